"""Calibration: second moments of keys and values, and of how much an error in them costs.

The captured graph is run on calibration batches with every `fhopt::attention` node instrumented. Per site and side two
moments are streamed in float64, and nothing else is kept:

    moment  sum over tokens of x x^H            what is there
    metric  sum over tokens of g g^H            what an error costs: g = d log p(y) / d x, y drawn from the model

The metric is the Fisher information of the key (value): to second order, an error e of a cached key changes the
predicted distribution by KL = 1/2 e^T F e. It holds everything that other weightings put in by hand: query energy,
softmax, the spread of values, the output projection, and all layers above. One backward pass gives it for all sites at
once. Only positions that a cache would see compressed count: the gradient through sinks and recent tokens, which stay
exact, is left out.

Source of the idea: optimal brain surgeon (Hassibi & Stork 1992), Fisher-weighted rank allocation in Palu (2407.21118).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fhopt import ops
from fhopt.capture import Captured
from fhopt.errors import FhoptError
from fhopt.passes import Outcome
from fhopt.spec import AttentionSite, ChannelFamily, SideStatistics, SiteStatistics

MIX_LIMIT = 1024  # widest real space (heads x channels) that one basis mixes


def families(site: AttentionSite, side: str) -> tuple[ChannelFamily, ...]:
    """Which channels of a head a basis may mix: rotary pairs one frequency each, everything else freely."""
    if side == "value":
        return (ChannelFamily((tuple(range(site.value_dim)),), False),)
    if site.rope is None:
        return (ChannelFamily((tuple(range(site.key_dim)),), False),)
    pairs = site.rope.pairs
    turning = {channel for pair in pairs for channel in pair}
    rest = tuple(c for c in range(site.key_dim) if c not in turning)
    rotary = ChannelFamily(pairs, True)
    return (rotary, ChannelFamily((rest,), False)) if rest else (rotary,)


def latent_groups(site: AttentionSite) -> int:
    """J: as few latent heads as keep the mixed space within MIX_LIMIT numbers."""
    dim = max(site.key_dim, site.value_dim)
    return next(
        j
        for j in range(1, site.kv_heads + 1)
        if (site.kv_heads % j == 0 and site.kv_heads // j * dim <= MIX_LIMIT) or j == site.kv_heads
    )


def blocks(x: Tensor, family: ChannelFamily, groups: int) -> Tensor:
    """x [B,G,T,D] -> rows [J, P, c, N] over all N = B*T tokens: complex with c = n, or real with c = n*d."""
    b, g, t, _ = x.shape
    n, p, d = g // groups, len(family.channels), len(family.channels[0])
    index = torch.tensor(family.channels, device=x.device).flatten()
    picked = x[..., index].unflatten(-1, (p, d)).reshape(b, groups, n, t, p, d)
    if family.is_complex:
        pairs = torch.complex(picked[..., 0], picked[..., 1])  # [B, J, n, T, P]
        return pairs.permute(1, 4, 2, 0, 3).flatten(3)
    return picked.permute(1, 4, 2, 5, 0, 3).flatten(2, 3).flatten(3)


def _second_moment(x: Tensor, family: ChannelFamily, groups: int) -> Tensor:
    rows = blocks(x.double(), family, groups)
    return rows @ rows.mH  # [J, P, c, c]


class _ProbedAttention(torch.autograd.Function):
    """Attention whose backward pass also hands out the gradient that reaches far keys and values only."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, far: Tensor, scale: float, softcap: float,
        found: Callable[[Tensor, Tensor], None],
    ) -> Tensor:  # fmt: skip
        logits = ops._grouped_logits(q * scale, k)
        slope = None
        if softcap:
            capped = torch.tanh(logits / softcap)
            slope, logits = 1 - capped**2, capped * softcap
        p = (logits if bias is None else logits + bias).softmax(-1)
        ctx.save_for_backward(q, k, v, p, far, *([] if slope is None else [slope]))
        ctx.scale, ctx.found = scale, found
        return ops._grouped_mix(p, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, far, *slope = ctx.saved_tensors
        (grad,) = gradients
        d_p = ops._grouped_logits(grad, v)
        d_s = p * (d_p - (d_p * p).sum(-1, keepdim=True))
        if slope:
            d_s = d_s * slope[0]
        d_q = ops._grouped_mix(d_s, k) * ctx.scale
        d_k, d_v = _to_keys(d_s, q, k.shape[1]) * ctx.scale, _to_keys(p, grad, k.shape[1])
        d_s, p = d_s * far, p * far
        ctx.found(_to_keys(d_s, q, k.shape[1]) * ctx.scale, _to_keys(p, grad, k.shape[1]))
        return d_q, d_k, d_v, None, None, None, None, None


def _to_keys(weights: Tensor, rows: Tensor, groups: int) -> Tensor:
    """sum over queries and over the heads of a group: weights [B,H,S,T], rows [B,H,S,D] -> [B,G,T,D]."""
    b, h, s, t = weights.shape
    grouped = weights.reshape(b, groups, h // groups * s, t)
    return grouped.mT @ rows.reshape(b, groups, h // groups * s, rows.shape[-1])


class _Instrumented(fx.Interpreter):
    """Runs the graph with the attention nodes of known sites replaced by `_ProbedAttention`."""

    def __init__(
        self, captured: Captured, outcome: Outcome, statistics: Mapping[str, SiteStatistics], far: tuple[int, int]
    ):
        super().__init__(captured.program.module)
        self.sites, self.statistics, self.far = outcome.sites, statistics, far
        self.leaf = torch.zeros((), requires_grad=True)

    def run_node(self, n: fx.Node) -> Any:
        """An attention node of a site is observed, everything else runs as it is."""
        if n.name not in self.sites:
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.observe(self.sites[n.name].name, *args, **kwargs)

    def observe(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float,
        is_causal: bool = False, softcap: float = 0.0, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Add the moments of k and v; arrange that the backward pass adds the metrics."""
        stats, (sinks, recent) = self.statistics[name], self.far
        _, far = ops.split_mask(q, k, None, False, sinks, recent)
        bias = ops.additive(ops.total_mask(q, k, mask, is_causal), q.dtype)
        _add(stats.key, "moments", k[:, :, sinks:])
        _add(stats.value, "moments", v[:, :, sinks:])
        count = k.shape[0] * (k.shape[2] - sinks)
        stats.key.count += count
        stats.value.count += count

        def found(key_gradient: Tensor, value_gradient: Tensor) -> None:
            _add(stats.key, "metrics", key_gradient[:, :, sinks:])
            _add(stats.value, "metrics", value_gradient[:, :, sinks:])

        result: Tensor = _ProbedAttention.apply(q + self.leaf.to(q), k, v, bias, far, scale, softcap, found)  # type: ignore[no-untyped-call]
        return result


@torch.no_grad()
def _add(side: SideStatistics, kind: str, x: Tensor) -> None:
    totals: list[Tensor] = getattr(side, kind)
    news = [_second_moment(x, family, side.groups) for family in side.families]
    if not totals:
        totals.extend(news)
    else:
        for total, new in zip(totals, news, strict=True):
            total += new


def empty_statistics(sites: Iterable[AttentionSite]) -> dict[str, SiteStatistics]:
    """Statistics with nothing in them, by site name."""
    out = {}
    for site in sites:
        groups = latent_groups(site)
        sides = [SideStatistics(families(site, side), groups) for side in ("key", "value")]
        out[site.name] = SiteStatistics(site, *sides)
    return out


def collect(
    captured: Captured,
    outcome: Outcome,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    sinks: int,
    recent: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, SiteStatistics]:
    """Statistics of every site over `batches` (each: argument name -> tensor of the captured shape).

    Labels are drawn from the model itself, with `seed`. Raises FhoptError when a batch does not fit the graph.
    """
    statistics = empty_statistics(outcome.sites.values())
    generator = torch.Generator().manual_seed(seed)
    for done, batch in enumerate(batches, 1):
        runner = _Instrumented(captured, outcome, statistics, (sinks, recent))
        with torch.enable_grad():
            output = runner.run(*_arguments(captured, batch))[captured.result]
            torch.autograd.grad(_sampled_likelihood(output, generator), runner.leaf)
        progress(done)
    return statistics


def _arguments(captured: Captured, batch: Mapping[str, Tensor]) -> list[Any]:
    values: list[Any] = []
    for name, example in captured.program.values.items():
        argument = captured.inputs.get(name)
        value = batch[argument] if argument is not None and argument in batch else example
        if isinstance(value, Tensor) and value.shape != example.shape:
            raise FhoptError(f"a batch has {argument} of shape {tuple(value.shape)}, expected {tuple(example.shape)}.")
        values.append(value.detach() if isinstance(value, Tensor) else value)
    return values


def _sampled_likelihood(output: Tensor, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient, squared, has the Fisher information as its expectation.

    For logits [B, T, V]: sum over positions of log p(y), y ~ p. Any other output counts as the mean of a unit
    Gaussian around itself.
    """
    if output.dim() == 3:
        log_p = output.float().log_softmax(-1)
        with torch.no_grad():
            mass = log_p.exp().cumsum(-1)
            draw = torch.rand((*mass.shape[:-1], 1), generator=generator).to(mass.device) * mass[..., -1:]
            labels = torch.searchsorted(mass, draw).clamp_max(mass.shape[-1] - 1)
        return log_p.gather(-1, labels).sum()
    draw = torch.randn(output.shape, generator=generator).to(output)
    return (output * draw).sum()
