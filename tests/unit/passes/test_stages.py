"""Dumps of each pass in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiled_models import forward, with_backend
from small_models import FittedModel, token_ids


@pytest.mark.usefixtures("traced_only")
def test_each_pass_is_dumped_with_its_changes(
    llama: FittedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHOPT_DUMP", str(tmp_path))
    with torch.no_grad():
        forward(with_backend(llama.model, plan=llama.plan(4)), token_ids(1, 40))
    names = sorted(p.name for p in tmp_path.iterdir())
    finding = ["input", "decompose", "functionalize", "normalize", "find_attention"]
    stages = [*finding, "absorb_projection", "compress", "absorb", "lower"]
    assert names == [*(f"{i:02d}-{stage}.txt" for i, stage in enumerate(stages)), "certificates.txt"]
    assert (tmp_path / "certificates.txt").read_text().count("3 sets of random values") == 2
    compressed, absorbed = ((tmp_path / f"{n}.txt").read_text() for n in ("06-compress", "07-absorb"))
    assert compressed.startswith("# compress: 2 sites, 2 compressed")
    assert " = decode(" in compressed and " = decode(" not in absorbed
    assert " = absorb(" in absorbed and "fhopt.latent_attention.default(" in absorbed
