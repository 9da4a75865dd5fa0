"""Checkpoints of a calibration, from which an interrupted run goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.files import check_digest, read_tensors, write_tensors
from fhopt.fitting.bases import Basis
from fhopt.fitting.statistics import SiteStatistics
from fhopt.parallel.collectives import Sums, processes

SAVE_EVERY = 4  # batches between two checkpoints


def moments(statistics: Mapping[str, SiteStatistics]) -> Sums:
    """Every sum of the statistics, by name."""
    sums: Sums = {}
    for name, s in statistics.items():
        for which, side in (("key", s.key), ("value", s.value)):
            sums |= {f"{name}.{which}.moment": side.moment, f"{name}.{which}.metric": side.metric}
            sums[f"{name}.{which}.count"] = side.count
        if s.cross is not None and s.cross_metric is not None:
            sums |= {f"{name}.cross": s.cross, f"{name}.cross_metric": s.cross_metric}
    return sums


def rates(found: Mapping[str, Mapping[str, tuple[Basis, ...]]], levels: Iterable[int]) -> Sums:
    """Every cost of the bases, made zero where nothing was measured yet."""
    sums: Sums = {}
    for name, table in found.items():
        for layout, pair in table.items():
            for which, basis in zip(("key", "value"), pair, strict=False):  # one basis may serve both
                for bits in levels:
                    cost = basis.costs.setdefault(bits, torch.zeros_like(basis.variance))
                    sums[f"{name}.{layout}.{which}.{bits}"] = cost
                sums[f"{name}.{layout}.{which}.tokens"] = basis.tokens
    return sums


@dataclass
class Checkpoint:
    """The file of an interrupted calibration; without a path nothing is kept. Each process has its own."""

    path: str | os.PathLike[str] | None
    key: Mapping[str, Any]

    def load(self, stage: str, sums: Sums) -> int:
        """Fill the sums with what was saved for `stage`; how many batches they hold. Raises FhoptError."""
        from safetensors import SafetensorError

        file = self._file(stage)
        if file is None or not file.exists():
            return 0
        try:
            about, tensors = read_tensors(file)
            if about["key"] != dict(self.key):
                raise FhoptError(
                    f"{file} is of another calibration (model or options differ). Remove it, or give the options that "
                    "it was made with."
                )
            check_digest(about, tensors)
            batches = int(about["batches"])
            for name, total in sums.items():
                total.copy_(tensors[name])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise FhoptError(f"{file} is damaged ({error}). Remove it to calibrate from the start.") from error
        return batches

    def save(self, stage: str, sums: Sums, batches: int) -> None:
        """Keep the sums, whole or not at all. Raises FhoptError."""
        from safetensors import SafetensorError

        file = self._file(stage)
        if file is None:
            return
        try:
            write_tensors(file, {"key": dict(self.key), "batches": batches}, sums)
        except (OSError, SafetensorError) as error:
            raise FhoptError(f"cannot write {file}: {error}. Give another place for the checkpoint.") from error

    def remove(self) -> None:
        """Remove the files: the calibration is done."""
        for stage in ("moments", "rates"):
            file = self._file(stage)
            if file is not None:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)

    def _file(self, stage: str) -> Path | None:
        rank, count = processes()
        suffix = f".{stage}" if count == 1 else f".{stage}.{rank}-of-{count}"
        return None if self.path is None else Path(f"{os.fspath(self.path)}{suffix}")


class Stage:
    """One pass over a number of batches: this process's share, with progress and checkpoints."""

    def __init__(self, name: str, total: int, progress: Callable[[str, int, int], None], saved: Checkpoint) -> None:
        self.name, self.total, self.progress, self.saved = name, total, progress, saved
        self.sequences = 0  # that came, of all processes
        self.sums: Sums = {}

    def batches(self, given: Iterator[Mapping[str, Tensor]], sums: Sums) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """(number, batch) of this process's share of the next `total` batches, less what a checkpoint holds."""
        self.sums = sums
        already = self.saved.load(self.name, sums)
        rank, count = processes()
        for number in range(self.total):
            batch = next(given, None)
            if batch is None:
                return
            self.sequences += next((len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim()), 1)
            if number >= already and number % count == rank:
                yield number, batch

    def done(self, number: int) -> None:
        """A batch was added to the sums."""
        self.progress(self.name, number + 1, self.total)
        count = processes()[1]
        if (number // count + 1) % SAVE_EVERY == 0 or number + count >= self.total:
            self.saved.save(self.name, self.sums, number + 1)
