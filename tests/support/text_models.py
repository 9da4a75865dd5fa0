"""Folders of small models that generate text, with and without a chat template, and commands in subprocesses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from character_tokenizer import characters
from small_models import FittedModel, tiny_llama
from tokenizers import decoders

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
FORGETFUL = (  # omits earlier answers, like templates of reasoning models
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<' + m.role[0] + '>' + m.content + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def save_text_model(folder: Path, template: str | None = TEMPLATE, model: Any = None, spaced: bool = False) -> Path:
    """Save a Hugging Face folder with a character-level tokenizer; without `template` it cannot chat.

    spaced: decoded characters are separated by spaces, after each of which a streamer emits its text.
    """
    tokenizer = characters()
    if not spaced:
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (tiny_llama() if model is None else model).save_pretrained(folder)
    return folder


def save_plan(folder: Path, llama: FittedModel) -> Path:
    return llama.plan(4).save(folder)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start `fhopt` in its own process group, with Ctrl-C not ignored."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fhopt.cli", *map(str, arguments)], text=True, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


def shown_on(own: int) -> bytes:
    """Return the output of a process on a pseudo-terminal, read until the process closes it."""
    shown = b""
    try:
        while chunk := os.read(own, 4096):
            shown += chunk
    except OSError:  # the other side is closed
        pass
    return shown


def interrupt(process: subprocess.Popen[str]) -> None:
    """Send Ctrl-C to a process started by `start`, and to no other."""
    os.killpg(os.getpgid(process.pid), signal.SIGINT)
