"""Report the language of all texts for users: pages, help of commands, and error messages.

    python docs/language_report.py              every text: words, mean and longest sentence, numbers per 100 words
    python docs/language_report.py README.md    only these, with their findings

A finding is a banned phrase, a sentence of more than MAX_WORDS words, or a mean of more than MAX_MEAN words per
sentence. Only paragraphs and list items have sentences; phrases are also searched in tables and headings. Code and
names in backticks are skipped.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
from error_catalogue import ERROR, messages
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table

from fhopt.cli.app import main as commands

ROOT = Path(__file__).resolve().parent.parent
MAX_WORDS, MAX_MEAN = 40, 20  # of a sentence; of the mean of a text
MIN_SENTENCES = 5  # of a text whose mean counts
GENERATED = ("docs/reference/errors.md", "docs/reference/not_rewritten.md")  # messages are checked in the code instead
_UNITS = r"(?:nats|bytes|tokens|ms|milliseconds|seconds|steps|cents)"
BANNED = {  # regular expression -> the term to use, in code and in texts for users
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
BANNED_FOR_USERS = {  # further phrases, in texts for users
    r"[\d.]*\d %": "no space before %",
    r"\d+(?:\.\d+)?x less": "Nx smaller",
    r"not possible": "invalid; must be",
    r"exact (?:KV )?cache": "full-precision cache",
    r"machine code": "native code",
    r"beside": "alongside; compared with",
    r"models? (?:in|of) 16 bits": "16-bit models",
    r"one of (?:both|the two)": "mutually exclusive",
    r"both or neither": "requires",
}


def phrases(*tables: dict[str, str]) -> re.Pattern[str]:
    """Return the expression that finds the phrases of tables at the borders of words."""
    parts = "|".join(f"(?:{phrase})" for table in tables for phrase in table)
    return re.compile(rf"\b(?:{parts})(?!\w)", re.IGNORECASE)


_PHRASES = phrases(BANNED, BANNED_FOR_USERS)
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|etc|cf|al|Fig|Eq|No)\.$")
_END = re.compile(r"[.!?][)\"'*]*\s+(?=[^a-z]|fhopt\b)")
_WORD = re.compile(r"[^\s]*\w[^\s]*")


@dataclass(frozen=True)
class Text:
    """One text for users.

    name: a file below the root, or a command. blocks: its paragraphs, list items or messages, as plain text. others:
    its headings and table cells.
    """

    name: str
    blocks: tuple[str, ...]
    others: tuple[str, ...] = ()

    @cached_property
    def sentences(self) -> list[str]:
        """All sentences that have words."""
        return [sentence for block in self.blocks for sentence in split(block) if _WORD.search(sentence)]

    @cached_property
    def lengths(self) -> list[int]:
        """Words of each sentence."""
        return [len(_WORD.findall(sentence)) for sentence in self.sentences]

    @property
    def mean(self) -> float:
        """Mean length of a sentence, in words."""
        return sum(self.lengths) / max(1, len(self.lengths))

    @property
    def number_density(self) -> float:
        """Numbers per 100 words."""
        numbers = sum(len(re.findall(r"(?<![\w.,-])[+-]?\d[\w.,]*", sentence)) for sentence in self.sentences)
        return 100 * numbers / max(1, sum(self.lengths))

    def findings(self) -> Iterator[str]:
        """Yield what the style guide forbids."""
        for block in self.blocks + self.others:
            yield from (f"phrase: {match[0]!r}" for match in _PHRASES.finditer(re.sub("`[^`]*`", "``", block)))
        for length, sentence in zip(self.lengths, self.sentences, strict=True):
            if length > MAX_WORDS:
                yield f"{length} words: {sentence[:60]}..."
        if len(self.lengths) >= MIN_SENTENCES and self.mean > MAX_MEAN:
            yield f"mean of {self.mean:.1f} words per sentence"


def split(block: str) -> Iterator[str]:
    """Split a block into sentences."""
    start = 0
    for match in _END.finditer(block):
        if not _ABBREVIATION.search(block[: match.start() + 1]):
            yield block[start : match.end()].strip()
            start = match.end()
    yield block[start:].strip()


def read(name: str, markdown: str) -> Text:
    """Read a page: paragraphs and list items, headings and table cells, without code and HTML."""
    blocks, others, is_prose = list[str](), list[str](), True
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type.startswith(("table_", "heading_")):
            is_prose = token.type.endswith("_close")
        if token.type == "inline":
            parts = (_plain(child.type, child.content) for child in token.children or ())
            (blocks if is_prose else others).append(" ".join("".join(parts).split()))
    return Text(name, tuple(blocks), tuple(others))


def _plain(kind: str, content: str) -> str:
    """Return the text of a part of a line. A name in backticks is one word."""
    if kind == "code_inline":
        return f"`{re.sub(r'[ .]+', '_', content)}`"
    return {"softbreak": " ", "hardbreak": " ", "text": content}.get(kind, "")


def pages() -> Iterator[Text]:
    """Yield the pages that are written by hand or by a benchmark."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "codegen/README.md", ROOT / "passes/README.md"]
    for path in sorted(found):
        name = path.relative_to(ROOT).as_posix()
        if name not in GENERATED:
            yield read(name, path.read_text(encoding="utf-8"))


def help_texts(command: click.Command = commands, name: str = "fhopt") -> Iterator[Text]:
    """Yield the help of a command with that of its options, then the same of its subcommands."""
    options = (getattr(parameter, "help", None) or "" for parameter in command.params)
    about = (command.help or "").replace("\b", "")
    yield Text(f"{name} --help", tuple(" ".join(part.split()) for part in (*about.split("\n\n"), *options)))
    if isinstance(command, click.Group):
        for subcommand in sorted(command.commands):
            yield from help_texts(command.commands[subcommand], f"{name} {subcommand}")


def error_messages() -> Iterator[Text]:
    """Yield the messages of FhoptError, a text for each module. A value counts as one word."""
    by_module: dict[str, list[str]] = {}
    for message in messages(ERROR):
        by_module.setdefault(message.module, []).append(re.sub("⟨[^⟩]*⟩", "⟨N⟩", message.text))
    for module, found in by_module.items():
        yield Text(f"{module}.py", tuple(found))


def texts() -> list[Text]:
    """Return all texts for users."""
    return [*pages(), *help_texts(), *error_messages()]


def main() -> None:
    """Print the report."""
    chosen = [text for text in texts() if text.name in sys.argv[1:] or not sys.argv[1:]]
    table = Table("text", box=None)
    for heading in ("words", "mean sentence", "longest", "numbers per 100 words", "findings"):
        table.add_column(heading, justify="right")
    for text in chosen:
        counts = sum(text.lengths), f"{text.mean:.1f}", max(text.lengths, default=0), f"{text.number_density:.1f}"
        table.add_row(text.name, *map(str, counts), str(len(list(text.findings()))))
    console = Console(width=120)
    console.print(table)
    for text in chosen if sys.argv[1:] else ():
        console.print(f"\n{text.name}", *text.findings(), sep="\n  ", markup=False, highlight=False)


if __name__ == "__main__":
    main()
