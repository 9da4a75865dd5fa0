"""The attention probe, against autograd and against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import FittedModel, numbered
from torch import Tensor, nn

from fhopt.calibration import probe as calibration_probe
from fhopt.calibration.probed_attention import OnGradients

SITE = "model.layers.1.self_attn"


@pytest.mark.parametrize("hidden", [-1e9, torch.finfo(torch.float32).min])
def test_a_mask_of_large_finite_values_hides_like_infinite_ones(llama: FittedModel, hidden: float) -> None:
    """A fully masked query has no weights in either."""
    allowed = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    allowed[0, :, :, :6] = False  # padding, whose queries are fully masked
    site = next(iter(llama.outcome.sites.values()))
    q, k, v = (torch.randn(2, heads, 20, 16) for heads in (4, 2, 2))
    found = []
    for number in (-math.inf, hidden):
        tiles: list[Tensor] = []
        watch = calibration_probe.Watch((2, 5), lambda *_, seen=tiles: lambda *gradients: seen.extend(gradients))
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, number)
        out = watch.attend(site, q, k, v, mask, scale=0.3)
        (gradient,) = torch.autograd.grad((out * torch.arange(16.0)).sum(), watch.leaf)
        found.append([out, gradient, *tiles])
    assert len(found[0]) == len(found[1]) > 2 and not found[1][0][0, :, :6].any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("change", ["another mask", "written to", "causal"])
def test_tiles_of_a_mask_are_reused_while_the_mask_is_unchanged(llama: FittedModel, change: str) -> None:
    """Layers with the same mask share its tiles; a mask that was written to counts as another."""
    site = next(iter(llama.outcome.sites.values()))
    q, k, v = (torch.randn(1, heads, 20, 16) for heads in (4, 2, 2))
    watch = calibration_probe.Watch((2, 5), lambda *_: lambda *gradients: None)
    mask = torch.zeros(20, 20)
    first, again = (watch.attend(site, q, k, v, mask, scale=0.3) for _ in range(2))
    assert torch.equal(first, again) and len(watch._matrices) == 1
    later = torch.zeros(20, 20).masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -math.inf)
    if change == "written to":
        mask += later
    given = later if change == "another mask" else mask
    out = watch.attend(site, q, k, v, given, scale=0.3, is_causal=change == "causal")
    fresh = calibration_probe.Watch((2, 5), lambda *_: lambda *gradients: None)
    torch.testing.assert_close(out, fresh.attend(site, q, k, v, None, scale=0.3, is_causal=True))
    assert not torch.allclose(out, first)


def test_the_metric_consists_of_gradients_of_the_random_score(llama: FittedModel) -> None:
    """Compare with each sequence's gradient by the last layer's values, with no query in the window: recent is 0."""
    seen: list[Tensor] = []

    def see(name: str, k: Tensor, v: Tensor) -> OnGradients:
        return lambda a, b: seen.append(b) if name == SITE else None

    batches = numbered(1)
    calibration_probe.run_probed(llama.captured, llama.outcome, batches, (0, 0), 3, see, lambda n: None)
    values: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        values.append(output)

    handle = llama.model.model.layers[1].self_attn.v_proj.register_forward_hook(hook)
    logits = llama.model(**batches[0][1]).logits
    handle.remove()
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    calibration_probe._random_score(logits, True, generator).backward()
    llama.model.zero_grad(set_to_none=True)
    assert values[0].grad is not None
    expected = values[0].grad.unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-4)  # float32 through a layer of this size


@pytest.mark.parametrize("one", [[0.3, -0.9], [2.0, -1.0, 0.5, 0.0], [9.0, 0.0, 1.0]])
def test_squares_of_the_score_are_the_fisher_information(one: list[float]) -> None:
    logits = torch.tensor([one]).expand(50_000, -1).contiguous().requires_grad_()
    score = calibration_probe._random_score(logits, True, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(score, logits)
    p = torch.softmax(logits.detach()[0], 0)
    fisher = torch.diag(p) - torch.outer(p, p)
    found = gradient.mT @ gradient / 50_000
    assert float((found - fisher).norm() / fisher.norm()) < 0.02  # 50,000 draws: below 1 percent


def test_a_position_with_certain_predictions_contributes_equally_in_every_draw() -> None:
    """With sampled labels, one in a thousand would carry all the information, and its square would vary 30-fold."""
    logits = torch.tensor([[7.0, 0.0]]).expand(2000, -1).contiguous().requires_grad_()
    score = calibration_probe._random_score(logits, True, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(score, logits)
    squares = gradient.square().sum(-1)
    assert float(squares.std() / squares.mean()) < 0.1


def test_signs_are_drawn_uniformly_and_independently() -> None:
    shape, like = torch.Size((4000, 19)), torch.zeros(())
    signs = calibration_probe._random_signs(shape, torch.Generator().manual_seed(3), like).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    products = signs.T @ signs / len(signs)  # 1 on the diagonal, else 0 within 5 deviations
    assert float((products - torch.eye(19)).abs().max()) < 5 / 4000**0.5
    assert float(signs.mean(0).abs().max()) < 5 / 4000**0.5
    assert float((signs[1:] * signs[:-1]).mean(0).abs().max()) < 5 / 4000**0.5
    again = calibration_probe._random_signs(shape, torch.Generator().manual_seed(3), signs)
    assert torch.equal(signs, again.double())


@pytest.mark.parametrize("shape", [(1, 300, 11), (2, 3, 11), (5, 11)])
def test_the_gradient_of_the_score_is_that_of_all_positions_at_once(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_probe, "PROBABILITIES", 700)
    logits = torch.randn(shape, dtype=torch.float64).requires_grad_()
    score = calibration_probe._random_score(logits, True, torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(3 * score, logits)
    p, generator = logits.detach().softmax(-1).flatten(0, -2), torch.Generator().manual_seed(3)
    signs = torch.cat(
        [calibration_probe._random_signs(x.shape, generator, p) for x in p.split(calibration_probe.positions(p))]
    )
    wanted = p.sqrt() * signs - p * (p.sqrt() * signs).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, 3 * wanted.view(shape), rtol=1e-5, atol=1e-6)
