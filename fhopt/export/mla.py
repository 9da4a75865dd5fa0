"""Plans as multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), for which serving engines have kernels.

    a plan     k_g ~ sum over g' of M[g,g'] k_g'   M = decode encode, on keys as a KV cache holds them: rotated
               v_g ~ decode encode v
    an engine  k_h = [K_g c ; R(t) p]   v_h = V_g c   R(t) rotation at position t; only c and p are cached

Values, and key channels without rotation, go into the latent c: in every layout, encoding and decoding are linear maps.
Of the rotated key channels, p has one complex number for each frequency, the same for all heads. Rotation multiplies by
e^{i theta t}, which commutes with complex numbers across heads (TransMLA, arXiv 2502.07864): where M is, at each
frequency, a complex G x G matrix of rank one, u v^H, the rest is exact:

    p = v^H k before its rotation        the query of head h is multiplied by conj(u_g)

One kv head always has rank one. Of several, `truncate` keeps the strongest complex latent of each frequency, which
loses much unless the model is trained further, as TransMLA and MHA2MLA (arXiv 2502.14837) do.

Letters: G kv heads, D and E sizes of keys and values, N key channels without rotation, J latent heads of a plan,
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

CLOSE = 1e-4  # of the largest: the rounding error of float32 bases where the exact number is 0
_HOW = (
    "Expected a model with one kv head, or a truncated plan: `fhopt fit MODEL --layout freq --ratio 1 -o PLAN`, "
    "`fhopt rewrite MODEL --plan PLAN -o FOLDER`, then `fhopt export FOLDER` with --kv-lora-rank."
)


@dataclass(frozen=True)
class Factors:
    """The matrices of one site in the form of the module docstring, float64.

    encode_key [C, G, N] and encode_value [C, G, E] map the N key channels without rotation, `still`, and the values to
    c; decode_key [G, N, C] and decode_value [G, E, C] map c back. shared [F, G] is v, query [F, G] is u, both complex.
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
        """Width of the latent, C."""
        return int(self.encode_value.shape[0])


def factor(plan: SitePlan) -> Factors:
    """Factorize a site's plan without quantized bit groups. Raises FhoptError where engines cannot express the site."""
    _check(plan)
    site = plan.site
    pairs = () if site.rope is None else site.rope.pairs
    still = tuple(sorted(set(range(site.key_dim)) - {channel for pair in pairs for channel in pair}))
    if plan.is_shared:
        encode = plan.key.encode[0].double().view(plan.key.width, site.kv_heads, -1)  # [C, G, D+E]
        keys, values = encode.split((site.key_dim, site.value_dim), -1)
        decoders = plan.key.decode.double(), plan.value.decode.double()
        return Factors(keys, values, *decoders, still, *_no_rotation(site.kv_heads))
    value, key = _merge_heads(plan.value, site.kv_heads), _merge_heads(plan.key, site.kv_heads)
    if not pairs:
        return _concatenate(key, value, still, *_no_rotation(site.kv_heads))
    matrix = torch.einsum("gdr,rhe->gdhe", key[1], key[0])  # [G, D, G, D]
    rotated = _rotated_part(matrix, pairs)
    _check_rest(plan, matrix, rotated, pairs, still)
    query, shared = _rank_one(plan, rotated)
    return _concatenate(_low_rank(matrix[:, still][:, :, :, still]), value, still, shared, query)


def _check(plan: SitePlan) -> None:
    site, name = plan.site, plan.site.name
    if (site.kind, site.mask) != ("self", "causal") or site.sinks or site.softcap or site.window:
        raise FhoptError(
            f"{name} has a mask of kind {site.mask!r}, a softcap, sink logits or an encoder; engines serve only causal "
            "self-attention as latent attention. Leave the export out for this model."
        )
    if site.key_norm:
        raise FhoptError(
            f"{name} normalizes its keys, which are then not a linear map of its input. Leave the export out for this "
            "model."
        )
    if site.rope is not None and (site.rope.positions != "sequence" or site.rope.blocks != 1):
        raise FhoptError(f"{name} rotates by more than one axis; expected RoPE over the sequence.")
    low = [t.bits for side in (plan.key, plan.value) for t in side.tiers if t.bits < 16]
    if low:
        raise FhoptError(
            f"{name} has channels of {min(low)} bits; engines keep latents in one dtype, of no fewer than 8 bits. "
            "Expected a plan without bit groups: `fhopt fit MODEL --layout freq --ratio 1 -o PLAN`."
        )


def _no_rotation(heads: int) -> tuple[Tensor, Tensor]:
    empty = torch.zeros(0, heads, dtype=torch.complex128)
    return empty, empty


def _merge_heads(side: SidePlan, heads: int) -> tuple[Tensor, Tensor]:
    """Merge all latent heads into one, with zeros elsewhere: (encode [J*R, G, d], decode [G, d, J*R])."""
    groups, width, per = side.groups, side.width, heads // side.groups
    dim = side.decode.shape[1]
    encode = torch.zeros(groups, width, heads, dim, dtype=torch.float64)
    decode = torch.zeros(heads, dim, groups, width, dtype=torch.float64)
    for j in range(groups):
        own = slice(j * per, (j + 1) * per)
        encode[j, :, own] = side.encode[j].double().view(width, per, dim)
        decode[own, :, j] = side.decode[own].double()
    return encode.flatten(0, 1), decode.flatten(2)


def _concatenate(
    key: tuple[Tensor, Tensor], value: tuple[Tensor, Tensor], still: tuple[int, ...], shared: Tensor, query: Tensor
) -> Factors:
    """Concatenate the latents of keys and of values, which share no channel of c."""
    (encode_key, decode_key), (encode_value, decode_value) = key, value
    first, last = len(encode_key), len(encode_value)
    pad = torch.nn.functional.pad
    return Factors(
        pad(encode_key, (0, 0, 0, 0, 0, last)), pad(encode_value, (0, 0, 0, 0, first, 0)),
        pad(decode_key, (0, last)), pad(decode_value, (first, 0)), still, shared, query,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- rotation


def _rotated_part(matrix: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Project M [G, D, G, D] on complex G x G matrices, one for each frequency: [F, G, G]."""
    blocks = []
    for a, b in pairs:
        real = (matrix[:, a, :, a] + matrix[:, b, :, b]) / 2
        blocks.append(torch.complex(real, (matrix[:, b, :, a] - matrix[:, a, :, b]) / 2))
    return torch.stack(blocks)


def _check_rest(
    plan: SitePlan, matrix: Tensor, rotated: Tensor, pairs: Sequence[tuple[int, int]], still: tuple[int, ...]
) -> None:
    """Raise FhoptError unless M is `rotated` plus a map among channels without rotation."""
    rest = matrix.clone()
    for (a, b), block in zip(pairs, rotated, strict=True):
        for i, j, part in ((a, a, block.real), (b, b, block.real), (b, a, block.imag), (a, b, -block.imag)):
            rest[:, i, :, j] -= part
    for i in still:
        rest[:, i, :, still] = 0
    if float(rest.norm()) > CLOSE * float(matrix.norm()):
        raise FhoptError(
            f"{plan.site.name} (layout {plan.layout!r}) mixes key channels of different rotary frequencies, which is "
            f"possible only after the rotation; engines rotate last. {_HOW}"
        )


def _rank_one(plan: SitePlan, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize the blocks [F, G, G] as u v^H, [F, G] each. Raises FhoptError for blocks of higher rank."""
    left, sizes, right = torch.linalg.svd(rotated)
    rank = int((sizes > CLOSE * float(sizes.max())).sum(1).max())
    if rank > 1:
        raise FhoptError(
            f"{plan.site.name} keeps {rank} complex numbers for each rotary frequency of its keys; the rotated part of "
            f"DeepSeek's attention has one, shared by all heads. {_HOW}"
        )
    root = sizes[:, :1].sqrt()
    return left[:, :, 0] * root, right[:, 0].conj() * root


def _low_rank(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize M [G, N, G, N] among channels without rotation: (encode [R, G, N], decode [G, N, R]), R its rank."""
    heads, still = matrix.shape[:2]
    left, sizes, right = torch.linalg.svd(matrix.flatten(0, 1).flatten(1))
    keep = sizes > CLOSE * (float(sizes.max()) if len(sizes) else 0.0)
    root = sizes[keep].sqrt()
    encode = (root.unsqueeze(1) * right[: len(sizes)][keep]).unflatten(1, (heads, still))
    return encode, (left[:, : len(sizes)][:, keep] * root).unflatten(0, (heads, still))


# --------------------------------------------------------------------------------------------------- truncation


def truncate(plan: LatentPlan, width: int) -> LatentPlan:
    """Truncate a plan to what an engine caches: one complex latent for each frequency, `width` channels of c.

    Channels of a plan are ordered by cost, so the first ones are kept. Where keys have channels without rotation, these
    and the values share the width in proportion. Raises FhoptError for quantized plans and for plans whose keys do not
    have the layout `freq` with one latent head.
    """
    if width < 1:
        raise FhoptError(f"a latent cannot have {width} channels; expected at least 1.")
    return replace(plan, sites=tuple(_truncate(site, width) for site in plan.sites))


def _truncate(plan: SitePlan, width: int) -> SitePlan:
    _check(plan)
    if plan.is_shared:
        first = range(min(width, plan.key.width))
        return replace(plan, key=_kept(plan.key, first), value=_kept(plan.value, first))
    if plan.layout != "freq" or plan.key.groups != 1 or plan.value.groups != 1 or plan.key.tiers or plan.value.tiers:
        raise FhoptError(
            f"{plan.site.name} has the layout {plan.layout!r}, {plan.key.groups} latent heads; expected an unquantized "
            "plan of the layout freq with one latent head: `fhopt fit MODEL --layout freq --ratio 1 -o PLAN`."
        )
    rotated, still = _by_frequency(plan)
    room = -(-width * len(still) // (len(still) + plan.value.width))
    kept = sorted([*rotated, *still[:room]])
    values = range(min(plan.value.width, width - min(room, len(still))))
    return replace(plan, key=_kept(plan.key, kept), value=_kept(plan.value, values))


def _by_frequency(plan: SitePlan) -> tuple[list[int], list[int]]:
    """List the latent channels of keys: the two strongest of each frequency, and all without rotation."""
    site = plan.site
    pairs = () if site.rope is None else site.rope.pairs
    owner = torch.full((site.key_dim,), len(pairs))  # frequency of each channel
    for frequency, pair in enumerate(pairs):
        owner[list(pair)] = frequency
    energy = plan.key.encode[0].double().square().view(plan.key.width, site.kv_heads, -1).sum(1)  # [R, D]
    by_owner = torch.zeros(len(energy), len(pairs) + 1, dtype=torch.float64).index_add_(1, owner, energy)
    channels: list[list[int]] = [[] for _ in range(len(pairs) + 1)]
    for channel, frequency in enumerate(by_owner.argmax(1).tolist()):
        channels[frequency].append(channel)
    return [channel for of_one in channels[:-1] for channel in of_one[:2]], channels[-1]


def _kept(side: SidePlan, channels: Sequence[int]) -> SidePlan:
    chosen = list(channels)
    return SidePlan(side.encode[:, chosen].contiguous(), side.decode[:, :, chosen].contiguous(), side.tiers)


# --------------------------------------------------------------------------------------------------- quantized caches


def is_quantized_at_full_width(plan: LatentPlan) -> bool:
    """Return True when a plan keeps all channels of keys and values in fewer bits: only the cache's dtype changes."""
    sides = [
        (site, side, dim)
        for site in plan.sites
        for side, dim in ((site.key, site.site.key_dim), (site.value, site.site.value_dim))
    ]
    return all(
        not site.is_shared and side.groups * side.width >= site.site.kv_heads * dim for site, side, dim in sides
    ) and any(tier.bits < 16 for _, side, _ in sides for tier in side.tiers)


def cache_dtype(plan: LatentPlan) -> str:
    """Return the `kv_cache_dtype` of engines nearest to a plan's bits: "fp8" for up to 8 bits a number, or "auto"."""

    def bits(side: SidePlan) -> float:
        return sum(t.bits * t.width for t in side.tiers) / side.width if side.tiers else 16.0

    return "fp8" if all(bits(side) <= 8 for site in plan.sites for side in (site.key, site.value)) else "auto"
