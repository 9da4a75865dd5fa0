"""The pages of docs/: programs run, commands exist, generated pages match the current code and results."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import torch
from click.testing import CliRunner
from gguf_models import save_text_gguf
from needs import needs_compiler
from PIL import Image
from small_models import tiny_llama
from text_models import save_text_model

import fhopt
from fhopt.calibration.options import FitOptions
from fhopt.cli.app import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
OWN_MODEL = DOCS / "tutorials" / "own_model.md"  # its programs need the output of its commands: a separate test
TUTORIALS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in ("any_module", "encoder") else [])
    for path in sorted((DOCS / "tutorials").glob("*.md"))
    if path != OWN_MODEL
] + [pytest.param(DOCS / name, id=Path(name).stem) for name in ("howto/reuse_a_prompt.md", "rewriting.md")]
# programs that compile graphs are slow
SHORT = {
    "inspect": (),
    "fit": ("--sequences", "2", "--rate-sequences", "2"),
    "generate": ("--max-new-tokens", "4"),
    "chat": ("--max-new-tokens", "4"),
    "eval": ("--context", "512"),
    "bench": ("--contexts", "512", "--decode", "8", "--rounds", "1"),
    "rewrite": ("--no-measure",),
}  # options that shorten the tutorial's commands on a small model
SPOKEN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + PAGES
TYPED = {"0.32", "1.25", "100 of 105", "2404.06654"}  # of vLLM, of a comparison, a count without a file, arXiv
SVG_TEXT = "{http://www.w3.org/2000/svg}text"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def script(name: str) -> Any:
    """Import a module of docs/, which is not a package."""
    return type("Script", (), runpy.run_path(str(DOCS / f"{name}.py")))


def programs(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS)
def test_the_programs_of_a_tutorial_run_in_sequence(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"__name__": "tutorial"}
    assert programs(page)
    for number, program in enumerate(programs(page), 1):
        exec(compile(program, f"{page.name}, program {number}", "exec"), known)


def type_commands(page: Path, model: str) -> None:
    """Run the commands of a page in sequence, on another model than `my-model`."""
    lines = re.findall(r"^ {4}(fhopt .*)$", page.read_text(), flags=re.M)
    assert lines
    for line in lines:
        _, name, *words = shlex.split(line)
        arguments = [model if word == "my-model" else word for word in words]
        result = CliRunner().invoke(main, [name, *arguments, *SHORT[name]], input="hello\n/quit\n")
        assert result.exit_code == 0, f"{line}: {result.output}"


@pytest.mark.usefixtures("without_compiling")
def test_commands_and_program_of_the_first_tutorial_run_on_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_text_model(tmp_path / "my-model", model=tiny_llama(max_position_embeddings=2048))
    type_commands(OWN_MODEL, "my-model")
    (program,) = programs(OWN_MODEL)
    exec(compile(program, OWN_MODEL.name, "exec"), {"__name__": "tutorial"})
    assert fhopt.load("latent-model") is not None


@pytest.mark.slow
@pytest.mark.usefixtures("without_compiling")
def test_commands_of_the_first_tutorial_run_on_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_text_gguf(tmp_path / "my-model.gguf")
    type_commands(OWN_MODEL, "my-model.gguf")


@pytest.mark.parametrize("page", SPOKEN, ids=name_of)
def test_every_program_of_a_page_is_python(page: Path) -> None:
    for program in programs(page):
        ast.parse(program)


# --------------------------------------------------------------------------------------------------- generated pages


@pytest.mark.parametrize("name", ["errors.md", "not_rewritten.md"])
def test_the_page_of_messages_matches_the_code(name: str) -> None:
    page = script("error_catalogue").PAGES[name]()
    assert (DOCS / "reference" / name).read_text() == page, "run: python docs/error_catalogue.py"


def test_every_message_has_a_fix() -> None:
    catalogue = script("error_catalogue")
    found = [m.text for m in catalogue.messages()]
    assert [text for text in found if not catalogue.split(text)[1]] == []
    assert len(found) > 200


@pytest.mark.parametrize("what", ["ERROR", "REASON"])
def test_every_message_has_its_own_family(what: str) -> None:
    catalogue = script("error_catalogue")
    families = catalogue.FAMILIES if what == "ERROR" else catalogue.REASONS
    groups = catalogue.grouped(catalogue.messages(getattr(catalogue, what)), families)
    others = [sorted({m.module for m in found}) for family, found in groups.items() if family.title == "Others"]
    assert others == [], "name these modules in a family of docs/error_catalogue.py"


def test_values_in_a_message_become_names() -> None:
    catalogue = script("error_catalogue")
    text = 'raise FhoptError(f"{path} has {len(rows)} rows of {x.shape}; " f"expected {\', \'.join(NAMES)}. Cut it.")'
    call = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call))
    said = "".join(catalogue._words(call.args[0]))
    assert said == "⟨path⟩ has ⟨number of rows⟩ rows of ⟨shape⟩; expected ⟨names⟩. Cut it."
    assert catalogue.split(said) == ("⟨path⟩ has ⟨number of rows⟩ rows of ⟨shape⟩", "Expected ⟨names⟩. Cut it.")


def test_the_pages_of_results_match_the_files() -> None:
    program = script("results_page")
    made = program.pages()
    for name, text in made.items():
        assert (DOCS / name).read_text() == text, f"{name}: run: python docs/results_page.py"
    assert program.outdated(made) == [], "run: python docs/results_page.py"


def test_results_of_an_unknown_benchmark_are_shown(tmp_path: Path) -> None:
    row = '{"case": "a", "impl": "b", "metric": "time_ms", "value": 1.5, "unit": "ms", "baseline": 3.0, "ratio": 2.0}'
    (tmp_path / "new.json").write_text(
        '{"machine": {"cpu": "C", "cpu_capability": "AVX2", "cores": 2, "threads": 1, "gpu": null}, '
        f'"versions": {{"torch": "2"}}, "commit": "abc-dirty", "rows": [{row}]}}'
    )
    page = script("results_page").pages(tmp_path)["results/others.md"]
    assert "| a, b | 1.5 (2.00x) |" in page and "commit abc with changes" in page


def test_means_are_over_held_out_texts_and_files_have_every_text() -> None:
    tables = script("quality_tables")
    values = {"topics": 900.0, "law": 0.0, "license": 21.0}
    rows = [
        {"case": f"{text}@4x", "impl": "fhopt", "metric": metric, "value": value}
        for text, value in values.items()
        for metric in (tables.RISE, "kl")
    ]
    results = tables.Results("quality", {}, {}, "abc", tuple(rows))
    (found,) = tables.caches(results)
    assert (found.texts, round(found.rise, 6), found.worst_rise, found.kl) == (2, 10.0, 21.0, 10.5)
    assert tables.as_csv(results).splitlines()[-1] == "fhopt,4,topics,900.0,,,900.0"


def test_no_more_attentions_are_found_than_there_are() -> None:
    """A class may have sites beyond the attentions that the benchmark counts; they do not make up for missed ones."""
    tables = script("results_tables")
    row = {"family": "text", "baseline": 2, "status": "found", "metric": "attentions_found"}
    shown = tables.zoo_wide(tables.Results("zoo_wide", {}, {}, "abc", (row | {"value": 3}, row | {"value": 1})))
    assert shown.splitlines()[-1] == "| text | 2 | 4 | 3 | 0 | 0 | 0 |"


def test_the_page_of_the_zoo_has_the_counts_of_its_file() -> None:
    tables = script("results_tables")
    results = tables.Results.read(tables.RESULTS / "zoo.json")
    expected, found, others = (
        f"{sum(row['value'] for row in results.of(f'sites_{what}')):.0f}" for what in ("expected", "found", "explained")
    )
    said = re.search(r"(\d+)/(\d+) attentions found, (\d+) others", (DOCS / "results" / "zoo.md").read_text())
    assert said is not None and said.groups() == (found, expected, others)


def test_measured_numbers_of_a_page_are_those_of_the_files() -> None:
    figures = script("page_figures")
    used: set[str] = set()
    for name in figures.PAGES:
        text = (DOCS / name).read_text()
        used |= set(re.findall(r"<!-- figures: (\w+) -->", text))
        assert figures.filled(text) == text, f"{name}: run: python docs/page_figures.py"
    assert used == set(figures.BLOCKS)


@pytest.mark.parametrize("name", ["measurements.md", "explanation/finding.md", "howto/choose_bytes.md"])
def test_no_measured_number_is_typed_by_hand(name: str) -> None:
    text = re.sub(r"<!-- figures: \w+ -->\n.*?<!-- end -->", "", (DOCS / name).read_text(), flags=re.S)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.M)
    found = re.findall(r"\b\d+\.\d+e-\d+|\d+\.\d\d+|\d+\.\d+x|[\d,.]+ (?:ms|MiB|GB/s|tok/s|nats)|\d+ of \d+", text)
    assert [number for number in found if number not in TYPED] == []


def test_percentages_in_the_text_are_the_measured_ones() -> None:
    measured = (DOCS / "results" / "quality.md").read_text()
    for name in ("comparison.md", "howto/heal.md", "howto/choose_bytes.md"):
        said = re.findall(r"[+-]\d+\.\d\d(?= ?%)", (DOCS / name).read_text())
        assert [figure for figure in said if figure not in measured] == [], name


def test_drawings_match_their_script(tmp_path: Path) -> None:
    drawings = script("drawings").drawings()
    assert {p.name for p in (DOCS / "pictures").glob("*.svg")} == drawings.keys()
    for name, text in drawings.items():
        kept = (DOCS / "pictures" / name).read_text()
        assert labels(text) == labels(kept), f"{name}: run: python docs/drawings.py"


@needs_compiler
def test_the_shown_decode_program_has_the_instructions_of_today() -> None:
    def segment(text: str) -> list[list[str]]:
        part = text.partition("segment 1: ")[2].partition("\n\n")[0]
        return re.findall(r"^ {4} *(\d+) (\w+) +(\[.*?\])", part, re.M)

    kept, now = (DOCS / "explanation" / "decode_step.txt").read_text(), script("decode_dump").dump()
    assert segment(kept) == segment(now) != [], "run: python docs/decode_dump.py"


def test_the_picture_of_a_cache_shows_the_default_sinks_window_and_blocks() -> None:
    options = FitOptions()
    recent, block = options.recent_tokens, options.block
    shown = labels((DOCS / "pictures" / "cache.svg").read_text())
    assert f"first {options.sinks}, exact" in shown
    assert f"packed latents, blocks of {block}" in shown
    assert f"newest {recent} to {recent + block}, {options.window_bits} bits" in shown


def test_the_picture_of_water_filling_gives_bits_to_channels_above_the_level_only() -> None:
    power = torch.logspace(0, -4, 50)
    bits = script("drawings").filled_bits(power, 0.002)
    assert torch.equal(bits > 0, power > 0.002)


@pytest.mark.parametrize("picture", sorted((DOCS / "pictures").glob("*.png")), ids=lambda path: path.stem)
def test_a_screenshot_is_not_older_than_the_page(picture: Path) -> None:
    with Image.open(picture) as image:
        stamp = image.info.get("Source")
    assert stamp == script("screenshots").ui_hash(), "run: python docs/screenshots.py --plan demo/plan"
    assert picture.stat().st_size < 100_000


def labels(svg: str) -> list[str]:
    """Return the labels of a picture; their positions depend on fonts and versions."""
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE.*?>", "", svg, flags=re.S))
    return sorted("".join(node.itertext()) for node in root.iter(SVG_TEXT))


# --------------------------------------------------------------------------------------------------- references


def command_lines(page: Path) -> list[str]:
    """Return the `fhopt` calls in code blocks and in backticks."""
    text = page.read_text()
    quoted = re.findall(r"`(fhopt [a-z][^`]*)`", text)
    return [*re.findall(r"^ {4}(fhopt [a-z].*)$", text, flags=re.M), *(" ".join(q.split()) for q in quoted)]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that words name, and the words after it."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", SPOKEN, ids=name_of)
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    for line in command_lines(page):
        line = re.split(r"\s{3,}|\s#|\s\.\.\.", line)[0]
        for name in line.split()[1].split("|"):
            command, words = command_of([name, *line.split()[2:]])
            assert command is not main, f"{line}: there is no such command"
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            given = {word.split("=")[0].rstrip(",.;:)") for word in words if re.match(r"-{1,2}[a-z]", word)}
            assert given <= known | {"--help", "--json"}, f"{line}: {given - known}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_names_on_a_page_exist(page: Path) -> None:
    for name in set(re.findall(r"`(fhopt(?:\.\w+)+)", page.read_text())):
        assert resolved(name) is not None, name


def resolved(name: str) -> Any:
    """Import the module, or return its attribute of that name; None if there is neither."""
    found: Any = fhopt
    for at, part in enumerate(parts := name.split(".")[1:], 1):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(["fhopt", *parts[:at]]))
            except ModuleNotFoundError:
                return None
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", SPOKEN, ids=name_of)
def test_files_named_on_a_page_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`((?:fhopt|passes|codegen|tests|examples|benchmarks|docs)/[\w/.-]+\.\w+)`", text)
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [n for n in named if not (ROOT / n).exists() and not n.startswith("benchmarks/results/")]
    missing += [t for t in targets if not (page.parent / t).exists()]
    assert missing == []


def test_every_target_named_on_a_page_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page in SPOKEN:
        named = set(re.findall(r"(?:`|^ {4}|=1 )make ([a-z-]+)", page.read_text(), flags=re.M))
        assert named <= targets, f"{page.name}: {named - targets}"


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "python.md").read_text()
    assert [n for n in fhopt.__all__ if n != "__version__" and f":: fhopt.{n}\n" not in text] == []


def test_every_module_is_on_the_page_of_its_package() -> None:
    for package in sorted(p for p in (ROOT / "fhopt").iterdir() if (p / "__init__.py").is_file() and p.name != "cli"):
        page = (DOCS / "reference" / "modules" / f"{package.name}.md").read_text()
        for path in package.resolve().rglob("*.py"):
            parts = path.relative_to(package.resolve()).with_suffix("").parts
            name = ".".join(["fhopt", package.name, *parts]).removesuffix(".__init__")
            is_run = parts[-1] in ("__main__", "compile_worker", "model_explorer_extension")  # run by other programs
            assert is_run or parts[-1] == "__init__" or f".. automodule:: {name}\n" in page, name


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tutorials" / "language_model.html").exists()
