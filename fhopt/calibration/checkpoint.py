"""Checkpoints that let interrupted calibration or healing resume: sums over batches, one file per stage."""

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

SAVE_EVERY = 4  # batches (calibration) or sequences (healing) between checkpoints; calibration also saves the first
SIDES = ("key", "value")


def named_moments(statistics: Mapping[str, SiteStatistics]) -> Sums:
    """Return all sums of the statistics, by name."""
    sums: Sums = {}
    for name, s in statistics.items():
        for which, side in zip(SIDES, (s.key, s.value), strict=True):
            sums |= {f"{name}.{which}.moment": side.moment, f"{name}.{which}.metric": side.metric}
            sums[f"{name}.{which}.count"] = side.count
        if s.cross is not None and s.cross_metric is not None:
            sums |= {f"{name}.cross": s.cross, f"{name}.cross_metric": s.cross_metric}
    return sums


def named_costs(costs: Costs) -> Sums:
    """Return all sums of the channel costs, by name."""
    sums: Sums = {}
    for (name, layout, side), measured in costs.items():
        prefix = f"{name}.{layout}.{SIDES[side]}"
        sums |= {f"{prefix}.{bits}": total for bits, total in measured.sums.items()}
        sums[f"{prefix}.tokens"] = measured.tokens
    return sums


@dataclass(frozen=True)
class ResumableStage:
    """A resumable stage of work, as progress output, files and messages name it.

    name: of the stage; also the suffix of its file if `is_suffix`. work: the task that the stage belongs to. verb: the
    verb for that task. inputs: what must be equal between the interrupted and the resumed run. unit: JSON key of the
    number of finished batches in a file's description.
    """

    name: str
    work: str
    verb: str
    inputs: str
    unit: str = "batches"
    is_suffix: bool = True


MOMENTS, RATES = (ResumableStage(name, "calibration", "calibrate", "model or options") for name in ("moments", "rates"))


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint file of one stage in one process; without a path nothing is saved.

    key: JSON values that must be equal when work resumes.
    """

    path: str | os.PathLike[str] | None
    key: Mapping[str, Any]
    stage: ResumableStage

    @property
    def file(self) -> Path | None:
        """Path of this process's checkpoint file."""
        if self.path is None or not self.stage.is_suffix:
            return None if self.path is None else Path(self.path)
        rank, count = processes()
        suffix = f".{self.stage.name}" if count == 1 else f".{self.stage.name}.{rank}-of-{count}"
        return Path(f"{os.fspath(self.path)}{suffix}")

    def check(self) -> None:
        """Raise FhoptError if the file cannot be written, is damaged, or belongs to other work."""
        file = self.file
        if file is not None:
            check_writable(file.parent)
            self.load()

    def load(self) -> tuple[Sums, int]:
        """Load the saved sums and the number of batches in them; without a file, ({}, 0).

        Raises FhoptError if the file is damaged or belongs to other work.
        """
        from safetensors import SafetensorError

        file = self.file
        if file is None or not file.exists():
            return {}, 0
        try:
            about, tensors = read_tensors(file)
            if about["key"] != dict(self.key):
                raise FhoptError(
                    f"{file} belongs to another {self.stage.work} ({self.stage.inputs} differ). Remove it, or "
                    "rerun with the original inputs."
                )
            check_digest(about, tensors)
            return tensors, int(about[self.stage.unit])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise self._damaged(error) from error

    def restore(self, sums: Sums) -> int:
        """Copy the saved sums into `sums` and return the number of batches in them. Raises FhoptError."""
        tensors, batches = self.load()
        try:
            for name, total in sums.items() if tensors else ():
                total.copy_(tensors[name])
        except (KeyError, RuntimeError) as error:
            raise self._damaged(error) from error
        return batches

    def save(self, sums: Mapping[str, Tensor], batches: int) -> None:
        """Save the sums over the first `batches` batches, atomically. Raises FhoptError."""
        from safetensors import SafetensorError

        file = self.file
        if file is None:
            return
        try:
            write_tensors(file, {"key": dict(self.key), self.stage.unit: batches}, sums)
        except (OSError, SafetensorError) as error:
            raise FhoptError(f"cannot write {file}: {error}. Choose another checkpoint file.") from error

    def remove(self) -> None:
        """Delete the checkpoint once the work is done."""
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
        self.sequences = 0  # received so far, in all processes
        self.sums: Sums = {}

    def batches(self, source: Iterator[Mapping[str, Tensor]], sums: Sums) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Yield (number, batch) for this process's share of the next `total` batches, skipping those in the checkpoint.

        sums: accumulators of the caller; they are restored from the checkpoint first.
        """
        self.sums = sums
        already = self.checkpoint.restore(sums)
        self.progress(self.checkpoint.stage.name, already, self.total)  # report now: the first batch may take minutes
        rank, count = processes()
        for number in range(self.total):
            batch = next(source, None)
            if batch is None:
                return
            self.sequences += next((len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim()), 1)
            if number >= already and number % count == rank:
                yield number, batch

    def done(self, number: int) -> None:
        """Report a batch as added to the sums, and save them periodically."""
        self.progress(self.checkpoint.stage.name, number + 1, self.total)
        count = processes()[1]
        finished = number // count + 1  # of this process
        if finished == 1 or finished % SAVE_EVERY == 0 or number + count >= self.total:
            self.checkpoint.save(self.sums, number + 1)
