"""The equations of decoders against weighted least squares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_plans import shared_plan
from healed_plans import CODED, CONTEXT
from small_models import FAR, found, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

from fhopt.calibration.checkpoint import Checkpoint
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan
from fhopt.refine import decoder_equations
from fhopt.refine.decoder_equations import CapturedModel, Equations
from fhopt.refine.heal import HEALING, read

pytestmark = pytest.mark.usefixtures("without_compiling")


@functools.cache
def site_plan(make: Callable[[], Any] = tiny_llama) -> SitePlan:
    """Two query heads per kv head in the llama; one latent for keys and values in the gpt2."""
    _, outcome = found(make(), CONTEXT)
    return shared_plan(outcome, 16, CODED, **FAR).sites[0]


def inputs(plan: SitePlan, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make float64 q, k and v of two sequences."""
    site, generator = plan.site, torch.Generator().manual_seed(0)
    shapes = ((site.heads, site.key_dim), (site.kv_heads, site.key_dim), (site.kv_heads, site.value_dim))
    q, k, v = (torch.randn(2, n, tokens, d, generator=generator, dtype=torch.float64) for n, d in shapes)
    return q, k, v


def taken(plan: SitePlan, q: Tensor, k: Tensor, v: Tensor, exact: tuple[int, int], **options: Any) -> Equations:
    equations = Equations()
    decoder_equations.add_attention(equations, plan, exact, q, k, v, scale=0.5, **options)
    return equations


def rows_of(plan: SitePlan, q: Tensor, k: Tensor, v: Tensor, exact: tuple[int, int]) -> dict[str, list[list[Any]]]:
    """Return the rows of every kv head, keys and values, one query at a time: (weight, latent, target)."""
    (z_k, _), (z_v, _) = decoder_equations._coded(plan, k, v)
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    keys: list[list[Any]] = [[] for _ in range(groups)]
    values: list[list[Any]] = [[] for _ in range(groups)]
    for b in range(len(q)):
        for h in range(q.shape[1]):
            g = h // repeats
            for s in range(q.shape[2]):
                p = (0.5 * k[b, g, : s + 1] @ q[b, h, s]).softmax(0)
                far = [t for t in range(s + 1) if t >= exact[0] and s - t >= exact[1]]
                keys[g] += [(float(p[t]), z_k[b, g, t], k[b, g, t]) for t in far]
                if far:
                    sums = [sum(p[t] * x[b, g, t] for t in far) for x in (z_v, v)]
                    values[g].append((1.0, *sums))
    return {"key": keys, "value": values}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_solution_is_the_weighted_least_squares(make: Callable[[], Any]) -> None:
    """Compare with `lstsq` on rows written out one query at a time; the ridge adds rows."""
    plan, exact, ridge = site_plan(make), (2, 3), 0.1
    q, k, v = inputs(plan, 24)
    equations, rows = taken(plan, q, k, v, exact, is_causal=True), rows_of(plan, q, k, v, exact)
    for name, side in (("key", plan.key), ("value", plan.value)):
        mine = equations.solution(f"{plan.site.name}.{name}", side.decode.double(), ridge)
        for decode, mine_g, rows_g in zip(side.decode.double(), mine, rows[name], strict=True):
            root = torch.tensor([w for w, _, _ in rows_g]).double().sqrt()[:, None]
            z, x = (torch.stack([row[i] for row in rows_g]) * root for i in (1, 2))
            drawn = (ridge * z.square().sum(0).mean()).sqrt() * torch.eye(z.shape[1], dtype=torch.float64)
            wanted = torch.linalg.lstsq(torch.cat([z, drawn]), torch.cat([x, drawn @ decode.T])).solution.T
            torch.testing.assert_close(mine_g, wanted, rtol=1e-6, atol=1e-8)  # conditioning of the normal equations


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = site_plan()
    q, k, v = inputs(plan, 24)
    whole = taken(plan, q, k, v, (2, 3), is_causal=True)
    monkeypatch.setattr(decoder_equations, "QUERIES", 5)
    tiled = taken(plan, q, k, v, (2, 3), is_causal=True)
    for mine, wanted in ((tiled.error, whole.error), (tiled.moment, whole.moment)):
        torch.testing.assert_close(mine, wanted)


def test_a_mask_hides_tokens() -> None:
    """A token visible to no query counts as absent, and a fully masked query adds nothing."""
    plan = site_plan()
    q, k, v = inputs(plan, 24)
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    mask[:, 20:] = mask[20:] = False
    shown = taken(plan, q, k, v, (2, 3), mask=mask)
    cut = taken(plan, q[:, :, :20], k[:, :, :20], v[:, :, :20], (2, 3), is_causal=True)
    for mine, wanted in ((shown.error, cut.error), (shown.moment, cut.moment)):
        torch.testing.assert_close(mine, wanted)


def test_a_softcap_without_effect_changes_nothing() -> None:
    plan = site_plan()
    q, k, v = inputs(plan, 24)
    plain, capped = (taken(plan, q, k, v, (2, 3), is_causal=True, softcap=cap) for cap in (0.0, 1e6))
    torch.testing.assert_close(capped.error, plain.error)
    tight = taken(plan, q, k, v, (2, 3), is_causal=True, softcap=0.5)
    assert not torch.allclose(tight.error[f"{plan.site.name}.key"], plain.error[f"{plan.site.name}.key"])


def test_tokens_that_stay_exact_add_nothing() -> None:
    plan = site_plan()
    equations = taken(plan, *inputs(plan, 24), (2, 24), is_causal=True)
    assert all(not x.any() for x in (*equations.error.values(), *equations.moment.values()))
    decode = plan.key.decode
    assert torch.equal(equations.solution(f"{plan.site.name}.key", decode, 0.1), decode)


def test_a_strong_ridge_keeps_the_decoders() -> None:
    plan = site_plan()
    equations = taken(plan, *inputs(plan, 24), (2, 3), is_causal=True)
    name, decode = f"{plan.site.name}.value", plan.value.decode
    moves = [float((equations.solution(name, decode, ridge) - decode).abs().max()) for ridge in (0.01, 1.0, 1e9)]
    assert moves[0] > moves[1] > 0 and moves[2] < 1e-6


def test_channels_without_correlation_stay_separate() -> None:
    """So a plan with the layout identity keeps it."""
    equations, decode = Equations(), torch.block_diag(torch.ones(2, 2), torch.eye(2))[None]
    equations.add("x", torch.randn(1, 50, 4), torch.randn(1, 50, 4))
    changed = equations.solution("x", decode, 0.1)
    assert torch.equal(changed != 0, decode != 0) and not torch.equal(changed, decode)
    one = Equations()
    one.error["x"], one.moment["x"] = equations.error["x"][:, 3:, 3:], equations.moment["x"][:, 3:, 3:]
    mean = equations.moment["x"].diagonal(dim1=1, dim2=2).mean() / one.moment["x"].mean()
    torch.testing.assert_close(changed[:, 3:, 3:], one.solution("x", decode[:, 3:, 3:], 0.1 * float(mean)))


def test_equations_of_a_text_are_sums_over_its_sequences(model: LoadedModel, plan: LatentPlan) -> None:
    reader, ids = CapturedModel.of(model.capture(CONTEXT), plan), token_ids(4, CONTEXT)
    checkpoint = Checkpoint(None, {}, HEALING)
    whole, backwards = read(reader, ids, checkpoint), read(reader, ids.flip(0), checkpoint)
    for name in whole.error:
        torch.testing.assert_close(backwards.error[name], whole.error[name])
    assert set(whole.error) == {f"{p.site.name}.{side}" for p in plan.sites for side in ("key", "value")}


def test_equations_are_restored_from_their_tensors() -> None:
    plan = site_plan()
    equations = taken(plan, *inputs(plan, 24), (2, 3), is_causal=True)
    again = Equations.of(equations.tensors())
    assert again.error.keys() == again.moment.keys() == {f"{plan.site.name}.{side}" for side in ("key", "value")}
    for name in again.error:
        assert torch.equal(again.error[name], equations.error[name])
        assert torch.equal(again.moment[name], equations.moment[name])
