"""Modes of the compiled zoo: ways to call a model, each of which returns its results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from model_zoo import ZooCase
from torch import Tensor

from benchmarks.zoo.compiled_results import CompilerResult

NEW = 4  # single tokens after the first call of a generation task


def call_twice(call: Callable[..., Any], case: ZooCase) -> CompilerResult:
    """Call without gradients; a second time unless a cache grows, which would be another task."""
    seen = CompilerResult()
    with torch.no_grad():
        for _ in range(1 if _has_cache(case) else 2):
            seen.values += [_copied(x) for x in _leaves(call(*case.args, **case.kwargs))]
    return _with_changes(seen, case)


def train(
    call: Callable[..., Any], case: ZooCase, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> CompilerResult:
    """Compute outputs and gradients of one random projection of them; then update the weights and repeat.

    Gradients are those of all parameters and of all floating arguments. Frozen models have none.
    """
    seen, parameters = CompilerResult(), [p for p in case.module.parameters() if p.requires_grad]
    if not parameters:
        raise Skipped("frozen")
    for _ in range(2):
        args, kwargs, inputs = _tracked(case)
        with around():
            outputs = _leaves(call(*args, **kwargs))
        seen.values += [_copied(x) for x in outputs]
        ends = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        if not ends:
            raise Skipped("no output has a gradient")
        gradients = torch.autograd.grad(ends, [*parameters, *inputs], _directions(ends), allow_unused=True)
        seen.gradients += [None if g is None else g.clone() for g in gradients]
        if _has_cache(case) or any(b.requires_grad for b in case.module.buffers()):
            break  # its state belongs to the first autograd graph
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.01)
    return _with_changes(seen, case)


class Skipped(Exception):
    """A mode does not apply to a model."""


def _tracked(case: ZooCase) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """Return arguments whose floating tensors require gradients, each as a copy: a leaf must not be written to."""
    inputs: list[Tensor] = []

    def track_one(value: Any) -> Any:
        if not is_float(value):
            return value
        inputs.append(value.detach().clone().requires_grad_())
        return inputs[-1].clone()

    return tuple(map(track_one, case.args)), {k: track_one(v) for k, v in case.kwargs.items()}, inputs


def _directions(outputs: Iterable[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def vary_lengths(call: Callable[..., Any], case: ZooCase) -> CompilerResult:
    """Call with token ids of four lengths, in batches of several sizes."""
    seen = CompilerResult()
    with torch.no_grad():
        for batch, tokens in ((2, 9), (3, 12), (2, 15), (5, 7)):
            ids = {k: torch.randint(3, 97, (batch, tokens)) for k in case.kwargs if k.endswith("ids")}
            inputs = {**case.kwargs, **ids}
            if "attention_mask" in inputs:
                ends = tokens - torch.arange(batch) % 4
                inputs["attention_mask"] = (torch.arange(tokens) < ends[:, None]).long()
            seen.values += [_copied(x) for x in _leaves(call(**inputs))]
    return seen


def vary_batches(call: Callable[..., Any], case: ZooCase) -> CompilerResult:
    """Make the entry's call, then another with one more of everything that has the first argument's batch size."""
    seen, size = CompilerResult(), case.args[0].shape[0]

    def one_more(value: Any) -> Any:
        grows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        return torch.cat([value, value[:1]]) if grows else value

    with torch.no_grad():
        seen.values += [_copied(x) for x in _leaves(call(*case.args, **case.kwargs))]
        more = {name: one_more(value) for name, value in case.kwargs.items()}
        seen.values += [_copied(x) for x in _leaves(call(*map(one_more, case.args), **more))]
    return seen


def generate(call: Callable[..., Any], case: ZooCase, places: int, eagerly: bool = False) -> CompilerResult:
    """Run the entry's tokens, then single ones, with a cache of `places` positions (0: a dynamic cache).

    eagerly: the first call is not compiled, as in transformers.
    """
    seen, cache = CompilerResult(), _new_cache(case, places)
    names = inspect.signature(case.module.forward).parameters
    keyword = "cache" if "cache" in names else "past_key_values"
    inputs = {k: v for k, v in case.kwargs.items() if k != "use_cache"} | {keyword: cache}
    with torch.no_grad():
        outputs = (case.module if eagerly else call)(**inputs)
        seen.values += [_copied(outputs.logits)]
        if "decoder_input_ids" in inputs:
            inputs = {"encoder_outputs": (outputs.encoder_last_hidden_state,), keyword: cache}
        token = "decoder_input_ids" if "encoder_outputs" in inputs else "input_ids"
        for _ in range(NEW):
            step = {**inputs, token: torch.randint(3, 97, (2, 1))}
            seen.values += [_copied(call(**step).logits)]
    seen.values += [_copied(x) for x in _leaves(cache)]
    return seen


def _new_cache(case: ZooCase, places: int) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    config: Any = case.module.config
    if "decoder_input_ids" in case.kwargs:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return StaticCache(config, max_cache_len=places) if places else DynamicCache(config=config)


def _with_changes(seen: CompilerResult, case: ZooCase) -> CompilerResult:
    """Add the arguments, caches and buffers after the call to the results."""
    left = [*_leaves(case.args), *_leaves(dict(case.kwargs)), *case.module.buffers()]
    seen.values += [_copied(x) for x in left]
    return seen


def _has_cache(case: ZooCase) -> bool:
    return any("cache" in type(value).__name__.lower() for value in case.kwargs.values())


def is_float(value: Any) -> bool:
    """Return whether a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _leaves(value: Any) -> list[Any]:
    """Return the tensors and numbers in any value: outputs of transformers, tuples, caches with their layers."""
    if isinstance(value, (Tensor, int, float)):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    if "cache" in type(value).__module__:
        return [leaf for part in vars(value).values() for leaf in _leaves(part)]
    return []
