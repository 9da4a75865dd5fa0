"""Names of kernels."""

from __future__ import annotations

from fhopt.plan.kernel_spec import KernelSpec


def test_a_kernel_spec_is_named_by_everything_its_source_depends_on() -> None:
    spec = KernelSpec(((8, 16, 0.1), (4, 32, 0.3)), ((4, 64, 0.3),), 48, 64, "float32", False)
    other = KernelSpec(((8, 16, 0.1), (4, 32, 0.3)), ((4, 64, 0.4),), 48, 64, "float32", False)
    assert spec.name.startswith("latent_k16b8x32b4_v64b4_float32_")
    assert spec.name != other.name
