"""README.md: its size, links, generated numbers, and whether its commands run."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_models import call
from small_models import tiny_llama
from text_models import save_text_model

import fhopt

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MAX_LINES, MAX_BYTES = 150, 9216  # three minutes of reading
BLOCK = re.compile(r"<!-- figures: \w+ -->\n.*?<!-- end -->", flags=re.S)
CODE = re.compile(r"^```.*?^```$|^ {4}.*$", flags=re.S | re.M)
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = {
    "fit": ("--sequences", "2", "--rate-sequences", "2"),
    "generate": ("--max-new-tokens", "8"),
    "bench": ("--contexts", "512", "--decode", "8", "--rounds", "1"),
}  # options that shorten the commands on a small model


def figures() -> Any:
    """docs/readme_figures.py."""
    return importlib.import_module("readme_figures")


def program() -> str:
    (found,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.S | re.M)
    return str(found)


def shown_output() -> str:
    (found,) = re.findall(r"^```python\n.*?^```$\n\n```text\n(.*?)^```$", README.read_text(), flags=re.S | re.M)
    return str(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"), model=tiny_llama(max_position_embeddings=2048))


def test_it_can_be_read_in_three_minutes() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_LINES and len(text.encode()) <= MAX_BYTES
    assert len(program().splitlines()) <= 12


def test_links_and_pictures_work_wherever_it_is_shown() -> None:
    targets = re.findall(r"\]\(([^)\s]+)", README.read_text())
    assert [target for target in targets if not target.startswith("https://")] == []


def test_pages_that_it_names_exist() -> None:
    named = re.findall(r"(?<![\w/.-])((?:docs|benchmarks)/[\w/.-]*\w|[A-Z]+\.md)", README.read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


# --------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_the_files() -> None:
    text = README.read_text()
    assert set(re.findall(r"<!-- figures: (\w+) -->", text)) == set(figures().BLOCKS)
    assert figures().filled(text) == text, "run: python docs/readme_figures.py"


def test_no_measured_number_is_typed_by_hand() -> None:
    typed = CODE.sub("", BLOCK.sub("", README.read_text()))
    assert re.findall(r"\d+\.\d+x|[\d.]+ (?:%|ms|MiB|GB/s|nats)", typed) == []


def test_other_numbers_in_the_files_are_other_numbers_in_the_text(tmp_path: Path) -> None:
    quality = figures().QUALITY
    for name in (quality, "decode", "peers", "memory", "zoo"):
        shutil.copy(ROOT / "benchmarks" / "results" / f"{name}.json", tmp_path)
    content = json.loads((tmp_path / f"{quality}.json").read_text())
    for row in content["rows"]:
        if row["impl"] == "fhopt" and row["case"].endswith("@4x") and row["metric"] == "perplexity_increase_percent":
            row["value"] = 12.5
    content["rows"] += [
        {"case": "license@4.2x", "impl": "newest-3.5bit", "metric": metric, "value": 0.5, "unit": ""}
        for metric in ("perplexity_increase_percent", "kl")
    ]
    (tmp_path / f"{quality}.json").write_text(json.dumps(content))
    peers = json.loads((tmp_path / "peers.json").read_text())
    for model, impl, value in (
        ("SmolLM2-135M-Instruct", "fhopt 4x", 6543.0), ("SmolLM2-135M-Instruct", "llama.cpp F16, K/V f16", 7654.0),
        ("SmolLM2-135M-Instruct", "llama.cpp Q4_0, K/V f16", 8765.0), ("another", "fhopt 4x", 9876.0),
    ):  # fmt: skip
        row = {"case": f"{model}/8000/1/AVX512", "impl": impl, "metric": "decode_tokens_per_second", "value": value}
        peers["rows"].append(row | {"unit": "1/s"})
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    changed = figures().filled(README.read_text(), tmp_path)
    assert "changes by +12.50 % (worst text +12.50 %)" in changed
    assert all((str(value) in changed) == shown for value, shown in ((6543, 1), (7654, 1), (8765, 0), (9876, 0)))
    assert "| newest, 3.5 bits | 4.2x | +0.50 % | +0.50 % | 0.5000 |" in changed
    assert re.search(r"^[ .\d]+\|.*\+", figures().chart(tmp_path), flags=re.M) and "+ others" in changed


# --------------------------------------------------------------------------------------------------- commands


def test_the_program_runs_on_a_small_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fhopt, "fit", functools.partial(fhopt.fit, sequences=2, rate_sequences=2))
    assert NAME in program()
    exec(compile(program().replace(NAME, str(folder)), "README.md", "exec"), {"__name__": "readme"})
    assert re.fullmatch(r"[4-9]\.\d\dx smaller: .*\n", capsys.readouterr().out, flags=re.S)


@pytest.mark.slow
def test_the_program_prints_the_shown_output_on_the_demo_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    from fhopt.models.loader import load_model

    loaded = load_model("demo")
    for kind, part in (("AutoModelForCausalLM", loaded.module), ("AutoTokenizer", loaded.tokenizer)):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda _, part=part: part)
    exec(compile(program(), "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == shown_output()


def test_the_commands_run_on_a_small_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^ {4}fhopt (.*)$", README.read_text(), flags=re.M)
    commands = [shlex.split(line) for line in lines]
    assert [words[0] for words in commands] == list(SMALL)
    for name, *words in commands:
        arguments = [str(folder) if word == "demo" else word for word in words]
        result = call(name, *arguments, *SMALL[name])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "plan" / "plan.json").is_file()
