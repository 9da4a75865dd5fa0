"""Rewritten folders: create, re-sign, and load or reject them."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.background import builder
from fhopt.export import rewrite_folder
from fhopt.models import rewritten_folder
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan import description
from fhopt.plan.latent_plan import LatentPlan

ROUNDING = 1e-5  # of the largest logit: weights at other addresses are summed in another order


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element."""
    return float((a - b).abs().max() / b.abs().max())


def written(out: Path, model: Any, plan: LatentPlan, **options: Any) -> rewrite_folder.Rewritten:
    return rewrite_folder.rewrite_folder(LoadedModel("small", model), plan, out, **options)


def generated(model: Any, ids: Tensor, tokens: int = 12) -> tuple[Tensor, Tensor]:
    out: Any = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits)


def sign(path: Path) -> None:
    """Recompute the digests of plan and files, as an attacker would."""
    digest = sign_plan(path / "plan")
    manifest = json.loads((path / "fhopt.json").read_text()) | {"plan": digest}
    sign_files(path, manifest)


def sign_plan(path: Path) -> str:
    """Recompute digest and checksum of a plan; returns the digest."""
    described = json.loads((path / "plan.json").read_text())
    tensors = (path / "plan.safetensors").read_bytes()
    digest = description.digest_of(described, tensors)
    signed = description.covered(described | {"digest": digest}, tensors)
    (path / "plan.json").write_text(json.dumps(signed))
    return digest


def sign_files(path: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = rewritten_folder.describe_files(path, [n for n in manifest["files"] if (path / n).is_file()])
    (path / "fhopt.json").write_text(json.dumps(manifest))


_watching = False
_ran: list[str] = []
_RUNS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen")


def _audit(event: str, args: Any) -> None:
    if _watching and event in _RUNS and threading.current_thread().name != "fhopt-build":
        _ran.append(event)


sys.addaudithook(_audit)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Require that the block reads no pickle, starts no process and opens no library; background builds are exempt."""
    global _watching
    builder.wait()  # kernels that other tests requested are compiled in this process
    _ran.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not _ran, _ran


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))
