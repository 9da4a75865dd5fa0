"""Plans for models whose heads are spread over processes: each keeps and reads the latents of its own heads.

    keys and values of a process   [B, G/W, T, D]     kv heads [r G/W, (r+1) G/W) of G, for process r of W
    W divides J                    E[J/W own heads]   D[G/W own heads]    nothing is sent
    J divides W                    E[1 own head]      D[G/W own heads]    encoder matrices read heads of all processes:
                                                                          their keys and values are gathered first

Which of both applies follows from J, for keys and for values separately. Where keys and values are gathered, the G/J
heads of a latent head lie in W/J processes, and each of these keeps the same latent, made of the same numbers: the
cache of a process is smaller by J only, and not by W. What is gathered is what an encoder matrix reads: a block when it
is quantized, or, by static caches, each token. Attention itself, attention sinks and residual window, and everything
else of a plan are local in both.

How a model is spread is read from the placements of its weights (`DTensor`, by transformers' `tp_plan` or
`parallelize_module`), and from the width of the outputs of its projections. The result is an ordinary plan for a model
with G/W kv heads; caches and kernels are the same as in one process.

Letters: B batch, H query heads, G kv heads, T tokens, D head size, J latent heads, W processes. Splitting attention by
heads: Megatron-LM (1909.08053), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import PagePlan, SidePlan, SitePlan, SketchPlan


@dataclass(frozen=True)
class Share:
    """Process `rank` of `count` that the heads of a site are spread over; `group` joins them."""

    rank: int
    count: int
    group: Any = None

    def part(self, number: int) -> slice:
        """Return the part of this process in `number` things, which `count` divides."""
        size = number // self.count
        return slice(self.rank * size, (self.rank + 1) * size)


@dataclass(frozen=True, eq=False)
class GatheredHeads:
    """A `HeadGather` over the processes of a share: the heads that this process's encoder matrices read, of all G."""

    share: Share
    key_heads: slice
    value_heads: slice

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Gather own k, v [B,G/W,T,D] to those of `key_heads` and `value_heads`. All processes must call it."""
        if not keys.shape[2]:
            return _blank(keys, self.key_heads), _blank(values, self.value_heads)
        own = torch.cat([keys, values], -1)
        parts = [torch.empty_like(own) for _ in range(self.share.count)]
        dist.all_gather(parts, own, group=self.share.group)
        every_key, every_value = torch.cat(parts, 1).split((keys.shape[3], values.shape[3]), -1)  # [B, G, T, D], E
        return every_key[:, self.key_heads], every_value[:, self.value_heads]


def _blank(x: Tensor, heads: slice) -> Tensor:
    return x.new_empty((x.shape[0], heads.stop - heads.start, *x.shape[2:]))


# --------------------------------------------------------------------------------------------------- plans


def local_plan(model: torch.nn.Module, plan: LatentPlan) -> LatentPlan:
    """Return the part of `plan` that this process needs of a spread `model`; `plan` itself where no head is elsewhere.

    All processes must call it. Raises FhoptError where heads cannot be divided so.
    """
    shares = [find_share(model, site.site) for site in plan.sites]
    if not any(shares):
        return plan
    sites = [s if share is None else shard_site(s, share) for s, share in zip(plan.sites, shares, strict=True)]
    return replace(plan, sites=tuple(sites), pages=_local_pages(plan.pages, shares))


def _local_pages(pages: PagePlan | None, shares: Sequence[Share | None]) -> PagePlan | None:
    """Return `pages` with the numbers of this process's query heads alone."""
    if pages is None or not pages.fill:
        return pages
    parts = [h if share is None else h[share.part(len(h))] for h, share in zip(pages.fill, shares, strict=True)]
    return replace(pages, fill=tuple(parts))


def shard_site(plan: SitePlan, share: Share) -> SitePlan:
    """Return the part of a site's plan that process `share.rank` needs. Raises FhoptError where heads do not divide."""
    site, count = plan.site, share.count
    if site.kv_heads % count or site.heads % count:
        raise FhoptError(
            f"{site.name}: {site.heads} query heads and {site.kv_heads} kv heads are spread over {count} processes; "
            "expected a number of processes that divides both. Use fewer processes."
        )
    heads = replace(site, heads=site.heads // count, kv_heads=site.kv_heads // count)
    key, key_heads = _shard_side(plan.key, share, site)
    value, value_heads = _shard_side(plan.value, share, site)
    own = share.part(site.kv_heads)
    gather = None if key_heads == value_heads == own else GatheredHeads(share, key_heads, value_heads)
    sketch = None if plan.sketch is None else _shard_sketch(plan.sketch, _latent_heads(plan.key.groups, share))
    return SitePlan(heads, plan.layout, key, value, sketch=sketch, gather=gather, segment=plan.segment)


def _shard_side(side: SidePlan, share: Share, site: AttentionSite) -> tuple[SidePlan, slice]:
    """Return (bases of this process's heads, the kv heads that its encoder matrix reads)."""
    groups, count, n = side.groups, share.count, site.kv_heads // side.groups
    if groups % count and count % groups:
        raise FhoptError(
            f"{site.name}: {groups} latent heads in {count} processes; expected numbers of which one divides the "
            f"other. Fit a plan with a latent for each kv head (--layout head), or use another number of processes."
        )
    latent = _latent_heads(groups, share)
    bases = side.encode[latent].contiguous(), side.decode[share.part(site.kv_heads)].contiguous()
    return SidePlan(*bases, side.tiers), slice(latent.start * n, latent.stop * n)


def _latent_heads(groups: int, share: Share) -> slice:
    """Return the latent heads, of `groups`, that this process's kv heads are decoded from."""
    first = share.rank * groups // share.count
    return slice(first, first + max(1, groups // share.count))


def _shard_sketch(sketch: SketchPlan, latent: slice) -> SketchPlan:
    return SketchPlan(sketch.channels[latent], sketch.mean[latent], sketch.deviation[latent], sketch.tiers)


# --------------------------------------------------------------------------------------------------- models


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether some weights of the model are in other processes."""
    return any(isinstance(p, DTensor) and any(map(_splits, p.placements)) for p in model.parameters())


def check_whole(model: torch.nn.Module) -> None:
    """Raise FhoptError for a model of which this process has only a part."""
    if is_sharded(model):
        raise FhoptError(
            f"{type(model).__name__} is spread over several processes; calibration expects a whole model in each. Load "
            "it with device_map (docs/distributed.md); the plan can be applied to the spread model."
        )


def _splits(placement: Any) -> bool:
    return bool(placement.is_shard())


def find_share(model: torch.nn.Module, site: AttentionSite) -> Share | None:
    """Find which part of a site's heads the projections of `model` compute in this process; None: all.

    Projections whose weights are spread are run on zeros: some gather their outputs. Raises FhoptError where queries
    and keys are spread in different ways, or in a way that is not by heads.
    """
    shares = {role: _share_of(model, site, role) for role in ("k", "v", "q")}
    if len({None if share is None else (share.rank, share.count) for share in shares.values()}) > 1:
        counts = ", ".join(f"{role} over {1 if s is None else s.count}" for role, s in shares.items())
        raise FhoptError(
            f"{site.name}: projections are spread over different numbers of processes ({counts}); expected all alike, "
            f"by heads. Spread q, k and v column by column over a divisor of the {site.kv_heads} kv heads."
        )
    return shares["k"]


def _share_of(model: torch.nn.Module, site: AttentionSite, role: str) -> Share | None:
    names = [n for n in site.projections.get(role, ()) if n.endswith("weight")]
    spread = [n for n in names if _is_spread(model, n)]
    if not spread:
        return None
    weight, module = model.get_parameter(spread[0]), model.get_submodule(spread[0].rpartition(".")[0])
    assert isinstance(weight, DTensor)
    inputs, outputs = _sizes(module, weight)
    with torch.no_grad():
        result: Any = module(torch.zeros(1, 1, inputs, dtype=weight.dtype, device=weight.to_local().device))
    if isinstance(result, DTensor):
        result = result.to_local()
    width = int(result.shape[-1])
    return None if width == outputs else _share_by(weight, outputs, width, site, spread[0])


def _is_spread(model: torch.nn.Module, name: str) -> bool:
    """Return whether other processes have parts of a weight; False also where the model has none of that name."""
    try:
        weight = model.get_parameter(name)
    except AttributeError:  # the plan is for a part of this model, or for another one: others check that
        return False
    return isinstance(weight, DTensor) and any(map(_splits, weight.placements))


def _sizes(module: torch.nn.Module, weight: DTensor) -> tuple[int, int]:
    """Return (inputs, outputs) of the whole projection.

    `nn.Linear` keeps outputs first, transformers' `Conv1D` last.
    """
    sizes: Sequence[int] = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
    return int(sizes[1]), int(sizes[0])


def _share_by(weight: DTensor, outputs: int, width: int, site: AttentionSite, name: str) -> Share:
    """Return the share by that dimension of the mesh over which `width` of `outputs` features are in this process."""
    mesh, placements = weight.device_mesh, weight.placements
    dims = [d for d, p in enumerate(placements) if _splits(p) and mesh.size(d) * width == outputs]
    if len(dims) != 1 or site.kv_heads % mesh.size(dims[0]):
        processes = " x ".join(str(mesh.size(d)) for d, p in enumerate(placements) if _splits(p))
        raise FhoptError(
            f"{name} gives {width} of {outputs} features here, spread over {processes} processes; expected whole heads "
            f"in each, of the {site.kv_heads} kv heads of {site.name}. Use a number of processes that divides them."
        )
    return Share(mesh.get_local_rank(dims[0]), mesh.size(dims[0]), mesh.get_group(dims[0]))
