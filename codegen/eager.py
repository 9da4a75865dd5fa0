"""Rendering of the plain torch kernel of a `KernelSpec`, the fallback without a compiler.

The file holds only what its spec needs: no loop over bit groups, no branch on bits. Tokens are processed in tiles of
1,024, merged by their running log-sum-exp, so that unpacked latents of full length never exist.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

from string import Template

from fhopt.codegen.source_files import read_package_source
from fhopt.codegen.tiers import PLANES, Tiers, check_uniform, is_scaled, legend
from fhopt.ops.packing import planes
from fhopt.plan.kernel_spec import KernelSpec


def render_torch(spec: KernelSpec) -> str:
    """Render the Python file of `spec`, deterministically. Raises FhoptError for unsupported bit groups."""
    check_uniform(spec, "a generated file of torch operations")
    return read_package_source("fhopt.codegen", "eager.py.in").substitute(
        name=spec.name,
        planes="".join(f"{line}\n" for line in PLANES),
        key_legend=legend(spec.key_tiers, spec.key_width),
        value_legend=legend(spec.value_tiers, spec.value_width),
        value_width=spec.value_width,
        cap="cap(x) = softcap tanh(x / softcap)" if spec.softcap else "cap(x) = x",
        cap_line=_CAP_LINE if spec.softcap else "",
        key_rows=_call("key", spec.key_tiers),
        value_rows=_call("value", spec.value_tiers),
        key_scale_line=_KEY_SCALE_LINE if _factors_out(spec.key_tiers) else "",
        value_scale_line=_VALUE_SCALE_LINE if _factors_out(spec.value_tiers) else "",
        functions="".join(_functions(spec)),
    )


def _factors_out(tiers: Tiers) -> bool:
    """Return True if the token scale can multiply the dot product instead of every element: all channels have it."""
    return bool(tiers) and all(bits < 16 for bits, _, _ in tiers)


def _is_mixed(tiers: Tiers) -> bool:
    """Return True if some channels have the token scale and others, which are 16-bit, do not."""
    return is_scaled(tiers) and not _factors_out(tiers)


def _call(side: str, tiers: Tiers) -> str:
    """Render the expression for the rows of a tile as floats."""
    if not tiers:
        return f"{side}[:, :, tile].float()"
    scale = f", {side}_scale[:, :, tile]" if _is_mixed(tiers) else ""
    return f"unpack_{side}({side}[:, :, tile]{scale})"


def _functions(spec: KernelSpec) -> list[str]:
    """Render the functions below the kernel: one per side, and their helpers."""
    tiers = spec.key_tiers + spec.value_tiers
    scaled = any(_factors_out(side) for side in (spec.key_tiers, spec.value_tiers))
    parts = [_unpack("key", spec.key_tiers), _unpack("value", spec.value_tiers)]
    small = {bits for bits, _, _ in tiers if bits < 8}
    parts += [_codes(bits) for bits in sorted(small.union(*map(planes, small)))]
    parts += [_FLOAT16] if any(bits == 16 for bits, _, _ in tiers) else []
    return parts + ([_PER_HEAD] if scaled else [])


def _unpack(side: str, tiers: Tiers) -> str:
    """Render the function that unpacks the rows of one side, empty for unquantized rows."""
    if not tiers:
        return ""
    mixed = _is_mixed(tiers)
    pieces, byte = [], 0
    for bits, width, step in tiers:
        end = byte + bits * width // 8
        pieces.append(_piece(bits, f"rows[..., {byte}:{end}]", step, " * factor" if mixed else ""))
        byte = end
    body = f"    return {pieces[0]}\n"
    if len(pieces) > 1:
        lines = "".join(f"        {piece},\n" for piece in pieces)
        body = f"    tiers = [\n{lines}    ]\n    return torch.cat(tiers, -1)\n"
    return _UNPACK.substitute(
        side=side,
        scale=", scale: Tensor" if mixed else "",
        what="latents without the token's scale" if _factors_out(tiers) else "latents",
        factor="    factor = scale.float().unsqueeze(-1)\n" if mixed else "",
        body=body,
    )


def _piece(bits: int, rows: str, step: float, factor: str) -> str:
    """Render the expression for one bit group as floats."""
    if bits == 16:
        return f"float16_of({rows})"
    codes = rows if bits == 8 else f"codes{bits}({rows})"
    return f"({codes}.float() - {(2**bits - 1) / 2}) * {step!r}{factor}"


def _codes(bits: int) -> str:
    """Render the function that unpacks `bits` < 8 bits, from one bit plane or from two planes' functions."""
    high, *low = planes(bits)
    if low:
        return _PLANES.substitute(bits=bits, high=high, low=low[0])
    return _CODES.substitute(bits=bits, mask=2**bits - 1, per_byte=8 // bits)


_CAP_LINE = """\
        logits = softcap * torch.tanh(logits / softcap)
"""
_KEY_SCALE_LINE = """\
        logits = logits * per_head(key_scale[:, :, tile], heads)
"""
_VALUE_SCALE_LINE = """\
        weights = weights * per_head(value_scale[:, :, tile], heads)
"""
_UNPACK = Template('''

def unpack_$side(rows: Tensor$scale) -> Tensor:
    """Bytes [B,J,t,bytes] -> $what, float32 [B,J,t,R]."""
$factor$body''')
_CODES = Template('''

def codes$bits(rows: Tensor) -> Tensor:
    """Bytes [...,n] -> codes of $bits bits, uint8 [...,$per_byte*n], low-order ones first."""
    codes = [(rows >> shift) & $mask for shift in range(0, 8, $bits)]
    return torch.stack(codes, -1).flatten(-2)
''')
_PLANES = Template('''

def codes$bits(rows: Tensor) -> Tensor:
    """Bytes [...,$bits*n] -> codes of $bits bits, uint8 [...,8*n]: a plane of $high bits, then one of $low."""
    end = rows.shape[-1] // $bits * $high
    return codes$high(rows[..., :end]) << $low | codes$low(rows[..., end:])
''')
_FLOAT16 = '''

def float16_of(rows: Tensor) -> Tensor:
    """Bytes [...,2n] that hold float16 -> float32 [...,n]; copied, since a view must start at an even byte."""
    return rows.clone(memory_format=torch.contiguous_format).view(torch.float16).float()
'''
_PER_HEAD = '''

def per_head(scale: Tensor, heads: int) -> Tensor:
    """Scales [B,J,t] -> float32 [B,H,1,t]: the H/J query heads of a latent head share one."""
    return scale.float().repeat_interleave(heads // scale.shape[1], 1).unsqueeze(2)
'''
