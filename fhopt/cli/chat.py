"""Command `fhopt chat`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fhopt.cli.app import main
from fhopt.cli.options import blocks_option, json_option, placement_options
from fhopt.cli.text_model import (
    TextModel,
    interruptible,
    load_text_model,
    read_model_plan,
    read_sampling,
    sampling_options,
    statistics,
)
from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from fhopt.hf.chat import Chat

COMMANDS = "/stats, /reset, /quit"
_COMMAND = re.compile(r"/[a-z]+")
_PROMPT = "> "


@main.command()
@click.argument("model")
@click.option("--system", default="", help="System message.")
@sampling_options
@placement_options
@blocks_option
@json_option
def chat(
    model: str, system: str, plan_path: Path | None, exact: bool, max_new_tokens: int | None, temperature: float,
    top_p: float, seed: int, device_map: str | None, dtype: str, keep_blocks: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Chat with MODEL, reusing one KV cache: each turn prefills only its new tokens.

    A turn is one line, typed or piped. /stats prints throughput and bytes, /reset clears the conversation, /quit
    leaves. Ctrl-C stops an answer; twice, or Ctrl-D, leaves. --json prints one object per turn, one per line.
    """
    with interruptible():
        sampling = read_sampling(model, max_new_tokens, temperature, top_p, seed, needs_template=True)
        plan = read_model_plan(model, plan_path, exact)
        opened = load_text_model(model, dtype, device_map, plan, as_json, keep_blocks)
        from fhopt.hf import chat as conversations

        conversations.check_template(opened.tokenizer, model)
        started = conversations.Chat(opened.network, opened.tokenizer, sampling, model, system)
        _Session(opened, started, dtype, as_json).run()


class _Session:
    """Loop of turns at a terminal or a pipe."""

    def __init__(self, opened: TextModel, chat: Chat, dtype: str, as_json: bool) -> None:
        self.opened, self.chat, self.dtype, self.as_json = opened, chat, dtype, as_json
        self.is_terminal = sys.stdin.isatty()
        self.interruptions = 0  # since the last line

    def run(self) -> None:
        """Answer lines until the last one."""
        import torch

        torch.manual_seed(self.chat.sampling.seed)
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (it edits lines and keeps their history)
            click.echo(f"{self.opened.name}, {self.opened.cache_words}. {COMMANDS}; Ctrl-C stops an answer.", err=True)
        while (line := self._line()) is not None:
            self.interruptions = 0
            if line == "/quit":
                return
            if line:
                self._take(line)

    def _line(self) -> str | None:
        """Read a line; None at the end of input. Leaves at the second Ctrl-C in a row."""
        while True:
            try:
                return self._read()
            except EOFError:
                if self.is_terminal:
                    click.echo(err=True)
                return None
            except KeyboardInterrupt:
                self._interrupted(1)
                click.echo("\nCtrl-C again, Ctrl-D or /quit leaves", err=True)

    def _read(self) -> str:
        if self.is_terminal and not self.as_json and sys.stdout.isatty():
            return input(_PROMPT).strip()
        if self.is_terminal:
            click.echo(_PROMPT, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()

    def _interrupted(self, count: int) -> None:
        """Count Ctrl-C; leave at the second one in a row, or at the first one without a terminal."""
        self.interruptions += count
        if self.interruptions > 1 or not self.is_terminal:
            raise KeyboardInterrupt

    def _take(self, line: str) -> None:
        """Run a command, or answer a turn."""
        if line == "/reset":
            self.chat.reset()
        elif line == "/stats":
            self._print_statistics()
        elif _COMMAND.fullmatch(line):
            click.echo(f"unknown command {line}; expected one of {COMMANDS}", err=True)
        else:
            self._answer(line)

    def _answer(self, line: str) -> None:
        try:
            done = self.chat.ask(line, self._write)
        except FhoptError as error:
            if not self.is_terminal:
                raise
            click.echo(f"fhopt: {error}", err=True)
            return
        if self.as_json:
            click.echo(json.dumps({"turn": line} | done.as_json(), sort_keys=True))
        else:
            click.echo()
        if done.interruptions:
            self._interrupted(done.interruptions)

    def _write(self, text: str) -> None:
        if not self.as_json:
            click.echo(text, nl=False)

    def _print_statistics(self) -> None:
        if self.chat.last is None:
            click.echo("no turns yet", err=True)
            return
        click.echo(f"{len(self.chat.held):,} tokens in the KV cache", err=True)
        for line in statistics(self.chat.last, self.opened.cache_words, self.dtype):
            click.echo(line, err=True)
