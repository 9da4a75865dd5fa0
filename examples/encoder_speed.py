"""Measure an encoder with written-out attention in eager mode, with inductor and with fhopt, and the loss of a plan.

An encoder caches nothing, so a plan saves neither bytes nor time: for speed use exact mode.

python examples/encoder_speed.py
"""

from __future__ import annotations

import statistics
import timeit
from typing import Any

import torch
from transformers import BertConfig, BertModel

import fhopt


def seconds(calls: dict[str, Any]) -> dict[str, float]:
    """Return median times; the calls alternate, so that other load on the machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(15):
        for name, call in calls.items():
            times[name].append(timeit.timeit(call, number=1))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    torch.manual_seed(0)
    tokens = 512
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=8)
    config = BertConfig(**sizes, attn_implementation="eager")
    model: Any = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    batches = [{"input_ids": torch.randint(0, config.vocab_size, (2, tokens))} for _ in range(8)]
    # An encoder caches nothing: no attention sinks, and no residual window but a query's own token.
    options: dict[str, Any] = dict(sequences=5, rate_sequences=3, context=tokens, sinks=0, recent=1, block=1)
    plan = fhopt.fit(model, batches=batches, ratio=8, tokens=tokens, **options)
    backends: dict[str, Any] = {
        "inductor": dict(backend="inductor"),
        "fhopt, exact": dict(backend="flashhead", options={"ratio": 1}),
        "fhopt, plan": dict(backend="flashhead", options={"plan": plan}),
    }
    compiled, arguments = {"eager": model}, batches[0]
    for name, backend in backends.items():
        torch._dynamo.reset()
        compiled[name] = torch.compile(model, **backend)
        compiled[name](**arguments)
    found = seconds({name: lambda call=call: call(**arguments) for name, call in compiled.items()})
    exact = model(**arguments)[0]
    for name, call in compiled.items():
        cosine = torch.cosine_similarity(call(**arguments)[0].mean(1), exact.mean(1)).min()
        print(f"{name:<14} {1000 * found[name]:6.1f} ms   least cosine with eager {float(cosine):.4f}")
    print(f"layout {plan.sites[0].layout}, {plan.ratio():.2f}x smaller")


if __name__ == "__main__":
    main()
