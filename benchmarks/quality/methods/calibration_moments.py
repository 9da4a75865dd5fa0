"""Calibration statistics for the calibrated codecs of the quality benchmark.

Letters: L layers, G kv heads, H query heads, D head size, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.methods.rotary_embedding import Rotary, watched
from fhopt.evaluation.perplexity import new_cache
from fhopt.models.model_facts import cache_argument

SAMPLE = 128  # last tokens of each sequence that are stored unmodified
Step = Callable[[int], None]  # called with the number of processed sequences


def _ignore(done: int) -> None:
    pass


def _read(model: Any, sequence: Tensor) -> Any:
    """Prefill token ids [T] in one call; return the cache."""
    cache = new_cache(model, None)
    model(sequence[None].to(model.device), **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
    return cache


# --------------------------------------------------------------------------------------------------- heads


@torch.inference_mode()
def head_moments(model: Any, ids: Tensor, sinks: int, progress: Step = _ignore) -> list[tuple[Tensor, Tensor]]:
    """Return sums of x x^T over tokens of ids [N, T] after the sinks: (keys, values) [G, D, D] per layer, float64.

    Keys are rotated, as in the cache.
    """
    totals: list[tuple[Tensor, Tensor]] = []
    for done, sequence in enumerate(ids, 1):
        layers = _read(model, sequence).layers
        news = [(_moment(layer.keys[0, :, sinks:]), _moment(layer.values[0, :, sinks:])) for layer in layers]
        totals = [(k + a, v + b) for (k, v), (a, b) in zip(totals, news, strict=True)] if totals else news
        progress(done)
    return totals


def _moment(x: Tensor) -> Tensor:
    rows = x.double()  # [G, N, D]
    return rows.mT @ rows


# --------------------------------------------------------------------------------------------------- attention


@dataclass
class AttentionMoments:
    """Sums over the tokens of a layer after the sinks, float64: the effect of key and value errors on attention.

    queries: q q^T [G, D, D], rotated, as attention uses them. scored_values: w v v^T [G, D, D] with
    w = k^T (sum of q q^T) k, of mean 1 in a sequence (OSCAR, arXiv 2605.17757). key_weights: [G, D], the sum over
    queries of q_c^2 sum_i a_i^2 |(v_i - o) W_O|^2 scale^2. value_weights: [G, D, D], the sum over query heads of
    W_O W_O^T sum a_i^2 (AATC, arXiv 2608.14191). a are attention's weights, o its output, W_O the output projection.
    """

    queries: Tensor
    scored_values: Tensor
    key_weights: Tensor
    value_weights: Tensor

    def add(self, other: AttentionMoments) -> None:
        """Add the sums over other tokens."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@torch.inference_mode()
def attention_moments(model: Any, ids: Tensor, sinks: int, progress: Step = _ignore) -> list[AttentionMoments]:
    """Return the moments of each layer over token ids [N, T]."""
    totals: dict[int, AttentionMoments] = {}

    def watch(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        gram = _output_gram(module, query.shape[1], value.shape[3]).to(query.device)
        found = _sequence_moments(query[0].float(), key[0].float(), value[0].float(), gram, scale, sinks)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        totals[layer].add(found) if layer in totals else totals.update({layer: found})

    with watched(model, watch):
        for done, sequence in enumerate(ids, 1):
            _read(model, sequence)
            progress(done)
    return [totals[layer] for layer in sorted(totals)]


def _output_gram(module: torch.nn.Module, heads: int, size: int) -> Tensor:
    """Return W_O W_O^T [H, D, D] of an attention module's output projection, its last matrix-valued child."""
    weights = [child.weight for child in module.children() if getattr(child, "weight", None) is not None]
    matrices = [weight for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2]
    if not matrices or heads * size not in matrices[-1].shape:
        return torch.eye(size).expand(heads, size, size)
    last = matrices[-1].float()
    rows = last.T if last.shape[1] == heads * size else last  # [H D, E]; a Conv1D stores it like this
    parts = rows.unflatten(0, (heads, size))
    return parts @ parts.mT


def _sequence_moments(
    query: Tensor, key: Tensor, value: Tensor, gram: Tensor, scale: float, sinks: int
) -> AttentionMoments:
    """Return the moments of one causal sequence: query [H,T,D], key and value [G,T,D], gram [H,D,D]."""
    heads, tokens, _ = query.shape
    group = heads // len(key)
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    keys, values = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    weights = (query @ keys.mT * scale).masked_fill(future, -torch.inf).softmax(-1)  # [H, T, T]
    output = weights @ values
    squares = weights.square()
    squares[..., :sinks] = 0  # sinks are exact
    seen, made = values @ gram, output @ gram  # [H, T, D]
    distance = (seen * values).sum(-1)[:, None] + (made * output).sum(-1)[..., None] - 2 * made @ values.mT
    sensitivity = scale**2 * (squares * distance.clamp_min(0)).sum(-1)  # [H, T]
    key_weights = (sensitivity[..., None] * query.square()).sum(1).double()
    value_weights = (squares.sum((1, 2))[:, None, None] * gram).double()
    queries = _moment(query[:, sinks:]).unflatten(0, (-1, group)).sum(1)
    key, value = key[:, sinks:].double(), value[:, sinks:].double()
    scores = ((key @ queries) * key).sum(-1)
    scores = scores / scores.mean(-1, keepdim=True).clamp_min(1e-30)
    return AttentionMoments(
        queries.cpu(),
        ((value * scores[..., None]).mT @ value).cpu(),
        key_weights.unflatten(0, (-1, group)).sum(1).cpu(),
        value_weights.unflatten(0, (-1, group)).sum(1).cpu(),
    )


# --------------------------------------------------------------------------------------------------- all layers


@dataclass(frozen=True, eq=False)
class TokenMoments:
    """Mean [P] and covariance [P, P] of the keys, or values, of all layers and heads of a token, P = L G D; float64.

    sample: [N, P], unmodified tokens, the last ones of each sequence; float32.
    """

    mean: Tensor
    covariance: Tensor
    sample: Tensor


@torch.inference_mode()
def token_moments(model: Any, ids: Tensor, sinks: int, progress: Step = _ignore) -> tuple[TokenMoments, TokenMoments]:
    """Return the moments of keys and of values over token ids [N, T] after the sinks; keys without rotation."""
    rotary = Rotary.of(model)
    sums = [_Sums(), _Sums()]
    for done, sequence in enumerate(ids, 1):
        layers = _read(model, sequence).layers
        keys, values = (torch.stack([getattr(x, s)[:, :, sinks:].float() for x in layers]) for s in ("keys", "values"))
        positions = torch.arange(sinks, len(sequence))
        for total, x in zip(sums, (rotary.undo(keys, positions), values), strict=True):
            total.add(token_rows(x)[0])
        progress(done)
    return sums[0].moments(), sums[1].moments()


class _Sums:
    """Sums over rows [N, P]."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Any = 0
        self.second: Any = 0
        self.samples: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self.first = self.first + rows.double().sum(0)
        self.second = self.second + (rows.mT @ rows).double()
        self.samples.append(rows[-SAMPLE:].clone())

    def moments(self) -> TokenMoments:
        mean = self.first / self.count
        covariance = self.second / self.count - mean.outer(mean)
        return TokenMoments(mean.cpu(), covariance.cpu(), torch.cat(self.samples).cpu())


def token_rows(x: Tensor) -> Tensor:
    """Concatenate all layers and heads of a token: [L,B,G,N,D] -> [B,N,L G D]."""
    return x.permute(1, 3, 0, 2, 4).flatten(2)


def from_token_rows(rows: Tensor, layers: int, heads: int) -> Tensor:
    """Undo `token_rows`: [B,N,L G D] -> [L,B,G,N,D]."""
    return rows.unflatten(2, (layers, heads, -1)).permute(2, 0, 3, 1, 4)
