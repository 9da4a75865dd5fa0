"""Bits and plans."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_plans import SITE
from small_models import TOKENS, Fitted, found, numbered, run, tiny_llama
from torch import Tensor

from fhopt import calibrate, fitting, ops, passes
from fhopt.bases import Basis, joint_basis
from fhopt.errors import FhoptError
from fhopt.files import write_folder
from fhopt.spec import TIER_QUANTUM, AttentionSite, LatentPlan, SideStatistics, SitePlan, SiteStatistics

MIXING = ("band", "freq", "head", "identity")
RATIOS = (1.5, 2.0, 3.0, 4.0, 6.0)


# ---- bases by hand


def basis(groups: int, *chunks: float) -> Basis:
    """Identity on `groups` latent heads whose chunks of 8 channels have these variances."""
    width = TIER_QUANTUM * len(chunks)
    eye = torch.eye(width, dtype=torch.float64).expand(groups, width, width)
    variance = torch.tensor(chunks, dtype=torch.float64).repeat_interleave(TIER_QUANTUM).expand(groups, width)
    return Basis(eye, eye, variance)


def site(name: str) -> AttentionSite:
    return replace(SITE, name=name, value_dim=16)


def statistics(*names: str) -> dict[str, SiteStatistics]:
    """Statistics of sites with 2 kv heads of 16; the numbers do not matter where bases are given."""
    zero = torch.zeros(1, 32, 32, dtype=torch.float64)
    return {n: SiteStatistics(site(n), SideStatistics(1, zero, zero), SideStatistics(1, zero, zero)) for n in names}


def pair(side: Basis) -> tuple[Basis, ...]:
    return side, side


STEEP, FLAT = (1.0, 0.01, 1e-4, 1e-6), (1.0, 1.0, 1.0, 1.0)


# ---- layouts


def test_layouts_compete_and_the_worse_one_loses_at_each_site() -> None:
    table: fitting.Candidates = {
        "steep": {"band": pair(basis(1, *STEEP)), "identity": pair(basis(2, 0.5, 0.5))},
        "flat": {"band": pair(basis(1, *FLAT)), "identity": pair(basis(2, 1.0, 1e-3))},
    }
    for names in (("steep", "flat"), ("flat", "steep")):
        given = {n: table[n] for n in names}
        plan = fitting.fit(statistics(*names), found=given, ratio=5, sinks=0, recent=1, block=1)
        assert {s.site.name: s.layout for s in plan.sites} == {"steep": "band", "flat": "identity"}


def test_plain_rounding_is_chosen_where_it_is_best(llama: Fitted) -> None:
    """With costs of `band` made a hundred times as large, no site has it; the plan is that of plain rounding."""
    dear: fitting.Candidates = {
        name: {
            "band": tuple(replace(b, costs={n: 100 * c for n, c in b.costs.items()}) for b in bases["band"]),
            "identity": bases["identity"],
        }
        for name, bases in llama.found.items()
    }
    plan = fitting.fit(llama.statistics, found=dear, ratio=4, recent=8, block=8, tokens=TOKENS)
    assert {s.layout for s in plan.sites} == {"identity"}
    assert plan.digest() == llama.plan(4, "identity").digest()


def test_a_layout_that_does_not_fit_into_the_bytes_is_not_chosen() -> None:
    """One chunk of 1 bit and the scales take 48 bits with one latent head and 96 with two; there are 64."""
    names = ("a", "b")
    given: fitting.Candidates = {
        n: {"band": pair(basis(1, *FLAT)), "identity": pair(basis(2, 1e-9, 1e-9))} for n in names
    }
    plan = fitting.fit(statistics(*names), found=given, ratio=16, sinks=0, recent=1, block=1, tokens=100_000)
    assert {s.layout for s in plan.sites} == {"band"}


@pytest.mark.parametrize("ratio", RATIOS)
def test_competing_layouts_are_never_worse_than_one_for_all(fitted: Fitted, ratio: float) -> None:
    layouts = ["band", "identity", *(["input"] if ratio > 2 and has_joint(fitted) else [])]
    assert nats(fitted.plan(ratio, "auto")) <= min(nats(fitted.plan(ratio, layout)) for layout in layouts)


def has_joint(fitted: Fitted) -> bool:
    return all("input" in table for table in fitted.found.values())


def test_the_chosen_layouts_are_recorded(fitted: Fitted, tmp_path: Path) -> None:
    for layout in MIXING:
        plan = LatentPlan.load(fitted.plan(4, layout).save(tmp_path / layout))
        assert {s.layout for s in plan.sites} == {plan.provenance["layout"]} == {layout}
    plan = LatentPlan.load(fitted.plan(4, "auto").save(tmp_path / "auto"))
    assert plan.provenance["layout"] == "auto"
    assert {s.layout for s in plan.sites} <= {"input", *fitting.COMPETING}
    assert [row["layout"] for row in fitting.describe(plan)] == [s.layout for s in plan.sites]


def test_transform_coding_predicts_less_loss_than_plain_rounding(fitted: Fitted) -> None:
    for ratio in (3.0, 4.0):
        assert nats(fitted.plan(ratio)) < nats(fitted.plan(ratio, "identity"))


# ---- one latent for keys and values


def test_a_joint_latent_gives_back_keys_and_values_and_halves_the_cache(gpt2: Fitted) -> None:
    plan = gpt2.plan(1, "input")
    assert 2 <= plan.ratio(10**6) < 2.1  # 63 numbers in place of 128; the window is exact
    for fitted_site in plan.sites:
        rows = joint_basis(gpt2.statistics[fitted_site.site.name])
        assert fitted_site.is_shared and rows is not None
        z = torch.randn(2, 1, 5, len(rows))
        x = (z @ rows.float()).unflatten(-1, (4, 32)).squeeze(1).transpose(1, 2)  # [B, G, T, D+E]
        latent = ops.encode(x, fitted_site.key.encode)
        both = [ops.decode(latent, side.decode) for side in (fitted_site.key, fitted_site.value)]
        torch.testing.assert_close(torch.cat(both, -1), x, rtol=1e-4, atol=1e-5)  # float32 products of 128 numbers


@pytest.mark.parametrize("ratio", [4.0, 6.0])
def test_a_joint_latent_is_coded_too_and_costs_less_than_two(gpt2: Fitted, ratio: float) -> None:
    """Keys and values of GPT-2 hold each number of their input twice; `auto` finds out."""
    plan = gpt2.plan(ratio, "input")
    assert ratio <= plan.ratio(TOKENS) < ratio * 1.05
    assert all(s.is_shared and s.key.tiers == s.value.tiers for s in plan.sites)
    assert nats(plan) < nats(gpt2.plan(ratio, "band"))
    assert gpt2.plan(ratio, "auto").digest() == plan.digest()


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_joint_latent_of_keys_that_rotate_is_refused(llama: Fitted, ratio: float) -> None:
    with pytest.raises(FhoptError, match=r"layers\.0\.self_attn: .*its keys rotate.* Use another layout"):
        llama.plan(ratio, "input")


def test_a_joint_latent_as_wide_as_what_it_holds_is_refused(gpt2: Fitted) -> None:
    full = {
        n: replace(s, key=replace(s.key, moment=s.key.moment + torch.eye(64, dtype=torch.float64)))
        for n, s in gpt2.statistics.items()
    }
    with pytest.raises(FhoptError, match="as wide as their input"):
        fitting.fit(full, ratio=1, layout="input")


# ---- sizes


@pytest.mark.parametrize("ratio", [2.0, 4.0, 6.0])
@pytest.mark.parametrize("layout", [*MIXING, "auto"])
def test_the_whole_cache_is_as_small_as_asked(fitted: Fitted, layout: str, ratio: float) -> None:
    plan = fitted.plan(ratio, layout)
    assert ratio <= plan.ratio(TOKENS) < ratio * 1.05  # two small sites: what is left is less than one chunk


@pytest.mark.parametrize("options", [dict(window_bits=16), dict(sinks=0), dict(tokens=512), dict(recent=64, block=64)])
def test_sinks_and_window_count(llama: Fitted, options: dict[str, Any]) -> None:
    plan = llama.plan(3, **options)
    assert 3 <= plan.ratio(options.get("tokens", TOKENS)) < 3.15


@pytest.mark.parametrize(
    ("window_bits", "bits"),
    [(8, 186), (16, 182)],
    # 1000 tokens of 2 * (16 + 8) numbers: 96 bytes exact, 48 + 2 * 2 scales of 2 bytes = 56 in an 8-bit window.
    # 4 sinks, 984 sealed (988 // 8 blocks), 12 open. A quarter of 96,000 bytes is 24,000:
    # 8 * (24,000 - 4 * 96 - 12 * 56) / 984 = 186.5; 8 * (24,000 - 16 * 96) / 984 = 182.6
)
def test_bits_of_a_sealed_token_are_what_sinks_and_window_leave(window_bits: int, bits: int) -> None:
    budget = fitting.Budget(4.0, sinks=4, recent=8, block=8, window_bits=window_bits, tokens=1000)
    assert budget.code_bits([SITE]) == bits


def test_a_context_without_sealed_tokens_is_refused(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match=r"19 tokens are all exact .* longer context"):
        llama.plan(2, tokens=19)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", MIXING)
def test_tiers_fall_in_bits_and_cover_whole_chunks(fitted: Fitted, layout: str, ratio: float) -> None:
    for fitted_site in fitted.plan(ratio, layout).sites:
        for side in (fitted_site.key, fitted_site.value):
            bits = [t.bits for t in side.tiers]
            assert bits == sorted(set(bits), reverse=True)
            assert all(t.width % TIER_QUANTUM == 0 and t.width for t in side.tiers)
            assert sum(t.width for t in side.tiers) == side.width
            assert all(t.step == fitting.STEPS.get(t.bits, 1.0) for t in side.tiers)


def test_channels_go_into_tiers_with_their_bits() -> None:
    """The second chunk costs most, so it stands first; the one that costs nothing is dropped."""
    found_pair: tuple[Basis, ...] = basis(1, 0.01, 1.0, 1e-12, 1e-12), basis(1, 1.0, 1e-12, 1e-12, 1e-12)
    plan = fitting.fit(
        statistics("a"), found={"a": {"band": found_pair}}, ratio=10, layout="band", sinks=0, recent=1, block=1,
        tokens=100_000,
    )  # fmt: skip
    key = plan.sites[0].key
    assert [t.width for t in key.tiers] == [8, 8] and key.width == 16
    kept = key.encode[0].argmax(1).tolist()
    assert kept == [*range(8, 16), *range(8)]
    assert torch.equal(key.decode.reshape(1, 32, 16).mT, key.encode)


def test_only_bits_that_were_allowed_are_given(llama: Fitted) -> None:
    for fitted_site in llama.plan(4, bits=(2, 8)).sites:
        assert {t.bits for side in (fitted_site.key, fitted_site.value) for t in side.tiers} <= {2, 8}


# ---- for a GPU


def spectrum(channels: int, groups: int, fall: float, seed: int) -> Basis:
    """Costs that fall by `fall` over the channels, not quite in order."""
    torch.manual_seed(seed)
    variance = fall ** (-torch.arange(channels, dtype=torch.float64) / channels) * (0.5 + torch.rand(channels))
    eye = torch.eye(channels, dtype=torch.float64).expand(groups, channels, channels)
    return Basis(eye, eye, variance.expand(groups, channels))


def wide(groups: int, channels: int, ratio: float, device: str | None = "h100", **options: Any) -> LatentPlan:
    """Two sites of 4 kv heads, with so many channels in each latent head."""
    names, dim = ("steep", "flat"), groups * channels // 4
    kept: dict[str, SiteStatistics] = {
        n: replace(s, site=replace(site(n), heads=4, kv_heads=4, key_dim=dim, value_dim=dim))
        for n, s in statistics(*names).items()
    }
    table: fitting.Candidates = {
        n: {"band": (spectrum(channels, groups, fall, 0), spectrum(channels, groups, fall / 2, 1))}
        for n, fall in zip(names, (1000.0, 10.0), strict=True)
    }
    chosen: dict[str, Any] = dict(sinks=0, recent=1, block=1, tokens=100_000, layout="band") | options
    return fitting.fit(kept, found=table, ratio=ratio, device=device, **chosen)


@pytest.mark.parametrize(("groups", "channels"), [(1, 256), (2, 128), (4, 64), (4, 60), (1, 200)])
@pytest.mark.parametrize("ratio", [2.5, 4.0, 6.0])
def test_for_a_gpu_rows_are_few_tiers_of_whole_planes(groups: int, channels: int, ratio: float) -> None:
    for fitted_site in wide(groups, channels, ratio).sites:
        for side in (fitted_site.key, fitted_site.value):
            bits = [t.bits for t in side.tiers]
            assert 0 < len(bits) <= 3 and bits == sorted(set(bits) & set(fitting.GPU_BITS), reverse=True)
            assert all(t.width * t.bits % (8 * fitting.PLANE) == 0 for t in side.tiers)
            assert side.row_bytes() % 16 == 0


@pytest.mark.parametrize(("groups", "channels"), [(1, 256), (2, 128), (4, 64)])
@pytest.mark.parametrize("ratio", [2.5, 4.0, 6.0])
def test_for_a_gpu_no_plane_is_left_of_the_budget(groups: int, channels: int, ratio: float) -> None:
    plan = wide(groups, channels, ratio)
    budget = fitting.Budget(ratio, sinks=0, recent=1, block=1, tokens=100_000)
    asked = budget.code_bits([s.site for s in plan.sites])
    given = sum(8 * s.token_bytes() for s in plan.sites)
    assert 0 <= asked - given < 8 * fitting.PLANE * groups


@pytest.mark.parametrize("levels", [(2, 4, 8), (4, 8), (2, 8), (4,)])
def test_tiers_for_a_gpu_are_the_best_of_all_for_their_bytes(levels: tuple[int, ...]) -> None:
    """Against all numbers of planes of each tier, channels in order of what they cost."""
    side = spectrum(88, 1, 300.0, 2)
    part = fitting._side(side, fitting._Grain(levels, fitting.PLANE)).parts[0]
    dropped = side.variance[0].unflatten(0, (-1, TIER_QUANTUM)).sum(1) / 2
    costs = torch.cat([dropped.sort(descending=True).values, torch.zeros(5)])
    best = dict.fromkeys(range(len(part.bits)), float("inf"))
    for counts in itertools.product(range(9), repeat=len(levels)):
        ends = list(itertools.accumulate(n * 16 // b for n, b in zip(counts, sorted(levels)[::-1], strict=True)))
        if ends[-1] > 16 // min(levels) * -(-11 * min(levels) // 16) or sum(counts) not in best:
            continue
        tiers = zip([0, *ends], [*ends, 16], [*sorted(levels)[::-1], 0], strict=True)
        nats = sum(float(costs[begin:end].sum()) * fitting.DISTORTION[b] for begin, end, b in tiers)
        best[sum(counts)] = min(best[sum(counts)], nats)
    assert part.bits == [8 * fitting.PLANE * n for n in best]
    assert part.nats == pytest.approx(list(best.values()))
    for n, nats in best.items():  # and the chunks are those that the loss was counted for
        given = part.chunks(n)
        assert sum(given) * TIER_QUANTUM == part.bits[n]
        padded = torch.cat([dropped, torch.zeros(len(given) - 11)])
        assert sum(float(c) * fitting.DISTORTION[b] for c, b in zip(padded, given, strict=True)) == pytest.approx(nats)


def test_a_cpu_and_no_device_get_the_same_bits() -> None:
    plans = [wide(1, 256, 4.0, device) for device in (None, "cpu", "cpu:4")]
    assert len({plan.digest() for plan in plans}) == 1
    assert any(t.bits not in fitting.GPU_BITS for s in plans[0].sites for t in s.key.tiers)


def test_whole_planes_cost_less_than_a_tenth_of_the_bytes() -> None:
    """Against chunks of the same bits, which a plan for a GPU would have without them."""
    for ratio in (3.0, 4.0):
        same = [nats(wide(1, 256, r, None, bits=fitting.GPU_BITS)) for r in (ratio, 1.1 * ratio)]
        assert same[0] <= nats(wide(1, 256, ratio)) < same[1]


def test_channels_of_planes_that_reach_past_the_last_one_hold_nothing() -> None:
    side = wide(4, 60, 1.5).sites[0].key
    assert [(t.bits, t.width) for t in side.tiers] == [(8, 64)]  # more bytes than it can use
    x = torch.randn(1, 4, 5, 60)
    latent = ops.encode(x, side.encode)
    assert latent.shape[-1] == side.width and int((latent == 0).all(2).sum()) == 4 * (side.width - 60)


def test_bits_that_make_no_kernel_for_a_gpu_are_refused() -> None:
    with pytest.raises(FhoptError, match=r"bits \[3, 5\] make no kernel for h100; expected some of 2, 4, 8"):
        wide(1, 256, 4.0, bits=(3, 5))
    with pytest.raises(FhoptError, match="device 'v100' is unknown"):
        wide(1, 256, 4.0, device="v100")


def test_a_ratio_that_leaves_no_plane_is_refused_before_calibration() -> None:
    sites, budget = [site("a")], fitting.Budget(6.0, sinks=0, recent=1, block=1, tokens=100_000)
    fitting.check_reach(sites, budget, fitting.BITS)  # 64 numbers: 21 bytes; two sides of 1 + 2 bytes are the least
    with pytest.raises(FhoptError, match="21 bytes for a sealed token, the least possible is 36"):
        fitting.check_reach(sites, budget, fitting.BITS, "h100")


@pytest.mark.parametrize("layout", [*MIXING, "auto"])
def test_a_larger_budget_never_costs_more(fitted: Fitted, layout: str) -> None:
    losses = [nats(fitted.plan(ratio, layout)) for ratio in RATIOS]
    assert losses == sorted(losses)


def test_a_head_size_that_is_no_multiple_of_a_chunk_is_padded(llama: Fitted) -> None:
    """12 channels are two chunks; the last 4 channels of the second hold nothing."""
    odd = replace(SITE, key_dim=6, value_dim=6)
    zero = torch.zeros(1, 12, 12, dtype=torch.float64)
    eye = torch.eye(12, dtype=torch.float64).unsqueeze(0)
    whole = Basis(eye, eye, torch.ones(1, 12, dtype=torch.float64))
    given: fitting.Candidates = {"a": {"band": (whole, whole)}}
    sides = SideStatistics(1, zero, zero), SideStatistics(1, zero, zero)
    plan = fitting.fit(
        {"a": SiteStatistics(odd, *sides)}, found=given, ratio=1.5, layout="band", sinks=0, recent=1, block=1
    )
    side = plan.sites[0].key
    assert side.width == 16
    x = torch.randn(1, 2, 5, 6)
    torch.testing.assert_close(ops.decode(ops.encode(x, side.encode), side.decode), x)


# ---- what a plan costs


def nats(plan: LatentPlan) -> float:
    return float(plan.provenance["predicted_nats"])


@pytest.mark.parametrize("layout", ["auto", *[pytest.param(x, marks=pytest.mark.slow) for x in ("band", "identity")]])
@pytest.mark.parametrize("ratio", [2.5, 4.0])
def test_the_predicted_loss_is_what_rounding_costs(fitted: Fitted, ratio: float, layout: str) -> None:
    """KL of the compressed graph against the exact one, on tokens that were not calibrated with."""
    plan, batches = fitted.plan(ratio, layout), [batch for _, batch in numbered(4)]
    captured, outcome = found(fitted.model, 96)

    def outputs() -> Tensor:
        return torch.cat([run(captured, batch).log_softmax(-1) for batch in batches])

    with torch.no_grad():
        exact = outputs()
        passes.optimize(outcome, plan)
        coded = outputs()
    kl = float((exact.exp() * (exact - coded)).sum(-1).mean())
    # second order in errors that are not small, and 4 + 4 sequences to measure on
    assert nats(plan) / 1.7 < kl < nats(plan) * 1.7


def test_measured_costs_count_per_token() -> None:
    """Half of 0.5 nats a channel at 0 bits over 10 tokens, 8 channels to a chunk; an unmeasured level is Gaussian."""
    side = basis(1, 1.0, 1.0)
    side.costs[0] = torch.full((1, 16), 0.5, dtype=torch.float64)
    side.tokens += 10
    parts = fitting._side(side, fitting._Grain((2, 16), 0)).parts
    for part in parts:
        assert part.bits == [0, 2 * 8, 16 * 8]
        assert part.nats == pytest.approx([0.2, 4 * fitting.DISTORTION[2], 0.0])
    assert len(parts) == 2


def test_absorbed_queries_give_the_same_products(fitted: Fitted) -> None:
    fitted_site: SitePlan = fitted.plan(1).sites[0]
    heads, groups, dim = fitted_site.site.heads, fitted_site.site.kv_heads, fitted_site.site.key_dim
    q, k = torch.randn(1, heads, 3, dim), torch.randn(1, groups, 5, dim)
    direct = q @ k.repeat_interleave(heads // groups, 1).mT
    latent = _products(q, k, fitted_site)
    torch.testing.assert_close(latent, direct, rtol=1e-4, atol=1e-3)  # float32 bases with a spread of about 100


def _products(q: Tensor, k: Tensor, plan: SitePlan) -> Tensor:
    latents = ops.encode(k, plan.key.encode).repeat_interleave(q.shape[1], 1)
    return ops.absorb(q, plan.key.decode) @ latents.mT


@pytest.mark.parametrize(
    ("device", "expected"), [("h100", {"band", "head", "identity"}), ("cpu", {"head", "identity"})]
)
def test_layouts_that_are_slow_on_a_device_do_not_compete(device: str, expected: set[str]) -> None:
    """12 query heads on one latent of 4 kv heads: four times the arithmetic, which only a CPU feels."""
    site = AttentionSite("a", {}, "self", 12, 4, 64, 64, 0.125, None, False, "causal", 0.0, "none", "")
    statistics = {"a": calibrate.empty_statistics([site])["a"]}
    table = fitting.candidates(statistics, context=64, device=device)["a"]
    assert set(table) == expected


# ---- files


def test_the_same_statistics_give_the_same_plan_byte_for_byte(llama: Fitted, tmp_path: Path) -> None:
    files = [llama.plan(4).save(tmp_path / name) for name in "ab"]
    for name in ("plan.json", "plan.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_a_plan_comes_back_whole(fitted: Fitted, tmp_path: Path) -> None:
    plan = fitted.plan(4).with_provenance(text="topics")
    again = LatentPlan.load(plan.save(tmp_path / "plan"))
    assert again.digest() == plan.digest()
    assert [s.site for s in again.sites] == [s.site for s in plan.sites]
    assert again.provenance["text"] == "topics"


def _damage(folder: Path, how: str) -> None:
    if how == "no folder":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    elif how == "cut short":
        blob = (folder / "plan.safetensors").read_bytes()
        (folder / "plan.safetensors").write_bytes(blob[: len(blob) // 2])
    elif how == "a changed number":
        altered = bytearray((folder / "plan.safetensors").read_bytes())
        altered[-2] ^= 1
        (folder / "plan.safetensors").write_bytes(bytes(altered))
    else:
        description = json.loads((folder / "plan.json").read_text())
        description["version" if how == "a newer version" else "sinks"] = 99
        (folder / "plan.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("how", "message"),
    [("no folder", "is not a plan"), ("cut short", "damaged"), ("a changed number", "altered"),
     ("a changed option", "altered"), ("a newer version", "plan version 99")],
)  # fmt: skip
def test_a_damaged_plan_is_refused_with_the_reason(llama: Fitted, tmp_path: Path, how: str, message: str) -> None:
    folder = llama.plan(4).save(tmp_path / "plan")
    _damage(folder, how)
    with pytest.raises(FhoptError, match=message):
        LatentPlan.load(folder)


def test_a_folder_with_other_things_is_not_overwritten(llama: Fitted, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FhoptError, match="holds other things"):
        llama.plan(4).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FhoptError, match="No space left"):
        write_folder(tmp_path / "plan", {"plan.json": b"{}"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ratio", [0, -3, 0.5, float("nan"), 5000])
def test_an_impossible_ratio_is_refused(llama: Fitted, ratio: float) -> None:
    with pytest.raises(FhoptError, match="ratio"):
        llama.plan(ratio)


def test_a_ratio_that_leaves_no_bits_says_what_the_least_is(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match="least possible"):
        llama.plan(60)


def test_a_plan_knows_its_model_in_any_dtype_and_refuses_another(llama: Fitted) -> None:
    sites = [s.site for s in llama.plan(4).sites]
    own = dict(llama.model.named_parameters())
    plan = llama.plan(4).with_provenance(fingerprint=fitting.fingerprint(own, sites))
    fitting.check_model(plan, {n: p.to(torch.bfloat16) for n, p in own.items()}, "the same in bfloat16")
    torch.manual_seed(5)
    other = tiny_llama()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.raises(FhoptError, match="another model"):
        fitting.check_model(plan, dict(other.named_parameters()), "another")
