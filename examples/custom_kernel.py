"""Generate a kernel for a hand-written specification: 64 channels of keys in two bit groups, 48 of values in 4 bits.

python examples/custom_kernel.py
"""

from __future__ import annotations

import torch

from fhopt.codegen import build_kernel
from fhopt.codegen.build import render_kernel
from fhopt.ops.latent_attention import latent_attention_reference
from fhopt.ops.packing import pack_reference
from fhopt.plan.kernel_spec import KernelSpec

Tiers = tuple[tuple[int, int, float], ...]
# (bits, channels, quantization step): the 16 most important channels have 8 bits, the others 3. A quantization step is
# a share of the token's scale.
KEYS: Tiers = ((8, 16, 1 / 32), (3, 48, 0.6))
VALUES: Tiers = ((4, 48, 0.3),)
SPEC = KernelSpec(KEYS, VALUES, key_width=64, value_width=48, dtype="float32", softcap=False)


def parts(tiers: Tiers) -> tuple[list[int], list[int], list[float]]:
    """Return bits, widths and quantization steps as separate lists, for the reference."""
    return [bits for bits, _, _ in tiers], [width for _, width, _ in tiers], [step for _, _, step in tiers]


def main() -> None:
    torch.manual_seed(0)
    (key_bits, key_widths, key_steps), (value_bits, value_widths, value_steps) = parts(KEYS), parts(VALUES)
    query = torch.randn(1, 8, 1, 64)  # [B, H, S, R_K]: 8 heads, absorbed
    keys, key_scale = pack_reference(torch.randn(1, 1, 1000, 64), key_bits, key_widths, key_steps)  # [B, J, T, bytes]
    values, value_scale = pack_reference(torch.randn(1, 1, 1000, 48), value_bits, value_widths, value_steps)
    for target in ("cpp", "triton", "torch"):
        print(f"{target}: {len(render_kernel(SPEC, target).splitlines())} lines")
    kernel = build_kernel(SPEC)  # compiled C++; torch operations where there is no compiler
    output, _ = kernel(query, keys, key_scale, values, value_scale, None, scale=0.125)  # [B, H, S, R_V]
    expected, _ = latent_attention_reference(
        query, keys, key_scale, values, value_scale, None, scale=0.125, key_bits=key_bits, key_widths=key_widths,
        key_steps=key_steps, value_bits=value_bits, value_widths=value_widths, value_steps=value_steps,
    )  # fmt: skip
    print(f"{SPEC.name}: {keys.shape[-1] + values.shape[-1]} bytes of codes a token instead of {2 * (64 + 48)}")
    print(f"largest difference from the reference {float((output - expected).abs().max()):.1e}")


if __name__ == "__main__":
    main()
