"""Normal equations for the decoder matrices that minimize the error of attention, by least squares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.calibration.probe import graph_arguments
from fhopt.errors import FhoptError, Miss
from fhopt.fitting.statistics import differences, relative_to_segments
from fhopt.models.capture import Captured
from fhopt.ops import algebra, attention, packing
from fhopt.ops import masks as ops_masks
from fhopt.passes import pipeline
from fhopt.passes.rewrite.compress import Compress
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan

QUERIES = 128  # rows of the attention matrix computed at once
_PARTS = (".error", ".moment")  # suffixes of the sums' names in a checkpoint


# --------------------------------------------------------------------------------------------------- equations


@dataclass
class Equations:
    """Normal equations, accumulated in float64. Names: `<site>.key` and `<site>.value`.

    error [G,D,R]: sum of w (x - D z) z^T. moment [G,R,R]: sum of w z z^T. Each kv head has its own, since its tokens
    get other attention weights.
    """

    error: dict[str, Tensor] = field(default_factory=dict)
    moment: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Equations:
        """Return the equations whose sums are in `tensors`, by name."""
        error, moment = ({n.removesuffix(p): x for n, x in tensors.items() if n.endswith(p)} for p in _PARTS)
        return Equations(error, moment)

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums by name: `<site>.<side>.error` and `<site>.<side>.moment`."""
        parts = zip(_PARTS, (self.error, self.moment), strict=True)
        return {f"{name}{part}": total for part, sums in parts for name, total in sums.items()}

    def add(self, name: str, error: Tensor, latent: Tensor, weight: Tensor | None = None) -> None:
        """Add rows of error [G,N,D] and of latents [G,N,R], weighted by `weight` [G,N] if given."""
        counted = latent if weight is None else latent * weight.unsqueeze(-1)
        for sums, rows in ((self.error, error), (self.moment, latent)):
            total = (rows.double().mT @ counted.double()).cpu()
            sums[name] = sums[name] + total if name in sums else total

    def solution(self, name: str, decode: Tensor, ridge: float) -> Tensor:
        """Solve for the decoder [G,D,R] of least error, regularized towards `decode`; unchanged if unattended."""
        used = (decode != 0).double()  # [G, D, R]
        mixed = ((used.mT @ used) > 0).double()  # channels that decode to a common element
        moment = self.moment[name] * mixed
        mean = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-300  # [G, 1, 1]
        error = self.error[name] * ((used @ mixed) > 0)
        drawn = moment + ridge * mean * torch.eye(moment.shape[-1], dtype=moment.dtype)
        return decode + torch.linalg.solve(drawn, error, left=False).to(decode)


def solved(plan: LatentPlan, equations: Equations, ridge: float) -> LatentPlan:
    """Return the plan with the decoders that solve the equations; sites without equations stay unchanged."""

    def side(site: SitePlan, name: str) -> SidePlan:
        old: SidePlan = getattr(site, name)
        return replace(old, decode=equations.solution(f"{site.site.name}.{name}", old.decode, ridge))

    sites = [
        replace(p, key=side(p, "key"), value=side(p, "value")) if f"{p.site.name}.key" in equations.error else p
        for p in plan.sites
    ]
    return replace(plan, sites=tuple(sites))


# --------------------------------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class CapturedModel:
    """A captured language model, and the site plans of its attention nodes that `plan` does not make exact."""

    captured: Captured
    plan: LatentPlan
    sites: Mapping[str, SitePlan]

    @staticmethod
    def of(captured: Captured, plan: LatentPlan) -> CapturedModel:
        """Match the plan to the graph. Raises FhoptError if the plan approximates no site of the graph."""
        outcome, compress = pipeline.find_attentions(captured.program, assume_finite=True), Compress(plan)
        nodes = {n.name: n for n in outcome.program.graph.nodes}
        sites, reasons = {}, set[str]()
        for name, site in outcome.sites.items():
            try:
                compress.match(nodes[name], site)
            except Miss as miss:
                reasons.add(miss.reason)
                continue
            if not plan.site(site.name).is_exact:
                sites[name] = plan.site(site.name)
        if not sites:
            why = "; ".join(sorted(reasons)) or "every site of the plan is unquantized and full width"
            raise FhoptError(
                f"there is nothing to heal: {why}; expected a lossy plan for this model. Use the plan unchanged."
            )
        return CapturedModel(captured, plan, sites)

    @torch.no_grad()
    def read(self, ids: Tensor, equations: Equations) -> None:
        """Add the exact model's attention on token ids [B, T]. Raises FhoptError if keys or values are not finite."""
        _Runner(self, equations).run(*graph_arguments(self.captured, {"input_ids": ids}))


class _Runner(fx.Interpreter):
    """Interpreter that runs the graph unchanged and adds operands of attention nodes to the equations."""

    def __init__(self, reader: CapturedModel, equations: Equations) -> None:
        super().__init__(reader.captured.program.module)
        self.reader, self.equations = reader, equations

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; for an attention node of a known site, first add its operands to the equations."""
        site = self.reader.sites.get(n.name)
        if site is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            far = site.site.exact_tokens(self.reader.plan.sinks, self.reader.plan.recent)
            add_attention(self.equations, site, far, *args, **kwargs, mean_tokens=self.reader.plan.mean_tokens)
        return super().run_node(n)


def add_attention(
    equations: Equations, plan: SitePlan, exact: tuple[int, int], q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None = None, extra: Tensor | None = None, *, scale: float, is_causal: bool = False,
    softcap: float = 0.0, dropout: float = 0.0, mean_tokens: int = 0,
) -> None:  # fmt: skip
    """Add the attention of q [B,H,S,D] to keys k [B,G,T,D] and values v [B,G,T,E] to the equations of a site.

    exact: (attention sinks, recent tokens) that are not cached as latents. mean_tokens: as in `LatentPlan`. The other
    arguments are those of the op `fhopt::attention`.
    """
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    near, far = (
        torch.atleast_2d(ops_masks.additive(m, q.dtype)) for m in ops_masks.split_mask(q, k, mask, is_causal, *exact)
    )
    later = relative_to_segments(plan.segment, k.shape[2], exact[0])
    latents, errors = zip(*_coded(plan, *differences(plan.site, k, v, exact[0], mean_tokens, later)), strict=True)
    counts = k.new_zeros(k.shape[:3])  # [B, G, T]
    for start in range(0, q.shape[2], QUERIES):
        rows = slice(start, start + QUERIES)
        seen = slice(0, _last(near[..., rows, :], far[..., rows, :]))
        masks = near[..., rows, seen], far[..., rows, seen]
        p = _far_weights(q[:, :, rows] * scale, k[:, :, seen], *masks, softcap)
        p = p.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, G, H/G * n, t]
        counts[..., seen] += p.sum(2)
        equations.add(f"{plan.site.name}.value", *(_rows(p @ x[:, :, seen]) for x in (errors[1], latents[1])))
    equations.add(f"{plan.site.name}.key", _rows(errors[0]), _rows(latents[0]), counts.transpose(0, 1).flatten(1))


def _coded(plan: SitePlan, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return for keys and for values (quantized latents [B,G,T,R], decoding errors [B,G,T,D])."""
    read = (torch.cat([k, v], -1), None) if plan.is_shared else (k, v)
    out, latent = [], k
    for x, source, side in zip((k, v), read, (plan.key, plan.value), strict=True):
        latent = latent if source is None else _rounded(algebra.encode(source, side.encode.to(x.device)), side)
        decode = side.decode.to(x.device)
        repeated = latent.repeat_interleave(len(decode) // latent.shape[1], 1)
        out.append((repeated, x - algebra.decode(latent, decode)))
    return out


def _rounded(latent: Tensor, side: SidePlan) -> Tensor:
    return packing.straight_through(latent, *algebra.bit_groups(side)) if side.tiers else latent


def _last(near: Tensor, far: Tensor) -> int:
    """Count the keys up to the last that any row of the masks [.., n, T] sees; at least 1."""
    seen = (torch.maximum(near, far) > -math.inf).flatten(0, -2).any(0).nonzero()
    return int(seen.max()) + 1 if len(seen) else 1


def _far_weights(q: Tensor, k: Tensor, near: Tensor, far: Tensor, softcap: float) -> Tensor:
    """Return the exact model's attention [B,H,n,T] to tokens cached as latents, zero for other tokens."""
    logits = attention.grouped_scores(q, k)
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return attention.safe_softmax(logits + torch.maximum(near, far))[0] * (far > -math.inf)


def _rows(x: Tensor) -> Tensor:
    """Stack the sequences of each head: [B,G,T,D] -> [G, B*T, D]."""
    return x.transpose(0, 1).flatten(1, 2)
