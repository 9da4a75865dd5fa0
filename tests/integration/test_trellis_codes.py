"""Plans with trellis codes: fitted, saved, in every cache, compiled, and refused where unsupported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import FittedModel, cached, token_ids

import fhopt
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import token_costs
from fhopt.export.decode_step import ExportedStep
from fhopt.export.pt2_module import export_module
from fhopt.fitting.codes import TRELLIS
from fhopt.hf.apply import latent_cache
from fhopt.models.loaded_model import LoadedModel
from fhopt.ops import registry
from fhopt.plan.latent_plan import LatentPlan


def test_it_has_less_loss_at_the_same_size(fitted: FittedModel) -> None:
    plans = [fitted.plan(6, code=code) for code in ("uniform", TRELLIS)]
    assert not plans[0].has_trellis and plans[1].has_trellis
    assert plans[1].ratio(4096) == pytest.approx(plans[0].ratio(4096), rel=0.03)
    ids = torch.cat([token_ids(1, 200) for _ in range(6)])
    uniform, trellis = (float(token_costs(fitted.model, ids, plan).kl.mean()) for plan in plans)
    assert trellis < 0.9 * uniform
    predicted = [plan.provenance["predicted_nats"] for plan in plans]
    assert predicted[1] < 0.9 * predicted[0]


def test_a_plan_on_disk_has_its_codes(llama: FittedModel, tmp_path: Path) -> None:
    plan = llama.plan(6, code=TRELLIS)
    loaded = LatentPlan.load(plan.save(tmp_path / "plan"))
    assert [s.key.tiers for s in loaded.sites] == [s.key.tiers for s in plan.sites] and loaded.has_trellis


@pytest.mark.parametrize("segment", [0, 64])
def test_every_cache_agrees_with_the_references(
    llama: FittedModel, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, ids, model = llama.plan(6, code=TRELLIS, window_bits=16), token_ids(2, 150), llama.model
    plan = replace(plan, sites=tuple(replace(s, segment=segment) for s in plan.sites))
    fhopt.apply(model, plan)
    fhopt.prepare(model)
    try:
        found: list[Any] = []
        names = ("latent_attention", "pack", "unpack", "rebuilt_attention", "open_attention", "attend_latents")
        for length in (None, 160):
            cache = latent_cache(model, **({} if length is None else {"max_cache_len": length}))
            found.append([model(ids[:, a:b], **cached(cache)).logits for a, b in ((0, 90), (90, 91), (91, 150))])
        for op in names:
            monkeypatch.setitem(registry._kernels, (op, "cpu"), None)
        cache = latent_cache(model)
        wanted = [model(ids[:, a:b], **cached(cache)).logits for a, b in ((0, 90), (90, 91), (91, 150))]
    finally:
        fhopt.unapply(model)
    for logits in found:
        for a, b in zip(logits, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def rows(cache: Any) -> list[torch.Tensor]:
    """Return all packed latents and their scales."""
    return [x for layer in cache.layers for x in layer.tensors if x.dtype in (torch.uint8, torch.float16)]


def test_a_compiled_step_is_one_graph(llama: FittedModel) -> None:
    from torch._dynamo.testing import CompileCounter

    model, ids = llama.model, token_ids(2, 70)
    fhopt.apply(model, llama.plan(6, code=TRELLIS, window_bits=16))
    torch._dynamo.reset()
    counter = CompileCounter()
    step: Any = torch.compile(model.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        eager, compiled = (latent_cache(model, max_cache_len=80) for _ in range(2))
        for cache in (eager, compiled):
            model(ids[:, :40], **cached(cache))
        compared = 0
        for i in range(40, 70):
            expected = model(ids[:, i : i + 1], **cached(eager)).logits
            found = step(input_ids=ids[:, i : i + 1], **cached(compiled), use_cache=True).logits
            # Of two equally near rings, sums in another order may select the other.
            if all(map(torch.equal, rows(eager), rows(compiled))):
                torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)
                compared += 1
    assert compared >= 5
    fhopt.unapply(model)
    assert counter.frame_count == 1


def test_a_rewritten_graph_runs_with_it(llama: FittedModel) -> None:
    ids, errors = token_ids(1, 96), []
    with torch.no_grad():
        exact = llama.model(ids, use_cache=False).logits
        for code in ("uniform", TRELLIS):
            options: Any = {"plan": llama.plan(6, code=code, window_bits=16)}
            compiled: Any = torch.compile(llama.model, backend="flashhead", options=options)
            errors.append(float((compiled(ids, use_cache=False).logits - exact).norm()))
            torch._dynamo.reset()
    assert 0 < errors[1] < errors[0]


def test_a_gpu_and_exports_refuse_it_in_one_sentence(llama: FittedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = llama.plan(6, code=TRELLIS, window_bits=16)
    with pytest.raises(FhoptError, match="an exported module does not support trellis codes"):
        export_module(LoadedModel("llama", llama.model, None), plan)
    with pytest.raises(FhoptError, match=r"an exported decode step does not support trellis codes.*--code uniform"):
        ExportedStep(llama.model, plan)
    elsewhere = [SimpleNamespace(device=torch.device("cuda"))]
    monkeypatch.setattr(llama.model, "parameters", lambda: iter(elsewhere))
    with pytest.raises(FhoptError, match="a GPU does not support trellis codes"):
        fhopt.apply(llama.model, plan)
