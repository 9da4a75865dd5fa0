"""Decode steps with and without a program, for tests: which calls ran as a program, and their logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from small_models import cached
from torch import Tensor

import fhopt
from fhopt.decode.program import DecodeProgram
from fhopt.hf.apply import latent_cache

PROMPT = 40


@contextmanager
def program_runs() -> Iterator[list[DecodeProgram]]:
    """Record the programs that run inside the context, one entry per step."""
    ran: list[DecodeProgram] = []
    run = DecodeProgram.run

    def watched(self: DecodeProgram, *args: Any) -> tuple[bool, Any]:
        is_done, result = run(self, *args)
        if is_done:
            ran.append(self)
        return is_done, result

    DecodeProgram.run = watched  # type: ignore[method-assign, assignment]
    try:
        yield ran
    finally:
        DecodeProgram.run = run  # type: ignore[method-assign]


def prepared(model: Any, plan: fhopt.LatentPlan, programs: bool = True) -> Any:
    """Apply a plan, with every kernel built."""
    return fhopt.prepare(fhopt.apply(model, plan, decode_program=programs))


def filled(model: Any, ids: Tensor) -> Any:
    """Return a cache that holds a prompt."""
    cache = latent_cache(model)
    with torch.no_grad():
        model(ids, **cached(cache))
    return cache


def decoded(model: Any, ids: Tensor, cache: Any, first: int = 0) -> Tensor:
    """Return the logits [B, N, V] of tokens [B, N], from `first` on, decoded one by one."""
    with torch.no_grad():
        rows = [model(ids[:, i : i + 1], **cached(cache)).logits for i in range(first, ids.shape[1])]
    return torch.cat(rows, 1)


def stepwise(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of the tokens after a prompt of PROMPT tokens, decoded one by one."""
    return decoded(model, ids, filled(model, ids[:, :PROMPT]), PROMPT)


def of_both(model: Any, plan: fhopt.LatentPlan, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits without a program, and with one, which must have run in each step."""
    expected = stepwise(prepared(model, plan, False), ids)
    with program_runs() as ran:
        output = stepwise(prepared(model, plan), ids)
    assert len(ran) == ids.shape[1] - PROMPT
    return expected, output


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference of two tensors."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
