"""Every example runs and prints its documented output; those on the demo's model run on a small one here."""

from __future__ import annotations

import ast
import functools
import json
import re
import runpy
import string
import sys
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import characters
from needs import sampled
from small_models import tiny_llama
from text_models import TEMPLATE

import fhopt
from fhopt.backend import online_fit
from fhopt.models import loader
from fhopt.models.loaded_model import LoadedModel

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "compile_any_module": r"largest difference: \d(\.\d+)?(e-0[5-9])?\n",
    "cross_attention": r"encoder_attn: input, 128 numbers a token, now 6[0-4]\n(?s:.*)same tokens: True of 2[4-9]\n",
    "custom_kernel": r"58 bytes of codes a token instead of 224\nlargest difference \D+ \d\.\de-0[6-9]\n",
    "export_a_step": r"40 tokens, 24 of them quantized; largest difference of a logit \d\.\de-0[5-9]\n",
}
COMPILED = {
    "encoder_speed": r"fhopt, exact +\d+\.\d ms +least cosine with eager 1\.0000\n",
    "profile_guided": r"new sequences are cached as latents, 4\.\d+x smaller",
}
ON_THE_DEMO = {
    "fit_and_generate": r"2 sites, [4-9]\.\d+x smaller: ",
    "reuse_a_prompt": r"\d{4} tokens: read in \d+\.\d s, loaded in \d+\.\d+ s from \d+\.\d MB\n",
}


def output_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_has_few_lines() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() == SMALL.keys() | COMPILED.keys() | ON_THE_DEMO.keys()
    assert {name: lines for name, lines in lengths.items() if lines >= 60} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_an_example_prints_its_documented_output(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(name, capsys)
    assert re.search(SMALL[name], printed), printed


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_an_example_that_compiles_much_prints_its_output(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        printed = output_of(name, capsys)
    finally:
        online_fit.forget_fits()
    assert re.search(COMPILED[name], printed), printed


@pytest.mark.parametrize("name", sampled(ON_THE_DEMO, 2))
def test_an_example_on_the_demo_runs_on_a_small_model(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LoadedModel("small", tiny_llama(max_position_embeddings=4096), letters())
    monkeypatch.setattr(loader, "load_model", lambda name: model)
    printed = output_of(name, capsys)
    assert re.search(ON_THE_DEMO[name], printed), printed


def letters() -> Any:
    """A character-level tokenizer of printable letters, fewer than the small model's vocabulary."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: at for at, letter in enumerate(["[UNK]", *string.printable[:95]])}
    tokenizer = Tokenizer(kinds.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def code_cells(notebook: Path) -> list[str]:
    """Return the code of a notebook's cells."""
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs_on_a_small_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its cells run in sequence, and a notebook can display their results."""
    tokenizer = characters()
    tokenizer.chat_template = TEMPLATE
    model = LoadedModel("small", tiny_llama(max_position_embeddings=4096), tokenizer)
    monkeypatch.setattr(loader, "load_model", lambda name: model)
    monkeypatch.setattr(fhopt, "fit", functools.partial(fhopt.fit, sequences=2, rate_sequences=2))
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"__name__": "notebook"}
    values: list[Any] = []
    monkeypatch.setattr(sys, "displayhook", values.append)
    for number, cell in enumerate(code_cells(EXAMPLES / "quickstart.ipynb"), 1):
        exec(compile(ast.Interactive(ast.parse(cell).body), f"cell {number}", "single"), known)
    shown = {type(value).__name__: value._repr_html_() for value in values if hasattr(value, "_repr_html_")}
    assert shown.keys() == {"LatentPlan", "Drawing"} and all("<" in text for text in shown.values())
    assert re.fullmatch(r"exact: .*\nplan:  .*\n[4-9]\.\d\dx smaller at 8,192 tokens\n", capsys.readouterr().out)
    assert (tmp_path / "plan" / "plan.json").is_file()


def test_the_notebook_is_committed_without_outputs() -> None:
    content = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    codes = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in codes if cell["outputs"] or cell["execution_count"]] == []


def test_every_example_is_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    lengths["quickstart.ipynb"] = sum(len(cell.splitlines()) for cell in code_cells(EXAMPLES / "quickstart.ipynb"))
    assert {name: lines for name, lines in lengths.items() if lines >= 60} == {}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SMALL, *COMPILED, *ON_THE_DEMO}
