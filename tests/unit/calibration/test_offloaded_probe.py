"""Calibration of models dispatched by accelerate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import sampled
from offloaded_models import offloaded
from small_models import found, numbered, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

from fhopt.calibration import checkpoint, options, probe, run
from fhopt.calibration.data import of_batches
from fhopt.calibration.offloaded_probe import find_dispatched, is_dispatched, outline
from fhopt.errors import FhoptError
from fhopt.hardware import float_products

OPTIONS = options.FitOptions(sequences=6, rate_sequences=5, context=96, recent=8, block=8, tokens=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    tiny_llama().double().save_pretrained(path)
    return path


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest element of each sum."""
    pairs = [(left[name].double(), right[name].double()) for name in left]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def test_a_model_on_disk_gives_the_plan_of_one_in_memory(folder: Path) -> None:
    batches = [batch for _, batch in numbered(11)]
    whole, away = tiny_llama().double(), offloaded(folder)
    assert is_dispatched(away) and not is_dispatched(whole)
    measured = [run.calibrate(of_batches(model, batches), OPTIONS) for model in (whole, away)]
    one, two = [checkpoint.named_moments(m.statistics) | checkpoint.named_costs(m.costs) for m in measured]
    assert largest_difference(two, one) < 1e-9  # float64, in the same order
    plans = [run.plan_from_calibration(m, OPTIONS) for m in measured]
    assert plans[0].provenance == plans[1].provenance
    for left, right in zip(plans[0].sites, plans[1].sites, strict=True):
        assert left.site == right.site and left.key.tiers == right.key.tiers
        torch.testing.assert_close(left.key.encode, right.key.encode, rtol=1e-5, atol=1e-5)
    there = {name for name, weight in away.named_parameters() if not weight.is_meta}
    assert there == {"model.embed_tokens.weight", "model.norm.weight"}
    assert away.config._attn_implementation == whole.config._attn_implementation


def test_float32_matmuls_are_those_of_both_runs_of_a_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, sums = [batch for _, batch in numbered(3)], []
    few = replace(OPTIONS, sequences=2, rate_sequences=1)
    for by_loops in (False, True):
        monkeypatch.setattr(float_products, "multiplies_by_loops", lambda dtype, here=by_loops: here)
        model = offloaded(folder, torch.bfloat16)
        measured = run.calibrate(of_batches(model, batches), few)
        sums.append(checkpoint.named_moments(measured.statistics))
    assert largest_difference(sums[1], sums[0]) < 0.2  # bfloat16 rounding; above 1 if a weight is transposed


def test_no_weights_of_blocks_are_held_for_the_backward_pass(folder: Path) -> None:
    model, batch = offloaded(folder), {"input_ids": token_ids(1, 48)}
    source = find_dispatched(model, batch)
    held: list[tuple[int, ...]] = []
    seen: list[str] = []

    def keep(x: Tensor) -> Tensor:
        held.append(tuple(x.shape))
        return x

    def see(name: str, key: Tensor, value: Tensor) -> Callable[[Tensor, Tensor], None]:
        seen.append(name)
        return lambda key_gradient, value_gradient: None

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        source.probe(batch, probe.Watch((4, 8), see), lambda logits: logits.sum())
    weights = {tuple(p.shape) for p in model.model.layers[0].mlp.parameters()}
    assert sorted(seen) == sorted(source.modules)  # each site once, although blocks run twice
    assert held and not weights & set(held)


def tiny_qwen() -> Any:
    """Qwen3: keys are normed before RoPE."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)).eval()


@pytest.mark.parametrize("make", sampled([tiny_gpt2, tiny_qwen], 2))
def test_the_outline_of_a_model_has_its_sites_and_no_memory(make: Callable[[], Any]) -> None:
    model = make()
    empty = outline(model)
    for one, other in zip(*(found(m)[1].sites.values() for m in (model, empty)), strict=True):
        angles = [site.rope.angles if site.rope else () for site in (one, other)]
        assert angles[0] == pytest.approx(angles[1], rel=1e-9)  # measured in float64
        assert replace(one, rope=None) == replace(other, rope=None)
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in empty.parameters()}
    assert max(memory.values()) <= 4


def test_a_dispatched_module_that_is_not_a_model_of_transformers_is_refused() -> None:
    from accelerate import cpu_offload

    module = cpu_offload(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.device("cpu"))
    with pytest.raises(FhoptError, match=r"not a transformers model.*Calibrate it on one device"):
        run.calibrate(of_batches(module, [{"input": torch.zeros(1, 4)}]), OPTIONS)


def test_a_model_with_explicit_attention_is_refused_on_several_devices() -> None:
    from accelerate import cpu_offload
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=4)
    model = cpu_offload(BloomForCausalLM(config).eval(), torch.device("cpu"))
    with pytest.raises(FhoptError, match="does not call transformers' attention interface"):
        find_dispatched(model, {"input_ids": token_ids(1, 16)})
