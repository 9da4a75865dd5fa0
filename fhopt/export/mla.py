"""Plans as multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), for which serving engines have kernels.

    a plan     k_g ~ sum over g' of M[g,g'] k_g'   M = decode encode, on keys as a cache holds them: rotated
               v_g ~ decode encode v
    an engine  k_h = [K_g c ; R(t) p]   v_h = V_g c   R(t) rotation at position t; c and p are all that is cached

Values, and channels of keys that do not rotate, go into the latent c: whatever the layout, what is encoded is a linear
map of c, and what is decoded is one again. Of channels that rotate, p has one complex number for each frequency, the
same for all heads. Rotation multiplies by e^{i theta t}, which commutes with complex numbers across heads (TransMLA,
arXiv 2502.07864): where M is, at each frequency, a complex G x G matrix of rank one, u v^H, the rest is exact:

    p = v^H k before its rotation        the query of head h is multiplied by conj(u_g)

One kv head always has rank one. Of more, a plan keeps the strongest complex latent of each frequency (`cut`), which
loses much unless the model is trained on: TransMLA and MHA2MLA (arXiv 2502.14837) do so.

Letters: G kv heads, D and E sizes of keys and values, N channels of keys that do not rotate, J latent heads of a plan,
F rotary frequencies, C width of c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan

CLOSE = 1e-4  # of the largest: what bases in float32 leave where there should be nothing
_HOW = (
    "Expected a model with one kv head, or a plan that was cut: `fhopt fit MODEL --layout freq --ratio 1 -o PLAN`, "
    "`fhopt rewrite MODEL --plan PLAN -o FOLDER`, then `fhopt export FOLDER` with --kv-lora-rank."
)


@dataclass(frozen=True)
class Factors:
    """What becomes of one site, float64.

    encode_key [C, G, N], encode_value [C, G, E]: c from channels of keys that do not rotate, and from values.
    decode_key [G, N, C], decode_value [G, E, C]. still: these N channels. shared [F, G]: v; query [F, G]: u, complex.
    """

    encode_key: Tensor
    encode_value: Tensor
    decode_key: Tensor
    decode_value: Tensor
    still: tuple[int, ...]
    shared: Tensor
    query: Tensor

    @property
    def width(self) -> int:
        """C."""
        return int(self.encode_value.shape[0])


def factor(plan: SitePlan) -> Factors:
    """The factors of a plan without low-bit tiers. Raises FhoptError where an engine has no place for the site."""
    _check(plan)
    site = plan.site
    pairs = () if site.rope is None else site.rope.pairs
    still = tuple(sorted(set(range(site.key_dim)) - {channel for pair in pairs for channel in pair}))
    if plan.is_shared:
        encode = plan.key.encode[0].double().view(plan.key.width, site.kv_heads, -1)  # [C, G, D+E]
        keys, values = encode.split((site.key_dim, site.value_dim), -1)
        decoders = plan.key.decode.double(), plan.value.decode.double()
        return Factors(keys, values, *decoders, still, *_nothing(site.kv_heads))
    value, key = _whole(plan.value, site.kv_heads), _whole(plan.key, site.kv_heads)
    if not pairs:
        return _beside(key, value, still, *_nothing(site.kv_heads))
    matrix = torch.einsum("gdr,rhe->gdhe", key[1], key[0])  # [G, D, G, D]
    turning = _turning(matrix, pairs)
    _check_rest(plan, matrix, turning, pairs, still)
    query, shared = _rank_one(plan, turning)
    return _beside(_low_rank(matrix[:, still][:, :, :, still]), value, still, shared, query)


def _check(plan: SitePlan) -> None:
    site, name = plan.site, plan.site.name
    if (site.kind, site.mask) != ("self", "causal") or site.sinks or site.softcap or site.window:
        raise FhoptError(
            f"{name} has a mask of kind {site.mask!r}, a softcap, sinks or an encoder; engines serve causal "
            "self-attention alone as latent attention. Leave the export out for this model."
        )
    if site.key_norm:
        raise FhoptError(
            f"{name} normalises its keys, which are then no linear map of its input. Leave the export out for this "
            "model."
        )
    if site.rope is not None and (site.rope.positions != "sequence" or site.rope.blocks != 1):
        raise FhoptError(f"{name} rotates by more than one axis; expected RoPE over the sequence.")
    low = [t.bits for side in (plan.key, plan.value) for t in side.tiers if t.bits < 16]
    if low:
        raise FhoptError(
            f"{name} has channels of {min(low)} bits; engines keep latents in one dtype, of no fewer than 8 bits. "
            "Expected a plan without tiers: `fhopt fit MODEL --layout freq --ratio 1 -o PLAN`."
        )


def _nothing(heads: int) -> tuple[Tensor, Tensor]:
    empty = torch.zeros(0, heads, dtype=torch.complex128)
    return empty, empty


def _whole(side: SidePlan, heads: int) -> tuple[Tensor, Tensor]:
    """(encode [J*R, G, d], decode [G, d, J*R]): all latent heads as one, with zeros where they do not look."""
    groups, width, per = side.groups, side.width, heads // side.groups
    dim = side.decode.shape[1]
    encode = torch.zeros(groups, width, heads, dim, dtype=torch.float64)
    decode = torch.zeros(heads, dim, groups, width, dtype=torch.float64)
    for j in range(groups):
        own = slice(j * per, (j + 1) * per)
        encode[j, :, own] = side.encode[j].double().view(width, per, dim)
        decode[own, :, j] = side.decode[own].double()
    return encode.flatten(0, 1), decode.flatten(2)


def _beside(
    key: tuple[Tensor, Tensor], value: tuple[Tensor, Tensor], still: tuple[int, ...], shared: Tensor, query: Tensor
) -> Factors:
    """Latents of keys in front, of values behind: the sides have no channel of c in common."""
    (encode_key, decode_key), (encode_value, decode_value) = key, value
    first, last = len(encode_key), len(encode_value)
    pad = torch.nn.functional.pad
    return Factors(
        pad(encode_key, (0, 0, 0, 0, 0, last)), pad(encode_value, (0, 0, 0, 0, first, 0)),
        pad(decode_key, (0, last)), pad(decode_value, (first, 0)), still, shared, query,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- rotation


def _turning(matrix: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """The part of M [G, D, G, D] that is a complex G x G matrix at each frequency: [F, G, G]."""
    found = []
    for a, b in pairs:
        real = (matrix[:, a, :, a] + matrix[:, b, :, b]) / 2
        found.append(torch.complex(real, (matrix[:, b, :, a] - matrix[:, a, :, b]) / 2))
    return torch.stack(found)


def _check_rest(
    plan: SitePlan, matrix: Tensor, turning: Tensor, pairs: Sequence[tuple[int, int]], still: tuple[int, ...]
) -> None:
    """Raise FhoptError unless M is `turning` and what it does among channels that do not rotate."""
    rest = matrix.clone()
    for (a, b), block in zip(pairs, turning, strict=True):
        for i, j, part in ((a, a, block.real), (b, b, block.real), (b, a, block.imag), (a, b, -block.imag)):
            rest[:, i, :, j] -= part
    for i in still:
        rest[:, i, :, still] = 0
    if float(rest.norm()) > CLOSE * float(matrix.norm()):
        raise FhoptError(
            f"{plan.site.name} (layout {plan.layout!r}) mixes channels of keys that rotate at different speeds, "
            f"which is right only behind the rotation; engines rotate last. {_HOW}"
        )


def _rank_one(plan: SitePlan, turning: Tensor) -> tuple[Tensor, Tensor]:
    """u and v, [F, G] each, with u v^H = the blocks [F, G, G]. Raises FhoptError for blocks of higher rank."""
    left, sizes, right = torch.linalg.svd(turning)
    rank = int((sizes > CLOSE * float(sizes.max())).sum(1).max())
    if rank > 1:
        raise FhoptError(
            f"{plan.site.name} keeps {rank} complex numbers for a rotary frequency of its keys; the rotated part of "
            f"DeepSeek's attention has one, shared by all heads. {_HOW}"
        )
    root = sizes[:, :1].sqrt()
    return left[:, :, 0] * root, right[:, 0].conj() * root


def _low_rank(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """M [G, N, G, N] among channels that do not rotate as (encode [R, G, N], decode [G, N, R]), R its rank."""
    heads, still = matrix.shape[:2]
    left, sizes, right = torch.linalg.svd(matrix.flatten(0, 1).flatten(1))
    keep = sizes > CLOSE * (float(sizes.max()) if len(sizes) else 0.0)
    root = sizes[keep].sqrt()
    encode = (root.unsqueeze(1) * right[: len(sizes)][keep]).unflatten(1, (heads, still))
    return encode, (left[:, : len(sizes)][:, keep] * root).unflatten(0, (heads, still))


# --------------------------------------------------------------------------------------------------- cutting


def cut(plan: LatentPlan, width: int) -> LatentPlan:
    """The same plan with what an engine has room for: one complex latent for each frequency, `width` channels of c.

    Channels of a plan stand in order of what they are worth, so the first ones stay. Where keys have channels that do
    not rotate, these and the values share the width in proportion. Raises FhoptError for plans that are not uncoded or
    whose keys are not of the layout `freq` with one latent head.
    """
    if width < 1:
        raise FhoptError(f"a latent of {width} channels is none; expected at least 1.")
    return replace(plan, sites=tuple(_cut(site, width) for site in plan.sites))


def _cut(plan: SitePlan, width: int) -> SitePlan:
    _check(plan)
    if plan.is_shared:
        first = range(min(width, plan.key.width))
        return replace(plan, key=_kept(plan.key, first), value=_kept(plan.value, first))
    if plan.layout != "freq" or plan.key.groups != 1 or plan.value.groups != 1 or plan.key.tiers or plan.value.tiers:
        raise FhoptError(
            f"{plan.site.name} has the layout {plan.layout!r}, {plan.key.groups} latent heads; expected an uncoded "
            "plan of the layout freq with one latent head: `fhopt fit MODEL --layout freq --ratio 1 -o PLAN`."
        )
    turning, still = _by_frequency(plan)
    room = -(-width * len(still) // (len(still) + plan.value.width))
    kept = sorted([*turning, *still[:room]])
    values = range(min(plan.value.width, width - min(room, len(still))))
    return replace(plan, key=_kept(plan.key, kept), value=_kept(plan.value, values))


def _by_frequency(plan: SitePlan) -> tuple[list[int], list[int]]:
    """Latent channels of keys: the two strongest of each frequency, and all that do not rotate."""
    site = plan.site
    pairs = () if site.rope is None else site.rope.pairs
    owner = torch.full((site.key_dim,), len(pairs))  # frequency of each channel
    for frequency, pair in enumerate(pairs):
        owner[list(pair)] = frequency
    energy = plan.key.encode[0].double().square().view(plan.key.width, site.kv_heads, -1).sum(1)  # [R, D]
    by_owner = torch.zeros(len(energy), len(pairs) + 1, dtype=torch.float64).index_add_(1, owner, energy)
    found: list[list[int]] = [[] for _ in range(len(pairs) + 1)]
    for channel, frequency in enumerate(by_owner.argmax(1).tolist()):
        found[frequency].append(channel)
    return [channel for channels in found[:-1] for channel in channels[:2]], found[-1]


def _kept(side: SidePlan, channels: Sequence[int]) -> SidePlan:
    chosen = list(channels)
    return SidePlan(side.encode[:, chosen].contiguous(), side.decode[:, :, chosen].contiguous(), side.tiers)


# --------------------------------------------------------------------------------------------------- bits alone


def is_coded_at_full_width(plan: LatentPlan) -> bool:
    """True when a plan keeps all channels of keys and values in fewer bits: only the bits of the cache change."""
    sides = [
        (site, side, dim)
        for site in plan.sites
        for side, dim in ((site.key, site.site.key_dim), (site.value, site.site.value_dim))
    ]
    return all(
        not site.is_shared and side.groups * side.width >= site.site.kv_heads * dim for site, side, dim in sides
    ) and any(tier.bits < 16 for _, side, _ in sides for tier in side.tiers)


def cache_dtype(plan: LatentPlan) -> str:
    """The `kv_cache_dtype` of engines that comes nearest to bits alone: "fp8" with up to 8 bits a number, or "auto"."""

    def bits(side: SidePlan) -> float:
        return sum(t.bits * t.width for t in side.tiers) / side.width if side.tiers else 16.0

    return "fp8" if all(bits(side) <= 8 for site in plan.sites for side in (site.key, site.value)) else "auto"
