"""Fingerprints of weights, which tell whether a plan belongs to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite


def fingerprint(parameters: Mapping[str, Tensor], plan_sites: Iterable[AttentionSite]) -> str:
    """Return a model's fingerprint for a plan: names, shapes and sampled signs of the projections of its sites.

    Signs survive a change of dtype, so a plan fitted in float32 also fits the model in bfloat16.
    """
    h = hashlib.sha256()
    names = {n for site in plan_sites for role in site.projections.values() for n in role}
    for name in sorted(names):
        weight = parameters.get(name)
        if weight is None:
            h.update(f"{name} absent".encode())
            continue
        h.update(name.encode() + shape_and_signs(weight))
    return h.hexdigest()


def weight_prints(parameters: Mapping[str, Tensor], sites: Iterable[AttentionSite]) -> dict[str, str]:
    """Return the `weight_print` of the key and value projections of each site whose weights are all known."""
    known = {s.name: [parameters.get(n) for n in s.cached_weights] for s in sites}
    return {n: weight_print([w for w in ws if w is not None]) for n, ws in known.items() if ws and None not in ws}


def check_fingerprint(plan: LatentPlan, parameters: Mapping[str, Tensor], model: str) -> None:
    """Raise FhoptError if the plan has a fingerprint that differs from the model's."""
    expected = plan.provenance.get("fingerprint")
    if expected is not None and fingerprint(parameters, [s.site for s in plan.sites]) != expected:
        is_adapted = any(".base_layer." in name for name in parameters)
        fix = (
            "Fit a plan for the model with its PEFT adapter: fhopt.fit(model, tokenizer)."
            if is_adapted
            else "Fit a plan for this one: fhopt fit MODEL."
        )
        raise FhoptError(
            f"the plan was not fitted to {model}, but to {plan.provenance.get('model', 'an unnamed model')} "
            f"(fingerprint {str(expected)[:12]} does not match). {fix}"
        )


def weight_print(weights: Iterable[Tensor]) -> str:
    """Hash weights by shapes and sampled signs, which survive a change of dtype and small updates."""
    h = hashlib.sha256()
    for weight in weights:
        h.update(shape_and_signs(weight))
    return h.hexdigest()[:16]


def shape_and_signs(weight: Tensor) -> bytes:
    """Return the shape of a weight and the signs of up to 256 evenly spaced elements.

    A sharded weight is gathered, so all processes must call this. A weight that a library stores quantized (a subclass
    of Tensor) is dequantized.
    """
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # DTensor
    if type(whole) not in (Tensor, torch.nn.Parameter) and hasattr(type(whole), "dequantize"):
        whole = whole.dequantize()
    flat = whole.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 256)][:256] > 0
    return f"{tuple(weight.shape)}".encode() + bytes(sample.cpu().to(torch.uint8).tolist())
