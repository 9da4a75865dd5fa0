"""`fhopt head`: from a model to a folder with a retrieval head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from command_models import save_tiny_model
from needs import needs_compiler

from fhopt.cli.app import main
from fhopt.lm_head import apply_head, fit_head, head_report
from fhopt.lm_head.evaluate import measure_head
from fhopt.lm_head.head import Head
from fhopt.lm_head.options import FILES, HeadOptions
from fhopt.models.loader import load_model

SAMPLE = ("--sequences", "2", "--context", "64", "--held-out", "100", "--json")
pytestmark = needs_compiler


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_a_model_gets_a_working_head(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    result = call("head", str(tmp_path / "model"), *SAMPLE, "--clusters", "5", "-o", str(tmp_path / "head"))
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["site"]["weight"], printed["site"]["vocabulary"], printed["clusters"]) == ("lm_head.weight", 97, 5)
    measured = printed["measured"]
    assert measured["positions"] == 128 and measured["agreement_percent"] == 100
    assert measured["bytes_per_row"] > 0 and measured["dense_bytes_per_row"] == 97 * 64 * 4
    head, model = Head.load(tmp_path / "head"), load_model(str(tmp_path / "model")).language_model()
    ids = torch.randint(1, 40, (1, 9))
    with torch.no_grad():
        expected = model(ids).logits[:, -1].argmax(-1)
        assert torch.equal(apply_head(model, head)(ids, logits_to_keep=1).logits[:, -1].argmax(-1), expected)
    assert head_report(model).rows == 1


@pytest.mark.slow
def test_the_same_data_and_seed_give_the_same_head(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    for name in "ab":
        result = call("head", str(tmp_path / "model"), *SAMPLE, "-o", str(tmp_path / name))
        assert result.exit_code == 0, result.output
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_without_json_the_output_is_text(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    result = call("head", str(tmp_path / "model"), *SAMPLE[:-1], "-o", str(tmp_path / "head"))
    assert result.exit_code == 0, result.output
    assert "lm_head.weight: 97 x 64, float32" in result.output
    assert "100.00% equal to the dense head" in result.output


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    for arguments, why in (
        (("head", "demo", "--bits", "3", "-o", str(tmp_path / "head")), "bits '3' is invalid"),
        (("head", "demo", "--clusters", "0", "-o", str(tmp_path / "head")), "clusters is 0"),
        (("head", "demo", "-o", str(tmp_path / "full")), "is not a plan"),
        (("head", "command_models:encoder", "-o", str(tmp_path / "head")), "is not a causal language model"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2 and why in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_on_a_real_model_the_search_is_certain_and_loads_a_seventh() -> None:
    loaded = load_model("demo")
    head = fit_head(loaded, HeadOptions(sequences=6, iterations=3))
    found = measure_head(loaded, head, ("topics", "source"), 512, 256)
    assert found.agreement_percent == 100 and found.certified_percent > 98
    assert found.probed_agreement_percent > 99
    assert found.bytes_per_row < found.dense_bytes_per_row / 5
