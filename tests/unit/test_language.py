"""Docstrings and comments use field terms: phrases that a reader of vLLM or torchao would not use are banned."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import language_report
import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fhopt", "passes", "codegen", "benchmarks", "tests", "docs")
PHRASES = language_report.phrases(language_report.BANNED)


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring and of every run of comments, without names in backticks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield node.body[0].lineno, _plain(text)
    start, run = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if start + len(run) != token.start[0]:
                yield start, _plain(" ".join(run))
                start, run = token.start[0], []
            run.append(token.string.lstrip("# "))
    yield start, _plain(" ".join(run))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"`[^`]*`", "``", text).split())


def files(folder: str) -> list[Path]:
    """Return the Python files of a folder, for docs only the top-level ones, without links to other packages."""
    found = (ROOT / folder).glob("*.py" if folder == "docs" else "**/*.py")
    return sorted(path for path in found if path.resolve() == path)


def hits(source: str) -> list[str]:
    """Return "line: phrase" for every banned phrase."""
    return [f"{line}: {match[0]!r}" for line, text in texts(source) for match in PHRASES.finditer(text)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_and_comments_use_field_terms(folder: str) -> None:
    found = {str(path.relative_to(ROOT)): lines for path in files(folder) if (lines := hits(path.read_text()))}
    assert found == {}, "replace these phrases, see BANNED in docs/language_report.py"


def test_phrases_are_found_in_docstrings_and_comments_only() -> None:
    source = (
        '"""Measure 4 tokens\na second."""\n'
        'x = "in place of"  # a step behind 512 tokens\n'
        "# done\n"
        "# anew\n\n\n"
        "def f():\n"
        '    """Return `told` of a dealer: Alike."""\n'
    )
    assert hits(source) == ["1: 'tokens a second'", "9: 'Alike'", "3: 'behind 512'", "3: 'anew'"]


@pytest.mark.parametrize(
    "text",
    [
        "behind a flag",
        "is None",
        "if there is none",
        "look-alike",
        "the holder",
        "a cured_model",
        "whose baselines",
        "concealed",
    ],
)
def test_words_that_contain_a_phrase_are_allowed(text: str) -> None:
    assert hits(f"# {text}\n") == []


# --------------------------------------------------------------------------------------------------- texts for users


@pytest.fixture(scope="module")
def user_texts() -> list[language_report.Text]:
    return language_report.texts()


@pytest.fixture(scope="module")
def findings(user_texts: list[language_report.Text]) -> dict[str, list[str]]:
    """What the style guide forbids in each text for users, without texts that have none."""
    return {text.name: found for text in user_texts if (found := list(text.findings()))}


def test_texts_for_users_follow_the_style_guide(findings: dict[str, list[str]]) -> None:
    assert findings == {}, "rewrite these; all findings of a text: python docs/language_report.py NAME"


def test_every_kind_of_text_is_checked(user_texts: list[language_report.Text]) -> None:
    names = {text.name for text in user_texts if text.lengths}
    assert {"README.md", "docs/limits.md", "fhopt fit --help", "fhopt plans fit --help", "fhopt/files.py"} <= names


def test_prose_is_paragraphs_and_list_items() -> None:
    table, code, comment = "| seven |\n|---|\n| told |", "    nine", "<!-- ten -->"
    page = "\n\n".join(["# One", "Two `a b. c` 3.\nFour!", "- Five [six](x.md)", table, code, comment])
    text = language_report.read("page.md", page)
    assert text.sentences == ["Two `a_b_c` 3.", "Four!", "Five six"]
    assert text.lengths == [3, 1, 2]
    assert text.number_density == pytest.approx(100 / 6)
    assert list(text.findings()) == ["phrase: 'told'"]


@pytest.mark.parametrize(
    ("block", "sentences"),
    [
        ("It ends. It begins", ["It ends.", "It begins"]),
        ("Use 3.5 bits, e.g. KIVI.", ["Use 3.5 bits, e.g. KIVI."]),
        ("Is it? (Yes.) `fhopt` does.", ["Is it?", "(Yes.)", "`fhopt` does."]),
        ("a.txt is one. so is b", ["a.txt is one. so is b"]),
    ],
)
def test_blocks_are_split_into_sentences(block: str, sentences: list[str]) -> None:
    assert list(language_report.split(block)) == sentences


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        (("word " * 41,), "41 words"),
        (("word " * 21,) * 5, "mean of 21.0 words"),
        (("It rises by 0.21 % there.",), "'0.21 %'"),
        (("The exact KV cache is 3.97x less.",), "'exact KV cache'"),
    ],
)
def test_a_text_has_findings(blocks: tuple[str, ...], found: str) -> None:
    assert found in "".join(language_report.Text("page.md", blocks).findings())


def test_a_plain_text_has_no_findings() -> None:
    blocks = ("word " * 40, "It rises by 0.21%, see `told`.", *("word " * 18,) * 3)
    assert list(language_report.Text("page.md", blocks).findings()) == []
