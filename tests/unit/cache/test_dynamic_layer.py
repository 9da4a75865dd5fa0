"""A dynamic layer against a naive reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_plans import CODED, random_plan
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from naive import naive_code, naive_round
from small_models import FittedModel
from torch import Tensor

from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.plan.latent_plan import LatentPlan

WINDOWS = (16, 8)


class CacheStates(RuleBasedStateMachine):
    """Any sequence of operations leaves the state of the naive reference.

    The reference holds lists of tokens [B,G,1,D], and encodes each one separately when it leaves the window.
    """

    plan: LatentPlan

    @initialize(batch=st.integers(1, 2))
    def start(self, batch: int) -> None:
        plan = self.plan
        self.layer = LatentLayer(plan, plan.sites[0], absorb=False)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rounded: list[bool] = []
        self.quantized, self.batch = 0, batch

    @rule(count=st.integers(1, 40), seed=st.integers(0, 9999))
    def append(self, count: int, seed: int) -> None:
        plan, generator = self.plan.sites[0], torch.Generator().manual_seed(seed)
        for tokens, dim in ((self.keys, plan.site.key_dim), (self.values, plan.site.value_dim)):
            shape = (self.batch, plan.site.kv_heads, count, dim)
            tokens += torch.randn(shape, generator=generator).to(plan.key.encode.dtype).split(1, 2)
        self.rounded += [False] * count
        found = self.layer.update(*[torch.cat(tokens[-count:], 2) for tokens in (self.keys, self.values)])
        for side, tokens in zip(found, (self.keys, self.values), strict=True):
            torch.testing.assert_close(side, torch.cat(tokens, 2), rtol=1e-3, atol=1e-3)
        while len(self.keys) - self.plan.sinks - self.quantized >= self.plan.recent + self.plan.block:
            for i in range(self.plan.sinks + self.quantized, self.plan.sinks + self.quantized + self.plan.block):
                self.keys[i], self.values[i] = naive_code(self.keys[i], self.values[i], plan)
                self.rounded[i] = False
            self.quantized += self.plan.block
        self.round_window()
        self.check()

    def round_window(self) -> None:
        if self.plan.window_bits == 8:
            for i in range(self.plan.sinks + self.quantized, len(self.keys)):
                if not self.rounded[i]:
                    self.keys[i], self.values[i] = naive_round(self.keys[i]), naive_round(self.values[i])
                    self.rounded[i] = True

    @precondition(lambda self: self.keys)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        length = len(self.keys)
        count = round(share * length)
        self.layer.crop(-count)
        for tokens in (self.keys, self.values, self.rounded):
            del tokens[length - count :]
        keep = max(0, length - count - self.plan.sinks) // self.plan.block * self.plan.block
        if count:
            self.quantized = min(self.quantized, keep)
        self.round_window()
        self.check()

    @precondition(lambda self: self.keys)
    @rule(indices=st.lists(st.integers(0, 1), min_size=1, max_size=3), how=st.sampled_from(["reorder", "select"]))
    def take(self, indices: list[int], how: str) -> None:
        index = torch.tensor([i % self.batch for i in indices])
        (self.layer.reorder_cache if how == "reorder" else self.layer.batch_select_indices)(index)
        self._take(index)

    @precondition(lambda self: self.keys and self.batch <= 2)
    @rule()
    def repeat(self) -> None:
        self.layer.batch_repeat_interleave(2)
        self._take(torch.arange(self.batch).repeat_interleave(2))

    @rule()
    def move(self) -> None:
        self.layer.offload()
        self.layer.prefetch()
        self.check()

    @rule()
    def reset(self) -> None:
        self.layer.reset()
        assert self.layer.keys is None and self.layer.values is None and not self.layer.tensors
        self.start(self.batch)

    def _take(self, index: Tensor) -> None:
        self.keys, self.values = ([t[index] for t in tokens] for tokens in (self.keys, self.values))
        self.batch = len(index)
        self.check()

    def check(self) -> None:
        assert self.layer.get_seq_length() == len(self.keys)
        assert self.layer.quantized == self.quantized
        assert self.layer.get_mask_sizes(3) == (len(self.keys) + 3, 0)
        for held, tokens in ((self.layer.keys, self.keys), (self.layer.values, self.values)):
            if tokens and held is not None:
                torch.testing.assert_close(held, torch.cat(tokens, 2), rtol=1e-3, atol=1e-3)
        plan, itemsize = self.plan.sites[0], self.plan.sites[0].key.encode.itemsize
        first = min(self.plan.sinks, len(self.keys))
        window = (len(self.keys) - first - self.quantized) * plan.window_bytes(self.plan.window_bits, itemsize)
        needed = window + first * plan.window_bytes(16, itemsize) + self.quantized * plan.token_bytes(itemsize)
        assert self.layer.nbytes >= self.batch * needed


def run_states(plan: LatentPlan) -> None:
    machine: Any = type("Machine", (CacheStates,), {"plan": plan})
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
    machine.TestCase().runTest()


@pytest.mark.parametrize("ratio", [1, 4])
def test_any_sequence_of_operations_leaves_the_state_of_a_naive_reference(llama: FittedModel, ratio: float) -> None:
    run_states(replace(llama.plan(ratio), sites=llama.plan(ratio).sites[:1]))


@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
@pytest.mark.parametrize("layout", ["head", "input"])
@pytest.mark.parametrize("window_bits", WINDOWS)
def test_so_do_quantized_windows_and_shared_rows(window_bits: int, layout: str, tiers: Any) -> None:
    run_states(random_plan(layout, tiers, window_bits=window_bits, sinks=3))
