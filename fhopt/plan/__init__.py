"""Plans as data and on disk: sites, sides, bases, bit groups, kernel specifications, files.

Names are imported lazily: the checks of plan files need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fhopt.import_hook import lazily

if TYPE_CHECKING:
    from fhopt.plan.kernel_spec import KernelSpec as KernelSpec
    from fhopt.plan.latent_plan import LatentPlan as LatentPlan
    from fhopt.plan.site import AttentionSite as AttentionSite
    from fhopt.plan.site import Rope as Rope
    from fhopt.plan.site_plan import BitGroup as BitGroup
    from fhopt.plan.site_plan import HeadGather as HeadGather
    from fhopt.plan.site_plan import PagePlan as PagePlan
    from fhopt.plan.site_plan import SidePlan as SidePlan
    from fhopt.plan.site_plan import SitePlan as SitePlan
    from fhopt.plan.site_plan import SketchPlan as SketchPlan

_WHERE = {
    "AttentionSite": "fhopt.plan.site",
    "HeadGather": "fhopt.plan.site_plan",
    "KernelSpec": "fhopt.plan.kernel_spec",
    "LatentPlan": "fhopt.plan.latent_plan",
    "PagePlan": "fhopt.plan.site_plan",
    "Rope": "fhopt.plan.site",
    "SidePlan": "fhopt.plan.site_plan",
    "SitePlan": "fhopt.plan.site_plan",
    "SketchPlan": "fhopt.plan.site_plan",
    "BitGroup": "fhopt.plan.site_plan",
}
__getattr__ = lazily(__name__, _WHERE)

__all__ = [
    "AttentionSite",
    "BitGroup",
    "HeadGather",
    "KernelSpec",
    "LatentPlan",
    "PagePlan",
    "Rope",
    "SidePlan",
    "SitePlan",
    "SketchPlan",
]
