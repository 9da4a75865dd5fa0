"""Shared kernel shapes: sites with the same bit groups use the same kernel.

A kernel is compiled for its bit groups. The free allocation gives every site its own, so a plan needs as many kernels
as the model has layers. Sites are therefore clustered by the KL that they would have in each other's shapes:

    shape of a cluster     for its k-th best chunk of channels, the bits that minimize the total cost of its sites
    cluster of a site      the one whose shape gives it the least cost

Both steps use the price per bit from the free allocation and alternate until nothing changes (Lloyd 1982, "Least
squares quantization in PCM", with the rate-distortion measure of entropy-constrained quantizers: Chou, Lookabaugh and
Gray 1989). Then the budget is allocated again, to clusters instead of sites. Both sides of a site share a kernel, so
they are clustered together. Chunks of a site are ordered by what dropping them costs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.fitting.allocation import Allocation, PartedSide, allocate_sides, side_of
from fhopt.fitting.choices import Grain
from fhopt.plan.site_plan import TIER_QUANTUM

GPU_SHAPES = 4  # max shapes of a plan for a GPU, where each is compiled and tuned
ROUNDS = 20  # max rounds of clustering; it converges much earlier
ChunkNats = Mapping[int, Sequence[float]]  # bits -> nats/token of each chunk of a side


@dataclass(frozen=True)
class SiteChunks:
    """Costs of the chunks of one site, by side.

    nats: of each side (one if keys and values share a latent). groups: latent heads J of each side. `alike`: sites can
    share a kernel only if this is equal. weight: of its bits, see `Budget.weights`. seconds: decode time per channel,
    if time counts.
    """

    nats: tuple[ChunkNats, ...]
    groups: tuple[int, ...]
    alike: Hashable = None
    weight: float = 1.0
    seconds: float = 0.0

    @property
    def kind(self) -> Hashable:
        """What sites with a common shape must share: number of chunks of each side, weight, and `alike`."""
        return (self.alike, self.weight, *(len(side[0]) for side in self.nats))

    def orders(self) -> list[list[int]]:
        """Return the chunks of each side in descending order of what dropping them costs."""
        return [sorted(range(len(side[0])), key=lambda i: -side[0][i]) for side in self.nats]


def share_shapes(
    sites: Mapping[str, SiteChunks], free: Allocation, budget: int, grain: Grain, most: int, rate: float = 0.0
) -> Allocation:
    """Allocate `budget` bits per token with at most `most` shapes, or one for each kind of site if more.

    free: the allocation without this limit; returned if it has no more shapes. rate: nats per second of decode time.
    Raises FhoptError if the budget is below the minimum that all sides need.
    """
    names = list(sites)
    if len({(*_shape(free, name, len(sites[name].nats)), sites[name].kind) for name in names}) <= most:
        return free
    kinds: dict[Hashable, list[str]] = {}
    for name in names:
        kinds.setdefault(sites[name].kind, []).append(name)
    clusters = [
        cluster
        for kind in kinds.values()
        for cluster in _clusters(kind, sites, free.price, grain, max(1, most * len(kind) // len(names)), rate)
    ]
    sides = {
        (str(number), i): _joined_side([sites[name] for name in cluster], i, grain)
        for number, cluster in enumerate(clusters)
        for i in range(len(sites[cluster[0]].nats))
    }
    shared = allocate_sides(sides, budget, fill=True, rate=rate)
    bits = {
        (name, i): _placed(order, shared.bits[str(number), i])
        for number, cluster in enumerate(clusters)
        for name in cluster
        for i, order in enumerate(sites[name].orders())
    }
    return Allocation(bits, shared.nats, shared.price, shared.seconds)


def _shape(allocation: Allocation, name: str, sides: int) -> tuple[Hashable, ...]:
    return tuple(tuple(sorted(allocation.bits[name, i])) for i in range(sides))


def _placed(order: Sequence[int], ranked: Sequence[int]) -> list[int]:
    """Return bits by chunk from bits by rank; ranks past the last chunk are padding and stay in place."""
    bits = list(ranked)
    for rank, chunk in enumerate(order):
        bits[chunk] = ranked[rank]
    return bits


def _joined_side(sites: Sequence[SiteChunks], side: int, grain: Grain) -> PartedSide:
    """Merge the chunks of equal rank of several sites into one side."""
    ranked = [_ranked(site, side) for site in sites]
    costs = {bits: [sum(part) for part in zip(*(r[bits] for r in ranked), strict=True)] for bits in ranked[0]}
    groups = sum(site.groups[side] for site in sites)
    return side_of(costs, groups, grain, sites[0].weight, sum(site.seconds for site in sites))


def _ranked(site: SiteChunks, side: int) -> dict[int, list[float]]:
    order = site.orders()[side]
    return {bits: [nats[i] for i in order] for bits, nats in site.nats[side].items()}


# --------------------------------------------------------------------------------------------------- clusters


def _clusters(
    names: Sequence[str], sites: Mapping[str, SiteChunks], price: float, grain: Grain, most: int, rate: float
) -> list[list[str]]:
    """Divide sites of one kind into at most `most` nonempty clusters. price, rate: nats per bit and per second."""
    levels = sorted({0, *grain.levels})
    worth = torch.stack([_worth(sites[name], levels, price, rate) for name in names])  # [sites, levels, chunks]
    shapes = _first_shapes(worth, most)
    assigned = torch.full((len(names),), -1)
    for _ in range(ROUNDS):
        losses = torch.stack([worth.gather(1, shape.expand(len(names), 1, -1)).sum((1, 2)) for shape in shapes])
        nearest = losses.argmin(0)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        used = assigned.unique().tolist()
        shapes = [worth[assigned == c].sum(0).argmin(0)[None] for c in used]
        assigned = torch.tensor([used.index(c) for c in assigned.tolist()])
    found = [[name for name, c in zip(names, assigned.tolist(), strict=True) if c == n] for n in range(len(shapes))]
    return [cluster for cluster in found if cluster]


def _worth(site: SiteChunks, levels: Sequence[int], price: float, rate: float) -> Tensor:
    """Return nats plus the price of bits and time for each level and ranked chunk of both sides, [levels, chunks]."""
    sides, time = [], rate * TIER_QUANTUM * site.weight * site.seconds
    for i, groups in enumerate(site.groups):
        ranked = _ranked(site, i)
        unit = TIER_QUANTUM * groups * site.weight
        rows = [[nats + price * bits * unit + (time if bits else 0.0) for nats in ranked[bits]] for bits in levels]
        sides.append(torch.tensor(rows, dtype=torch.float64))
    return torch.cat(sides, 1)


def _first_shapes(worth: Tensor, most: int) -> list[Tensor]:
    """Choose initial shapes [1, chunks] farthest-first: the next is the shape of the site with the largest excess."""
    own = worth.argmin(1, keepdim=True)  # [sites, 1, chunks], each site's best shape
    best = worth.min(1).values.sum(1)
    losses = torch.full((len(worth),), torch.inf, dtype=torch.float64)
    chosen = int((worth.sum(0).argmin(0)[None, None] == own).double().mean((1, 2)).argmax())
    shapes = []
    for _ in range(min(most, len(worth))):
        shapes.append(own[chosen])
        excess = worth.gather(1, own[chosen].expand(len(worth), 1, -1)).sum((1, 2)) - best
        losses = torch.minimum(losses, excess)
        if float(losses.max()) <= 0:
            break
        chosen = int(losses.argmax())
    return shapes
