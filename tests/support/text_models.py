"""Folders of small models that generate text, with and without a chat template, and commands in processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from character_tokenizer import characters
from small_models import Fitted, tiny_llama
from tokenizers import decoders

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
FORGETFUL = (  # it leaves out earlier answers, as templates do with reasoning
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<' + m.role[0] + '>' + m.content + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def save_text_model(folder: Path, template: str | None = TEMPLATE, model: Any = None, spaced: bool = False) -> Path:
    """A Hugging Face folder with a tokenizer of characters; without `template` it cannot chat.

    spaced: decoded characters have a space between them, behind which a streamer passes on what it has.
    """
    tokenizer = characters()
    if not spaced:
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (tiny_llama() if model is None else model).save_pretrained(folder)
    return folder


def save_plan(folder: Path, llama: Fitted) -> Path:
    return llama.plan(4).save(folder)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start `fhopt` in a process group of its own, in which Ctrl-C is not ignored."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fhopt.cli", *map(str, arguments)], text=True, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


def shown_on(own: int) -> bytes:
    """What a process has shown on a pseudo-terminal, read from its other side until the process has closed it."""
    shown = b""
    try:
        while chunk := os.read(own, 4096):
            shown += chunk
    except OSError:  # the other side is closed
        pass
    return shown


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C for a process that `start` started, and for nothing else."""
    os.killpg(os.getpgid(process.pid), signal.SIGINT)
