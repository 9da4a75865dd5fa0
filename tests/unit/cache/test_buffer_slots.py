"""Latents in slots against static layers and a slow reference."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from buffered_decoder import (
    CLOSE,
    D,
    G,
    LatentReference,
    caches,
    call,
    coded_plan,
    compiled_with,
    decoder,
    exact_plan,
    sites_of,
    words,
)
from hand_plans import CODED
from naive import naive_code
from torch import Tensor

from fhopt.cache import buffer_slots
from fhopt.cache.store import Bases
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.module_buffer import Places
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan
from fhopt.plan.window import ResidualWindow

pytestmark = pytest.mark.usefixtures("traced_only")


def one_latent_plan(model: Any, window_bits: int) -> LatentPlan:
    """A plan with half of the channels of keys and values, in one latent."""
    basis = torch.linalg.qr(torch.randn(G * 2 * D, 32, generator=torch.Generator().manual_seed(5)))[0]
    keys, values = basis.unflatten(0, (G, 2 * D)).split(D, 1)
    sides = SidePlan(basis.T[None], keys, CODED * 2), SidePlan(basis.T[None, :, :0], values, CODED * 2)
    sites = tuple(SitePlan(site, "input", *sides) for site in sites_of(model))
    return LatentPlan(sites, sinks=3, recent=8, block=8, window_bits=window_bits)


# --------------------------------------------------------------------------------------------------- unquantized


def test_tokens_may_be_written_over_in_any_order() -> None:
    """Chunks, going back, restarting at 0, a gap: the slots always hold the last write."""
    model = decoder()
    plain, compiled = copy.deepcopy(model), compiled_with(model, exact_plan(model))
    for start, count in [(0, 40), (40, 1), (41, 1), (30, 1), (31, 7), (0, 25), (25, 1), (60, 2), (26, 30), (10, 1)]:
        new = words(count)
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)


def test_of_two_tokens_in_one_slot_only_one_counts() -> None:
    model, at = decoder(), torch.tensor([4, 4, 4, 5, 6])
    plain, compiled = copy.deepcopy(model), compiled_with(model, exact_plan(model))
    with torch.no_grad():
        for start in (0, 5):
            ids = words(5)
            torch.testing.assert_close(compiled(ids, at + start, 0), plain(ids, at + start, 0), **CLOSE)


def test_tokens_already_in_a_buffer_are_encoded() -> None:
    model = decoder()
    for cache in caches(model):
        cache.normal_()
    plain = copy.deepcopy(model)
    compiled = compiled_with(model, exact_plan(model))
    for start in (50, 51):
        new = words(1)
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)


# --------------------------------------------------------------------------------------------------- quantized


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window_bits", "tiers"),
    [(16, CODED), (16, None), (8, CODED), (8, ()), (8, None)],  # unquantized with 16 bits: the exact plans above
    ids=["16 bits, coded", "16 bits, one latent", "8 bits, coded", "8 bits, uncoded", "8 bits, one latent"],
)
def test_a_lossy_plan_gives_what_static_latent_layers_give(window_bits: int, tiers: Any) -> None:
    model, ids = decoder(), words(90)
    is_one = tiers is None
    plan = one_latent_plan(model, window_bits) if is_one else coded_plan(model, tiers, window_bits=window_bits)
    reference, plain = LatentReference(copy.deepcopy(model), plan), copy.deepcopy(model)
    compiled, errors = compiled_with(model, plan), []
    for start, stop in [(0, 40), *((t, t + 1) for t in range(40, 60)), (60, 70), (70, 71)]:
        new = ids[:, start:stop]
        found = call(compiled, new, start)
        torch.testing.assert_close(found, call(reference, new, start), rtol=1e-3, atol=1e-3)
        errors.append(float((found - call(plain, new, start)).abs().max()))
    assert max(errors) > (1e-7 if tiers == () else 1e-2)


class _Written:
    """Reference of the slots of `fhopt.cache.module_buffers`: a dict of tokens, and the contents of the ring."""

    def __init__(self, plan: SitePlan, places: Places) -> None:
        self.plan, self.places = plan, places
        zero = torch.zeros(1, G, 1, D, dtype=torch.float64)
        self.exact = dict.fromkeys(range(places.tokens), (zero, zero))
        self.coded = dict(self.exact)
        self.ring: dict[int, int] = {}  # place -> slot

    def read(self, start: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values seen by a call whose first new token goes into slot `start`."""
        p = self.places.window
        quantized = max(0, start - p.sinks - p.recent) // p.block * p.block
        opened = {s for s in self.ring.values() if s >= p.sinks + quantized} | set(range(p.sinks))
        pairs = [(self.exact if s in opened else self.coded)[s] for s in range(self.places.tokens)]
        return torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2)

    def write(self, slots: list[int], keys: Tensor, values: Tensor) -> None:
        self.ring = {place: slot for place, slot in self.ring.items() if slot not in slots}
        for slot, *pair in zip(slots, keys.split(1, 2), values.split(1, 2), strict=True):
            self.exact[slot] = (pair[0], pair[1])
            self.coded[slot] = naive_code(pair[0], pair[1], self.plan)
            behind = slot - self.places.window.sinks
            if behind >= 0 and slot > max(slots) - self.places.window.capacity:
                self.ring[behind % self.places.window.capacity] = slot


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_writes_leaves_what_a_slow_reference_holds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = Places(50, ResidualWindow(sinks=3, recent=6, block=4))
    plan = random_site(CODED if seed % 2 else ())
    slots, slow = buffer_slots.BufferSlots(plan.key, plan.value, False, places), _Written(plan, places)
    slots.place(*[Bases(side.encode, side.decode) for side in (plan.key, plan.value)])
    blank = torch.zeros(1, G, places.tokens, D, dtype=torch.float64)
    slots.start(blank, blank)
    for _ in range(25):
        count = int(torch.randint(1, 16, (), generator=generator))
        at = torch.randperm(places.tokens, generator=generator)[:count].sort().values
        if torch.rand((), generator=generator) < 0.7:  # consecutive tokens
            at = torch.arange(count) + torch.randint(places.tokens - count, (), generator=generator)
        key, value = (torch.randn(1, G, count, D, generator=generator, dtype=torch.float64) for _ in range(2))
        keys, values, latents = slots.read(key, value, at, places.window.quantized_tokens(at.min()))
        wanted = slow.read(int(at.min()))
        slots.write(key, value, at)
        slow.write(at.tolist(), key, value)
        for opened, side, past, fresh in zip(
            (keys, values), (latents.key, latents.value), wanted, (key, value), strict=True
        ):
            held = side.reconstruct().double().masked_fill(~latents.seen[:, None], math.nan)  # NaN if attended to
            torch.testing.assert_close(latents.place(opened, held, 2), past.index_copy(2, at, fresh), **CLOSE)
        assert latents.positions[latents.positions >= 0].unique().numel() == (latents.positions >= 0).sum()


def random_site(tiers: tuple[BitGroup, ...]) -> SitePlan:
    generator = torch.Generator().manual_seed(3)

    def basis() -> Tensor:
        return torch.randn(G, D, D, generator=generator, dtype=torch.float64) / 4

    sides = [SidePlan(basis(), basis(), tiers) for _ in range(2)]
    return SitePlan(sites_of(decoder())[0], "head", *sides)
