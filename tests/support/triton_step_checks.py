"""Checks of which decode steps the Triton kernels run, and which they leave to torch operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from triton_block_checks import PLANS, close, engines, same_blocks, tokens_of


def nothing_is_read_back_and_sequences_of_no_tokens_are_left_out() -> None:
    plan = PLANS["one latent for keys and values, means, window of 8 bits"]
    tokens = tokens_of(plan, torch.float32, 40, 2)
    reference, kernels = engines(plan, torch.float32)
    for engine in (reference, kernels):
        engine.step(tokens, [(0, 39), (0, 20)])
    before = [cache.clone() for cache in kernels.caches]
    caches = kernels.caches_of([0, 1, 2], [40, 0])
    caches.batch.lengths = torch.tensor([40, 0], dtype=torch.int32)
    query, key, value = (torch.stack([x[39], x[39]]) for x in tokens[0])
    output = torch.full((2, 4, 8), torch.nan)
    kernels.layer.write_and_attend(caches, query, key, value, output)
    close([output[:1]], reference.step(tokens[:1], [(39, 40)]))
    assert not bool(output[1].any())
    assert "sequences" not in vars(caches.batch)  # the lengths are not copied to the host
    for cache, held, table in zip(kernels.caches, before, kernels.tables, strict=True):
        others = torch.cat([table[1:].flatten(), torch.zeros(1)]).long()
        assert torch.equal(cache[others], held[others])  # blocks of other sequences and block 0 are unchanged


def sequences_with_one_new_token_stand_beside_others() -> None:
    plan = PLANS["bit groups of 2 to 8 bits, means, window of 8 bits"]
    tokens = tokens_of(plan, torch.float32, 60, 3)
    reference, kernels = engines(plan, torch.float32)
    for spans in ([(0, 30), (0, 10), (0, 14)], [(30, 31), (10, 50), (14, 15)], [(31, 32), (50, 51), (15, 60)]):
        close(kernels.step(tokens, spans), reference.step(tokens, spans))
    same_blocks(kernels, reference)


def tokens_without_a_block_are_not_written() -> None:
    plan = PLANS["a latent for each head"]
    tokens = tokens_of(plan, torch.float32, 40, 1)
    _, kernels = engines(plan, torch.float32)
    kernels.step(tokens, [(0, 39)])
    caches = kernels.caches_of([0, 1], [40], kept=40)
    before = kernels.caches[1].clone()
    query, key, value = (x[39:] for x in tokens[0])
    kernels.layer.write_and_attend(caches, query, key, value, query.new_empty((1, 4, 8)))
    assert torch.equal(kernels.caches[1], before)


def other_tensors_are_left_to_torch() -> None:
    _, kernels = engines(PLANS["a latent for each head"], torch.float32)
    step, query = kernels.layer.compiled, torch.zeros(1, 4, 16)
    caches = kernels.caches_of([0, 1], [40])
    assert step is not None and step.serves(caches, query) and step.writes(caches.batch)
    assert not step.serves(caches, query.bfloat16())
    mixed = kernels.caches_of([0, 1, 4], [40, 30])
    assert step.serves(mixed, query) and not step.writes(mixed.batch)
    assert not step.serves(kernels.caches_of([0, 2], [40]), query)  # no sequence has one new token
    odd = replace(caches, window=replace(caches.window, cache=caches.window.cache[..., :-1].contiguous()))
    assert not step.serves(odd, query)  # rows of an odd number of bytes would misalign elements


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        nothing_is_read_back_and_sequences_of_no_tokens_are_left_out,
        sequences_with_one_new_token_stand_beside_others,
        tokens_without_a_block_are_not_written,
        other_tensors_are_left_to_torch,
    )
}
