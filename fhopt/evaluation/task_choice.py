"""Parsing of task names and context lengths, before torch is imported."""

from __future__ import annotations

from fhopt.errors import FhoptError

TASKS = ("passkey", "copy", "digits", "arithmetic")  # fhopt/evaluation/tasks.py
RULER = (  # fhopt/evaluation/ruler.py
    "niah_single", "niah_multikey", "niah_multivalue", "variable_tracking", "common_words", "question",
    "json_extraction", "long_copy",
)  # fmt: skip


def parse_tasks(names: str) -> list[str]:
    """Parse a comma-separated list of tasks; returns each once, in the order of this module. Raises FhoptError.

    `all` means perplexity and the tasks of `fhopt.evaluation.tasks`, `ruler` those of `fhopt.evaluation.ruler`.
    """
    known, groups = ["perplexity", *TASKS, *RULER], {"all": ["perplexity", *TASKS], "ruler": [*RULER]}
    chosen = [name.strip() for name in names.split(",")]
    wrong = [name for name in chosen if name not in (*known, *groups)]
    if wrong:
        expected = ", ".join((*known, *groups))
        raise FhoptError(f"task {wrong[0]!r} is unknown; expected a comma-separated list of {expected}.")
    meant = {task for name in chosen for task in groups.get(name, [name])}
    return [name for name in known if name in meant]


def read_lengths(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of lengths, such as 512,1024. Raises FhoptError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise FhoptError(f"--lengths {text!r} is invalid; expected comma-separated token counts such as 512,1024.")
    return tuple(dict.fromkeys(int(part) for part in parts))
