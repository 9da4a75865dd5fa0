"""Tasks of the compiled zoo: the modes of each entry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from model_zoo import Entry, ZooCase
from model_zoo.checking import entries
from model_zoo.huggingface import MODELS
from torch import nn

from benchmarks.zoo.compiled_modes import call_twice, generate, is_float, train, vary_batches, vary_lengths
from benchmarks.zoo.compiled_results import ZooTask

ROUGH = 2.0**-5  # 8-bit mantissa, minus three bits for accumulated error
DYNAMIC = ("llama", "gpt2", "gemma3", "gpt_oss", "bloom", "mpt", "falcon", "deepseek_v3", "bert", "t5")
LONG = ("llama", "gpt2", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "falcon")
TRAINED = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "bert", "gpt_neox")  # these support activation checkpoints
LAYERED = ("llama", "gpt2", "gpt_oss", "deepseek_v3", "bloom", "bert", "t5")  # layers of one class, other weights
HALF = ("llama", "gpt2", "gemma2", "gpt_oss", "bloom", "t5", "bert", "deepseek_v3", "vit")
ROUTED = ("gpt_oss",)  # in bfloat16 its expert choice depends on the last bit; under autocast it does not
BEHIND, PLACES = 300, 320  # cached tokens of a long task; positions for them and later ones


def tasks() -> list[ZooTask]:
    """Return all tasks: each zoo entry as it is called there, and further modes of its transformers models."""
    zoo = entries()
    listed: list[ZooTask] = []
    for entry in zoo:
        listed.append(ZooTask(entry, "no_grad", entry.build, call_twice))
        listed.append(ZooTask(entry, "train", entry.build, train))
        if entry.family != "huggingface":
            listed.append(ZooTask(entry, "batches", entry.build, vary_batches, dynamic=True))
    firsts = {(e.name, e.implementation): e for e in zoo if e.family == "huggingface" and e.step in FIRST_STEPS}
    steps = {(e.name, e.implementation, e.step) for e in zoo}
    for (name, chosen), entry in firsts.items():
        if (name, chosen, "decode") in steps:
            listed.append(ZooTask(entry, "dynamic cache", entry.build, partial(generate, places=0)))
        if (name, chosen, "decode static") in steps:
            listed.append(ZooTask(entry, "static cache", entry.build, partial(generate, places=16)))
        listed.extend(_sampled(entry, (name, chosen, "decode") in steps))
    return listed


FIRST_STEPS = ("forward", "prefill")


def _sampled(entry: Entry, decodes: bool) -> Iterator[ZooTask]:
    """Yield the tasks that only some models have."""
    build = entry.build
    if entry.implementation == "flex":
        return
    if entry.name in DYNAMIC:
        yield ZooTask(entry, "lengths", build, vary_lengths, dynamic=True)
        if decodes:
            yield ZooTask(entry, "growing", build, partial(generate, places=0), dynamic=True)
    if entry.name in DYNAMIC and entry.step == "prefill":
        yield ZooTask(entry, "left padding", partial(_left_padded, entry), train)
    if entry.name in LONG:
        for places, mode in ((0, "long dynamic"), (PLACES, "long static")):
            yield ZooTask(entry, mode, partial(_with_room, entry), partial(generate, places=places, eagerly=True))
    if entry.name in LAYERED:
        yield ZooTask(entry, "layers", build, train, by_layers=True)
        if decodes:
            yield ZooTask(entry, "layers decode", build, partial(generate, places=0), by_layers=True)
    if entry.name in TRAINED:
        yield ZooTask(entry, "checkpoints", partial(_checkpointing, entry), train)
    if entry.name in HALF:
        rough: dict[str, Any] = dict(tolerance=ROUGH, exact=partial(_rounded_to_bfloat16, entry))
        if entry.name not in ROUTED:
            yield ZooTask(entry, "bfloat16", partial(_in_bfloat16, entry), train, **rough)
        yield ZooTask(entry, "autocast", build, partial(train, around=_autocast), **{**rough, "exact": build})
    if entry.implementation == "eager":
        yield ZooTask(entry, "weights", partial(_asking_for_weights, entry), call_twice)


def _with_room(entry: Entry) -> ZooCase:
    """Build the entry's model with positions for 512 tokens, at a context of 300; `generate` fills its cache."""
    model = next(m for m in MODELS if m.name == entry.name)
    places = "n_positions" if "n_positions" in model.options else "max_position_embeddings"
    inputs = lambda: {"input_ids": torch.randint(3, 97, (2, BEHIND))}  # noqa: E731
    roomy = replace(model, options={**model.options, places: 512}, inputs=inputs)
    return roomy.entry(entry.implementation, "prefill").build()


def _left_padded(entry: Entry) -> ZooCase:
    """Build a case whose second sequence begins late: its first rows attend to nothing, and are compared, too."""
    case = entry.build()
    mask = torch.ones(case.kwargs["input_ids"].shape, dtype=torch.long)
    mask[1, :3] = 0
    return ZooCase(case.module, case.args, {**case.kwargs, "attention_mask": mask})


def _checkpointing(entry: Entry) -> ZooCase:
    case = entry.build()
    for part in case.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    module: Any = case.module.train()
    module.gradient_checkpointing_enable()
    return case


def _in_bfloat16(entry: Entry) -> ZooCase:
    case = entry.build()
    kwargs = {k: v.bfloat16() if is_float(v) else v for k, v in case.kwargs.items()}
    return ZooCase(case.module.bfloat16(), case.args, kwargs)


def _rounded_to_bfloat16(entry: Entry) -> ZooCase:
    """Build the case of `_in_bfloat16` with its rounded values in float32."""
    case = _in_bfloat16(entry)
    kwargs = {k: v.float() if is_float(v) else v for k, v in case.kwargs.items()}
    return ZooCase(case.module.float(), case.args, kwargs)


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _asking_for_weights(entry: Entry) -> ZooCase:
    case = entry.build()
    return ZooCase(case.module, case.args, {**case.kwargs, "output_attentions": True})
