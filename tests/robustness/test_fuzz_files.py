"""Damaged files of every kind that fhopt loads: an error in one sentence, or the original contents; no traceback.

Files come from test_faults.py. A file is truncated, emptied or doubled, has bits flipped, or bytes inserted or
removed, at random places. What loads despite the damage must be bit-identical to the original.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from small_models import FittedModel
from written_files import WRITES, Write

from fhopt.codegen.gpu import configs, resources
from fhopt.errors import FhoptError
from fhopt.hardware import this_cpu
from fhopt.inspection import progress_file
from fhopt.lm_head.head import Head
from fhopt.models.loader import load_model
from fhopt.models.rewritten_folder import PLAN
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def turned(content: bytes, rng: random.Random) -> bytes:
    """Flip one bit, preferably near an end: headers and last elements."""
    size = len(content)
    at = min(
        size - 1,
        rng.choice([rng.randrange(size), rng.randrange(min(200, size)), size - 1 - rng.randrange(min(9, size))]),
    )
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def put_in(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice([1, 8, 4096])) + content[at:]


def taken_out(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.randint(1, 64) :]


def oversized(content: bytes, rng: random.Random) -> bytes:
    """Make the header length of a safetensors file, or the beginning of a text, enormous."""
    return (2 ** rng.choice([24, 40, 62])).to_bytes(8, "little") + content[8:]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": cut,
    "a bit turned": turned,
    "bytes put in": put_in,
    "bytes taken out": taken_out,
    "said twice": lambda content, rng: content + content,
    "emptied": lambda content, rng: b"",
    "zeros": lambda content, rng: bytes(len(content)),
    "oversized": oversized,
    "deep": lambda content, rng: b"[" * 100_000,
    "not text": lambda content, rng: b"\xff\xfe" + content,
}


# --------------------------------------------------------------------------------------------------- what is read


def numbers_of(folder: Path) -> tuple[str, str]:
    """Return digests of a rewritten model's plan and of all its weights."""
    model = load_model(str(folder)).module
    assert model is not None
    h = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        h.update(name.encode() + weight.numpy().tobytes())
    return LatentPlan.load(folder / PLAN).digest(), h.hexdigest()


def content_of(file: Path) -> Any:
    """Return the description and all tensor bytes of a safetensors file."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        described = {key: json.loads(text) for key, text in (opened.metadata() or {}).items()}
    flat = {name: x.reshape(-1).view(torch.uint8).numpy().tobytes() for name, x in tensors.items()}
    return described, flat, {name: (x.dtype, x.shape) for name, x in tensors.items()}


def head_of(folder: Path) -> Any:
    Head.load(folder)
    return json.loads((folder / "head.json").read_text()), content_of(folder / "head.safetensors")


# Contents of folders that affect results.
FOLDERS: dict[str, Callable[[Path], Any]] = {
    "plan": lambda folder: LatentPlan.load(folder).digest(),
    "rewritten model": numbers_of,
    "head": head_of,
}


@dataclass(frozen=True)
class Kept:
    """A written file or folder, and an undamaged copy of it."""

    kind: str
    write: Write
    whole: Path

    def read(self) -> Any:
        """Return all values in it. Raises FhoptError."""
        if self.kind in FOLDERS:
            return FOLDERS[self.kind](self.write.place)
        return self.write.read(), content_of(self.write.place)

    def lay(self) -> list[Path]:
        """Restore the undamaged copy; returns its files."""
        place = self.write.place
        if place.is_dir():
            shutil.rmtree(place)
        (shutil.copytree if self.whole.is_dir() else shutil.copyfile)(self.whole, place)
        return [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())


@pytest.fixture(scope="module", params=WRITES)
def kept(request: pytest.FixtureRequest, llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("damaged") / "out"
    folder.mkdir()
    write = WRITES[request.param](folder, llama)
    write.write(0)
    whole = folder.with_name("whole")
    (shutil.copytree if write.place.is_dir() else shutil.copyfile)(write.place, whole)
    return Kept(request.param, write, whole)


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_an_error_in_a_sentence_or_the_original(kept: Kept, data: st.DataObject) -> None:
    kept.lay()
    expected = kept.read()
    files = kept.lay()
    file = files[data.draw(st.integers(0, len(files) - 1), label="file")]
    how = data.draw(st.sampled_from([*DAMAGES]), label="damage")
    file.write_bytes(DAMAGES[how](file.read_bytes(), random.Random(data.draw(st.integers(0, 2**32)))))
    try:
        found = kept.read()
    except FhoptError as error:
        assert "\n" not in str(error) and ("xpected" in str(error) or ". " in str(error)), error
    else:
        assert found == expected, f"{how}: {file.name} was accepted"


# --------------------------------------------------------------------------------------------------- the cache folder


NOT_OURS = [
    b"",
    b"{",
    b"[" * 100_000,
    b"[1]",
    b"\xff\xfe",
    b'{"best": 3}',
    b'{"stages": 1}',
    b'{"stages": [{"x": 1}]}',
    b"null",
]


@pytest.mark.parametrize("content", NOT_OURS, ids=lambda content: repr(content[:12]))
def test_a_damaged_file_of_the_cache_folder_counts_as_absent(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path))
    anew: Any = object()
    monkeypatch.setattr(this_cpu, "measure_cpu", lambda threads: anew)
    this_cpu.measured.cache_clear()
    place = tmp_path / "any.json"
    monkeypatch.setattr(configs, "config_path", lambda *which: place)
    place.write_bytes(content)
    (tmp_path / f"machine-{this_cpu._digest(1)}.json").write_bytes(content)
    assert resources._kept("any.json") is None
    assert configs.read_config("decode", KernelSpec((), (), 8, 8, "float32", False), 1, "a GPU") is None
    assert this_cpu.measured(1) is anew
    assert progress_file.read_progress(place) is None
    this_cpu.measured.cache_clear()
