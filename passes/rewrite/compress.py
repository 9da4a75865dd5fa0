"""Compression of keys and values to latents, according to the plan.

    before                                  after, at full width without bit groups
    o = fhopt.attention(q, k, v, mask)      z_k = encode(k, E_k); z_v = encode(v, E_v)
                                            o, _ = fhopt.latent_attention(q, decode(z_k, D_k), decode(z_v, D_v), mask)

    after, with bit groups (attention sinks and recent window stay exact, as in the cache; none in cross attention)
                                            c_k = unpack(pack(encode(k, E_k))); c_v from v
                                            near, far = split_mask(mask)
                                            o = merge(latent_attention(q, decode(c_k, D_k), decode(c_v, D_v), far),
                                                      latent_attention(q, k, v, near))

    one latent for both (layout "input")    z = encode(cat(k, v), E); keys decode(z, D_k), values decode(z, D_v)

One latent is exact if its span contains all keys and values of these weights. Gradients of the projections (and of the
norm before them) are projected onto that span, all other gradients are exact.

Near tokens (attention sinks and recent window) stay exact with any `plan.window_bits`, because nothing is stored here;
a cache with an 8-bit recent window gives slightly different results.

Keys and values are still reconstructed here, which makes the pass readable and separately testable; `absorb` removes
the reconstruction. Bases are extra placeholders, bound to the weights of each call (`Fitted`): a graph that several
layers share gets the bases of each layer; weights that the plan was not fitted for raise Stale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss, Stale
from fhopt.ops import algebra, packing
from fhopt.ops import masks as ops_masks
from fhopt.passes.graph.nodes import add_constant, call, shape
from fhopt.passes.graph.program import Bound, Program
from fhopt.plan.fingerprint import weight_print
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SidePlan, SitePlan

NO_WEIGHTS: Mapping[str, Tensor] = {}


@dataclass(frozen=True, eq=False)
class FittedSite:
    """The plan of a site, and the weights it was fitted for.

    sources: placeholders of these weights, empty if unknown. own: their fingerprint. others: plans of sites that fit
    the same graph, by fingerprint. trusting: accept weights that have changed since the fit.
    """

    site: SitePlan
    sources: tuple[str, ...] = ()
    own: str = ""
    others: Mapping[str, SitePlan] = field(default_factory=dict)
    trusting: bool = False

    def of(self, *weights: Tensor) -> SitePlan:
        """Return the plan for these weights. Raises Stale without one."""
        fingerprint = weight_print(weights)
        if fingerprint == self.own:
            return self.site
        if fingerprint in self.others:
            return self.others[fingerprint]
        if self.trusting or (self.site.is_exact and not self.site.is_shared):  # full width is exact for any weights
            return self.site
        raise Stale(f"the weights of {self.site.site.name} are not those that the plan was fitted for")

    def bound(self, pick: Callable[[SitePlan], Tensor]) -> Bound | None:
        """Return the computation of a basis input from the weights."""
        return Bound(self.sources, lambda *weights: pick(self.of(*weights))) if self.sources else None


@dataclass(frozen=True)
class Compress:
    """The pass `compress`, for one plan. training: rounding uses a straight-through gradient (Bengio et al. 2013).

    trusting: use the plan for weights that have changed since it was fitted.
    """

    plan: LatentPlan
    training: bool = False
    trusting: bool = False
    name: str = "compress"

    def match(self, node: fx.Node, site: AttentionSite, weights: Mapping[str, Tensor] = NO_WEIGHTS) -> FittedSite:
        """Choose the plan for the site at `node`. weights: values of the program's parameters, by qualified name.

        Raises Miss without a plan, for other weights, or if the graph's shapes differ from the plan's.
        """
        fitted = self._fitted(node, site, weights)
        plan = fitted.site
        if site.cache != "none":
            raise Miss(
                "the graph reads a full-precision KV cache; for a compressed one use LatentCache (fhopt.apply)", node
            )
        if site.sinks:
            raise Miss("the attention has sink logits besides its keys; expected none, latents do not hold them", node)
        if node.kwargs.get("dropout"):
            raise Miss("attention dropout is active; expected evaluation or dropout 0", node)
        sizes = tuple(int(d) for shaped in (shape(a) for a in node.args[1:3]) for d in (shaped[1], shaped[3]))  # type: ignore[index, arg-type]
        expected = (plan.site.kv_heads, plan.site.key_dim, plan.site.kv_heads, plan.site.value_dim)
        if sizes != expected:
            raise Miss(f"keys and values have (heads, size) {sizes}; the plan was fitted for {expected}", node)
        return fitted

    def _fitted(self, node: fx.Node, site: AttentionSite, weights: Mapping[str, Tensor]) -> FittedSite:
        """Choose a plan by the weights, which also works for part of a model, else by the site's name. Raises Miss."""
        held = [weights.get(name) for name in site.cached_weights]
        fingerprint = weight_print([w for w in held if w is not None]) if held and None not in held else ""
        named = next((p for p in self.plan.sites if p.site.name == site.name), None)
        known = {print_: self.plan.site(name) for name, print_ in self.plan.weights.items()}
        plan = known.get(fingerprint) or named
        if plan is None:
            raise Miss(f"the site is not in the plan: {site.name}", node)
        own = self.plan.weights.get(plan.site.name, fingerprint)
        if fingerprint and fingerprint != own and not self.trusting:
            raise Miss("the weights are not those that the plan was fitted for", node)
        others = {key: other for key, other in known.items() if _serves(other, plan)}
        return FittedSite(plan, site.cached_weights if fingerprint else (), own, others, self.trusting or self.training)

    def rewrite(self, program: Program, node: fx.Node, fitted: FittedSite) -> fx.Node:
        """Replace the canonical node and return the node that holds the result."""
        site = fitted.site
        query, key, value = (a for a in node.args[:3] if isinstance(a, fx.Node))
        mask = node.args[3] if len(node.args) > 3 else None
        with program.graph.inserting_before(node):
            latent_k, latent_v = self._through_latents(program, key, value, _placed(program, fitted), node.name)
            shared = dict(scale=node.kwargs["scale"], softcap=node.kwargs.get("softcap", 0.0))
            causal = bool(node.kwargs.get("is_causal", False))
            if site.is_exact:
                total = (
                    call(program, ops_masks.total_mask, (query, key, mask, causal))
                    if causal or mask is not None
                    else None
                )
                result = call(program, algebra.first, (_attend(program, query, latent_k, latent_v, total, shared),))
            else:
                exact = site.site.exact_tokens(self.plan.sinks, self.plan.recent)
                masks = call(program, ops_masks.split_mask, (query, key, mask, causal, *exact))
                near, far = (call(program, pick, (masks,)) for pick in (algebra.first, algebra.second))
                parts = [
                    _attend(program, query, latent_k, latent_v, far, shared),
                    _attend(program, query, key, value, near, shared),
                ]
                result = call(program, algebra.merge, (parts,))
        node.replace_all_uses_with(result)
        program.graph.erase_node(node)
        return result

    def _through_latents(
        self, program: Program, key: fx.Node, value: fx.Node, fitted: FittedSite, name: str
    ) -> tuple[fx.Node, fx.Node]:
        """Insert decode(encode(x)) for keys and values, from one latent if the plan shares it."""
        is_shared = fitted.site.is_shared
        read = call(program, torch.cat, ([key, value], -1)) if is_shared else key
        latent = self._latent(program, read, fitted, "key", name)
        decoded_k = _decoded(program, latent, fitted, "key", name)
        if not is_shared:
            latent = self._latent(program, value, fitted, "value", name)
        return decoded_k, _decoded(program, latent, fitted, "value", name)

    def _latent(self, program: Program, node: fx.Node, fitted: FittedSite, which: str, name: str) -> fx.Node:
        """Insert encode(x), with the rounding of the bit groups."""
        side: SidePlan = getattr(fitted.site, which)
        encoder = _basis(program, node, fitted, which, "encode", name)
        latent = call(program, algebra.encode, (node, encoder))
        tiers = algebra.bit_groups(side)
        if side.tiers and self.training:
            return call(program, packing.straight_through, (latent, *tiers))
        if not side.tiers:
            return latent
        packed = call(program, torch.ops.fhopt.pack.default, (latent, *tiers))
        rows, scale = (call(program, pick, (packed,)) for pick in (algebra.first, algebra.second))
        return call(program, torch.ops.fhopt.unpack.default, (rows, scale, *tiers))


def _decoded(program: Program, latent: fx.Node, fitted: FittedSite, which: str, name: str) -> fx.Node:
    return call(program, algebra.decode, (latent, _basis(program, latent, fitted, which, "decode", name)))


def _basis(program: Program, node: fx.Node, fitted: FittedSite, which: str, kind: str, name: str) -> fx.Node:
    """Add an input that holds a basis, on the device of `node`."""
    value = node.meta.get("example_value", node.meta.get("val"))
    device = value.device if isinstance(value, Tensor) else torch.device("cpu")

    def pick(site: SitePlan) -> Tensor:
        basis: Tensor = getattr(getattr(site, which), kind)
        return basis.to(device)

    return add_constant(program, f"{name}_{which}_{kind}", pick(fitted.site), fitted.bound(pick))


def _placed(program: Program, fitted: FittedSite) -> FittedSite:
    """Replace the names of the weights by their placeholders."""
    nodes = {name: node for node, name in program.parameters.items()}
    return replace(fitted, sources=tuple(nodes[name] for name in fitted.sources))


def _serves(other: SitePlan, plan: SitePlan) -> bool:
    """Return whether the bases of `other` fit the graph of `plan`: same layout, bit groups and shapes."""
    sides = [(getattr(other, which), getattr(plan, which)) for which in ("key", "value")]
    same = all(a.tiers == b.tiers and a.encode.shape == b.encode.shape for a, b in sides)
    return same and other.layout == plan.layout and other.site.kind == plan.site.kind


def _attend(
    program: Program, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None, shared: dict[str, Any]
) -> fx.Node:
    options = {**algebra.uncoded_options(), **shared}
    return call(program, torch.ops.fhopt.latent_attention.default, (query, key, None, value, None, mask), options)
