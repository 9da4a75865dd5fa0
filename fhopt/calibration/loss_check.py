"""Measured KL of plans on held-out text: one run of the exact model, then one run for each plan.

Attention of every site gets keys and values as a cache of the plan would return them, for a whole sequence at once:

    attention sinks, the token itself    full precision
    the recent window                    rounded to 8 bits if the plan's window has 8 bits
    all others                           encoded, quantized, dequantized, decoded

No cache is used, so any model that can be calibrated can be checked. Attention runs on the CPU's prefill kernel if that
supports the inputs. fhopt/fitting/loss_interval.py interpolates the KL of plans of other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fhopt import codegen
from fhopt.attention.exact_tokens import no_token
from fhopt.calibration.probe import Batch, Probed, positions
from fhopt.calibration.probed_attention import additive_mask, probed_tiles, slice_mask
from fhopt.fitting.loss_interval import LossCheck
from fhopt.fitting.statistics import differences, relative_to_segments, turned
from fhopt.ops import algebra, attention, packing, prefill_attention
from fhopt.ops import masks as ops_masks
from fhopt.parallel import collectives
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SidePlan, SitePlan


class PlanAttention:
    """Attention on the keys and values that a plan's cache would return; exact for sites outside the plan.

    plan: None for exact attention at all sites, with the same arithmetic. recent: newest tokens in the recent window.
    """

    def __init__(self, plan: LatentPlan | None, recent: int = 0) -> None:
        self.plan, self.recent = plan, recent
        self.sites: Mapping[str, SitePlan] = {} if plan is None else {s.site.name: s for s in plan.sites}
        self._masks: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # results of `_split`, shared by layers

    def attend(
        self, site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        extra: Tensor | None = None, *, scale: float, is_causal: bool = False, softcap: float = 0.0,
        dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Compute attention in float32 or wider."""
        given = q.dtype
        q, k, v = (x.to(torch.promote_types(given, torch.float32)) for x in (q, k, v))
        allowed, extra = ops_masks.total_mask(q, k, mask, is_causal), additive_mask(extra, q)
        parts = self._parts(site, q, k, v)
        output = _attended_by_kernels(q, parts, allowed, extra, {"scale": scale, "softcap": softcap})
        if output is not None:
            return output.to(given)
        bias, outputs = additive_mask(allowed, q), []
        for rows, columns in probed_tiles(q, k, bias):
            masks = slice_mask(bias, rows, columns), slice_mask(extra, rows, slice(None))
            tile = [
                KeysValues(slice_mask(p.seen, rows, columns), p.k[:, :, columns], p.v[:, :, columns]) for p in parts
            ]
            outputs.append(_attended(q[:, :, rows] * scale, tile, *masks, softcap))
        return torch.cat(outputs, 2).to(given)

    def _parts(self, site: AttentionSite, q: Tensor, k: Tensor, v: Tensor) -> list[KeysValues]:
        """Return keys and values in full precision, rounded as in the window, and decoded from packed latents."""
        planned = self.sites.get(site.name)
        if planned is None or self.plan is None:
            return [KeysValues(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device), k, v)]
        sinks, recent = site.exact_tokens(self.plan.sinks, self.recent)
        near, far = self._split(q, k, sinks, recent)
        own, _ = self._split(q, k, sinks, min(recent, 1))
        later = relative_to_segments(planned.segment, k.shape[2], self.plan.sinks)
        relative = differences(site, k, v, self.plan.sinks, self.plan.mean_tokens, later)
        moved = [read - x for read, x in zip(_through_latents(planned, *relative), relative, strict=True)]
        if later is not None:
            moved[0] = turned(site, moved[0], -later)
        parts = [KeysValues(far, k + moved[0], v + moved[1])]
        if self.plan.window_bits == 16:
            return [KeysValues(near, k, v), *parts]
        plain = differences(site, k, v, self.plan.sinks, self.plan.mean_tokens)
        moved = [packing.unround_rows(*packing.round_rows(x), x.dtype) - x for x in plain]
        return [KeysValues(own, k, v), KeysValues(near & ~own, k + moved[0], v + moved[1]), *parts]

    def _split(self, q: Tensor, k: Tensor, sinks: int, recent: int) -> tuple[Tensor, Tensor]:
        """Return which keys each query sees in full precision, and which through latents: bool [S,T] each."""
        key = (q.shape[2], k.shape[2], sinks, recent, q.device)
        if key not in self._masks:
            self._masks[key] = ops_masks.split_mask(q, k, None, False, sinks, recent)
        return self._masks[key]


class KeysValues(NamedTuple):
    """Keys and values [B,G,T,D] in one precision, and which queries see them: bool [S,T]."""

    seen: Tensor
    k: Tensor
    v: Tensor


def _attended_by_kernels(
    q: Tensor, parts: Sequence[KeysValues], allowed: Tensor | None, extra: Tensor | None, numbers: Mapping[str, float]
) -> Tensor | None:
    """Attend with queries [B,H,S,D] to each part with the CPU kernel, and merge; None if it does not support them."""
    attended = []
    for part in parts:
        mask = part.seen if allowed is None else ops_masks.restricted(allowed, part.seen)
        one = prefill_attention.attend_on_cpu("open_attention", q, part.k, part.v, mask, causal=False, **numbers)
        if one is None:
            return None
        attended.append(one)
    if extra is not None:
        attended.append(no_token(q, parts[0].v, extra.logsumexp(-1)))
    return algebra.merge(attended)


def _attended(
    q: Tensor, parts: Sequence[KeysValues], bias: Tensor | None, extra: Tensor | None, softcap: float
) -> Tensor:
    """Attend with scaled queries [B,H,S,D] to keys and values, each of which is seen in one of the parts."""
    products = [attention.grouped_scores(q, part.k) * part.seen for part in parts]
    logits = sum(products[1:], products[0])
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    logits = logits if bias is None else logits + bias
    tokens = logits.shape[3]
    if extra is not None:
        logits = torch.cat((logits, extra.to(logits).expand(*logits.shape[:3], -1)), -1)
    weights = attention.safe_softmax(logits)[0][..., :tokens]
    outputs = [attention.grouped_mix(weights * part.seen, part.v) for part in parts]
    return sum(outputs[1:], outputs[0])


def _through_latents(plan: SitePlan, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Encode, quantize, dequantize and decode keys and values [B,G,T,D] whose means were subtracted."""
    if plan.is_shared:
        shared = _quantized(torch.cat([k, v], -1), plan.key)
        return algebra.decode(shared, plan.key.decode.to(k)), algebra.decode(shared, plan.value.decode.to(v))
    keys, values = _quantized(k, plan.key), _quantized(v, plan.value)
    return algebra.decode(keys, plan.key.decode.to(k)), algebra.decode(values, plan.value.decode.to(v))


def _quantized(x: Tensor, side: SidePlan) -> Tensor:
    """Encode x [B,G,T,D] to latents [B,J,T,R], rounded by the side's bit groups."""
    latent = algebra.encode(x, side.encode.to(x))
    groups = algebra.bit_groups(side)
    return packing.straight_through(latent, *groups) if groups.bits else latent


def check_losses(
    model: Probed, batches: Sequence[tuple[str, Batch]], plans: Sequence[tuple[float, LatentPlan]], recent: int,
    done: Callable[[int], None] = lambda number: None,
) -> tuple[LossCheck, ...]:  # fmt: skip
    """Measure the KL of plans from the exact model on named held-out batches; each process takes its share.

    Installs the kernels of this machine. plans: (predicted nats, plan). recent: as in `PlanAttention`. `done(number)`
    is called after each batch.
    """
    codegen.register_kernels()

    def measure(numbered: tuple[int, Batch]) -> Tensor:
        number, batch = numbered
        exact = model.run(batch, PlanAttention(None))
        losses = [_divergence(exact, model.run(batch, PlanAttention(plan, recent))) for _, plan in plans]
        done(number)
        return torch.tensor(losses, dtype=torch.float64)

    rows = collectives.by_process([(i, batch) for i, (_, batch) in enumerate(batches)], measure)
    predicted = tuple(nats for nats, _ in plans)
    checks = (LossCheck(text, predicted, tuple(row.tolist())) for (text, _), row in zip(batches, rows, strict=True))
    return tuple(check for check in checks if all(map(math.isfinite, check.measured)))


def _divergence(exact: Tensor, other: Tensor) -> float:
    """Return the mean KL in nats/token of logits [..., V] from the exact ones.

    Computed as the sum of p (exp(-d) - 1 + d) with d = log p - log q, valid because q sums to one. The float32 rounding
    error of d is multiplied by d itself, so a KL of 1e-8 has four digits.
    """
    total, rows = 0.0, exact.reshape(-1, exact.shape[-1])
    others, step = other.reshape(rows.shape), positions(rows)
    for one, two in zip(rows.split(step), others.split(step), strict=True):
        log_p, log_q = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (one, two))
        d = (log_p - log_q).masked_fill_(log_p == -math.inf, 0.0)  # tokens to which the model gives probability 0
        p, q = log_p.exp_(), log_q.exp_()
        less = torch.where(d < -1, q - p, p * torch.expm1(-d))  # p (exp(-d) - 1); exp(-d) may overflow float32
        total += float(less.addcmul_(p, d).sum(-1).double().sum())
    return total / len(rows)
