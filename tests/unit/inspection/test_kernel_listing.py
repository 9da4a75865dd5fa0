"""Listings of kernels."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from small_models import FittedModel

from fhopt.codegen.build import render_kernel
from fhopt.hardware.kernel_table import kernels_of
from fhopt.inspection.kernel_listing import list_kernels


def test_a_listing_is_the_source_of_the_kernel(llama: FittedModel) -> None:
    plan, found = llama.plan(4), list_kernels(llama.plan(4))
    specs = {kernel[0].name: kernel[0] for kernel in kernels_of(plan, "bfloat16")}
    assert {f.file for f in found.files} == {f"{name}{end}" for name in specs for end in (".cpp", ".py")}
    for listing in found.files:
        name, _, _ = listing.file.rpartition(".")
        plain = "".join(ET.fromstring(f"<pre>{found.html(listing)}</pre>").itertext())
        assert plain.strip() == render_kernel(specs[name], listing.language).strip()
        assert set(listing.sites) <= {p.site.name for p in plan.sites}


def test_trellis_codes_have_kernels_only_for_cpus(llama: FittedModel) -> None:
    found = list_kernels(llama.plan(6, code="trellis"))
    assert found.files and all(listing.file.endswith(".cpp") for listing in found.files)
