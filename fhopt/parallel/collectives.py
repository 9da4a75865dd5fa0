"""Sums over calibration batches sharded across processes, and errors that stop all processes.

A sum is a tensor accumulated in place. Under `torchrun` each process handles every world-size-th batch, and
`reduce_sums` all-reduces the sums: the result does not depend on the number of processes, except for the order of
addition. `by_process` splits rows across processes in the same way.

If a process fails, all stop with its error: before each collective they exchange their status (`agree`), and a failed
process sends its error there (`together`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fhopt.errors import FhoptError

MESSAGE_BYTES = 2048  # of an error sent to other processes
Sums = dict[str, Tensor]
Row = TypeVar("Row")
_has_left = False  # left torchrun's group, which cannot be joined twice


def processes() -> tuple[int, int]:
    """Return (rank, world size), joining torchrun's group if there is none yet; (0, 1) without a group."""
    is_described = "TORCHELASTIC_RUN_ID" in os.environ and not _has_left
    if not dist.is_available() or not (dist.is_initialized() or is_described):
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # sums are on the CPU; the caller's own group may use another backend
    return dist.get_rank(), dist.get_world_size()


def leave() -> int:
    """Leave the group, in all processes at once; return the own rank. Raises OtherFailed."""
    global _has_left
    rank, _ = processes()
    agree()
    _has_left = True
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return rank


def reduce_sums(sums: Sums) -> None:
    """All-reduce the sums, in place. Raises OtherFailed."""
    if processes()[1] == 1:
        return
    agree()
    try:
        for name in sorted(sums):
            moved = sums[name].to(_device())
            dist.all_reduce(moved)
            sums[name].copy_(moved)
    except RuntimeError as error:
        raise _lost(error) from error


def by_process(rows: Sequence[Row], measure: Callable[[Row], Tensor]) -> list[Tensor]:
    """Return `measure` of each row, in order; rows are split across processes and results, all of one shape, shared.

    Raises OtherFailed in all processes if one raises.
    """
    rank, count = processes()
    if count == 1:
        return [measure(row) for row in rows]
    with together():
        own = [measure(row) for row in rows[rank::count]]
        shape = torch.zeros(16, dtype=torch.int64)
        if rank == 0 and own:  # rank 0 has a row if any process has
            shape[: own[0].dim() + 1] = torch.tensor([own[0].dim(), *own[0].shape])
        reduce_sums({"shape": shape})
        every = torch.zeros(len(rows), *shape[1 : 1 + int(shape[0])].tolist(), dtype=torch.float64)
        if own:
            every[rank::count] = torch.stack(own).to(every)
        reduce_sums({"rows": every})
    return list(every)


# --------------------------------------------------------------------------------------------------- failures


class OtherFailed(FhoptError):
    """Raised in all processes if one has failed, with its error and rank."""


class Lost(OtherFailed):
    """Raised if another process ended without sending an error."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Fail in all processes if one fails inside the context; they synchronize only in `agree`.

    The failed process raises its own error unless it is a FhoptError, so that its traceback is preserved.
    """
    try:
        yield
    except OtherFailed:
        raise
    except Exception as error:
        if processes()[1] == 1:
            raise
        message = str(error) if isinstance(error, FhoptError) else f"{type(error).__name__}: {error}"
        try:
            agree(message)
        except Lost:
            raise error from None
        except OtherFailed as failed:
            if isinstance(error, FhoptError):
                raise failed from error
        raise


def agree(failure: str = "") -> None:
    """Wait for all processes. Raises OtherFailed in all of them if one passes a failure."""
    count = processes()[1]
    if count == 1:
        return
    own = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
    text = failure.encode()[:MESSAGE_BYTES]
    own[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    every = [torch.empty_like(own, device=_device()) for _ in range(count)]
    try:
        dist.all_gather(every, own.to(_device()))
    except RuntimeError as error:
        raise _lost(error) from error
    messages = [bytes(one.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for one in every]
    failed = [i for i, message in enumerate(messages) if message]
    if failed and len(failed) == count and len(set(messages)) == 1:
        raise OtherFailed(messages[0])
    if failed:
        which = f"process {failed[0]} of {count}" + (f" ({len(failed) - 1} more failed)" if failed[1:] else "")
        raise OtherFailed(f"{which}: {messages[failed[0]]}")


def _lost(error: RuntimeError) -> Lost:
    reason = (str(error).strip() or "no message").splitlines()[0][:200]
    return Lost(
        f"another process has ended or is unreachable ({reason}). Check its output, then restart all "
        "processes; an interrupted calibration resumes."
    )


def _device() -> torch.device:
    """Return the device for collectives."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
