"""Calibration of models that accelerate has spread over several devices, CPU memory or disk (`device_map`).

    outline    the model's graph, with weights that take no memory   -> its attention sites: shapes, rotation, mask
    probe      the model itself, attention by `probe.Watch`          -> the same sums as from a captured graph

Hooks that move weights during a run cannot be captured, and a graph of the whole model would need all weights at once.
Neither is needed: the sites follow from the configuration, and the statistics come from running the model through
transformers' attention interface. Each block is recomputed in the backward pass (Chen et al. 2016, 1604.06174), so only
the inputs of blocks are stored in between, no weights and no other activations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fhopt.calibration.probe import Attends, Batch, Watch
from fhopt.errors import FhoptError
from fhopt.hardware.float_products import fast_products
from fhopt.hf.attention_interface import IMPLEMENTATION, WATCH, register_attention
from fhopt.models.capture import capture
from fhopt.models.model_facts import implementations, text_key, uses_interface
from fhopt.parallel.offloaded_weights import hooks, named_buffers
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.plan.site import AttentionSite

OUTLINE_WEIGHT = 0.01  # any value that keeps results finite; sites do not depend on weights


def is_dispatched(model: torch.nn.Module) -> bool:
    """Return whether accelerate hooks run the model."""
    return any(hooks(module) for module in model.modules())


@dataclass(frozen=True)
class Dispatched:
    """A transformers model that accelerate runs, with the sites of its outline; implements `probe.Probed`.

    modules: those that run attention, by site name. is_logits: whether the main output is logits.
    """

    model: Any
    outcome: passes_outcome.Outcome
    modules: Mapping[str, torch.nn.Module]
    is_logits: bool

    def run(self, batch: Batch, attends: Attends) -> Tensor:
        """Run forward on a batch with attention by `attends`; return the main output."""
        with self._watched(attends), torch.no_grad():
            return self._output(batch)

    def _output(self, batch: Batch) -> Tensor:
        result = self.model(**batch, **_without_cache(self.model))
        output: Tensor = result.logits if self.is_logits else torch.utils._pytree.tree_leaves(result)[0]
        return output

    def probe(self, batch: Batch, watch: Watch, likelihood: Callable[[Tensor], Tensor]) -> None:
        """Run forward on a batch, and backward from `likelihood` of the main output to the watch."""
        with self._watched(watch), _blocks_run_again(self.model, self.modules.values()), torch.enable_grad():
            torch.autograd.grad(likelihood(self._output(batch)), watch.leaf)

    @contextlib.contextmanager
    def _watched(self, watch: Attends) -> Iterator[None]:
        """Run attention of the sites by `watch` inside the context."""
        register_attention()
        before = implementations(self.model.config)
        self.model.set_attn_implementation(before | {text_key(self.model.config): IMPLEMENTATION})
        for site in self.outcome.sites.values():
            setattr(self.modules[site.name], WATCH, functools.partial(_attend, watch, site))
        try:
            yield
        finally:
            for module in self.modules.values():
                delattr(module, WATCH)
            self.model.set_attn_implementation(before)


def _attend(
    watch: Attends, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *,
    sinks: Tensor | None, **options: Any,
) -> Tensor:  # fmt: skip
    return watch.attend(site, query, key, value, mask, None if sinks is None else sinks.unsqueeze(-1), **options)


def find_dispatched(model: Any, batch: Batch) -> Dispatched:
    """Find the sites of a model by capturing its outline on a batch. Raises FhoptError for unsupported models."""
    if not hasattr(model, "set_attn_implementation"):
        raise FhoptError(
            f"{type(model).__name__} runs with accelerate hooks but is not a transformers model; expected a "
            "transformers model. Calibrate it on one device."
        )
    inputs = {name: value.cpu() for name, value in batch.items()}
    captured = capture(outline(model), (), {**inputs, **_without_cache(model)})
    outcome = pipeline.find_attentions(captured.program, assume_finite=True)
    modules = {site.name: model.get_submodule(site.name.partition("#")[0]) for site in outcome.sites.values()}
    by_hand = [name for name, module in modules.items() if not uses_interface(module)]
    if by_hand or len({id(module) for module in modules.values()}) < len(outcome.sites):
        raise FhoptError(
            f"{(by_hand or list(modules))[0]} of {type(model).__name__} does not call transformers' attention "
            "interface exactly once; expected one call if a model is spread over devices. Calibrate it on "
            "one device."
        )
    return Dispatched(model, outcome, modules, captured.is_logits)


def _without_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model, "generate") else {}


# --------------------------------------------------------------------------------------------------- outline


def outline(model: Any) -> torch.nn.Module:
    """Build a model of the same configuration whose weights are one expanded scalar and take no memory.

    Its buffers have the values of the model's. It is on the CPU, in float32, wherever the model is.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        empty: torch.nn.Module = type(model)(config)
    for module in empty.modules():
        for name, weight in module.named_parameters(recurse=False):
            number = torch.full((), OUTLINE_WEIGHT)
            setattr(module, name, torch.nn.Parameter(number.expand(weight.shape), requires_grad=False))
    for name, buffer in named_buffers(model):
        path, _, key = name.rpartition(".")
        held = buffer.detach().cpu()
        empty.get_submodule(path)._buffers[key] = held.float() if held.is_floating_point() else held
    return empty.eval()


# --------------------------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def _blocks_run_again(model: torch.nn.Module, modules: Any) -> Iterator[None]:
    """Checkpoint the blocks around attention inside the context: store only inputs, and recompute in backward.

    Recomputation runs each block to its end: with early stop, the hooks would not offload its weights again. Both runs
    use `fast_products`, which a backward pass disables: otherwise the two runs would save tensors of different
    functions.
    """
    blocks = [block for block in _blocks(model) if any(m in modules for m in block.modules())]
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        run = functools.partial(_run_fast, block.forward, [*block.parameters()])
        again = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        vars(block)["forward"] = again
    try:
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


def _run_fast(forward: Callable[..., Any], weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    with fast_products(weights):
        return forward(*args, **kwargs)


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the outermost blocks for which transformers supports gradient checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            blocks.append(module)
            inside |= {id(part) for part in module.modules()}
    return blocks
