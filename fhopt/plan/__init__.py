"""What a plan is, as data and on disk: sites, sides, bases, bit groups, kernel specs, files."""

from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite, Rope
from fhopt.plan.site_plan import HeadGather, PagePlan, SidePlan, SitePlan, SketchPlan, Tier

__all__ = [
    "AttentionSite",
    "HeadGather",
    "KernelSpec",
    "LatentPlan",
    "PagePlan",
    "Rope",
    "SidePlan",
    "SitePlan",
    "SketchPlan",
    "Tier",
]
