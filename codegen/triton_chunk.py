"""Render the Triton kernels for many queries behind a cache: keys and values of a tile of tokens are rebuilt.

    k[t] = D_K z_K[t]     x[t] = cap(scale * q . k[t]) + mask[t]     o = sum_t softmax(x)[t] v[t]     v[t] = D_V z_V[t]

A decode step multiplies queries by D_K^T instead (triton_attention.py), and never meets a key. A chunk of a prompt has
hundreds of queries of every kv head for the same tokens, and where latents are wider than keys, or where unpacking
codes anew for every 32 queries costs more than the products, it is cheaper to rebuild (fhopt/chunks.py counts):

    rebuild_kernel   keys or values of a range of tokens, into memory that the L2 cache holds: once for all queries
    chunk_kernel     attention of BLOCK_M rows, of keys and values as they are; or of latents, rebuilt by each program

Codes are read as in triton_attention.py: lane l of the words of a plane is an operand of its own, whose rows of the
decoder are taken together. What a code u stands for, (u - (2^b - 1)/2) step scale[token], becomes

    step, 2^shift of the plane, 2^w    multiply the rows of the decoder, before a call (`Table`)
    the mean code                      a row of its own, taken off the sum: from the decoder as it was rounded
    scale[token]                       multiplies what is rebuilt, and float16 channels are added to that

A code of 8 bits is converted where the mantissa has 7: a product of two halves would cost more than the conversion,
which serves BLOCK_M queries here.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T tokens, D and E head size of keys and values,
R latent width, M rows (S queries of the H/G heads of a kv head), K operands of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from string import Template
from types import ModuleType

import torch
from torch import Tensor

from fhopt.codegen.build import load_module
from fhopt.codegen.call import Side
from fhopt.codegen.tiers import PLANES, Tiers, check, is_scaled, legend
from fhopt.codegen.triton_attention import (
    MANTISSA,
    ONES,
    POINTERS,
    Config,
    Example,
    Field,
    Piece,
    example_of,
    fields,
    pieces,
    reading,
    row_size,
)
from fhopt.codegen.triton_call import SHORTEST as SPLIT_TOKENS
from fhopt.codegen.triton_call import choose_splits, mask_as_read, processors, rows_as_read
from fhopt.spec import KernelSpec

KERNELS = ("rebuild_kernel", "chunk_kernel")
SCRATCH = 32 * 2**20  # bytes of keys and values that are rebuilt at a time: what L2 caches of 40 MB and more hold
SHORTEST = 1024  # tokens that are rebuilt at a time at least, and that a split has at least
CUDA_OPTIONS = {"maxnreg": 255}  # left alone, ptxas takes fewer registers for more blocks, and spills
TILE_ROWS = 128  # rows of a program of `chunk_kernel`, where there are as many
WITHIN_ROWS = 64  # rows up to which a program of `chunk_kernel` has all of a kv head, and rebuilds as it goes
WITHIN_BYTES = 64 * 1024  # of decoders that it holds in shared memory then: smaller GPUs have 99 KiB
LONGEST = 128  # tokens of a tile at most

Rows = tuple[Tensor, Tensor | None, Tensor | None]  # of one side: rows, their scales, their decoder
Decoder = tuple[Tensor | None, Tensor | None]  # what `decoder_rows` gives


# --------------------------------------------------------------------------------------------------- called from torch


def rebuilt_attention(
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
    """`fhopt.chunks.rebuilt_attention_reference` by kernels, for queries of float32, bfloat16 or float16.

    Where one program has all rows of a kv head, and room for its decoders, it rebuilds keys and values as it goes.
    Otherwise they are rebuilt first, SCRATCH bytes at a time. Raises ValueError when tensors do not belong together.
    """
    spec = KernelSpec(
        tuple(zip(key_bits, key_widths, key_steps, strict=True)),
        tuple(zip(value_bits, value_widths, value_steps, strict=True)),
        int(sum(key_widths)) or key.shape[3], int(sum(value_widths)) or value.shape[3],
        str(query.dtype).removeprefix("torch."), softcap != 0.0,
    )  # fmt: skip
    sides = (key, key_scale, key_decode), (value, value_scale, value_decode)
    kernel = build_chunk(spec)
    plain = key_decode is None and value_decode is None
    few = kernel.rows(query, sides) <= WITHIN_ROWS and kernel.decoder_bytes(sides) <= WITHIN_BYTES
    if plain or few or not key.shape[2]:
        return kernel.attend(query, *sides, mask, lengths, scale=scale, softcap=softcap)
    return _apart(kernel, query, sides, mask, lengths, scale=scale, softcap=softcap)


def _apart(
    kernel: ChunkKernel, query: Tensor, sides: tuple[Rows, Rows], mask: Tensor | None, lengths: Tensor | None,
    *, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rebuild a range of tokens, attend to it, go on with the next."""
    tokens = sides[0][0].shape[2]
    (groups, key_size), (_, value_size) = kernel.sizes(sides)
    numbers = query.shape[0] * groups * (key_size + value_size)  # of a token
    length = max(SHORTEST, SCRATCH // (numbers * query.element_size()))
    mask = mask if mask is None else mask.expand(*mask.shape[:-1], tokens)
    plain = build_chunk(replace(kernel.spec, key_tiers=(), value_tiers=(), key_width=key_size, value_width=value_size))
    tables = [kernel.table(i, decode, query.dtype) for i, (_, _, decode) in enumerate(sides)]
    found: tuple[Tensor, Tensor] | None = None
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
        found = part if found is None else joined(*map(torch.stack, zip(found, part, strict=True)))
    assert found is not None, "there are no tokens"
    return found[0].to(query.dtype), found[1]


def _cut(x: Tensor | None, tokens: slice) -> Tensor | None:
    return None if x is None else x[:, :, tokens]


def joined(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over ranges of tokens, outputs [n,B,H,S,E] and lses [n,B,H,S], as over all of them; in float32."""
    top = lses.amax(0)
    weights = torch.exp(lses - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(0)
    weights = weights / torch.where(total == 0.0, 1.0, total)
    return (outputs * weights.unsqueeze(-1)).sum(0), top + torch.log(torch.where(total == 0.0, 1.0, total))


@functools.cache
def build_chunk(spec: KernelSpec) -> ChunkKernel:
    """The kernels of `spec` for many queries. Raises ImportError where there is no Triton."""
    return ChunkKernel(load_module(f"{spec.name}_chunk", render(spec)), spec)


class ChunkKernel:
    """The kernels of a rendered file. Raises ValueError when a shape or type does not fit the spec."""

    def __init__(self, module: ModuleType, spec: KernelSpec) -> None:
        self._chunk, self._rebuild = module.chunk_kernel, module.rebuild_kernel
        self.spec = spec
        self._sides = (
            Side("key", spec.key_tiers, spec.key_width, spec.dtype),
            Side("value", spec.value_tiers, spec.value_width, spec.dtype),
        )

    def sizes(self, sides: tuple[Rows, Rows]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(G, D) of keys and (G, E) of values. Raises ValueError."""
        found = []
        for side, (x, _, decode) in zip(self._sides, sides, strict=True):
            if decode is None and side.coded:
                raise ValueError(f"{side.name}_decode is none; codes need a decoder [G, D, R]. Give that of the site.")
            width = self.spec.key_width if side.name == "key" else self.spec.value_width
            if decode is not None and (decode.shape[2] != width or decode.shape[0] % x.shape[1]):
                raise ValueError(
                    f"{side.name}_decode has shape {tuple(decode.shape)}; for rows {tuple(x.shape)} it is "
                    f"[G, D, {width}], G a multiple of {x.shape[1]}. Give the decoder of these rows."
                )
            found.append((x.shape[1], x.shape[3]) if decode is None else (decode.shape[0], decode.shape[1]))
        if found[0][0] != found[1][0]:
            raise ValueError(
                f"there are {found[0][0]} heads of keys and {found[1][0]} of values; expected as many. Give both sides "
                "of one site."
            )
        return found[0], found[1]

    def decoder_bytes(self, sides: tuple[Rows, Rows]) -> int:
        """Of the decoders of one kv head, as the kernels read them."""
        spec, sizes = self.spec, self.sizes(sides)
        tiers = (spec.key_tiers, spec.key_width), (spec.value_tiers, spec.value_width)
        return sum(
            len(table(*found, spec.dtype).channels) * padded(size) * getattr(torch, spec.dtype).itemsize
            for found, (_, size), (_, _, decode) in zip(tiers, sizes, sides, strict=True)
            if decode is not None
        )

    def rows(self, query: Tensor, sides: tuple[Rows, Rows]) -> int:
        """M of a kv head. Raises ValueError when the queries do not fit the keys."""
        (groups, size), _ = self.sizes(sides)
        if query.shape[1] % groups or query.shape[3] != size:
            raise ValueError(
                f"queries have shape {tuple(query.shape)}; for {groups} kv heads of {size} numbers they are "
                f"[B, H, S, {size}], H a multiple of {groups}. Give queries that are not absorbed."
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
        """Attention of query [B,H,S,D]: o [B,H,S,E] in its dtype (exact: float32), lse [B,H,S] float32.

        A decoder of a side: its rows are latents; None: they are keys or values, uncoded. splits: ranges of tokens that
        programs of their own go through.
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
        config = config or default_config(self.spec, rows, key_size, value_size, rebuilds, _arch(query.device))
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
                self._chunk[programs, splits](
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
        output, lse = joined(outputs, lses)
        return output if exact else output.to(query.dtype), lse

    def rebuild(self, side: int, rows: Tensor, scale: Tensor | None, size: int, decoder: Decoder) -> Tensor:
        """Keys (side 0) or values (1) [B,G,T,D] from rows [B,J,T,..]: what the latents kept. size: D."""
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
        """The decoder of keys (side 0) or values (1) as the kernels read it, if there is one."""
        tiers = (self.spec.key_tiers, self.spec.value_tiers)[side]
        return (None, None) if decode is None else decoder_rows(decode, tiers, dtype)


def _padded_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The mask as the kernel reads it, bytes or floats [B,H,S,T'] behind a multiple of LONGEST tokens: 16 at a time."""
    mask = mask_as_read(mask, mask.shape)
    whole = mask.new_zeros((*(1,) * (4 - mask.dim()), *mask.shape[:-1], -(-shape[3] // LONGEST) * LONGEST))
    whole[..., : shape[3]] = mask
    return whole.expand(*shape[:3], -1)


def _packed(x: Tensor) -> bool:
    return x.is_cuda and not torch.version.hip


def _options(x: Tensor) -> dict[str, int]:
    return CUDA_OPTIONS if _packed(x) else {}


# --------------------------------------------------------------------------------------------------- operands


def operands(piece: Piece, dtype: str) -> tuple[Field, ...]:
    """The operands of a piece: those of a decode step, but codes that are wider than the mantissa stay whole."""
    if not is_converted(piece, dtype):
        return fields(piece, dtype)
    return tuple(Field(lane, piece.bits * lane, piece.bits, 1) for lane in range(piece.lanes))


def is_converted(piece: Piece, dtype: str) -> bool:
    """True for codes u that become the numbers u - 2^(b-1), by conversion."""
    return piece.is_coded and piece.bits > MANTISSA[dtype]


@dataclass(frozen=True)
class Table:
    """Rows of a decoder in the order of operands, K of them: which channel (R: none), times what, and the mean code."""

    channels: tuple[int, ...]
    factors: tuple[float, ...]
    middles: tuple[float, ...]


@functools.cache
def table(tiers: Tiers, width: int, dtype: str) -> Table:
    """The table of one side, for products of `dtype`."""
    channels, factors, middles = list[int](), list[float](), list[float]()
    for piece in _ordered(tiers, width):
        for field in operands(piece, dtype):
            first = piece.channel + field.lane
            channels += [first + piece.lanes * i if i < piece.used else width for i in range(piece.size)]
            factor, middle = 1.0, 0.0
            if is_converted(piece, dtype):
                factor, middle = piece.unit, -0.5
            elif piece.is_coded:
                factor, middle = piece.unit * 2**field.bits, field.middle
            factors += [factor] * piece.size
            middles += [middle] * piece.size
    return Table(tuple(channels), tuple(factors), tuple(middles))


def _ordered(tiers: Tiers, width: int) -> list[Piece]:
    """The pieces of a row: codes, which a token's scale multiplies, before what it does not."""
    return sorted(pieces(tiers, width), key=lambda piece: not piece.is_coded)


def decoder_rows(decode: Tensor, tiers: Tiers, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The decoder [G,D,R] as the kernels read it: rows [G,K,D'] of `dtype`, and what codes are too large by [G,D'].

    D' is D up to a power of two; what is beyond D is 0. The second is float32.
    """
    groups, size, width = decode.shape
    channels, factors, middles = _on(tiers, width, str(dtype).removeprefix("torch."), decode.device)
    rows = torch.nn.functional.pad(decode.to(torch.float32), (0, 1))[..., channels] * factors  # [G, D, K]
    held = rows.new_zeros((groups, channels.numel(), padded(size)), dtype=dtype)
    held[..., :size] = rows.mT
    return held, (held.to(torch.float32) * middles[:, None]).sum(1)


@functools.cache
def _on(tiers: Tiers, width: int, dtype: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A `Table` as tensors."""
    found = table(tiers, width, dtype)
    with torch.inference_mode(False):
        numbers = [torch.tensor(x, dtype=torch.float32, device=device) for x in (found.factors, found.middles)]
        return torch.tensor(found.channels, device=device), numbers[0], numbers[1]


def padded(size: int) -> int:
    """A head size as products want it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


# --------------------------------------------------------------------------------------------------- configurations


def default_config(
    spec: KernelSpec, rows: int, key_size: int, value_size: int, rebuilds: bool = False, arch: int = 90
) -> Config:
    """The configuration of `chunk_kernel` for M = `rows`, where none has been measured; arch as in gpu.py.

    Found by compiling for sm_80, sm_89 and sm_90, with masks and without: nothing spills, and shared memory is that of
    the smallest. rebuilds: keys and values are rebuilt within.
    """
    if spec.dtype == "float32":  # not for the tensor core
        return Config(16, 16, 4, 1)
    m, size = max(16, 1 << (rows - 1).bit_length()), max(padded(key_size), padded(value_size))
    if rebuilds:
        return Config(32, min(WITHIN_ROWS, m), 8, 2)
    if size > 128:
        return Config(32, min(64, m), 8, 2)
    return Config(64 if arch >= 90 else 32, min(TILE_ROWS, m), 8 if m >= TILE_ROWS else 4, 2)


def rebuild_config(operands: int) -> Config:
    """The configuration of `rebuild_kernel` for a decoder of K `operands`: of wide ones the loads of all come first."""
    return Config(64, 1, 4, 1) if operands <= 128 else Config(32, 1, 8, 1)


@functools.cache
def _arch(device: torch.device) -> int:
    """Of a GPU; of what runs Triton's interpreter, any."""
    if device.type != "cuda" or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def example(
    spec: KernelSpec, config: Config, key_size: int, value_size: int, rebuilds: bool = True, **features: object
) -> dict[str, Example]:
    """What `triton.compile(ASTSource(...))` needs, by kernel; `rebuild_kernel` is that of the keys.

    As the launcher calls it for contiguous tensors. rebuilds: keys and values are rebuilt within `chunk_kernel`.
    Features by name: mask ("bool" or a dtype), lengths (True), exact (float32 out), packed (False for AMD).
    """
    number, packed = POINTERS[spec.dtype], bool(features.get("packed", True))
    sides = (("key", spec.key_tiers, spec.key_width), ("value", spec.value_tiers, spec.value_width))
    types = {"query": number}
    for side, tiers, _ in sides:
        types[side] = "*u8" if tiers else number
        types[f"{side}_scale"] = "*fp16" if is_scaled(tiers) else "constexpr"
        types |= {f"{side}_table": number, f"{side}_bias": "*fp32"} if rebuilds else {}
        types |= {} if rebuilds else dict.fromkeys((f"{side}_table", f"{side}_bias"), "constexpr")
    mask = features.get("mask")
    types["mask"] = "constexpr" if not mask else "*u8" if mask == "bool" else POINTERS[str(mask)]
    types["lengths"] = "*i32" if features.get("lengths") else "constexpr"
    types |= {"output": "*fp32" if features.get("exact") else number, "lse": "*fp32"}
    types |= dict.fromkeys((*STRIDES, *SIZES), "i32") | {"scale": "fp32", "softcap": "fp32"}
    constants: dict[str, object] = {name: None for name, kind in types.items() if kind == "constexpr"}
    aligned = [gcd(16, row_size(tiers, width)) for _, tiers, width in sides]
    constants |= dict.fromkeys(("key_scale_t", "value_scale_t"), 1) | {
        "D": key_size, "E": value_size, "BLOCK_D": padded(key_size), "BLOCK_E": padded(value_size),
        "KEY_ALIGN": aligned[0], "VALUE_ALIGN": aligned[1], "PACKED": packed,
        "BLOCK_T": config.block_t, "BLOCK_M": config.block_m,
    }  # fmt: skip
    found = {"chunk_kernel": example_of(types, constants)}
    if rebuilds:
        rows = {"rows": types["key"], "scale": types["key_scale"], "table": number, "bias": "*fp32", "output": number}
        rows |= dict.fromkeys(("rows_b", "rows_h", "rows_t", "scale_b", "scale_h", "scale_t", "tokens", "group"), "i32")
        tile = rebuild_config(len(table(spec.key_tiers, spec.key_width, spec.dtype).channels)).block_t
        known: dict[str, object] = {"scale": None} if rows["scale"] == "constexpr" else {}
        known |= {"scale_t": 1, "VALUES": False, "D": key_size, "BLOCK_D": padded(key_size), "ALIGN": aligned[0]}
        found["rebuild_kernel"] = example_of(rows, known | {"PACKED": packed, "BLOCK_T": tile})
    return found


STRIDES = tuple(
    f"{name}_{axis}"
    for name, axes in (
        ("query", "bhs"), ("key", "bht"), ("key_scale", "bht"), ("value", "bht"), ("value_scale", "bht"),
        ("mask", "bhs"), ("lengths", "b"),
    )
    for axis in axes
)  # fmt: skip
SIZES = ("heads", "groups", "queries", "tokens", "splits", "key_group", "value_group")


# --------------------------------------------------------------------------------------------------- the text


def render(spec: KernelSpec) -> str:
    """The text of the kernels of `spec`; the same spec gives the same text. Raises FhoptError for odd tiers."""
    check(spec)
    sides = (("key", "D", spec.key_tiers, spec.key_width), ("value", "E", spec.value_tiers, spec.value_width))
    return _FILE.substitute(
        name=spec.name,
        planes="\n".join(PLANES),
        key_legend=legend(spec.key_tiers, spec.key_width),
        value_legend=legend(spec.value_tiers, spec.value_width),
        dtype=spec.dtype,
        mantissa=MANTISSA[spec.dtype],
        integer="int32" if spec.dtype == "float32" else "int16",
        one=f"0x{ONES[spec.dtype]:X}",
        softcap=spec.softcap,
        key_operands=len(table(spec.key_tiers, spec.key_width, spec.dtype).channels),
        value_operands=len(table(spec.value_tiers, spec.value_width, spec.dtype).channels),
        rebuilding="\n\n".join(_rebuild(*side, spec.dtype) for side in sides),
        reading=reading(spec.dtype),
    )


def _rebuild(side: str, letter: str, tiers: Tiers, width: int, dtype: str) -> str:
    """The function that rebuilds one side."""
    lines, at, scaled = list[str](), 0, is_scaled(tiers)
    for piece in _ordered(tiers, width):
        if scaled and not piece.is_coded:
            lines.append(_SCALED)
            scaled = False
        lines += _load(piece)
        for field in operands(piece, dtype):
            lines.append(f"x = rebuild({_operand(piece, field, dtype)}, table, {at}, x)")
            at += piece.size
    if scaled:
        lines.append(_SCALED)
    return _REBUILD.substitute(side=side, letter=letter, count=at, lines="".join(f"    {line}\n" for line in lines))


_SCALED = "x = (x - bias[None, :]) * factor[:, None]"


def _load(piece: Piece) -> list[str]:
    """The lines that load a run of all rows of a tile [T, size]."""
    end = piece.channel + piece.lanes * piece.used
    what = {0: "uncoded", 16: "float16"}.get(piece.bits, f"a plane of {piece.bits} bit{'s' * (piece.bits > 1)}")
    run = f"rows, stride, None, here, {piece.start}, {piece.size}, {piece.used}, False"
    if not piece.bits:
        call = f"load({run})"
    elif piece.bits == 16:
        call = f"load_odd_halves({run})" if piece.word == 8 else f"load_as(tl.float16, {run})"
    else:
        call = f"load_as(tl.int16, {run})" if piece.word == 16 else f"load({run}).to(tl.int16)"
    return [f"# channels {piece.channel} to {end - 1}: {what}", f"z = {call}"]


def _operand(piece: Piece, field: Field, dtype: str) -> str:
    if not piece.is_coded:
        return "z.to(DTYPE)"
    if is_converted(piece, dtype):
        return f"numbers(z, {field.shift}, {2**field.bits - 1}, {2 ** (field.bits - 1)})"
    most = MANTISSA[dtype] - field.bits
    return f"codes(z, {field.shift - most}, 0x{2**field.bits - 1 << most:X}, PACKED)"


_REBUILD = Template('''\
@triton.jit
def rebuilt_$side(rows, stride, here, factor, table, bias, PACKED: tl.constexpr):
    """Tile [T, $letter'] of $side rows [T]: $count operands times the rows of the decoder, in the same order."""
    x = tl.zeros([here.shape[0], bias.shape[0]], tl.float32)
$lines\
    return x.to(DTYPE)
''')

_FILE = Template('''\
"""$name, for many queries

Latent attention for one kind of latent, on GPUs, with keys and values rebuilt:

    k[t] = D_K z_K[t]    v[t] = D_V z_V[t]
    x[t] = cap(scale * q . k[t]) + mask[t]
    lse  = log sum_t exp(x[t])
    o    = sum_t exp(x[t] - lse) v[t]             o = 0 and lse = -inf where every token is masked

    q [B,H,S,D]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,E]   lse [B,H,S]

    B batch, H query heads, G kv heads, J latent heads (keys and values may differ in J), S queries, T tokens, R
    channels of a latent, D and E head size (D' and E': up to a power of two). M the rows of a program: queries of the
    H/G heads of a kv head, in the order (head, query).

    channels of a key row:    $key_legend
    channels of a value row:  $value_legend

A code u of b bits stands for (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
$planes
A word of a plane of w bits holds 16/w consecutive channels (a byte, where a plane is short, 8/w): lane l of all words
is a product of its own. Its codes u are read as 1 + u / 2^w, by moving bits, or as u - 2^(w-1); what that is too large
by (`bias`) is taken off the sum, and what a step is worth is in the rows of the decoder.
"""

import triton
import triton.language as tl

DTYPE = tl.constexpr(tl.$dtype)  # of what is multiplied: $mantissa bits of mantissa
INTEGER = tl.constexpr(tl.$integer)
ONE = tl.constexpr($one)  # the bits of 1.0
SOFTCAP = tl.constexpr($softcap)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
KEY_OPERANDS = tl.constexpr($key_operands)  # numbers of a row that are multiplied, padding among them
VALUE_OPERANDS = tl.constexpr($value_operands)
LOWEST = tl.constexpr(-1e38)  # of finite masks, in base e: lets a row attend to what it hides, evenly


@triton.jit(
    do_not_specialize=(
        *("query_b", "query_h", "query_s", "key_b", "key_h", "key_t", "key_scale_b", "key_scale_h"),
        *("value_b", "value_h", "value_t", "value_scale_b", "value_scale_h", "mask_b", "mask_h", "mask_s"),
        *("lengths_b", "heads", "groups", "queries", "tokens", "splits", "key_group", "value_group"),
    )
)
def chunk_kernel(
    query,  # [B, H, S, D]
    key,  # rows [B, J, T]
    key_scale,  # float16, like the rows; None: rows have none
    key_table,  # [G, operands, D']: rows of the decoder; None: the rows are keys
    key_bias,  # float32 [G, D']
    value,
    value_scale,
    value_table,
    value_bias,
    mask,  # uint8 or floats [B, H, S, T'], T up to a multiple of BLOCK_T; None: all tokens
    lengths,  # integers [B]: tokens of a sequence; None: T
    output,  # [splits, B, H, S, E]
    lse,  # float32 [splits, B, H, S]
    query_b,  # strides
    query_h,
    query_s,
    key_b,  # in units of KEY_ALIGN elements
    key_h,
    key_t,
    key_scale_b,
    key_scale_h,
    key_scale_t,
    value_b,  # in units of VALUE_ALIGN elements
    value_h,
    value_t,
    value_scale_b,
    value_scale_h,
    value_scale_t,
    mask_b,  # in units of 16 elements
    mask_h,
    mask_s,
    lengths_b,
    heads,  # H
    groups,  # G
    queries,  # S
    tokens,  # T
    splits,  # ranges of tokens, each with a result of its own
    key_group,  # kv heads that share a latent head of keys
    value_group,
    scale,
    softcap,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D'
    BLOCK_E: tl.constexpr,
    KEY_ALIGN: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    PACKED: tl.constexpr,  # NVIDIA: codes by PTX
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One range of tokens for BLOCK_M rows of a kv head."""
    group = heads // groups
    tiles = tl.cdiv(group * queries, BLOCK_M)
    g = tl.program_id(0) // tiles % groups
    b = tl.program_id(0) // tiles // groups
    split = tl.program_id(1)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    inside = m < group * queries
    head, s = g * group + m // queries, m % queries
    d, e, t_in = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_T)

    rows = query + b.to(tl.int64) * query_b + head.to(tl.int64) * query_h + s.to(tl.int64) * query_s
    q = tl.load(rows[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(DTYPE)  # [M, D']
    factor = scale / softcap if SOFTCAP else scale * LOG2E
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # largest logit so far, base 2
    weight = tl.zeros([BLOCK_M], tl.float32)  # sum of 2^(logit - top)
    o = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)

    end = tokens
    if lengths is not None:
        end = tl.minimum(tokens, tl.load(lengths + b * lengths_b).to(tl.int32))
    share = tl.cdiv(tl.cdiv(tl.maximum(end, 0), splits), BLOCK_T) * BLOCK_T
    begin = split * share
    end = tl.minimum(end, begin + share)

    key += (b.to(tl.int64) * key_b + (g // key_group).to(tl.int64) * key_h) * KEY_ALIGN
    value += (b.to(tl.int64) * value_b + (g // value_group).to(tl.int64) * value_h) * VALUE_ALIGN
    key_stride, value_stride = key_t * KEY_ALIGN, value_t * VALUE_ALIGN
    if key_scale is not None:
        key_scale += b.to(tl.int64) * key_scale_b + (g // key_group).to(tl.int64) * key_scale_h
    if value_scale is not None:
        value_scale += b.to(tl.int64) * value_scale_b + (g // value_group).to(tl.int64) * value_scale_h
    mask_rows = mask
    if mask is not None:
        mask_rows += (b.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h + s.to(tl.int64) * mask_s) * 16  # [M]
    for i in tl.range(0, tl.cdiv(end - begin, BLOCK_T)):
        start = begin + i * BLOCK_T
        t = start + t_in
        here = t < end

        # keys and values
        key_rows = key + start.to(tl.int64) * key_stride
        if key_table is None:
            k = load(key_rows, key_stride, None, here, 0, BLOCK_D, D, False).to(DTYPE)
        else:
            factors, bias = scales(key_scale, t, key_scale_t, here), tl.load(key_bias + g * BLOCK_D + d)
            decoder = key_table + g.to(tl.int64) * (KEY_OPERANDS * BLOCK_D)
            k = rebuilt_key(key_rows, key_stride, here, factors, decoder, bias, PACKED)  # [T, D']
        value_rows = value + start.to(tl.int64) * value_stride
        if value_table is None:
            v = load(value_rows, value_stride, None, here, 0, BLOCK_E, E, False).to(DTYPE)
        else:
            factors, bias = scales(value_scale, t, value_scale_t, here), tl.load(value_bias + g * BLOCK_E + e)
            decoder = value_table + g.to(tl.int64) * (VALUE_OPERANDS * BLOCK_E)
            v = rebuilt_value(value_rows, value_stride, here, factors, decoder, bias, PACKED)  # [T, E']

        # scores
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * factor  # [M, T], logits in base 2
        if SOFTCAP:
            x = capped(x) * (softcap * LOG2E)
        seen = here[None, :]
        if mask is not None:
            y = tl.load(mask_rows[:, None] + t[None, :], mask=inside[:, None], other=0)
            if mask.dtype.element_ty.is_floating():
                y = y.to(tl.float32)
                x += tl.where(y == -float("inf"), y, tl.maximum(y, LOWEST) * LOG2E)
            else:
                seen = seen & (y != 0)
        x = tl.where(seen, x, -float("inf"))

        # softmax
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # all masked so far: weights are 0, not NaN
        p = tl.exp2(x - base[:, None])
        shrink = tl.exp2(top - base)
        weight = weight * shrink + tl.sum(p, 1)
        top = new_top

        # output
        o = tl.dot(p.to(DTYPE), v, o * shrink[:, None], input_precision="ieee")  # [M, E']

    row = ((split * (tl.num_programs(0) // tiles // groups) + b) * heads + head).to(tl.int64) * queries + s
    o *= (1.0 / tl.where(weight == 0.0, 1.0, weight))[:, None]
    at = output + (row * E)[:, None] + e[None, :]
    tl.store(at, o.to(output.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
    some = weight > 0.0
    total = tl.where(some, (top + tl.log2(tl.where(some, weight, 1.0))) * LN2, -float("inf"))
    tl.store(lse + row, total, mask=inside)


@triton.jit(do_not_specialize=("rows_b", "rows_h", "rows_t", "scale_b", "scale_h", "tokens", "group"))
def rebuild_kernel(
    rows,  # [B, J, T], of keys or values
    scale,  # float16, like the rows; None: rows have none
    table,  # [G, operands, BLOCK_D]: rows of the decoder
    bias,  # float32 [G, BLOCK_D]
    output,  # [B, G, T, D]
    rows_b,  # strides, in units of ALIGN elements
    rows_h,
    rows_t,
    scale_b,
    scale_h,
    scale_t,
    tokens,  # T
    group,  # kv heads that share a latent head
    VALUES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Keys (or VALUES) of BLOCK_T tokens in one kv head."""
    start, g, b = tl.program_id(0) * BLOCK_T, tl.program_id(1), tl.program_id(2)
    d, t = tl.arange(0, BLOCK_D), start + tl.arange(0, BLOCK_T)
    here = t < tokens
    j = (g // group).to(tl.int64)
    stride = rows_t * ALIGN
    rows += (b.to(tl.int64) * rows_b + j * rows_h) * ALIGN + start.to(tl.int64) * stride
    if scale is not None:
        scale += b.to(tl.int64) * scale_b + j * scale_h
    factors = scales(scale, t, scale_t, here)
    base = tl.load(bias + g * BLOCK_D + d)
    table += g.to(tl.int64) * ((VALUE_OPERANDS if VALUES else KEY_OPERANDS) * BLOCK_D)
    if VALUES:
        x = rebuilt_value(rows, stride, here, factors, table, base, PACKED)
    else:
        x = rebuilt_key(rows, stride, here, factors, table, base, PACKED)
    at = output + ((b * tl.num_programs(1) + g).to(tl.int64) * tokens + t) * D
    tl.store(at[:, None] + d[None, :], x.to(output.dtype.element_ty), mask=here[:, None] & (d < D)[None, :])


$rebuilding

@triton.jit
def rebuild(z, table, FIRST: tl.constexpr, total):
    """total [T, D'] + operand z [T, n] . n rows of the decoder from FIRST on."""
    c, d = FIRST + tl.arange(0, z.shape[1]), tl.arange(0, total.shape[1])
    part = tl.load(table + (c * total.shape[1])[:, None] + d[None, :])
    return tl.dot(z, part, total, input_precision="ieee")


@triton.jit
def scales(scale, t, stride, here):
    """Scales of tokens t [T]; 1 where rows have none."""
    if scale is None:
        return tl.full(here.shape, 1.0, tl.float32)
    return tl.load(scale + t.to(tl.int64) * stride, mask=here, other=0.0).to(tl.float32)


@triton.jit
def numbers(z, SHIFT: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr):
    """Fields of words as the numbers u - HALF."""
    return (((z.to(tl.int32) >> SHIFT) & MASK) - HALF).to(tl.float32).to(DTYPE)


@triton.jit
def capped(x):
    """tanh."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


$reading\
''')
