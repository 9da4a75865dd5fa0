"""The probe of attention, against autograd and against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import Fitted, numbered
from torch import Tensor, nn

from fhopt.calibration import probe as calibration_probe
from fhopt.ops import masks

SITE = "model.layers.1.self_attn"


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def padded(queries: int, keys: int) -> Tensor:
    """Causal, and the first sequence begins with 6 tokens of padding, whose queries see nothing at all."""
    mask = causal(queries, keys).repeat(2, 1, 1, 1)
    mask[0, :, :, :6] = False
    return mask


def numbers(queries: int, keys: int) -> Tensor:
    return torch.randn(1, 4, queries, keys).masked_fill(~causal(queries, keys), -math.inf)


MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "causal": causal,
    "bidirectional": lambda queries, keys: None,
    "padded": padded,
    "numbers": numbers,
    "one for all queries": lambda queries, keys: torch.arange(keys) < keys - 3,
    "one for all keys": lambda queries, keys: torch.randn(2, 1, queries, 1),
}


@pytest.mark.parametrize("rows", [7, 128])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("kind", MASKS)
def test_the_probe_gives_the_gradients_that_reach_far_keys_and_values(
    monkeypatch: pytest.MonkeyPatch, kind: str, softcap: float, extra: int, rows: int
) -> None:
    """Against automatic differentiation through an explicit perturbation of what is far, in float64, tile by tile."""
    monkeypatch.setattr(calibration_probe, "QUERIES", rows)
    q, k, v = (torch.randn(2, heads, 20, dim, dtype=torch.float64) for heads, dim in ((4, 16), (2, 16), (2, 8)))
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    mask = MASKS[kind](20, 20)
    bias = calibration_probe.additive_mask(mask, q)
    sinks = torch.randn(1, 4, 1, extra, dtype=torch.float64) if extra else None
    _, far = masks.split_mask(q, k, None, False, 2, 5)
    seen: list[Tensor] = []
    tiles: list[tuple[Tensor, Tensor]] = []

    def observe(*tensors: Tensor) -> calibration_probe.OnGradients:
        seen.extend(tensors)
        return lambda *gradients: tiles.append(gradients)

    probe: Any = calibration_probe._ProbedAttention
    out = probe.apply(q, k, v, bias, sinks, far, 0.3, softcap, observe)
    weight = torch.randn_like(out)
    own = torch.autograd.grad((out * weight).sum(), (q, k, v))

    dk, dv = torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)
    expected = _attention(q, (k, dk), (v, dv), bias, sinks, far, softcap)
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v), retain_graph=True)
    torch.testing.assert_close(out, expected)
    assert torch.equal(seen[0], k) and torch.equal(seen[1], v)
    for probed_gradient, gradient in zip(own, gradients, strict=True):
        torch.testing.assert_close(probed_gradient, gradient)
    given = iter(tiles)
    for start in range(0, 20, rows):
        part = expected[:, :, start : start + rows] * weight[:, :, start : start + rows]
        wanted = torch.autograd.grad(part.sum(), (dk, dv), retain_graph=True)
        if any(gradient.any() for gradient in wanted):
            for probed_gradient, gradient in zip(next(given), wanted, strict=True):
                reached = probed_gradient.shape[2]
                torch.testing.assert_close(probed_gradient, gradient[:, :, :reached])
                assert not gradient[:, :, reached:].any()
    assert not any(gradient.any() for rest in given for gradient in rest)


@pytest.mark.parametrize("hidden", [-1e9, torch.finfo(torch.float32).min])
def test_a_mask_of_large_numbers_hides_as_one_of_infinities(llama: Fitted, hidden: float) -> None:
    """A query that sees nothing has no weights in either."""
    allowed, site = padded(20, 20), next(iter(llama.outcome.sites.values()))
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


def _attention(
    q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], bias: Tensor | None, sinks: Tensor | None,
    far: Tensor, softcap: float,
) -> Tensor:  # fmt: skip
    """Attend the obvious way; far keys and values are (number, change), near ones the number alone."""
    (k, dk), (v, dv) = ([x.repeat_interleave(2, 1) for x in pair] for pair in (keys, values))
    logits = torch.where(far, q @ (k + dk).mT, q @ k.mT) * 0.3
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = logits if bias is None else logits + bias
    hidden = logits == -math.inf
    blind = hidden.all(-1, keepdim=True) if sinks is None else torch.zeros_like(hidden[..., :1])
    logits = logits.masked_fill(blind, 0.0)
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(2, 4, 20, -1)], -1)
    p = logits.softmax(-1)[..., :20].masked_fill(blind, 0.0)
    return (p * far) @ (v + dv) + (p * ~far) @ v


def test_the_metric_is_made_of_gradients_of_the_random_score(llama: Fitted) -> None:
    """Each sequence's gradient with respect to the values of the last layer, when no query is near: recent is 0."""
    seen: list[Tensor] = []

    def see(name: str, k: Tensor, v: Tensor) -> calibration_probe.OnGradients:
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


def test_a_position_that_is_sure_says_as_much_in_every_draw() -> None:
    """Of drawn labels one in a thousand would say everything here, and its square would vary by thirty times."""
    logits = torch.tensor([[7.0, 0.0]]).expand(2000, -1).contiguous().requires_grad_()
    score = calibration_probe._random_score(logits, True, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(score, logits)
    squares = gradient.square().sum(-1)
    assert float(squares.std() / squares.mean()) < 0.1


def test_signs_are_drawn_alike_and_independently() -> None:
    signs = calibration_probe._random_signs(torch.Size((4000, 19)), torch.Generator().manual_seed(3)).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    products = signs.T @ signs / len(signs)  # 1 with itself, else 0 within 5 deviations
    assert float((products - torch.eye(19)).abs().max()) < 5 / 4000**0.5
    assert float(signs.mean(0).abs().max()) < 5 / 4000**0.5
    assert float((signs[1:] * signs[:-1]).mean(0).abs().max()) < 5 / 4000**0.5
    again = calibration_probe._random_signs(torch.Size((4000, 19)), torch.Generator().manual_seed(3))
    assert torch.equal(signs, again.double())


@pytest.mark.parametrize("shape", [(1, 300, 11), (2, 3, 11), (5, 11)])
def test_the_gradient_of_the_score_is_that_of_all_positions_at_once(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64).requires_grad_()
    score = calibration_probe._random_score(logits, True, torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(3 * score, logits)
    p, generator = logits.detach().softmax(-1).flatten(0, -2), torch.Generator().manual_seed(3)
    signs = torch.cat([calibration_probe._random_signs(x.shape, generator) for x in p.split(64)])
    wanted = p.sqrt() * signs - p * (p.sqrt() * signs).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, 3 * wanted.view(shape), rtol=1e-5, atol=1e-6)
