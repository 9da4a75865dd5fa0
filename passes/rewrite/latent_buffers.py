"""Replacement of K/V buffers, which a module owns and its forward writes, by latents.

    before                                             after
    %w = written(%k_cache, [], setitem, [.., %k])      %n = written(no_tokens, [], setitem, [.., numbered(%k)])
    %o = fhopt.attention(%q, %w, %w_1, %mask)          %o = attend_buffered(%q, %k, %v, %mask, %n, T, [parts], [bases])
    %copy_ = copy_(%k_cache, %w)
    return [%o]                                        return [%o]

`buffer_updates` analyzes the use of the buffers. A `Keeper` (fhopt/cache/module_buffers.py) provides `attend_buffered`
and the parts of a latent cache that it uses and changes in place. The parts are bound to the buffers at call time: the
graphs of prefill and decode share them, and the buffers release their memory. Only buffers and attributes of the
compiled module and its submodules are replaced, never caches of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, fx

from fhopt.errors import FhoptError, Miss
from fhopt.passes.graph.evaluate import Evaluator
from fhopt.passes.graph.nodes import add_constant, call, fake, remove_dead_code
from fhopt.passes.graph.program import Bound, Program
from fhopt.passes.recognize.node_roles import Roles
from fhopt.passes.rewrite.buffer_updates import (
    Update,
    arrange_tokens,
    own_buffer,
    read_update,
    slots_read,
    stand_in,
    written_slots,
)
from fhopt.passes.rewrite.compress import Compress, FittedSite
from fhopt.plan.module_buffer import BufferPair, Places
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SitePlan


class Keeper(Protocol):
    """Storage of latents instead of K/V buffers between calls: `fhopt.cache.module_buffers.BufferKeeper`."""

    @property
    def attend_buffered(self) -> Callable[..., Tensor]:
        """Attention over a buffer and new tokens, as called by graphs."""

    def why_kept(self, buffer: Tensor) -> str:
        """Return why a buffer cannot be replaced, "" if it can."""

    def is_released(self, buffer: Tensor) -> bool:
        """Return whether a buffer has released its memory."""

    def blank(self, held: BufferPair, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return examples of the parts for buffers of keys and values."""

    def parts(self, held: BufferPair, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return the parts for these buffers, which release their memory."""


@dataclass(frozen=True, eq=False)
class Buffered:
    """A site whose keys and values are buffers."""

    node: fx.Node
    fitted: FittedSite
    held: BufferPair
    key: Update
    value: Update


@dataclass(frozen=True)
class LatentBuffers:
    """The pass `latent_buffers`, according to the plan of `compress`."""

    compress: Compress
    keeper: Keeper
    name: str = "latent_buffers"

    def is_for(self, node: fx.Node, site: AttentionSite, program: Program) -> bool:
        """Return whether the graph writes the keys and values into buffers of a module."""
        return site.cache == "in-place" and all(own_buffer(program, operand) for operand in node.args[1:3])

    def match(self, node: fx.Node, site: AttentionSite, program: Program, roles: Roles, base: Evaluator) -> Buffered:
        """Match the buffers used by the site at `node`. Raises Miss if latents cannot replace them."""
        fitted = self.compress.match(node, replace(site, cache="none"), program.weights)
        if self.compress.training:
            raise Miss("the graph is compiled for training; expected inference", node)
        if site.kind != "self":
            raise Miss("its buffers hold the tokens of an encoder; expected the attention's own tokens", node)
        for operand in node.args[1:3]:
            buffer = own_buffer(program, operand)
            if buffer is not None and (reason := self.keeper.why_kept(program.values[buffer.name])):
                raise Miss(f"its buffer {reason}", node)
        operands = [a for a in node.args[1:3] if isinstance(a, fx.Node)]
        key, value = (read_update(program, node, operand, roles, base) for operand in operands)
        if key.buffer is value.buffer:
            raise Miss("keys and values share one buffer; expected one for each", node)
        if written_slots(key, base, roles) != written_slots(value, base, roles) or key.tokens != value.tokens:
            raise Miss("keys and values are written into different slots; expected the same", node)
        plan = self.compress.plan
        if key.tokens <= plan.sinks:
            raise Miss(
                f"its buffer has {key.tokens} slots; expected more than the {plan.sinks} attention sinks of the plan",
                node,
            )
        places = Places(key.tokens, plan.window)
        inputs = {name: placeholder for placeholder, name in program.parameters.items()}
        fitted = replace(fitted, sources=tuple(inputs[name] for name in fitted.sources))
        return Buffered(node, fitted, BufferPair(fitted.site, places, key.axes, value.axes), key, value)

    def rewrite(self, program: Program, buffered: Buffered) -> fx.Node:
        """Replace the canonical node and return the node that holds the result."""
        node, site = buffered.node, buffered.held.site
        with program.graph.inserting_before(node):
            numbers = stand_in(program, buffered.key)
            dtype = fake(buffered.key.buffer).dtype
            new = [call(program, arrange_tokens, (u.new, u.new_axes, dtype)) for u in (buffered.key, buffered.value)]
            mask = node.args[3] if len(node.args) > 3 else None
            read = slots_read(program, buffered.key, numbers)
            bases = [
                _basis(program, buffered, side, kind) for side in ("key", "value") for kind in ("encode", "decode")
            ]
            arguments = (node.args[0], *new, mask, numbers, read, self._parts(program, buffered), bases)
            tiers = [tuple((t.bits, t.width, t.step) for t in side.tiers) for side in (site.key, site.value)]
            options = dict(
                is_causal=bool(node.kwargs.get("is_causal", False)), scale=node.kwargs["scale"],
                softcap=node.kwargs.get("softcap", 0.0), is_shared=site.is_shared, places=buffered.held.places.numbers,
                key_tiers=tiers[0], value_tiers=tiers[1],
            )  # fmt: skip
            result = call(program, self.keeper.attend_buffered, arguments, options)
        node.replace_all_uses_with(result)
        for gone in (node, buffered.key.copy, buffered.value.copy):
            program.graph.erase_node(gone)
        remove_dead_code(program)
        return result

    def check(self, program: Program, missed: Sequence[str]) -> None:
        """Raise FhoptError if the graph still reads a buffer that another graph has replaced by latents."""
        for node in program.graph.nodes:
            value = program.values[node.name] if node.op == "placeholder" else None
            if node.users and isinstance(value, Tensor) and self.keeper.is_released(value):
                raise FhoptError(
                    f"{program.buffers.get(node.name, node.name)} holds latents, and this graph needs its tokens: "
                    f"{'; '.join(missed) or 'no attention of the plan reads it'}. Compile everything that uses the "
                    "cache with the same plan; fhopt.cache.module_buffers.restore gives a buffer its memory back."
                )

    def _parts(self, program: Program, buffered: Buffered) -> list[fx.Node]:
        keys, values = buffered.key.buffer.name, buffered.value.buffer.name
        examples = self.keeper.blank(buffered.held, program.values[keys], program.values[values])
        bound = [
            Bound((keys, values, *buffered.fitted.sources), _part(self.keeper, buffered.fitted, buffered.held, index))
            for index in range(len(examples))
        ]
        name = f"{buffered.node.name}_part"
        return [add_constant(program, f"{name}_{i}", examples[i], bound[i]) for i in range(len(examples))]


def _part(keeper: Keeper, fitted: FittedSite, held: BufferPair, index: int) -> Callable[..., Tensor]:
    """Return the function of (keys, values, weights) that gives one of the parts."""

    def make(keys: Tensor, values: Tensor, *weights: Tensor) -> Tensor:
        site = fitted.of(*weights) if weights else held.site
        return keeper.parts(replace(held, site=site), keys, values)[index]

    return make


def _basis(program: Program, buffered: Buffered, side: str, kind: str) -> fx.Node:
    """Add an input for a basis: encoders in the plan's dtype, decoders in the model's."""
    value = fake(buffered.key.buffer)

    def pick(site: SitePlan) -> Tensor:
        basis: Tensor = getattr(getattr(site, side), kind)
        return basis.to(value.device, value.dtype if kind == "decode" else basis.dtype)

    bound = buffered.fitted.bound(pick)
    return add_constant(program, f"{buffered.node.name}_{side}_{kind}", pick(buffered.held.site), bound)


__all__ = ["BufferPair", "Buffered", "Keeper", "LatentBuffers", "Places"]
