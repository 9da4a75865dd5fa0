"""Checkpoints of healing, from which an interrupted run goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError
from fhopt.files import check_digest, check_writable, read_tensors, write_tensors
from fhopt.refine.decoder_equations import Equations


@dataclass(frozen=True)
class HealingCheckpoint:
    """The file of an interrupted healing: its equations so far. Without a path nothing is kept."""

    path: Path | None
    key: Mapping[str, Any]

    def check(self) -> None:
        """Raise FhoptError when the file cannot be written, is damaged, or is of another healing."""
        if self.path is not None:
            check_writable(Path(self.path).parent)
            self.load()

    def load(self) -> tuple[Equations, int]:
        """The equations so far, and of how many sequences. Raises FhoptError."""
        from safetensors import SafetensorError

        if self.path is None or not Path(self.path).exists():
            return Equations(), 0
        try:
            about, tensors = read_tensors(self.path)
            if about["key"] != dict(self.key):
                raise FhoptError(
                    f"{self.path} is of another healing (model, plan, text or version differ). Remove it, or give what "
                    "it was made with."
                )
            check_digest(about, tensors)
            parts = [{n: tensors[f"{n}.{part}"] for n in about["names"]} for part in _PARTS]
            return Equations(*parts), int(about["sequences"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise FhoptError(f"{self.path} is damaged ({error}). Remove it to heal from the start.") from error

    def save(self, equations: Equations, sequences: int) -> None:
        """Keep the equations of `sequences` sequences, whole or not at all. Raises FhoptError."""
        from safetensors import SafetensorError

        if self.path is None:
            return
        tensors = {f"{n}.{part}": x for part in _PARTS for n, x in getattr(equations, part).items()}
        about = {"key": dict(self.key), "sequences": sequences, "names": sorted(equations.error)}
        try:
            write_tensors(Path(self.path), about, tensors)
        except (OSError, SafetensorError) as error:
            raise FhoptError(f"cannot write {self.path}: {error}. Give another place for the checkpoint.") from error

    def remove(self) -> None:
        """Remove the file: the healing is done."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                Path(self.path).unlink(missing_ok=True)


_PARTS = ("error", "moment")
