"""Fitted retrieval head as data, and its folder on disk.

    head.json            version, site, sizes, dtype, fingerprint of the weight, how it was fitted, digest
    head.safetensors     quantized values and bounds of all rows, basis, centre, centroids and radii of clusters

Dimensions: C width of the hidden states, R width of the basis, V vocabulary, K clusters.
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

from fhopt.codegen.cpu.lm_head import BLOCK, NUMBERS, Codes, Search, head_block_bytes
from fhopt.errors import FhoptError
from fhopt.files import check_tensor_file, digest, read_file, write_folder
from fhopt.lm_head.options import FILES
from fhopt.passes.recognize.find_lm_head import HeadSite

VERSION = 2
TENSORS = ("codes", "transform", "centre", "centroids", "radii")  # of `Codes`
_CURE = "Fit the head again with: fhopt head"
_NUMBERS = ("rank", "lead", "vocabulary", "transform_norm", "largest")


@dataclass(frozen=True)
class Head:
    """An LM head with quantized rows.

    site: where the head is in its model. codes: the quantized rows with their bounds. dtype, fingerprint: of the weight
    and bias that were quantized. probes, spread: how many clusters are loaded if no certificate is required, and how
    they are ranked. about: texts and measurements of the fit.
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
        """Number of clusters, K."""
        return int(self.codes.centroids.shape[0])

    @property
    def bytes_read(self) -> int:
        """Bytes loaded for one hidden state, or up to 8 at once: quantized rows and basis, without exact rows."""
        basis = self.codes.transform.numel() * 2 if self.codes.transform is not None else 0
        return self.codes.codes.numel() + basis

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight."""
        return self.site.vocabulary * self.site.width * getattr(torch, self.dtype).itemsize

    def search(self, **options: Any) -> Search:
        """Build the options of a search in this head; `probes=-1`: the fitted number of clusters."""
        search = Search(spread=self.spread, softcap=self.site.softcap / self.site.scale, **options)
        return replace(search, probes=self.probes) if search.probes < 0 else search

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the folder `path`, atomically. Raises FhoptError."""
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
        """Load a folder that `save` wrote. Raises FhoptError if it is not a head, damaged, or of another version."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(path)
        try:
            content = json.loads(read_file(folder / FILES[0], cure=_CURE))
            check_tensor_file(folder / FILES[1], _CURE)
            tensors = load_file(folder / FILES[1])
        except OSError as error:
            raise FhoptError(
                f"cannot read {folder}: {error.strerror or error}; expected a folder written by `fhopt head`. "
                "Check the path."
            ) from error
        except (SafetensorError, ValueError, RecursionError) as error:
            raise FhoptError(f"{folder} is damaged ({error}). {_CURE}") from error
        if not isinstance(content, dict) or content.get("version") != VERSION:
            version = content.get("version") if isinstance(content, dict) else None
            raise FhoptError(f"{folder} has version {version}; expected {VERSION}. {_CURE}")
        try:
            if content.pop("digest", None) != digest(content, tensors):
                raise ValueError("its digest does not match its content")
            return _checked(_from_content(content, tensors))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise FhoptError(f"{folder} is damaged ({error!r}). {_CURE}") from error


def _from_content(content: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
    parts: dict[str, Any] = {name: tensors.get(name) for name in TENSORS}
    return Head(
        HeadSite(**content["site"]),
        Codes(**parts, **content["codes"]),
        *(content[key] for key in ("dtype", "fingerprint", "probes", "spread", "about")),
    )


def _checked(head: Head) -> Head:
    """Return the head. Raises ValueError for inconsistent sizes or invalid values, which kernels do not check."""
    codes, site = head.codes, head.site
    count, blocks = codes.centroids.shape[0], codes.codes.shape[0]
    shapes = {
        "codes": (codes.codes, torch.uint8, (blocks, head_block_bytes(codes.rank, codes.lead))),
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
        raise ValueError("the blocks do not contain each row exactly once")
    if blocks % count or codes.rank % 8 or codes.lead % 8 or not 0 <= codes.lead <= codes.rank:
        raise ValueError(f"{blocks} blocks, {count} clusters, rank {codes.rank}, lead {codes.lead}")
    if codes.vocabulary != site.vocabulary or codes.rank < site.width or not 1 <= head.probes <= count:
        raise ValueError(f"vocabulary {codes.vocabulary}, rank {codes.rank}, probes {head.probes}")
    numbers = codes.codes[:, -(4 + 2 * NUMBERS) * BLOCK : -4 * BLOCK].contiguous().view(torch.bfloat16)
    tensors = (numbers, codes.centre, codes.centroids, codes.radii, codes.transform)
    finite = all(bool(x.isfinite().all()) for x in tensors if x is not None)
    if not finite or not all(math.isfinite(x) and x >= 0 for x in (codes.transform_norm, codes.largest, head.spread)):
        raise ValueError("non-finite values")  # a NaN bound would wrongly exclude rows
    return head


def head_fingerprint(weight: Tensor, bias: Tensor | None) -> str:
    """Hash all elements of weight and bias, since bounds hold only for the quantized weight."""
    h = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}{bias is not None}".encode())
    for part in (*weight.detach().split(4096), *([] if bias is None else [bias.detach()])):
        h.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return h.hexdigest()
