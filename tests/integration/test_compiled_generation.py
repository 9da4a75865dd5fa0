"""SmolLM2's `generate` with a static latent cache, compiled: eager tokens, without recompilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.generation.streamers import BaseStreamer

import fhopt
from benchmarks.cpu.memory import plain_plan
from fhopt.models.loader import load_model
from fhopt.texts import tokens

PROMPT, FIRST, MORE = 400, 2, 500
# Logits of up to 30 in float32, with attention summed in another order: a latent between two of its 16 codes
# changes them by up to 0.11, so that a step may choose the other one of two equally likely tokens.
ROUNDING = 0.3
LAYERS = 9  # of 30 equal ones: more than the 8 graphs per function after which Dynamo gives up


class Graphs(BaseStreamer):  # type: ignore[misc]
    """Number of compiled graphs at each token."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def put(self, value: Any) -> None:
        self.counts.append(int(counters["stats"]["unique_graphs"]))

    def end(self) -> None:
        pass


@pytest.mark.slow
def test_five_hundred_steps_of_smollm2_compile_nothing_more_and_give_the_eager_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    # The number of graphs does not depend on inductor, whose C++ would take minutes.
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda m, i, **options: aot_eager(m, i))
    loaded = load_model("demo")
    model: Any = loaded.language_model()
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    fhopt.apply(model, plain_plan(loaded), decode_program=False)
    ids = tokens.held_out_ids(loaded.tokenizer, ("topics",), count=1, length=PROMPT)
    options: dict[str, Any] = dict(
        max_new_tokens=FIRST + MORE,
        min_new_tokens=FIRST + MORE,
        do_sample=False,
        cache_implementation="static",
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = model.generate(ids, **options)
    compiled: Any = torch.compile(model, backend="flashhead")
    counters.clear()
    seen = Graphs()
    found = compiled.generate(ids, streamer=seen, **options)
    same = int((found.sequences == expected.sequences)[0].long().cumprod(0).sum()) - PROMPT
    assert same > MORE // 5
    for a, b in zip(found.logits[: same + 1], expected.logits[: same + 1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)
    steps = seen.counts[1:]  # after the prompt
    assert len(steps) == FIRST + MORE and steps[0] > 0
    assert set(steps[FIRST:]) == {steps[FIRST]} and not counters["graph_break"]
