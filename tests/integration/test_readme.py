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
from fhopt.models.loader import load_model

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MAX_LINES, MAX_BYTES = 150, 9600  # three minutes of reading
BLOCK = re.compile(r"<!-- figures: \w+ -->\n.*?<!-- end -->", flags=re.S)
CODE = re.compile(r"^```.*?^```$|^ {4}[^\n]*$", flags=re.S | re.M)
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
    return re.findall(r"^# (.*\n)", program(), flags=re.M)[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"), model=tiny_llama(max_position_embeddings=2048))


def test_it_can_be_read_in_three_minutes() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_LINES and len(text.encode()) <= MAX_BYTES
    assert len(program().splitlines()) <= 12


def test_links_lead_to_files_and_headings() -> None:
    text = README.read_text()
    targets = [t for t in re.findall(r'(?:\]\(|src=")([^)"\s]+)', text) if not t.startswith("https://")]
    assert len(targets) > 20
    assert [target for target in targets if not leads_somewhere(target)] == []


def leads_somewhere(target: str) -> bool:
    """Return whether a relative link of the README names a file, and a heading of it."""
    name, _, anchor = target.partition("#")
    path = ROOT / name if name else README
    if not anchor:
        return path.exists()
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("target", ["docs/none.md", "#none", "docs/limits.md#none"])
def test_a_broken_link_leads_nowhere(target: str) -> None:
    assert not leads_somewhere(target)


def test_a_release_has_absolute_links() -> None:
    text = '[a](docs/index.md#b) ![c](d.png) [e](#f) [g](https://h) <img src="i.svg">'
    expected = (
        "[a](https://x/y/blob/main/docs/index.md#b) ![c](https://x/y/raw/main/d.png) [e](#f) [g](https://h) "
        '<img src="https://x/y/raw/main/i.svg">'
    )
    assert figures().absolute(text, "https://x/y/") == expected


def test_the_package_is_described_in_the_same_words() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (described,) = re.findall(r'^description = "(.*)"$', project, flags=re.M)
    title = README.read_text().splitlines()[0].removeprefix("# fhopt: ")
    assert described.startswith(f"{title}: ")


# --------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_the_files() -> None:
    text = README.read_text()
    assert set(re.findall(r"<!-- figures: (\w+) -->", text)) == set(figures().BLOCKS)
    assert figures().filled(text) == text, "run: python docs/readme_figures.py"


def test_no_measured_number_is_typed_by_hand() -> None:
    typed = CODE.sub("", BLOCK.sub("", README.read_text()))
    assert re.findall(r"\d+\.\d+x|[\d.]+ ?(?:%|ms|MiB|GB/s|nats|tok/s)|\d of \d", typed) == ["25%"]


def test_other_numbers_in_the_files_are_other_numbers_in_the_text(tmp_path: Path) -> None:
    quality = figures().QUALITY
    for name in (quality, "decode", "peers", "memory", "zoo", "zoo_wide", "tasks"):
        shutil.copy(ROOT / "benchmarks" / "results" / f"{name}.json", tmp_path)
    content = json.loads((tmp_path / f"{quality}.json").read_text())
    for row in content["rows"]:
        if row["impl"] == "fhopt" and row["case"].endswith("@4x") and row["metric"] == "perplexity_increase_percent":
            row["value"] = 12.5
    content["rows"] += [
        {"case": "license@4.2x", "impl": "newest-3.5bit", "metric": metric, "value": 0.00125, "unit": ""}
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
    assert "| +12.50% (+12.50%) |" in changed
    assert all((f"{value:,}" in changed) == shown for value, shown in ((6543, 1), (7654, 1), (8765, 0), (9876, 0)))
    assert "| 7,654 (llama.cpp) | 6,543 (0.85x) |" in changed
    assert "| newest, 3.5 bits | 4.2x | +0.00% | +0.00% | 0.0013 |" in changed


# --------------------------------------------------------------------------------------------------- commands


def test_the_program_runs_on_a_small_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fhopt, "fit", functools.partial(fhopt.fit, sequences=2, rate_sequences=2))
    monkeypatch.setattr("fhopt.hf.load.load_model", lambda name, dtype: load_model(str(folder), dtype))
    exec(compile(program(), "README.md", "exec"), {"__name__": "readme"})
    assert re.fullmatch(r"[4-9]\.\d\dx smaller: .*\n", capsys.readouterr().out, flags=re.S)


@pytest.mark.slow
def test_the_program_prints_the_shown_output_on_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
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
