"""Saving and loading a head."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_heads import made, skewed, weights
from needs import needs_compiler

from fhopt.codegen.cpu.lm_head import search_head
from fhopt.errors import FhoptError
from fhopt.files import digest
from fhopt.lm_head.head import Head

pytestmark = needs_compiler


def test_a_saved_head_loads_unchanged(tmp_path: Path) -> None:
    weight, bias = weights("random", 97, 24), torch.randn(97)
    head = made(weight, skewed(50, 24), bias)
    back = Head.load(head.save(tmp_path / "head"))
    assert back.site == head.site and back.about == json.loads(json.dumps(head.about))
    assert (back.fingerprint, back.probes, back.spread, back.dtype) == (
        head.fingerprint, head.probes, head.spread, head.dtype,
    )  # fmt: skip
    hidden = torch.randn(3, 24)
    ours, theirs = (search_head(hidden, weight, bias, h.codes, h.search(logits=True)) for h in (head, back))
    assert ours.logits is not None and theirs.logits is not None
    assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.logits, theirs.logits)


def damage(folder: Path, change: Any, signed: bool) -> None:
    """Change a head; signed: as an attacker who can recompute its digest."""
    from safetensors.torch import load_file, save_file

    tensors, content = load_file(folder / "head.safetensors"), json.loads((folder / "head.json").read_text())
    change(tensors, content)
    if signed:
        content.pop("digest")
        content["digest"] = digest(content, tensors)
    save_file(tensors, folder / "head.safetensors")
    (folder / "head.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t, c: t.pop("codes"), "is damaged"),
        (lambda t, c: t.update(codes=t["codes"][:, :-1].contiguous()), "codes is torch.uint8"),
        (lambda t, c: t.update(codes=torch.zeros_like(t["codes"])), "do not contain each row exactly once"),
        (lambda t, c: t["codes"][:, -256:-64].fill_(255), "non-finite values"),
        (lambda t, c: t["transform"].fill_(math.nan), "non-finite values"),
        (lambda t, c: t.update(radii=t["radii"].double()), "radii is torch.float64"),
        (lambda t, c: c.update(version=9), "has version 9; expected 2"),
        (lambda t, c: c["codes"].update(lead=3), "is damaged"),
        (lambda t, c: c.update(probes=10**6), "probes 1000000"),
        (lambda t, c: c.pop("fingerprint"), "is damaged"),
    ],
)
def test_a_damaged_head_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    folder = made(weights("random", 97, 24), skewed(50, 24)).save(tmp_path / "head")
    damage(folder, change, signed=True)
    with pytest.raises(FhoptError, match=why):
        Head.load(folder)


def test_a_head_with_a_changed_value_is_refused(tmp_path: Path) -> None:
    folder = made(weights("random", 97, 24), skewed(50, 24)).save(tmp_path / "head")
    damage(folder, lambda t, c: t["centroids"][0, 0].add_(1), signed=False)
    with pytest.raises(FhoptError, match=r"its digest does not match its content.*Fit the head again"):
        Head.load(folder)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match="cannot read"):
        Head.load(tmp_path / "nothing")
    (tmp_path / "head.json").write_text("{")
    (tmp_path / "head.safetensors").write_text("")
    with pytest.raises(FhoptError, match="is damaged"):
        Head.load(tmp_path)
