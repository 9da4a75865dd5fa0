"""A language-model head that reads few of its rows: found, coded, saved, and put into a model.

    loaded = load_model("demo")
    head = fit(loaded, HeadOptions())               find the head, see hidden states, code its rows
    head.save("head"); head = Head.load("head")
    apply(loaded.module, head)                      generate() as before; the largest logits are certain
    report(loaded.module)                           rows by certificate, rows by the dense head, bytes
    unapply(loaded.module)

The dense head reads every row of the weight for every token. This one reads codes of all rows, some 4 bits a number,
which give a bound of every logit, and then the exact rows whose bounds reach the largest exact logit (Cauchy-Schwarz;
codegen/cpu/lm_head.py has the equations, fhopt/lm_head/quantize.py the basis that makes the bounds tight). The largest
logits are found for certain, whatever the hidden state is; one whose bounds exclude too little goes to the dense head,
and is counted. With `probes`, only codes of the clusters that come first are read: fewer bytes and no certificate.

Vocabularies as inner-product indices: maximum inner-product search with bounds (Ram & Gray 2012, arXiv 1202.6101);
retrieval heads: FlashHead (arXiv 2603.14591).

Letters: M hidden states, C their width, R width of the basis, V vocabulary, K clusters.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.cpu.lm_head import BLOCK, NUMBERS, Codes, Search, block_bytes
from fhopt.errors import FhoptError
from fhopt.files import digest, write_folder
from fhopt.passes.recognize.find_lm_head import HeadSite

VERSION = 2
FILES = ("head.json", "head.safetensors")
TENSORS = ("codes", "transform", "centre", "centroids", "radii")  # of `Codes`
_NUMBERS = ("rank", "lead", "vocabulary", "transform_norm", "largest")


@dataclass(frozen=True)
class Head:
    """The codes of one head, and what they belong to.

    site: where the head is in its model. dtype: of the weight that was coded. fingerprint: of that weight and bias.
    probes, spread: clusters to look at when no certificate is wanted, and how they are ranked. about: what the codes
    were fitted on and what was measured then.
    """

    site: HeadSite
    codes: Codes
    dtype: str
    fingerprint: str
    probes: int
    spread: float
    about: dict[str, Any]

    @property
    def clusters(self) -> int:
        """K."""
        return int(self.codes.centroids.shape[0])

    @property
    def bytes_read(self) -> int:
        """By a hidden state, or up to 8 at once: codes of all rows and the basis, exact rows not counted."""
        basis = self.codes.transform.numel() * 2 if self.codes.transform is not None else 0
        return self.codes.codes.numel() + basis

    @property
    def dense_bytes(self) -> int:
        """Of the weight."""
        return self.site.vocabulary * self.site.width * getattr(torch, self.dtype).itemsize

    def search(self, **options: Any) -> Search:
        """A `Search` in this head; `probes=-1`: as many as were fitted."""
        wanted = Search(spread=self.spread, softcap=self.site.softcap / self.site.scale, **options)
        return replace(wanted, probes=self.probes) if wanted.probes < 0 else wanted

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the folder `path`, whole or not at all. Raises FhoptError."""
        from safetensors.torch import save

        tensors = {name: getattr(self.codes, name) for name in TENSORS if getattr(self.codes, name) is not None}
        content = {
            "version": VERSION,
            "site": asdict(self.site),
            "codes": {name: getattr(self.codes, name) for name in _NUMBERS},
            "dtype": self.dtype,
            "fingerprint": self.fingerprint,
            "probes": self.probes,
            "spread": self.spread,
            "about": self.about,
        }
        content = {**content, "digest": digest(content, tensors)}
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()
        write_folder(Path(path), {"head.json": text, "head.safetensors": save(tensors)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Head:
        """Read what `save` wrote. Raises FhoptError when it is no head, damaged, or of another version."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(path)
        try:
            content = json.loads((folder / "head.json").read_text())
            tensors = load_file(folder / "head.safetensors")
        except OSError as error:
            raise FhoptError(
                f"cannot read {folder}: {error.strerror or error}. Expected a folder of `fhopt head`."
            ) from error
        except (SafetensorError, ValueError, RecursionError) as error:
            raise FhoptError(f"{folder} is damaged ({error}). Make the head again with: fhopt head") from error
        if not isinstance(content, dict) or content.get("version") != VERSION:
            found = content.get("version") if isinstance(content, dict) else None
            raise FhoptError(f"{folder} has version {found}, expected {VERSION}. Make the head again with: fhopt head")
        try:
            if content.pop("digest", None) != digest(content, tensors):
                raise ValueError("its content is not what was written")
            return _checked(_made(content, tensors))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise FhoptError(f"{folder} is damaged ({error!r}). Make the head again with: fhopt head") from error


def _made(content: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
    parts: dict[str, Any] = {name: tensors.get(name) for name in TENSORS}
    return Head(
        HeadSite(**content["site"]),
        Codes(**parts, **content["codes"]),
        *(content[key] for key in ("dtype", "fingerprint", "probes", "spread", "about")),
    )


def _checked(head: Head) -> Head:
    """The head, when every size fits. Raises ValueError: machine code trusts them."""
    codes, site = head.codes, head.site
    count, blocks = codes.centroids.shape[0], codes.codes.shape[0]
    shapes = {
        "codes": (codes.codes, torch.uint8, (blocks, block_bytes(codes.rank, codes.lead))),
        "centre": (codes.centre, torch.float32, (site.width,)),
        "centroids": (codes.centroids, torch.bfloat16, (count, codes.rank)),
        "radii": (codes.radii, torch.float32, (count,)),
    }
    if codes.transform is not None:
        shapes["transform"] = (codes.transform, torch.bfloat16, (codes.rank, site.width))
    for name, (tensor, dtype, shape) in shapes.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    rows = codes.codes[:, -4 * BLOCK :].contiguous().view(torch.int32).flatten()
    if not torch.equal(rows[rows >= 0].sort().values, torch.arange(site.vocabulary, dtype=torch.int32)):
        raise ValueError("the blocks do not hold every row once")
    if blocks % count or codes.rank % 8 or codes.lead % 8 or not 0 <= codes.lead <= codes.rank:
        raise ValueError(f"{blocks} blocks, {count} clusters, rank {codes.rank}, lead {codes.lead}")
    if codes.vocabulary != site.vocabulary or codes.rank < site.width or not 1 <= head.probes <= count:
        raise ValueError(f"vocabulary {codes.vocabulary}, rank {codes.rank}, probes {head.probes}")
    numbers = codes.codes[:, -(4 + 2 * NUMBERS) * BLOCK : -4 * BLOCK].contiguous().view(torch.bfloat16)
    tensors = (numbers, codes.centre, codes.centroids, codes.radii, codes.transform)
    finite = all(bool(x.isfinite().all()) for x in tensors if x is not None)
    if not finite or not all(math.isfinite(x) and x >= 0 for x in (codes.transform_norm, codes.largest, head.spread)):
        raise ValueError("numbers that are not finite")  # a bound that is NaN excludes what it should not
    return head


def fingerprint(weight: Tensor, bias: Tensor | None) -> str:
    """Hash of every number of weight and bias: bounds hold for the weight that was coded and for no other."""
    h = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}{bias is not None}".encode())
    for part in (*weight.detach().split(4096), *([] if bias is None else [bias.detach()])):
        h.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return h.hexdigest()
