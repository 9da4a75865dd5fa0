"""Docstrings and comments use field terms: phrases that a reader of vLLM or torchao would not use are banned."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fhopt", "passes", "codegen", "benchmarks", "tests", "docs")
_UNITS = r"(?:nats|bytes|tokens|ms|milliseconds|seconds|steps|cents)"
BANNED = {  # regular expression -> the term to use
    r"in place of": "instead of; versus",
    r"behind \d+": "at a context of N tokens",
    r"anew": "again; re-measured",
    r"so many": "N; a given number of",
    r"(?<!there )(?:is|are) (?-i:none)": "is not one; is empty",
    r"(?<!-)alike": "the same; likewise",
    r"half (?:as much )?again": "1.5x",
    r"nobody": "no caller",
    r"dear(?:er|est)?": "expensive; costly",
    r"hardly": "barely; rarely",
    r"cures?": "fix; workaround",
    r"rivals?": "baseline; other method",
    r"looked at": "checked; inspected",
    r"a list with commas": "comma-separated list",
    r"told": "reported; given",
    r"as (?:it|they) (?:comes?|came)": "unmodified; unquantized",
    r"stands? (?:for|in|beside|behind)": "represents; is in",
    r"left alone": "not rewritten; unchanged",
    r"sealed": "quantized",
    r"in the mean": "on average",
    r"some (?:ten|seconds|minutes|\d+)": "about N; a few",
    r"rehears(?:e|es|ed|als?)": "trace; dry run",
    r"products? of (?:few|more|many) rows": "skinny GEMM; GEMM",
    r"(?:latents|prompts?) (?:is|are) read": "attention runs on latents; prompts are prefilled",
    rf"{_UNITS} an? (?:token|second|step|hour|thread|layer)": "tokens/s; nats/token; per",
}
PHRASES = re.compile(rf"\b(?:{'|'.join(f'(?:{phrase})' for phrase in BANNED)})(?!\w)", re.IGNORECASE)


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
    assert found == {}, f"replace these phrases, see BANNED in {Path(__file__).name}"


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
