"""K/V buffers of hand-written modules, replaced by latents: any spelling and order of writes, no memory."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hand_plans import CODED
from naive import naive_code
from torch import Tensor, nn

from fhopt import buffers, fitting, passes
from fhopt.backend import last_outcome
from fhopt.capture import capture
from fhopt.errors import FhoptError
from fhopt.layers import StaticLatentLayer
from fhopt.passes.latent_buffers import Places
from fhopt.spec import LatentPlan, SidePlan, SitePlan, Tier
from fhopt.storage import Bases

H, G, D, C, V, SLOTS = 4, 2, 16, 64, 50, 96
CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=1e-4)  # q D . z and q . D z round differently


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """AOTAutograd as in inductor, without the minutes that generating C++ takes, but for slow tests."""
    from torch._dynamo.backends.debugging import aot_eager

    def compile_fx(module: Any, inputs: Any, **options: Any) -> Any:
        return aot_eager(module, inputs)

    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)


# --------------------------------------------------------------------------------------------------- models

Write = Callable[[Tensor, Tensor, Tensor, int], Any]  # buffer, new tokens [B,G,S,D], positions [S], their first


def by_index(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache[:, :, at] = new


def by_slice(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache[:, :, start : start + new.shape[2]] = new


def by_index_copy(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache.index_copy_(2, at, new)


def by_copy(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache.narrow(2, start, new.shape[2]).copy_(new)


def by_slice_of_tokens(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache[:, start : start + new.shape[2]] = new.transpose(1, 2)


def by_index_put(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache.index_put_((at,), new.permute(2, 0, 1, 3))


BGTD, BTGD, TBGD = (0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)  # which of B, G, T, D each axis of a buffer is
SPELLINGS: dict[str, tuple[tuple[int, ...], Write]] = {
    "index": (BGTD, by_index),
    "slice": (BGTD, by_slice),
    "index_copy_": (BGTD, by_index_copy),
    "copy_": (BGTD, by_copy),
    "slice, [B,T,G,D]": (BTGD, by_slice_of_tokens),
    "index_put_, [T,B,G,D]": (TBGD, by_index_put),
}


class Attention(nn.Module):
    """Reads as many slots as `read` says: "all" with a mask, "some" with a mask, "no mask" for single tokens."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, spelling: str, read: str, batch: int) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(C, H * D), nn.Linear(H * D, C)
        self.wk, self.wv = nn.Linear(C, G * D), nn.Linear(C, G * D)
        self.layout, self.write = SPELLINGS[spelling]
        self.read = read
        sizes = (batch, G, SLOTS, D)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros([sizes[i] for i in self.layout]))

    def kept(self, cache: Tensor, new: Tensor, at: Tensor, start: int) -> Tensor:
        """All keys or values [B,G,T,D]."""
        self.write(cache, new, at, start)
        back = sorted(range(4), key=self.layout.__getitem__)
        cut = cache if self.read == "all" else cache.narrow(self.layout.index(2), 0, start + new.shape[2])
        return cut.permute(back)

    def forward(self, x: Tensor, at: Tensor, start: int, given: Any = None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, D).transpose(1, 2) for p in (self.wq, self.wk, self.wv))
        k_cache, v_cache = given or (self.k_cache, self.v_cache)
        keys, values = self.kept(k_cache, k, at, start), self.kept(v_cache, v, at, start)
        mask = None if self.read == "no mask" else torch.arange(keys.shape[2]) <= at[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(b, s, H * D))


class Decoder(nn.Module):
    """Learned positions."""

    def __init__(self, spelling: str = "index", read: str = "all", batch: int = 2, layers: int = 1) -> None:
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(V, C), nn.Embedding(SLOTS, C), nn.Linear(C, V)
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(layers)])
        self.layers = nn.ModuleList([Attention(spelling, read, batch) for _ in range(layers)])
        self.batch = batch

    def forward(self, ids: Tensor, at: Tensor, start: int, given: Any = None) -> Tensor:
        x = self.words(ids) + self.places(at)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), at, start, given)
        return self.out(x)


def decoder(*options: Any, **named: Any) -> Any:
    torch.manual_seed(1)
    model: Any = Decoder(*options, **named).eval()
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.wq.weight, layer.wk.weight, layer.wv.weight):
                weight.mul_(3)
    return model


def caches(model: Any) -> list[Tensor]:
    return [b for b in model.buffers() if b.dim() == 4]


def call(model: Any, ids: Tensor, start: int, by_number: bool = False) -> Tensor:
    """Logits of ids [B,S] at slots from `start` on; other models get 0 in its place, so that nothing is specialised."""
    at = torch.arange(start, start + ids.shape[1])
    with torch.no_grad():
        logits: Tensor = model(ids, at, start if by_number else 0)
    return logits


def words(count: int, batch: int = 2) -> Tensor:
    return torch.randint(1, V, (batch, count))


def sites_of(model: Any) -> list[Any]:
    """The sites of a decoder, which do not depend on how it writes its buffers."""
    return _sites_of(len(model.layers))


@functools.cache
def _sites_of(layers: int) -> list[Any]:
    with torch.no_grad(), torch.random.fork_rng():
        program = capture(decoder(layers=layers), (words(5), torch.arange(5), 0)).program
    return list(passes.find(program).sites.values())


def exact_plan(model: Any) -> LatentPlan:
    return fitting.exact_plan(sites_of(model), sinks=3, recent=8, block=8)


def coded_plan(model: Any, tiers: tuple[Tier, ...] = CODED, **options: Any) -> LatentPlan:
    """Rotated channels, half of them in 8 and half in 4 bits."""
    basis = torch.linalg.qr(torch.randn(G, D, D, generator=torch.Generator().manual_seed(5)))[0]
    side = SidePlan(basis, basis.transpose(1, 2).contiguous(), tiers)
    sites = tuple(SitePlan(site, "head", side, side) for site in sites_of(model))
    return LatentPlan(sites, **(dict(sinks=3, recent=8, block=8) | options))


def one_latent_plan(model: Any, window_bits: int) -> LatentPlan:
    """Half of the channels of keys and values, from one latent."""
    basis = torch.linalg.qr(torch.randn(G * 2 * D, 32, generator=torch.Generator().manual_seed(5)))[0]
    keys, values = basis.unflatten(0, (G, 2 * D)).split(D, 1)
    sides = SidePlan(basis.T[None], keys, CODED * 2), SidePlan(basis.T[None, :, :0], values, CODED * 2)
    sites = tuple(SitePlan(site, "input", *sides) for site in sites_of(model))
    return LatentPlan(sites, sinks=3, recent=8, block=8, window_bits=window_bits)


def compiled_with(model: Any, plan: LatentPlan) -> Any:
    options: dict[str, Any] = {"plan": plan}
    return torch.compile(model, backend="flashhead", options=options)


def compressed() -> dict[str, str]:
    outcome = last_outcome()
    assert outcome is not None
    return outcome.compressed


def caches_in_graph() -> list[str]:
    """Caches that the last graph reads or writes."""
    outcome = last_outcome()
    assert outcome is not None
    inputs = [n for n in outcome.program.graph.nodes if n.name in outcome.program.buffers]
    assert len([n for n in inputs if "cache" in n.name]) == 2 * len(outcome.sites)
    return [n.name for n in inputs if n.users]


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def is_by_number(spelling: str) -> bool:
    return spelling.partition(",")[0] in ("slice", "copy_")


# --------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_spelling_of_a_write_gives_the_numbers_of_the_module(spelling: str) -> None:
    from torch._dynamo.utils import counters

    is_common, by_number = spelling in ("index", "slice"), is_by_number(spelling)
    model, last = decoder(spelling, layers=2 if is_common else 1), 80 if is_common else 32
    plain, ids, plan = copy.deepcopy(model), words(90), exact_plan(model)
    compiled = compiled_with(model, plan)
    counters.clear()
    names = []
    for start, stop in [(0, 20), *((t, t + 1) for t in range(20, last)), (last, last + 10)]:
        new = ids[:, start:stop]
        found = call(compiled, new, start, by_number)
        torch.testing.assert_close(found, call(plain, new, start, by_number), **CLOSE)
        names.append(tuple(compressed()))
    assert set(names) == {tuple(f"layers.{i}" for i in range(len(model.layers)))} and not caches_in_graph()
    count, exact = graphs(), torch.compile(plain, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    for start, stop in [(0, 20), (20, 21), (21, 22), (22, 23), (80, 90)]:
        call(exact, ids[:, start:stop], start, by_number)
    assert count <= graphs() + 1
    assert all(cache.untyped_storage().nbytes() < cache.nbytes / 40 for cache in caches(model))


@pytest.mark.parametrize("read", ["some", "no mask"])
def test_a_buffer_may_be_read_up_to_its_newest_token(read: str) -> None:
    model = decoder("slice", read)
    plain, ids = copy.deepcopy(model), words(60)
    compiled = compiled_with(model, exact_plan(decoder("slice", "some")))
    first = 20 if read == "some" else 1
    for start, stop in [(0, first), *((t, t + 1) for t in range(first, 40)), *([(40, 60)] if first > 1 else [])]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(compiled, new, start, True), call(plain, new, start, True), **CLOSE)
    assert compressed()


def test_tokens_may_be_written_over_in_any_order() -> None:
    """Chunks, going back, starting again at 0, a gap: whatever is done, the slots hold what was written last."""
    model = decoder()
    plain, compiled = copy.deepcopy(model), compiled_with(model, exact_plan(model))
    for start, count in [(0, 40), (40, 1), (41, 1), (30, 1), (31, 7), (0, 25), (25, 1), (60, 2), (26, 30), (10, 1)]:
        new = words(count)
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)


def test_of_two_tokens_in_one_slot_one_counts() -> None:
    model, at = decoder(), torch.tensor([4, 4, 4, 5, 6])
    plain, compiled = copy.deepcopy(model), compiled_with(model, exact_plan(model))
    with torch.no_grad():
        for start in (0, 5):
            ids = words(5)
            torch.testing.assert_close(compiled(ids, at + start, 0), plain(ids, at + start, 0), **CLOSE)


def test_tokens_that_a_buffer_holds_already_are_coded() -> None:
    model = decoder()
    for cache in caches(model):
        cache.normal_()
    plain = copy.deepcopy(model)
    compiled = compiled_with(model, exact_plan(model))
    for start in (50, 51):
        new = words(1)
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)


def test_new_weights_count_at_once() -> None:
    model = decoder()
    plain, compiled = copy.deepcopy(model), compiled_with(model, exact_plan(model))
    ids = words(40)
    for start, stop in [(0, 20), (20, 21), (21, 22)]:
        torch.testing.assert_close(
            call(compiled, ids[:, start:stop], start), call(plain, ids[:, start:stop], start), **CLOSE
        )
        with torch.no_grad():
            for parameters in zip(model.parameters(), plain.parameters(), strict=True):
                for parameter in parameters:
                    parameter.mul_(1.05)


def test_a_cache_may_be_a_plain_attribute() -> None:
    model = decoder()
    plan = exact_plan(model)
    for layer in model.layers:
        del layer._buffers["k_cache"], layer._buffers["v_cache"]
        layer.k_cache, layer.v_cache = torch.zeros(2, G, SLOTS, D), torch.zeros(2, G, SLOTS, D)
    plain, compiled, ids = copy.deepcopy(model), compiled_with(model, plan), words(30)
    for start, stop in [(0, 20), (20, 21), (21, 22)]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)
    assert compressed() and buffers.is_released(model.layers[0].k_cache)


def test_inference_mode_is_the_same() -> None:
    model = decoder()
    plain, compiled, ids = copy.deepcopy(model), compiled_with(model, exact_plan(model)), words(30)
    with torch.inference_mode():
        for start, stop in [(0, 20), (20, 21), (21, 22)]:
            new, at = ids[:, start:stop], torch.arange(start, stop)
            torch.testing.assert_close(compiled(new, at, 0), plain(new, at, 0), **CLOSE)


# --------------------------------------------------------------------------------------------------- coded


class Reference(nn.Module):
    """The module with static latent layers in place of its buffers, uncompiled."""

    def __init__(self, model: Any, plan: LatentPlan) -> None:
        super().__init__()
        self.model = model
        for layer, site in zip(model.layers, plan.sites, strict=True):
            layer.cache = StaticLatentLayer(plan, site, SLOTS, absorb=False)
            layer.forward = functools.partial(self.attend, layer)

    @staticmethod
    def attend(layer: Any, x: Tensor, at: Tensor, start: int, given: Any) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, D).transpose(1, 2) for p in (layer.wq, layer.wk, layer.wv))
        keys, values = layer.cache.update(k, v)
        mask = torch.arange(SLOTS) <= at[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        result: Tensor = layer.wo(y.transpose(1, 2).reshape(b, s, H * D))
        return result

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


@pytest.mark.parametrize(
    ("window_bits", "tiers"),
    [(16, CODED), (16, None), (8, CODED), (8, ()), (8, None)],  # uncoded with 16 bits: the exact plans above
    ids=["16 bits, coded", "16 bits, one latent", "8 bits, coded", "8 bits, uncoded", "8 bits, one latent"],
)
def test_a_lossy_plan_gives_what_static_latent_layers_give(window_bits: int, tiers: Any) -> None:
    model, ids = decoder(), words(90)
    is_one = tiers is None
    plan = one_latent_plan(model, window_bits) if is_one else coded_plan(model, tiers, window_bits=window_bits)
    reference, plain = Reference(copy.deepcopy(model), plan), copy.deepcopy(model)
    compiled, errors = compiled_with(model, plan), []
    for start, stop in [(0, 40), *((t, t + 1) for t in range(40, 60)), (60, 70), (70, 71)]:
        new = ids[:, start:stop]
        found = call(compiled, new, start)
        torch.testing.assert_close(found, call(reference, new, start), rtol=1e-3, atol=1e-3)
        errors.append(float((found - call(plain, new, start)).abs().max()))
    assert max(errors) > (1e-7 if tiers == () else 1e-2)


@pytest.mark.slow
def test_inductor_compiles_the_same() -> None:
    model, ids = decoder(), words(60)
    plan = coded_plan(model)
    reference, compiled = Reference(copy.deepcopy(model), plan), compiled_with(model, plan)
    for start, stop in [(0, 40), (40, 41), (41, 42)]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(compiled, new, start), call(reference, new, start), rtol=1e-3, atol=1e-3)


class Written:
    """Slots as the module docstring of `fhopt.buffers` has it, slowly: a dict of tokens, and what the ring holds."""

    def __init__(self, plan: SitePlan, places: Places) -> None:
        self.plan, self.places = plan, places
        zero = torch.zeros(1, G, 1, D, dtype=torch.float64)
        self.exact = dict.fromkeys(range(places.tokens), (zero, zero))
        self.coded = dict(self.exact)
        self.ring: dict[int, int] = {}  # place -> slot

    def read(self, start: int) -> tuple[Tensor, Tensor]:
        """All keys and values as a call sees them whose first new token goes into slot `start`."""
        p = self.places
        sealed = max(0, start - p.sinks - p.recent) // p.block * p.block
        opened = {s for s in self.ring.values() if s >= p.sinks + sealed} | set(range(p.sinks))
        pairs = [(self.exact if s in opened else self.coded)[s] for s in range(p.tokens)]
        return torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2)

    def write(self, slots: list[int], keys: Tensor, values: Tensor) -> None:
        self.ring = {place: slot for place, slot in self.ring.items() if slot not in slots}
        for slot, *pair in zip(slots, keys.split(1, 2), values.split(1, 2), strict=True):
            self.exact[slot] = (pair[0], pair[1])
            self.coded[slot] = naive_code(pair[0], pair[1], self.plan)
            behind = slot - self.places.sinks
            if behind >= 0 and slot > max(slots) - self.places.window:
                self.ring[behind % self.places.window] = slot


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_writes_leaves_what_a_slow_reference_holds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = Places(tokens=50, sinks=3, recent=6, block=4, window_bits=16)
    plan = random_site(CODED if seed % 2 else ())
    slots, slow = buffers.Slots(plan.key, plan.value, False, places), Written(plan, places)
    slots.place(*[Bases(side.encode, side.decode) for side in (plan.key, plan.value)])
    blank = torch.zeros(1, G, places.tokens, D, dtype=torch.float64)
    slots.start(blank, blank)
    for _ in range(25):
        count = int(torch.randint(1, 16, (), generator=generator))
        at = torch.randperm(places.tokens, generator=generator)[:count].sort().values
        if torch.rand((), generator=generator) < 0.7:  # tokens in a row
            at = torch.arange(count) + torch.randint(places.tokens - count, (), generator=generator)
        key, value = (torch.randn(1, G, count, D, generator=generator, dtype=torch.float64) for _ in range(2))
        keys, values, latents = slots.read(key, value, at, places.sealed(at.min()))
        wanted = slow.read(int(at.min()))
        slots.write(key, value, at)
        slow.write(at.tolist(), key, value)
        for opened, side, past, fresh in zip(
            (keys, values), (latents.key, latents.value), wanted, (key, value), strict=True
        ):
            held = side.rebuild().double().masked_fill(~latents.seen[:, None], math.nan)  # who reads it sees NaN
            torch.testing.assert_close(latents.place(opened, held, 2), past.index_copy(2, at, fresh), **CLOSE)
        assert latents.positions[latents.positions >= 0].unique().numel() == (latents.positions >= 0).sum()


def random_site(tiers: tuple[Tier, ...]) -> SitePlan:
    generator = torch.Generator().manual_seed(3)

    def basis() -> Tensor:
        return torch.randn(G, D, D, generator=generator, dtype=torch.float64) / 4

    sides = [SidePlan(basis(), basis(), tiers) for _ in range(2)]
    return SitePlan(sites_of(decoder())[0], "head", *sides)


# --------------------------------------------------------------------------------------------------- memory


def test_the_buffers_give_their_memory_back_and_the_state_is_as_small_as_the_plan_says() -> None:
    model = decoder()
    plan = coded_plan(model)
    held = sum(cache.nbytes for cache in caches(model))
    call(compiled_with(model, plan), words(20), 0)
    assert all(cache.isnan().all() for cache in caches(model))  # what is read elsewhere
    state = buffers.state_of(model.layers[0].k_cache)
    rows, exact = (SLOTS - 3 + 1) * plan.sites[0].token_bytes(4), (3 + 1 + 16 + 1) * G * 2 * D * 4
    assert state is not None and state.nbytes == 2 * (rows + exact) + 16 * 8  # two sequences; slots of the ring
    assert sum(cache.untyped_storage().nbytes() for cache in caches(model)) < held / 40


def test_a_state_dies_with_its_buffers() -> None:
    model = decoder()
    call(compiled_with(model, exact_plan(model)), words(20), 0)
    before = len(buffers._states)
    for layer in model.layers:
        layer.k_cache, layer.v_cache = (torch.zeros(2, G, SLOTS, D) for _ in range(2))
    assert len(buffers._states) == before - 1


def test_what_writes_a_buffer_elsewhere_is_found() -> None:
    model = decoder()
    compiled = compiled_with(model, exact_plan(model))
    call(compiled, words(20), 0)
    assert bool(call(model, words(1), 20).isnan().all())  # uncompiled
    with pytest.raises(FhoptError, match="written outside of a compiled graph"):
        call(compiled, words(1), 21)


def test_a_copy_of_a_module_has_no_tokens_and_says_so() -> None:
    model = decoder()
    plan = exact_plan(model)
    call(compiled_with(model, plan), words(20), 0)
    for other in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        with pytest.raises(FhoptError, match=r"the tokens in its cache are lost.*copy.*zero_"):
            call(compiled_with(other, plan), words(1), 20)


def test_a_buffer_of_zeros_starts_again() -> None:
    model = decoder()
    plain, compiled = copy.deepcopy(model), compiled_with(model, exact_plan(model))
    call(compiled, words(20), 0)
    ids = words(30)
    for cache in caches(model):
        cache.zero_()
    for start, stop in [(0, 20), (20, 21)]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)
    assert all(cache.untyped_storage().nbytes() < cache.nbytes / 40 for cache in caches(model))
    caches(model)[0].zero_()
    with pytest.raises(FhoptError, match="only one was filled anew"):
        call(compiled, ids[:, 21:22], 21)


def test_restored_buffers_hold_what_the_latents_kept() -> None:
    for spelling in ("index", "index_put_, [T,B,G,D]"):
        model, ids = decoder(spelling), words(60)
        plain, plan = copy.deepcopy(model), exact_plan(model)
        compiled = compiled_with(model, plan)
        for start, stop in [(0, 40), (40, 41)]:
            call(compiled, ids[:, start:stop], start)
            call(plain, ids[:, start:stop], start)
        buffers.restore(model.buffers())
        for found, wanted in zip(caches(model), caches(plain), strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)
            assert found.is_contiguous()
        torch.testing.assert_close(call(model, ids[:, 41:42], 41), call(plain, ids[:, 41:42], 41), **CLOSE)
        torch.testing.assert_close(call(compiled, ids[:, 42:43], 42), call(plain, ids[:, 42:43], 42), **CLOSE)


def test_buffers_that_are_loaded_are_taken_over() -> None:
    model = decoder()
    plain, compiled, ids = copy.deepcopy(model), compiled_with(model, exact_plan(model)), words(60)
    call(compiled, words(30), 0)
    call(plain, ids[:, :40], 0)
    model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
    for start in (40, 41):
        new = ids[:, start : start + 1]
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)


def test_two_modules_and_two_plans_do_not_mix() -> None:
    first, second, ids = decoder(), decoder(), words(60)
    plain, plan = copy.deepcopy(first), coded_plan(first)
    reference = Reference(copy.deepcopy(second), plan)
    one, other = compiled_with(first, exact_plan(first)), compiled_with(second, plan)
    for start, stop in [(0, 40), (40, 41), (41, 42)]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(one, new, start), call(plain, new, start), **CLOSE)
        torch.testing.assert_close(call(other, new, start), call(reference, new, start), rtol=1e-3, atol=1e-3)
    with pytest.raises(FhoptError, match="latents of another plan"):
        call(compiled_with(first, plan), ids[:, 42:43], 42)


# --------------------------------------------------------------------------------------------------- misses


def reasons(model: Any, *args: Any, plan: LatentPlan | None = None) -> str:
    """Why nothing of a module is replaced."""
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="the plan changed nothing"):
        torch._dynamo.reset()
        compiled_with(model, plan or exact_plan(decoder()))(*(args or (words(5), torch.arange(5), 0)))
    outcome = last_outcome()
    assert outcome is not None
    return "; ".join(sorted({m.reason for m in outcome.missed}))


class Changed(Decoder):
    """A decoder of one changed step."""

    def __init__(self, change: Callable[[Any, Tensor, Tensor, Tensor], Tensor], batch: int = 2) -> None:
        super().__init__(batch=batch)
        for layer in self.layers:
            setattr(layer, "kept", functools.partial(self.step, layer, change))  # noqa: B010  # mypy: a method

    @staticmethod
    def step(layer: Any, change: Any, cache: Tensor, new: Tensor, at: Tensor, start: int) -> Any:
        return change(layer, cache, new, at)


def part_of_the_batch(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[: new.shape[0], :, at] = new
    return cache[: new.shape[0]]


def rolled(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache.copy_(cache.roll(-1, 2))
    cache[:, :, at] = new
    return cache


def later_slots(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at] = new
    return cache[:, :, 1:]


def a_slot_for_each(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[torch.arange(2)[:, None], :, at + torch.arange(2)[:, None]] = new.transpose(1, 2)
    return cache


def halves(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at, :8] = new[..., :8]
    return cache


def added(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache.index_add_(2, at, new)
    return cache


def read_twice(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at] = new
    return cache + 0 * cache.mean()


def reordered(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at] = new
    return cache[at[:2]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (part_of_the_batch, "not read for all of its sequences"),
        (rolled, "changed by copy_|changed by clone|changed by roll|moves the tokens"),
        (later_slots, "not read from the first slot on"),
        (a_slot_for_each, "could not be run|other slots"),
        (halves, "other slots"),
        (added, "changed by index_add"),
        (read_twice, "read through mean"),
        (reordered, "read through getitem"),
    ],
)
def test_what_is_not_tokens_in_slots_is_left_alone(change: Any, reason: str) -> None:
    model, batch = Changed(change).eval(), 1 if change is part_of_the_batch else 2
    found = reasons(model, words(5, batch), torch.arange(5), 0)
    assert any(part in found for part in reason.split("|")), found


def test_a_graph_that_trains_keeps_its_buffers() -> None:
    model = decoder()
    with pytest.warns(RuntimeWarning, match="the graph trains"):
        compiled_with(model, exact_plan(model))(words(5), torch.arange(5), 0)


def test_caches_of_the_caller_are_left_alone() -> None:
    given = (torch.zeros(2, G, SLOTS, D), torch.zeros(2, G, SLOTS, D))
    assert "latents live in a LatentCache" in reasons(decoder(), words(5), torch.arange(5), 0, given)
    assert given[0].is_contiguous() and not given[0].isnan().any()


def test_a_buffer_that_is_a_view_is_left_alone() -> None:
    model = decoder()
    for layer in model.layers:
        layer.k_cache, layer.v_cache = (torch.zeros(3, 2, G, SLOTS, D)[1] for _ in range(2))
    assert "has no memory of its own" in reasons(model)


def test_more_sinks_than_slots_are_left_alone() -> None:
    plan = fitting.exact_plan(sites_of(decoder()), sinks=SLOTS, recent=8, block=8)
    assert "all of which the plan keeps exact" in reasons(decoder(), plan=plan)


def test_a_graph_that_needs_the_tokens_of_latents_is_refused() -> None:
    model = decoder()
    plan = exact_plan(model)
    call(compiled_with(model, plan), words(20), 0)
    with pytest.raises(Exception, match=r"k_cache holds latents, and this graph needs its tokens: the graph trains"):
        compiled_with(model, plan)(words(1), torch.tensor([20]), 0)
