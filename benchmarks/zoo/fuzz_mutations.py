"""Mutation test of the fuzzer: weaken one rule of the finder at a time, and measure the time until detection.

    python -m benchmarks.zoo.fuzz_mutations              every rule, up to ten minutes each
    python -m benchmarks.zoo.fuzz_mutations --rule NAME  one of them; rows of the others stay in the results

Writes benchmarks/results/fuzz_mutations.json. The exit status is 1 if a rule survives.

A rule is an attribute of a module, and a function that returns its weakened version. Modules of fhopt that imported the
attribute by name get the weakened one, too.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.recording import Row, kept_rows, write
from benchmarks.zoo.fuzz_graphs import start


@dataclass(frozen=True)
class Rule:
    """A weakened rule. attribute: a name of the module, or `Class.name`. weakened: the original -> its replacement."""

    module: str
    attribute: str
    weakened: Callable[[Any], Any]


def _never(original: Any) -> Callable[..., None]:
    """Create a check that finds nothing."""
    return lambda *_, **__: None


def _always(value: Any) -> Callable[[Any], Callable[..., Any]]:
    """Create a function that returns one value."""
    return lambda original: lambda *_, **__: value


RECOGNIZE = "fhopt.passes.recognize"
RULES = {
    "the canonical op is neither proved nor checked": Rule(f"{RECOGNIZE}.canonical_check", "check_canonical", _never),
    "side values keep their value of the first call": Rule(f"{RECOGNIZE}.draws", "random_sides", _always({})),
    "every value is a literal": Rule(f"{RECOGNIZE}.node_roles", "is_fixed", _always(True)),
    "masks of a check hide nothing": Rule(
        f"{RECOGNIZE}.draws", "_mask", lambda original: lambda numbers, draw: numbers == numbers
    ),
    "elements may be taken by any index": Rule(f"{RECOGNIZE}.validity", "_Prover._movement", _always("")),
    "bounds are never crossed": Rule(f"{RECOGNIZE}.validity", "_Prover._bound", _always("")),
    "gradients flow everywhere": Rule(f"{RECOGNIZE}.validity", "_Prover._check_gradient", _never),
    "gradients flow into scores that a mask overwrites": Rule(
        f"{RECOGNIZE}.canonical", "Core.levels",
        lambda original: property(lambda core: original.fget(core) and not core.scores.absorbing),
    ),
    "rows without keys are zero": Rule(f"{RECOGNIZE}.empty_rows", "empty_rows_give_nan", _always(False)),
    "mask values survive casts": Rule("fhopt.passes.graph.nodes", "overflow_limit", _always(math.inf)),
    "exponentials never overflow": Rule(f"{RECOGNIZE}.softmax", "_is_largest", _always(True)),
    "scores in float16 never overflow": Rule(f"{RECOGNIZE}.normalize", "_is_half", _always(False)),
    "nothing sees the memory order of a result": Rule(f"{RECOGNIZE}.result_strides", "is_layout_seen", _always(False)),
    "function transforms change nothing": Rule("fhopt.passes.graph.transforms", "transform_scopes", _always([])),
    "complex numbers are real": Rule(f"{RECOGNIZE}.readable", "check_readable", _never),
}  # fmt: skip


def weaken(name: str) -> None:
    """Apply a rule of RULES to this process."""
    importlib.import_module("fhopt.backend")
    rule = RULES[name]
    owner: Any = importlib.import_module(rule.module)
    *path, last = rule.attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, last)
    replacement = rule.weakened(original)
    setattr(owner, last, replacement)
    if path:
        return
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("fhopt.") and vars(module).get(last) is original:
            setattr(module, last, replacement)


def seconds_to_failure(name: str, seed: int, seconds: float) -> float | None:
    """Run the fuzzer with a weakened rule; None if it finds no failure in time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tally.json")
        process = start(seed, seconds, file, name)
        if process.wait() or not file.exists():
            raise RuntimeError(f"the worker for {name!r} ended with status {process.returncode}")
        tally = json.loads(file.read_text())
    reason = (tally["failure"] or "no failure").splitlines()[0]
    click.echo(f"{name}: {tally['programs']} programs; {reason}")
    return float(tally["seconds_to_failure"]) if tally["failure"] else None


@click.command()
@click.option(
    "--rule", "names", multiple=True, type=click.Choice(list(RULES)), help="A rule; repeatable. Default: all."
)
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Time for each rule.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the fuzzer.")
def main(names: tuple[str, ...], minutes: float, seed: int) -> None:
    """Report the seconds until the first failure with each weakened rule; exit status 1 if a rule survives."""
    names = names or tuple(RULES)
    found = {name: _reported(name, seconds_to_failure(name, seed, 60 * minutes)) for name in names}
    measured = [_row(name, seconds) for name, seconds in found.items()]
    others = kept_rows("fuzz_mutations", lambda case: case in found or case not in RULES)
    click.echo(str(write("fuzz_mutations", sorted([*measured, *others], key=lambda row: list(RULES).index(row.case)))))
    sys.exit(None in found.values())


def _reported(name: str, seconds: float | None) -> float | None:
    click.echo(f"{name}: {'survives' if seconds is None else f'failure after {seconds:.1f} s'}")
    return seconds


def _row(name: str, seconds: float | None) -> Row:
    """Return the row of a rule: seconds until the fuzzer detected its weakening."""
    if seconds is None:
        return Row(name, "fhopt", "seconds_to_failure", float("nan"), "s", error="the rule survives")
    return Row(name, "fhopt", "seconds_to_failure", seconds, "s")


if __name__ == "__main__":
    main()
