"""Checkpoints of calibration and healing, from which interrupted work goes on: sums over batches, a file a stage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.files import check_digest, check_writable, read_tensors, write_tensors
from fhopt.fitting.costs import Costs
from fhopt.fitting.statistics import SiteStatistics
from fhopt.parallel.collectives import Sums, processes

SAVE_EVERY = 4  # batches, or sequences of a healing, between two checkpoints
SIDES = ("key", "value")


def named_moments(statistics: Mapping[str, SiteStatistics]) -> Sums:
    """Return every sum of the statistics, by name."""
    sums: Sums = {}
    for name, s in statistics.items():
        for which, side in zip(SIDES, (s.key, s.value), strict=True):
            sums |= {f"{name}.{which}.moment": side.moment, f"{name}.{which}.metric": side.metric}
            sums[f"{name}.{which}.count"] = side.count
        if s.cross is not None and s.cross_metric is not None:
            sums |= {f"{name}.cross": s.cross, f"{name}.cross_metric": s.cross_metric}
    return sums


def named_costs(costs: Costs) -> Sums:
    """Return every sum of the costs of channels, by name."""
    sums: Sums = {}
    for (name, layout, side), measured in costs.items():
        prefix = f"{name}.{layout}.{SIDES[side]}"
        sums |= {f"{prefix}.{bits}": total for bits, total in measured.sums.items()}
        sums[f"{prefix}.tokens"] = measured.tokens
    return sums


@dataclass(frozen=True)
class Stage:
    """A stage of work that can be interrupted, as progress, files and messages name it.

    name: of the stage, and the suffix of its file where `is_suffix`. work: what it belongs to, and `verb`, doing that.
    inputs: what two runs must have in common. unit: JSON key of the number of batches in a file's description.
    """

    name: str
    work: str
    verb: str
    inputs: str
    unit: str = "batches"
    is_suffix: bool = True


MOMENTS, RATES = (Stage(name, "calibration", "calibrate", "model or options") for name in ("moments", "rates"))


@dataclass(frozen=True)
class Checkpoint:
    """The file of an interrupted stage; without a path nothing is kept. Each process has its own.

    key: JSON values that the interrupted work must have in common with the one that goes on.
    """

    path: str | os.PathLike[str] | None
    key: Mapping[str, Any]
    stage: Stage

    @property
    def file(self) -> Path | None:
        """Where the stage of this process is kept."""
        if self.path is None or not self.stage.is_suffix:
            return None if self.path is None else Path(self.path)
        rank, count = processes()
        suffix = f".{self.stage.name}" if count == 1 else f".{self.stage.name}.{rank}-of-{count}"
        return Path(f"{os.fspath(self.path)}{suffix}")

    def check(self) -> None:
        """Raise FhoptError when the file cannot be written, is damaged, or is of other work."""
        file = self.file
        if file is not None:
            check_writable(file.parent)
            self.load()

    def load(self) -> tuple[Sums, int]:
        """Read the sums that were saved, and the number of batches in them: ({}, 0) without a file.

        Raises FhoptError.
        """
        from safetensors import SafetensorError

        file = self.file
        if file is None or not file.exists():
            return {}, 0
        try:
            about, tensors = read_tensors(file)
            if about["key"] != dict(self.key):
                raise FhoptError(
                    f"{file} is of another {self.stage.work} ({self.stage.inputs} differ). Remove it, or give what it "
                    "was made with."
                )
            check_digest(about, tensors)
            return tensors, int(about[self.stage.unit])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise self._damaged(error) from error

    def restore(self, sums: Sums) -> int:
        """Fill `sums` with what was saved of them, and return the number of batches in them. Raises FhoptError."""
        tensors, batches = self.load()
        try:
            for name, total in sums.items() if tensors else ():
                total.copy_(tensors[name])
        except (KeyError, RuntimeError) as error:
            raise self._damaged(error) from error
        return batches

    def save(self, sums: Mapping[str, Tensor], batches: int) -> None:
        """Keep the sums of so many batches, whole or not at all. Raises FhoptError."""
        from safetensors import SafetensorError

        file = self.file
        if file is None:
            return
        try:
            write_tensors(file, {"key": dict(self.key), self.stage.unit: batches}, sums)
        except (OSError, SafetensorError) as error:
            raise FhoptError(f"cannot write {file}: {error}. Give another place for the checkpoint.") from error

    def remove(self) -> None:
        """Remove the file: the work is done."""
        file = self.file
        if file is not None:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)

    def _damaged(self, error: Exception) -> FhoptError:
        file, verb = self.file, self.stage.verb
        return FhoptError(f"{file} is damaged ({error}). Remove it to {verb} from the start.")


class BatchPass:
    """One pass over a number of batches: this process's share, with progress and checkpoints."""

    def __init__(self, total: int, checkpoint: Checkpoint, progress: Callable[[str, int, int], None]) -> None:
        self.total, self.checkpoint, self.progress = total, checkpoint, progress
        self.sequences = 0  # that came, of all processes
        self.sums: Sums = {}

    def batches(self, source: Iterator[Mapping[str, Tensor]], sums: Sums) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Yield (number, batch) of this process's share of the next `total` batches, less what a checkpoint holds.

        sums: what the batches are added to; they are restored first.
        """
        self.sums = sums
        already = self.checkpoint.restore(sums)
        self.progress(self.checkpoint.stage.name, already, self.total)  # the first may take minutes
        rank, count = processes()
        for number in range(self.total):
            batch = next(source, None)
            if batch is None:
                return
            self.sequences += next((len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim()), 1)
            if number >= already and number % count == rank:
                yield number, batch

    def done(self, number: int) -> None:
        """Count a batch that was added to the sums, and save them now and then."""
        self.progress(self.checkpoint.stage.name, number + 1, self.total)
        count = processes()[1]
        if (number // count + 1) % SAVE_EVERY == 0 or number + count >= self.total:
            self.checkpoint.save(self.sums, number + 1)
