"""`fhopt chat` on the command line, piped and at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_models import FittedModel, tiny_llama
from text_models import interrupt, save_plan, save_text_model, start

from fhopt.cli.app import main

SECONDS = 240  # for a loaded machine; normally immediate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"), model=tiny_llama(max_position_embeddings=20_000))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(max_position_embeddings=20_000)
    return save_text_model(tmp_path_factory.mktemp("spaced"), model=model, spaced=True)


def talk(folder: Path, *arguments: object, lines: str) -> Result:
    words = ["chat", str(folder), "--max-new-tokens", "6", *map(str, arguments)]
    return CliRunner().invoke(main, words, input=lines)


def test_each_piped_line_is_a_turn_on_the_same_cache(folder: Path, llama: FittedModel, tmp_path: Path) -> None:
    plan = save_plan(tmp_path / "plan", llama)
    result = talk(folder, "--plan", plan, "--json", lines="hello\n\nand then\n")
    assert result.exit_code == 0, result.output
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["turn"], second["turn"]) == ("hello", "and then") and first["tokens"] == second["tokens"] == 6
    assert first["prefill_tokens"] == first["prompt_tokens"] and second["prefill_tokens"] < 20 < second["prompt_tokens"]
    assert first["ratio"] > 1


def test_commands_forget_show_and_leave(folder: Path) -> None:
    result = talk(folder, "--system", "be brief", lines="/stats\nhello\n/stats\n/reset\nhello\n/what\n/quit\nmore\n")
    assert result.exit_code == 0, result.output
    first, again = result.stdout.splitlines()
    assert first == again and len(first) == 6
    lines = result.stderr.splitlines()
    assert lines[0] == "no turns yet" and lines[1].endswith("tokens in the KV cache") and "prefill" in lines[2]
    assert "decode" in lines[3] and lines[4].startswith("full-precision KV cache: ")
    assert lines[5].startswith("unknown command /what; expected one of")


def test_a_piped_turn_without_room_ends_the_command(folder: Path) -> None:
    result = talk(folder, lines="x" * 20_001 + "\n")
    assert (
        result.exit_code == 2 and "exceed the model" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    )


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.own, other = pty.openpty()
        self.process = start("chat", *arguments, stdin=other, stdout=other, stderr=other)
        os.close(other)
        self.seen = ""

    def wait(self, text: str) -> str:
        """Read until `text` is shown; returns what came before it."""
        assert self.shows(text, SECONDS), self.seen
        before, _, self.seen = self.seen.partition(text)
        return before

    def shows(self, text: str, seconds: float) -> bool:
        """Whether `text` is shown within a few seconds."""
        end = time.monotonic() + seconds
        while text not in self.seen and (left := end - time.monotonic()) > 0:
            if select.select([self.own], [], [], left)[0]:
                try:
                    self.seen += os.read(self.own, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        return text in self.seen

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until `text` is shown: readline ignores one that arrives before it waits for a key."""
        for _ in range(3):
            interrupt(self.process)
            if self.shows(text, SECONDS / 8):
                break
        self.wait(text)

    def type(self, text: str) -> None:
        os.write(self.own, text.encode())

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(SECONDS)


Opener = Callable[..., Terminal]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Open terminals that are closed after the test, even if it fails."""
    terminals: list[Terminal] = []

    def make(*arguments: object) -> Terminal:
        terminals.append(Terminal(*arguments))
        return terminals[-1]

    yield make
    for terminal in terminals:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.own)


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(spaced: Path, opened: Opener) -> None:
    terminal = opened(spaced, "--max-new-tokens", 19_000)
    assert "full-precision KV cache. /stats, /reset, /quit" in terminal.wait("> ")
    terminal.type("hello\n")
    terminal.wait("hello")
    terminal.wait(" ")  # in the answer
    terminal.interrupt("> ")
    terminal.type("/stats\n")
    assert "decode" in terminal.wait("full-precision KV cache: ")
    terminal.wait("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
def test_ctrl_c_twice_leaves(folder: Path, opened: Opener) -> None:
    terminal = opened(folder, "--max-new-tokens", 4)
    terminal.wait("> ")
    terminal.interrupt("Ctrl-C again, Ctrl-D or /quit leaves")
    terminal.wait("> ")
    terminal.interrupt("stopped")
    assert terminal.end() == 130


@pytest.mark.slow
def test_an_error_of_a_turn_does_not_end_the_chat(tmp_path: Path, opened: Opener) -> None:
    terminal = opened(save_text_model(tmp_path), "--json")
    terminal.wait("> ")
    terminal.type("x" * 600 + "\n")
    terminal.wait("exceed the model")
    terminal.type("/quit\n")
    assert terminal.end() == 0


@pytest.mark.slow
def test_ctrl_c_in_a_pipe_leaves(spaced: Path) -> None:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = start("chat", spaced, "--max-new-tokens", 19_000, **pipes)
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("hello\nmore\n")
        process.stdin.flush()
        assert process.stdout.read(2)
        interrupt(process)
        _, lines = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in lines
