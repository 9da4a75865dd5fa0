"""Plans for tensor-parallel models: each process caches and attends to the latents of its own heads.

    keys and values of a process   [B, G/W, T, D]     kv heads [r G/W, (r+1) G/W) of G, for process r of W
    W divides J                    E[J/W own heads]   D[G/W own heads]    no communication
    J divides W                    E[1 own head]      D[G/W own heads]    encoder inputs span heads of all processes:
                                                                          their keys and values are gathered first

J decides between the two, for keys and for values separately. If keys and values are gathered, the G/J heads of a
latent head are in W/J processes, and each of these stores the same latent, computed from the same values: a process's
cache is only J times smaller, not W times. Gathered are the encoder inputs: a block when it is quantized, or, in static
caches, each token. In both cases attention itself, attention sinks, residual window, and everything else are local.

The sharding of a model is derived from its weights' placements (`DTensor`, by transformers' `tp_plan` or
`parallelize_module`) and from the output width of its projections. The result is an ordinary plan for a model with G/W
kv heads; caches and kernels are the same as in one process.

Letters: B batch, H query heads, G kv heads, T tokens, D head size, J latent heads, W processes. Tensor parallelism by
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
    """Process `rank` of the `count` processes in `group` that share a site's heads."""

    rank: int
    count: int
    group: Any = None

    def part(self, number: int) -> slice:
        """Return this process's slice of `number` items; `count` must divide it."""
        size = number // self.count
        return slice(self.rank * size, (self.rank + 1) * size)


@dataclass(frozen=True, eq=False)
class GatheredHeads:
    """A `HeadGather` over a share's processes. key_heads, value_heads: encoder inputs of this process, of all G."""

    share: Share
    key_heads: slice
    value_heads: slice

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Gather `key_heads` and `value_heads` from all processes' k, v [B,G/W,T,D]. All processes must call it."""
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
    """Return the part of `plan` that this process needs of a sharded `model`; `plan` itself if heads are not sharded.

    All processes must call it. Raises FhoptError if heads cannot be divided this way.
    """
    shares = [find_share(model, site.site) for site in plan.sites]
    if not any(shares):
        return plan
    sites = [s if share is None else shard_site(s, share) for s, share in zip(plan.sites, shares, strict=True)]
    return replace(plan, sites=tuple(sites), pages=_local_pages(plan.pages, shares))


def _local_pages(pages: PagePlan | None, shares: Sequence[Share | None]) -> PagePlan | None:
    """Return `pages` with only the values of this process's query heads."""
    if pages is None or not pages.fill:
        return pages
    parts = [h if share is None else h[share.part(len(h))] for h, share in zip(pages.fill, shares, strict=True)]
    return replace(pages, fill=tuple(parts))


def shard_site(plan: SitePlan, share: Share) -> SitePlan:
    """Return process `share.rank`'s part of a site's plan. Raises FhoptError if heads do not divide evenly."""
    site, count = plan.site, share.count
    if site.kv_heads % count or site.heads % count:
        raise FhoptError(
            f"{site.name}: {count} processes do not divide {site.heads} query heads and {site.kv_heads} kv "
            "heads; expected a common divisor. Use fewer processes."
        )
    heads = replace(site, heads=site.heads // count, kv_heads=site.kv_heads // count)
    key, key_heads = _shard_side(plan.key, share, site)
    value, value_heads = _shard_side(plan.value, share, site)
    own = share.part(site.kv_heads)
    gather = None if key_heads == value_heads == own else GatheredHeads(share, key_heads, value_heads)
    sketch = None if plan.sketch is None else _shard_sketch(plan.sketch, _latent_heads(plan.key.groups, share))
    return SitePlan(heads, plan.layout, key, value, sketch=sketch, gather=gather, segment=plan.segment)


def _shard_side(side: SidePlan, share: Share, site: AttentionSite) -> tuple[SidePlan, slice]:
    """Return (bases of this process's heads, kv heads of its encoder input)."""
    groups, count, n = side.groups, share.count, site.kv_heads // side.groups
    if groups % count and count % groups:
        raise FhoptError(
            f"{site.name}: {groups} latent heads do not divide evenly over {count} processes; expected that "
            "one number divides the other. Fit a plan with --layout head, or use another number of processes."
        )
    latent = _latent_heads(groups, share)
    bases = side.encode[latent].contiguous(), side.decode[share.part(site.kv_heads)].contiguous()
    return SidePlan(*bases, side.tiers), slice(latent.start * n, latent.stop * n)


def _latent_heads(groups: int, share: Share) -> slice:
    """Return the latent heads, of `groups`, from which this process's kv heads are decoded."""
    first = share.rank * groups // share.count
    return slice(first, first + max(1, groups // share.count))


def _shard_sketch(sketch: SketchPlan, latent: slice) -> SketchPlan:
    return SketchPlan(sketch.channels[latent], sketch.mean[latent], sketch.deviation[latent], sketch.tiers)


# --------------------------------------------------------------------------------------------------- models


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether some weights of the model are sharded."""
    return any(isinstance(p, DTensor) and any(map(_splits, p.placements)) for p in model.parameters())


def check_whole(model: torch.nn.Module) -> None:
    """Raise FhoptError for a sharded model."""
    if is_sharded(model):
        raise FhoptError(
            f"{type(model).__name__} is sharded over several processes; expected a whole model in each "
            "process for calibration. Load it with device_map (docs/distributed.md); the plan can be applied "
            "to the sharded model."
        )


def _splits(placement: Any) -> bool:
    return bool(placement.is_shard())


def find_share(model: torch.nn.Module, site: AttentionSite) -> Share | None:
    """Find which part of a site's heads this process's projections compute; None: all.

    Runs sharded projections on zeros, since some gather their outputs. Raises FhoptError if queries and keys are
    sharded differently, or not by heads.
    """
    shares = {role: _share_of(model, site, role) for role in ("k", "v", "q")}
    if len({None if share is None else (share.rank, share.count) for share in shares.values()}) > 1:
        counts = ", ".join(f"{role} over {1 if s is None else s.count}" for role, s in shares.items())
        raise FhoptError(
            f"{site.name}: projections are sharded over different numbers of processes ({counts}); expected "
            f"the same number for each. Shard q, k and v by columns over a divisor of the {site.kv_heads} kv "
            "heads."
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
    """Return whether a weight is sharded; False also if the model has no such weight."""
    try:
        weight = model.get_parameter(name)
    except AttributeError:  # the plan is for a part of this model or for another one; checked elsewhere
        return False
    return isinstance(weight, DTensor) and any(map(_splits, weight.placements))


def _sizes(module: torch.nn.Module, weight: DTensor) -> tuple[int, int]:
    """Return (inputs, outputs) of the unsharded projection.

    `nn.Linear` has outputs first, transformers' `Conv1D` last.
    """
    sizes: Sequence[int] = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
    return int(sizes[1]), int(sizes[0])


def _share_by(weight: DTensor, outputs: int, width: int, site: AttentionSite, name: str) -> Share:
    """Return the share for the mesh dimension that splits `outputs` features into `width` per process."""
    mesh, placements = weight.device_mesh, weight.placements
    dims = [d for d, p in enumerate(placements) if _splits(p) and mesh.size(d) * width == outputs]
    if len(dims) != 1 or site.kv_heads % mesh.size(dims[0]):
        processes = " x ".join(str(mesh.size(d)) for d, p in enumerate(placements) if _splits(p))
        raise FhoptError(
            f"{name} computes {width} of {outputs} features in each of {processes} processes; expected whole "
            f"kv heads of {site.name}. Use a number of processes that divides its {site.kv_heads} kv heads."
        )
    return Share(mesh.get_local_rank(dims[0]), mesh.size(dims[0]), mesh.get_group(dims[0]))
