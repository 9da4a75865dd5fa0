"""Put a latent in place of keys and values, by the plan.

    before                                  after, uncoded and full width
    o = fhopt.attention(q, k, v, mask)      z_k = encode(k, E_k); z_v = encode(v, E_v)
                                            o, _ = fhopt.latent_attention(q, decode(z_k, D_k), decode(z_v, D_v), mask)

    after, with tiers of fewer bits (sinks and recent tokens stay exact, as in the cache; none of a cross attention)
                                            c_k = unpack(pack(encode(k, E_k))); c_v likewise
                                            near, far = split_mask(mask)
                                            o = merge(latent_attention(q, decode(c_k, D_k), decode(c_v, D_v), far),
                                                      latent_attention(q, k, v, near))

    one latent for both (layout "input")    z = encode(cat(k, v), E); keys decode(z, D_k), values decode(z, D_v)

One latent is exact where its span holds all keys and values of these weights; gradients of the projections (and of the
norm before them) are cut to that span, those of everything else are exact.

Near tokens (sinks and recent ones) stay exact with any `plan.window_bits`: nothing is stored here, so there is nothing
to round; a cache with a window of 8 bits gives slightly other numbers.

Keys and values are still expanded here, which makes the pass readable and testable on its own; `absorb` removes that.
Bases come in as extra placeholders: they are bound at call time and never baked into the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt import ops
from fhopt.errors import FhoptError, Miss
from fhopt.passes.graph import Program, add_constant, call, shape
from fhopt.spec import AttentionSite, LatentPlan, SidePlan, SitePlan


@dataclass(frozen=True)
class Compress:
    """The pass, for one plan. With `training`, rounding passes gradients straight through (Bengio et al. 2013)."""

    plan: LatentPlan
    training: bool = False
    name: str = "compress"

    def match(self, node: fx.Node, site: AttentionSite) -> SitePlan:
        """The plan for the site at `node`. Raises Miss when it has none, or the graph's shapes are not the plan's."""
        try:
            plan = self.plan.site(site.name)
        except FhoptError as error:
            raise Miss(f"not in the plan: {site.name}", node) from error
        if site.cache != "none":
            raise Miss("reads an ordinary cache; latents live in a LatentCache (fhopt.apply), not in this graph", node)
        if site.sinks:
            raise Miss("attention sinks take weight beside the keys; latents do not hold them yet", node)
        if node.kwargs.get("dropout"):
            raise Miss("attention dropout is active; expected evaluation or dropout 0", node)
        found = tuple(int(d) for shaped in (shape(a) for a in node.args[1:3]) for d in (shaped[1], shaped[3]))  # type: ignore[index, arg-type]
        wanted = (plan.site.kv_heads, plan.site.key_dim, plan.site.kv_heads, plan.site.value_dim)
        if found != wanted:
            raise Miss(f"keys and values have (heads, size) {found}, the plan was fitted for {wanted}", node)
        return plan

    def rewrite(self, program: Program, node: fx.Node, site: SitePlan) -> fx.Node:
        """Replace the canonical node; returns the node that holds the result."""
        query, key, value = (a for a in node.args[:3] if isinstance(a, fx.Node))
        mask = node.args[3] if len(node.args) > 3 else None
        with program.graph.inserting_before(node):
            latent_k, latent_v = self._through_latents(program, key, value, site, node.name)
            shared = dict(scale=node.kwargs["scale"], softcap=node.kwargs.get("softcap", 0.0))
            causal = bool(node.kwargs.get("is_causal", False))
            if site.is_exact:
                total = (
                    call(program, ops.total_mask, (query, key, mask, causal)) if causal or mask is not None else None
                )
                result = call(program, ops.first, (_attend(program, query, latent_k, latent_v, total, shared),))
            else:
                exact = site.site.exact_tokens(self.plan.sinks, self.plan.recent)
                masks = call(program, ops.split_mask, (query, key, mask, causal, *exact))
                near, far = (call(program, pick, (masks,)) for pick in (ops.first, ops.second))
                parts = [
                    _attend(program, query, latent_k, latent_v, far, shared),
                    _attend(program, query, key, value, near, shared),
                ]
                result = call(program, ops.merge, (parts,))
        node.replace_all_uses_with(result)
        program.graph.erase_node(node)
        return result

    def _through_latents(
        self, program: Program, key: fx.Node, value: fx.Node, site: SitePlan, name: str
    ) -> tuple[fx.Node, fx.Node]:
        """decode(encode(x)) of keys and of values, from one latent where the plan has one for both."""
        read = call(program, torch.cat, ([key, value], -1)) if site.is_shared else key
        latent = self._latent(program, read, site.key, f"{name}_key")
        decoded_k = _decoded(program, latent, site.key, f"{name}_key")
        if not site.is_shared:
            latent = self._latent(program, value, site.value, f"{name}_value")
        return decoded_k, _decoded(program, latent, site.value, f"{name}_value")

    def _latent(self, program: Program, node: fx.Node, side: SidePlan, name: str) -> fx.Node:
        """encode(x), with the rounding of the tiers."""
        encoder = add_constant(program, f"{name}_encode", _on_device(side.encode, node))
        latent = call(program, ops.encode, (node, encoder))
        tiers = ops.tier_arguments(side)
        if side.tiers and self.training:
            return call(program, ops.straight_through, (latent, *tiers))
        if not side.tiers:
            return latent
        packed = call(program, torch.ops.fhopt.pack.default, (latent, *tiers))
        codes, scale = (call(program, pick, (packed,)) for pick in (ops.first, ops.second))
        return call(program, torch.ops.fhopt.unpack.default, (codes, scale, *tiers))


def _decoded(program: Program, latent: fx.Node, side: SidePlan, name: str) -> fx.Node:
    decoder = add_constant(program, f"{name}_decode", _on_device(side.decode, latent))
    return call(program, ops.decode, (latent, decoder))


def _on_device(basis: Tensor, node: fx.Node) -> Tensor:
    value = node.meta.get("example_value", node.meta.get("val"))
    return basis.to(value.device) if isinstance(value, Tensor) else basis


def _attend(
    program: Program, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None, shared: dict[str, Any]
) -> fx.Node:
    options = {**ops.latent_options(None, None), **shared}
    return call(program, torch.ops.fhopt.latent_attention.default, (query, key, None, value, None, mask), options)
