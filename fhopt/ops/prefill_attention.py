"""Prefill attention: to exact tokens, and to latents with reconstructed K/V.

    fhopt::rebuilt_attention  q [B,H,S,D]  rows [B,J,T,..] and decoders of keys and values   -> o [B,H,S,E], lse [B,H,S]
    fhopt::open_attention     q [B,H,S,D]  k [B,G,N,D]  v [B,G,N,E]                          -> o [B,H,S,E], lse [B,H,S]

On a GPU, a decode step absorbs the decoder into its query and attends to latents directly. A prefill has M = S H/G rows
per kv head for the same tokens. The cost of one token, in tensor-core FLOPs, with c = CONVERSION per unpacked quantized
value:

    absorbed        2 M (R_K + R_V) + c (R_K + R_V) tiles    tiles of STEP_ROWS rows, each of which unpacks all values
    reconstructed   2 M (D + E) + 2 (R_K D + R_V E) + c (R_K + R_V)

Reconstruction therefore pays off from some number of rows on, for any T: if latents are wider than heads because
matmuls are shorter, otherwise because values are unpacked only once. It never pays off if neither holds, as with narrow
16-bit latents. Both load the same bytes; keys and values are reconstructed 32 MB at a time (codegen/gpu/prefill.py),
never all of them.

On a CPU the matmuls of such queries run 2x to 5x faster on plain keys and values (codegen/cpu/prefill.py). From
CPU_QUERIES queries per head on, both kinds of tokens therefore use that kernel in eager mode, but not in graphs.
Non-NVIDIA GPUs always absorb. The references define the results.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T quantized tokens, N exact tokens, D and E head
size of keys and values, R latent width, M rows of a kv head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.ops import algebra, latent_attention, packing, registry

CONVERSION = 15  # tensor-core FLOPs while a value is unpacked: H100 989 / 67, A100 312 / 19.5 (data sheets)
STEP_ROWS, STEP_STATE = 32, 12288  # of a decode-step program: maximum rows, and maximum elements of state
FEWEST_ROWS = 32  # per kv head: minimum for the many-row kernels on exact tokens
FLASH_SIZES = range(8, 257, 8)  # head sizes that flash attention supports
HALVES = (torch.bfloat16, torch.float16)
CPU_QUERIES = 16  # per head: below this, rearranging keys and values costs more than it gains
CPU_ROWS = 192  # per kv head: below this, reconstruction costs more (Zen 5: break-even at 192)
_CPU_TYPES = (torch.float32, *HALVES)
_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(
    "rebuilt_attention(Tensor query, Tensor key, Tensor? key_scale, Tensor? key_decode, Tensor value, "
    "Tensor? value_scale, Tensor? value_decode, Tensor? mask, Tensor? lengths, *, int[] key_bits, int[] key_widths, "
    "float[] key_steps, int[] value_bits, int[] value_widths, float[] value_steps, float scale, float softcap=0.0) "
    "-> (Tensor, Tensor)"
)
_LIB.define(
    "open_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, *, bool causal=False, float scale, "
    "float softcap=0.0) -> (Tensor, Tensor)"
)


# --------------------------------------------------------------------------------------------------- which op runs


def absorbed_operations(heads: int, queries: int, key: tuple[int, int], value: tuple[int, int], coded: bool) -> float:
    """Count the FLOPs of absorbed attention on one token, for all H query heads. key, value: (J, R) of each side."""
    shared = math.gcd(heads // key[0], heads // value[0])  # query heads per program
    width, rows = key[1] + value[1], STEP_ROWS
    while rows > 8 and rows * width > STEP_STATE:
        rows //= 2
    tiles = heads // shared * -(-shared * queries // rows)
    return 2 * heads * queries * width + (CONVERSION * tiles * width if coded else 0)


def reconstructed_operations(
    heads: int, queries: int, key: tuple[int, int, int], value: tuple[int, int, int], coded: bool
) -> float:
    """Count the FLOPs of attention on one token with reconstructed key and value, for all H query heads.

    key, value: (G, D, R) of the decoder of each side.
    """
    (groups, key_size, key_width), (_, value_size, value_width) = key, value
    reconstructing = 2 * (key_size * key_width + value_size * value_width)
    unpacking = CONVERSION * (key_width + value_width) if coded else 0
    return 2 * heads * queries * (key_size + value_size) + groups * (reconstructing + unpacking)


def should_reconstruct(
    query: Tensor,
    key: Tensor,
    key_decode: Tensor,
    value: Tensor,
    value_decode: Tensor,
    mask: Tensor | None,
    coded: bool,
) -> bool:
    """Return True if attention of `query` should run through `fhopt::rebuilt_attention`: if that is cheaper.

    key, value: rows [B,J,T,..]; decoders [G,D,R]; coded: rows are quantized values. Only on NVIDIA GPUs, for 16-bit
    queries, and if no gradient is required.
    """
    if not is_gpu_prefill(query, key, key_decode, value, value_decode, mask):
        return False
    (heads, queries), decoders = query.shape[1:3], (key_decode, value_decode)
    sides = [(x.shape[1], decode.shape[2]) for x, decode in zip((key, value), decoders, strict=True)]
    sizes = [(decode.shape[0], decode.shape[1], decode.shape[2]) for decode in decoders]
    absorbed = absorbed_operations(heads, queries, sides[0], sides[1], coded)
    return reconstructed_operations(heads, queries, sizes[0], sizes[1], coded) < absorbed


def is_gpu_prefill(query: Tensor, *others: Tensor | None) -> bool:
    """Return True if the GPU ops of this module support queries [B,H,S,D]: several, 16-bit, on an NVIDIA GPU.

    others: the tensors that they attend to; none may require a gradient.
    """
    return (
        _on_nvidia(query)
        and query.shape[2] > 1
        and query.dtype in HALVES
        and not latent_attention.needs_gradient(query, *others)
    )


def is_cpu_prefill(query: Tensor, *others: Tensor | None) -> bool:
    """Return True if CPU prefill kernels support queries [B,H,S,D]: in eager mode, without gradients.

    others: the tensors that they attend to.
    """
    if query.device.type != "cpu" or query.dtype not in _CPU_TYPES or torch.compiler.is_compiling():
        return False
    return query.shape[2] >= CPU_QUERIES and not latent_attention.needs_gradient(query, *others)


def attend_on_cpu(op: str, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor] | None:
    """Run the CPU kernel of "open_attention" or "rebuilt_attention", with the arguments of the op.

    Returns None if there is no kernel, or it does not support these tensors.
    """
    if not is_cpu_prefill(query, *(x for x in args if isinstance(x, Tensor))):
        return None
    if op == "rebuilt_attention" and query.shape[2] * query.shape[1] < CPU_ROWS * args[0].shape[1]:
        return None
    kernel = registry.kernel_of(op, "cpu")
    return None if kernel is None else kernel(query, *args, **options)


def is_prefill(query: Tensor, *others: Tensor | None) -> bool:
    """Return True if `fhopt::open_attention` supports queries [B,H,S,D], on any device."""
    return is_gpu_prefill(query, *others) or is_cpu_prefill(query, *others)


def _on_nvidia(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


# --------------------------------------------------------------------------------------------------- reconstructed K/V


def rebuilt_attention_reference(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    key_decode: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    value_decode: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    *,
    key_bits: Sequence[int],
    key_widths: Sequence[int],
    key_steps: Sequence[float],
    value_bits: Sequence[int],
    value_widths: Sequence[int],
    value_steps: Sequence[float],
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute attention on keys and values reconstructed from latents.

    query [B,H,S,D] is not absorbed. key: quantized values uint8 [B,J,T,bytes] with key_scale [B,J,T], or unquantized
    latents [B,J,T,R] without bit groups and scale; key_decode [G,D,R], None if the rows are keys [B,G,T,D]. value: in
    the same forms, with its own J. mask: bool or additive, broadcastable to [B,H,S,T]. lengths: integers, [B] or
    scalar: number of leading tokens to attend to. Returns o [B,H,S,E] in the dtype of query, and lse [B,H,S] float32
    (float64 for float64 queries): -inf, and o = 0, for a query without attended tokens. Raises ValueError if H is not a
    multiple of G.
    """
    keys = _reconstructed(key, key_scale, key_decode, (key_bits, key_widths, key_steps), query.dtype)
    values = _reconstructed(value, value_scale, value_decode, (value_bits, value_widths, value_steps), query.dtype)
    if query.shape[1] % keys.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads are not a multiple of {keys.shape[1]} kv heads; expected both of one site."
        )
    options: Any = algebra.uncoded_options()
    return latent_attention.latent_attention_reference(
        query, keys, None, values, None, mask, **options, scale=scale, softcap=softcap, lengths=lengths
    )


def _reconstructed(
    rows: Tensor, scale: Tensor | None, decode: Tensor | None,
    groups: tuple[Sequence[int], Sequence[int], Sequence[float]], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Reconstruct keys or values [B,G,T,D] of `dtype` from rows; groups: their bits, widths and steps."""
    exact = torch.promote_types(dtype, torch.float32)
    latent = rows if scale is None else packing.unpack_reference(rows, scale, *groups)
    return (latent if decode is None else algebra.decode(latent.to(exact), decode.to(exact))).to(dtype)


def _rebuilt_attention(query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    tensors = [x for x in (query, *args) if isinstance(x, Tensor)]
    kernel = registry.kernel_of("rebuilt_attention", query.device.type)
    served = query.dtype != torch.float64 and not latent_attention.needs_gradient(*tensors)
    result: tuple[Tensor, Tensor] | None = kernel(query, *args, **options) if kernel and served else None
    output, lse = rebuilt_attention_reference(query, *args, **options) if result is None else result
    return output.contiguous(), lse


def _rebuilt_attention_fake(
    query: Tensor, key: Tensor, key_scale: Tensor | None, key_decode: Tensor | None, value: Tensor,
    value_scale: Tensor | None, value_decode: Tensor | None, *args: Any, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _blank(query, value.shape[-1] if value_decode is None else value_decode.shape[1])


def _blank(query: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Allocate uninitialized results: o [B,H,S,E], lse [B,H,S]."""
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:3], size)), query.new_empty(query.shape[:3], dtype=exact)


# --------------------------------------------------------------------------------------------------- exact tokens


def open_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False, scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention of the newest S queries on exact keys and values [B,G,N,D].

    mask: bool or additive, broadcastable to [B,H,S,N]. causal: the mask is only causal, aligned to the last key.
    Returns o [B,H,S,E] in the dtype of query and lse [B,H,S] float32, as `fhopt::latent_attention` does. On CPU many
    queries use the prefill kernel. On a GPU they use flash attention if nothing else is masked, else the kernel for
    many rows per kv head; few rows use the decode kernel.
    """
    result = attend_on_cpu("open_attention", query, key, value, mask, causal=causal, scale=scale, softcap=softcap)
    if result is not None:
        return result[0].contiguous(), result[1]
    if softcap == 0.0 and (causal or mask is None) and _flashes(query, key, value):
        return _by_flash(query, key, value, causal and query.shape[2] > 1, scale)
    options: Any = dict(**algebra.uncoded_options(), scale=scale, softcap=softcap)
    if is_gpu_prefill(query, key, value, mask) and query.shape[2] * (query.shape[1] // key.shape[1]) >= FEWEST_ROWS:
        return torch.ops.fhopt.rebuilt_attention(query, key, None, None, value, None, None, mask, None, **options)
    return latent_attention.latent_attention(query, key, None, value, None, mask, **options)


def _flashes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if torch's flash attention supports these tensors. Its causal mask covers only the newest keys."""
    rows, size = query.shape[2] * (query.shape[1] // key.shape[1]), query.shape[3]
    shaped = size == value.shape[3] and size in FLASH_SIZES and key.shape[2] >= query.shape[2]
    alike = query.dtype == key.dtype == value.dtype
    return shaped and alike and rows >= FEWEST_ROWS and is_gpu_prefill(query, key, value) and _has_flash(query.device)


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Return True for Ampere and later GPUs."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _by_flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Run flash attention separately on the queries' own keys, causally, and on earlier keys, without a mask.

    The causal part is then square; otherwise kernels disagree on the alignment of "causal".
    """
    if not causal:
        return _folded_flash(query, key, value, scale)
    before, copies = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    fresh = [x[:, :, before:].repeat_interleave(copies, 1) for x in (key, value)]
    newest = _flash(query, fresh[0], fresh[1], True, scale)
    if not before:
        return newest
    parts = newest, _folded_flash(query, key[:, :, :before], value[:, :, :before], scale)
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    output = sum(o.to(torch.float32) * torch.exp(part - lse).unsqueeze(-1) for o, part in parts)
    assert isinstance(output, Tensor)
    return output.to(query.dtype), lse


def _folded_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run flash attention without a mask, with the H/G query heads of a kv head as extra queries."""
    (b, heads, s, d), groups = query.shape, key.shape[1]
    output, lse = _flash(query.reshape(b, groups, heads // groups * s, d), key, value, False, scale)
    return output.reshape(b, heads, s, -1), lse.reshape(b, heads, s)


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Run torch's flash attention with equal numbers of kv and query heads: o [B,H,S,D], lse [B,H,S] float32."""
    if query.is_cuda:
        results = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    else:
        flash_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        results = flash_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return results[0], results[1][..., : query.shape[2]]


def _open_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    return _blank(query, value.shape[3])


_LIB.impl("rebuilt_attention", _rebuilt_attention, "CompositeExplicitAutograd")
_LIB.impl("open_attention", open_attention, "CompositeExplicitAutograd")
torch.library.register_fake("fhopt::rebuilt_attention", _rebuilt_attention_fake, lib=_LIB)
torch.library.register_fake("fhopt::open_attention", _open_attention_fake, lib=_LIB)
