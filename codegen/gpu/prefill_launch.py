"""Launch of the prefill kernels: keys and values are reconstructed within attention, or in memory before it.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T tokens, D and E head size of keys and values,
R latent width, M rows (S queries of the H/G heads of a kv head), K operands of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from fhopt.codegen.build import load_module
from fhopt.codegen.gpu import configs
from fhopt.codegen.gpu.configs import LONGEST, Config, prefill_config, rebuild_config
from fhopt.codegen.gpu.launch import SHORTEST as SPLIT_TOKENS
from fhopt.codegen.gpu.launch import choose_splits, mask_as_read, processors, rows_as_read
from fhopt.codegen.gpu.prefill import operand_table, padded, render_prefill
from fhopt.codegen.rows import RowFormat
from fhopt.codegen.tiers import Tiers
from fhopt.plan.kernel_spec import KernelSpec

SCRATCH = 32 * 2**20  # bytes of keys and values rebuilt at a time: fits L2 caches of 40 MB and more
SHORTEST = 1024  # min tokens rebuilt at a time, and min tokens per split
CUDA_OPTIONS = {"maxnreg": 255}  # by default ptxas uses fewer registers for higher occupancy, and spills
WITHIN_BYTES = 64 * 1024  # max decoder bytes for that, in shared memory: smaller GPUs have 99 KiB
Rows = tuple[Tensor, Tensor | None, Tensor | None]  # of one side: rows, their scales, their decoder
Decoder = tuple[Tensor | None, Tensor | None]  # the result of `decoder_rows`


def rebuilt_attention_triton(
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
    """Compute attention on reconstructed keys and values, for queries of float32, bfloat16 or float16.

    The reference is `fhopt.ops.prefill_attention.rebuilt_attention_reference`. If one program has all rows of a kv
    head, and room for its decoders, it reconstructs keys and values tile by tile. Otherwise they are reconstructed
    first, SCRATCH bytes at a time. Raises ValueError if tensors do not match.
    """
    spec = KernelSpec(
        tuple(zip(key_bits, key_widths, key_steps, strict=True)),
        tuple(zip(value_bits, value_widths, value_steps, strict=True)),
        int(sum(key_widths)) or key.shape[3], int(sum(value_widths)) or value.shape[3],
        str(query.dtype).removeprefix("torch."), softcap != 0.0,
    )  # fmt: skip
    sides = (key, key_scale, key_decode), (value, value_scale, value_decode)
    kernel = build_prefill(spec)
    plain = key_decode is None and value_decode is None
    few = kernel.rows(query, sides) <= configs.WITHIN_ROWS and kernel.decoder_bytes(sides) <= WITHIN_BYTES
    if plain or few or not key.shape[2]:
        return kernel.attend(query, *sides, mask, lengths, scale=scale, softcap=softcap)
    return _apart(kernel, query, sides, mask, lengths, scale=scale, softcap=softcap)


def _apart(
    kernel: PrefillKernel, query: Tensor, sides: tuple[Rows, Rows], mask: Tensor | None, lengths: Tensor | None,
    *, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reconstruct keys and values one range of tokens at a time, attend to each, and merge."""
    tokens = sides[0][0].shape[2]
    (groups, key_size), (_, value_size) = kernel.sizes(sides)
    numbers = query.shape[0] * groups * (key_size + value_size)  # per token
    length = max(SHORTEST, SCRATCH // (numbers * query.element_size()))
    mask = mask if mask is None else mask.expand(*mask.shape[:-1], tokens)
    plain = build_prefill(
        replace(kernel.spec, key_tiers=(), value_tiers=(), key_width=key_size, value_width=value_size)
    )
    tables = [kernel.table(i, decode, query.dtype) for i, (_, _, decode) in enumerate(sides)]
    result: tuple[Tensor, Tensor] | None = None
    for start in range(0, tokens, length):
        cut = slice(start, start + length)
        keys, values = [
            x[:, :, cut] if decode is None else kernel.rebuild(i, x[:, :, cut], _cut(factors, cut), size, tables[i])
            for i, (size, (x, factors, decode)) in enumerate(zip((key_size, value_size), sides, strict=True))
        ]
        part = plain.attend(
            query, (keys, None, None), (values, None, None), None if mask is None else mask[..., cut],
            None if lengths is None else (lengths - start).clamp(min=0), scale=scale, softcap=softcap, exact=True,
        )  # fmt: skip
        result = part if result is None else merge_ranges(*map(torch.stack, zip(result, part, strict=True)))
    assert result is not None, "there are no tokens"
    return result[0].to(query.dtype), result[1]


def _cut(x: Tensor | None, tokens: slice) -> Tensor | None:
    return None if x is None else x[:, :, tokens]


def merge_ranges(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over ranges of tokens, outputs [n,B,H,S,E] and lses [n,B,H,S], into that over all; float32."""
    top = lses.amax(0)
    weights = torch.exp(lses - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(0)
    weights = weights / torch.where(total == 0.0, 1.0, total)
    return (outputs * weights.unsqueeze(-1)).sum(0), top + torch.log(torch.where(total == 0.0, 1.0, total))


@functools.cache
def build_prefill(spec: KernelSpec) -> PrefillKernel:
    """Build the prefill kernels of `spec`. Raises ImportError without Triton."""
    return PrefillKernel(load_module(f"{spec.name}_chunk", render_prefill(spec)), spec)


class PrefillKernel:
    """The prefill kernels of a rendered file. Raises ValueError if a shape or type does not fit the spec."""

    def __init__(self, module: ModuleType, spec: KernelSpec) -> None:
        self._attention, self._rebuild = module.chunk_kernel, module.rebuild_kernel
        self.spec = spec
        self._sides = (
            RowFormat("key", spec.key_tiers, spec.key_width, spec.dtype),
            RowFormat("value", spec.value_tiers, spec.value_width, spec.dtype),
        )

    def sizes(self, sides: tuple[Rows, Rows]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (G, D) of keys and (G, E) of values. Raises ValueError."""
        sizes = []
        for side, (x, _, decode) in zip(self._sides, sides, strict=True):
            if decode is None and side.coded:
                raise ValueError(
                    f"{side.name}_decode is missing; expected a decoder [G, D, R] for codes. Pass the decoder of "
                    "the site."
                )
            width = self.spec.key_width if side.name == "key" else self.spec.value_width
            if decode is not None and (decode.shape[2] != width or decode.shape[0] % x.shape[1]):
                raise ValueError(
                    f"{side.name}_decode has shape {tuple(decode.shape)}; expected [G, D, {width}], G a "
                    f"multiple of {x.shape[1]}, for rows {tuple(x.shape)}. Pass the decoder of these rows."
                )
            sizes.append((x.shape[1], x.shape[3]) if decode is None else (decode.shape[0], decode.shape[1]))
        if sizes[0][0] != sizes[1][0]:
            raise ValueError(
                f"there are {sizes[0][0]} key heads and {sizes[1][0]} value heads; expected the same number. "
                "Pass both sides of one site."
            )
        return sizes[0], sizes[1]

    def decoder_bytes(self, sides: tuple[Rows, Rows]) -> int:
        """Return the bytes of the decoders of one kv head in the kernels' layout."""
        spec, sizes = self.spec, self.sizes(sides)
        tiers = (spec.key_tiers, spec.key_width), (spec.value_tiers, spec.value_width)
        return sum(
            len(operand_table(*side, spec.dtype).channels) * padded(size) * getattr(torch, spec.dtype).itemsize
            for side, (_, size), (_, _, decode) in zip(tiers, sizes, sides, strict=True)
            if decode is not None
        )

    def rows(self, query: Tensor, sides: tuple[Rows, Rows]) -> int:
        """Return the rows M per kv head. Raises ValueError if the queries do not fit the keys."""
        (groups, size), _ = self.sizes(sides)
        if query.shape[1] % groups or query.shape[3] != size:
            raise ValueError(
                f"queries have shape {tuple(query.shape)}; expected [B, H, S, {size}], H a multiple of "
                f"{groups} kv heads. Pass queries that are not absorbed."
            )
        return query.shape[1] // groups * query.shape[2]

    def attend(
        self,
        query: Tensor,
        key: Rows,
        value: Rows,
        mask: Tensor | None,
        lengths: Tensor | None = None,
        *,
        scale: float,
        softcap: float = 0.0,
        exact: bool = False,
        splits: int | None = None,
        config: Config | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention of query [B,H,S,D]: o [B,H,S,E] in its dtype (exact: float32), lse [B,H,S] float32.

        If a side has a decoder, its rows are latents; else they are uncoded keys or values. splits: ranges of tokens
        for separate programs.
        """
        b, h, s, _ = query.shape
        rows, ((groups, key_size), (_, value_size)) = self.rows(query, (key, value)), self.sizes((key, value))
        tokens = key[0].shape[2]
        query = query if query.stride(3) == 1 else query.contiguous()
        read = [
            rows_as_read(side, x, factors, (b, h, s), tokens, False)
            for side, (x, factors, _) in zip(self._sides, (key, value), strict=True)
        ]
        rebuilds = any(decode is not None for _, _, decode in (key, value))
        config = config or prefill_config(self.spec, rows, key_size, value_size, rebuilds, _arch(query.device))
        programs = b * groups * -(-rows // config.block_m)
        splits = splits or choose_splits(programs, tokens * SPLIT_TOKENS // SHORTEST, processors(query.device))
        shape, dtype = (splits, b, h, s), torch.float32 if exact or splits > 1 else query.dtype
        outputs, lses = query.new_empty((*shape, value_size), dtype=dtype), query.new_empty(shape, dtype=torch.float32)
        mask = None if mask is None else _padded_mask(mask, (b, h, s, tokens))
        mask_strides = (0, 0, 0) if mask is None else tuple(n // 16 for n in mask.stride()[:3])
        lengths = None if lengths is None else lengths.reshape(-1).expand(b)
        if lses.numel():
            tables = [self.table(i, decode, query.dtype) for i, (_, _, decode) in enumerate((key, value))]
            with torch.cuda.device_of(query):
                self._attention[programs, splits](
                    query, *(x for side, pair in zip(read, tables, strict=True) for x in (*side[:2], *pair)),
                    mask, lengths, outputs, lses,
                    *query.stride()[:3], *read[0][2], *read[1][2], *mask_strides,
                    0 if lengths is None else lengths.stride(0),
                    h, groups, s, tokens, splits, groups // key[0].shape[1], groups // value[0].shape[1],
                    scale, softcap,
                    D=key_size, E=value_size, BLOCK_D=padded(key_size), BLOCK_E=padded(value_size),
                    KEY_ALIGN=read[0][3], VALUE_ALIGN=read[1][3], PACKED=_packed(query),
                    BLOCK_T=config.block_t, BLOCK_M=config.block_m,
                    num_warps=config.num_warps, num_stages=config.num_stages, **_options(query),
                )  # fmt: skip
        if splits == 1:
            return outputs[0], lses[0]
        output, lse = merge_ranges(outputs, lses)
        return output if exact else output.to(query.dtype), lse

    def rebuild(self, side: int, rows: Tensor, scale: Tensor | None, size: int, decoder: Decoder) -> Tensor:
        """Reconstruct keys (side 0) or values (1) [B,G,T,D] from rows [B,J,T,..]. size: D."""
        table_rows, bias = decoder
        assert table_rows is not None and bias is not None
        (batch, heads, tokens, _), groups = rows.shape, bias.shape[0]
        config = rebuild_config(table_rows.shape[1])
        x, factors, strides, align = rows_as_read(self._sides[side], rows, scale, (batch, groups, 0), tokens, False)
        output = rows.new_empty((batch, groups, tokens, size), dtype=table_rows.dtype)
        if output.numel():
            with torch.cuda.device_of(rows):
                self._rebuild[-(-tokens // config.block_t), groups, batch](
                    x, factors, table_rows, bias, output, *strides, tokens, groups // heads,
                    VALUES=side == 1, D=size, BLOCK_D=padded(size), ALIGN=align, PACKED=_packed(rows),
                    BLOCK_T=config.block_t, num_warps=config.num_warps, num_stages=config.num_stages,
                    **_options(rows),
                )  # fmt: skip
        return output

    def table(self, side: int, decode: Tensor | None, dtype: torch.dtype) -> Decoder:
        """Convert the decoder of keys (side 0) or values (1), if there is one, to the kernels' layout."""
        tiers = (self.spec.key_tiers, self.spec.value_tiers)[side]
        return (None, None) if decode is None else decoder_rows(decode, tiers, dtype)


def _padded_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Pad the mask for the kernel to bytes or floats [B,H,S,T'], T' a multiple of LONGEST tokens."""
    mask = mask_as_read(mask, mask.shape)
    whole = mask.new_zeros((*(1,) * (4 - mask.dim()), *mask.shape[:-1], -(-shape[3] // LONGEST) * LONGEST))
    whole[..., : shape[3]] = mask
    return whole.expand(*shape[:3], -1)


def _packed(x: Tensor) -> bool:
    return x.is_cuda and not torch.version.hip


def _options(x: Tensor) -> dict[str, int]:
    return CUDA_OPTIONS if _packed(x) else {}


def decoder_rows(decode: Tensor, tiers: Tiers, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Convert a decoder [G,D,R] to the kernels' layout: rows [G,K,D'] of `dtype`, and biases [G,D'].

    D' is D up to a power of two; elements beyond D are 0. Biases, float32, correct for the mean of quantized values.
    """
    groups, size, width = decode.shape
    channels, factors, middles = _on(tiers, width, str(dtype).removeprefix("torch."), decode.device)
    rows = torch.nn.functional.pad(decode.to(torch.float32), (0, 1))[..., channels] * factors  # [G, D, K]
    held = rows.new_zeros((groups, channels.numel(), padded(size)), dtype=dtype)
    held[..., :size] = rows.mT
    return held, (held.to(torch.float32) * middles[:, None]).sum(1)


@functools.cache
def _on(tiers: Tiers, width: int, dtype: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors of an `OperandTable` on a device."""
    order = operand_table(tiers, width, dtype)
    with torch.inference_mode(False):
        numbers = [torch.tensor(x, dtype=torch.float32, device=device) for x in (order.factors, order.middles)]
        return torch.tensor(order.channels, device=device), numbers[0], numbers[1]


@functools.cache
def _arch(device: torch.device) -> int:
    """Return the compute capability of a GPU without its point; 80 for AMD and Triton's interpreter."""
    if device.type != "cuda" or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
