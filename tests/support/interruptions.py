"""Interrupt work that writes checkpoints, and damage a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fhopt.progress import Progress


class Interrupted(Exception):
    """Raised by tests as a user's Ctrl-C."""


def stop_at(stage: str, number: int) -> Progress:
    """Return a progress callback that interrupts after batch `number` of a stage."""

    def progress(now: str, done: int, total: int) -> None:
        if (now, done) == (stage, number):
            raise Interrupted

    return progress


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _without_a_key(file: Path) -> None:
    save_file({"x": torch.zeros(1)}, file)


def _of_fewer_sums(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file({"x": torch.zeros(1)}, file, about)


DAMAGES = (_cut_short, _without_a_key, _of_fewer_sums)
