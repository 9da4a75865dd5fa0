"""Cache layer indices from the names of attention sites."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SitePlan


def cached_sites(plan: LatentPlan, kind: str = "self", layers: Mapping[str, int] | None = None) -> dict[int, SitePlan]:
    """Return the plan's decoder sites by layer index.

    kind: "self" or "cross". layers: layer index of each cached site, by name; None: parsed from the names, without
    encoder sites. Raises FhoptError if two sites belong to the same layer.
    """
    sites = [p for p in plan.sites if p.site.kind == kind]
    if layers is None:
        decoding = [p for p in sites if "encoder" not in p.site.name.split(".")]
        layers = layer_indices([p.site for p in decoding])
    by_index: dict[int, SitePlan] = {}
    for site in (p for p in sites if p.site.name in layers):
        index = layers[site.site.name]
        if index in by_index:
            raise FhoptError(
                f"the plan names two sites of layer {index}, {by_index[index].site.name} and "
                f"{site.site.name}; expected one per layer. Use torch.compile(model, backend='flashhead') for "
                "this model."
            )
        by_index[index] = site
    return by_index


def layer_indices(sites: Iterable[AttentionSite]) -> dict[str, int]:
    """Return the layer index of each site: the number in the module path that distinguishes the sites.

    Raises FhoptError for a name without a number.
    """
    numbers = {site.name: [int(n) for n in re.findall(r"(?:^|\.)(\d+)(?=\.|#|$)", site.name)] for site in sites}
    for name, path in numbers.items():
        if not path:
            raise FhoptError(
                f"site {name!r} has no layer number in its name; expected a name like 'model.layers.3.self_attn'."
            )
    columns = range(min(map(len, numbers.values()), default=0))
    distinct = [c for c in columns if len({path[c] for path in numbers.values()}) == len(numbers)]
    column = distinct[-1] if distinct and len(numbers) > 1 else 0
    return {name: path[column] for name, path in numbers.items()}
