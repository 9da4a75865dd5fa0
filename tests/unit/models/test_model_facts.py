"""Facts about transformers models: whose code computes their attention."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt.calibration import run
from fhopt.calibration.data import CalibrationData
from fhopt.errors import FhoptError
from fhopt.fitting import fit_plan
from fhopt.models.capture import capture
from fhopt.models.model_facts import check_segments, counts_in_images, uses_interface


def tiny_git() -> Any:
    """GIT: a decoder with explicit attention, and in the same file an image encoder without."""
    from transformers import GitConfig, GitForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    config = GitConfig(
        vision_config=sizes | dict(image_size=32, patch_size=16), vocab_size=97, bos_token_id=1, eos_token_id=2, **sizes
    )
    return GitForCausalLM(config).eval()


def test_the_code_of_a_module_decides_not_its_file() -> None:
    assert uses_interface(tiny_llama().model.layers[0].self_attn) and uses_interface(tiny_gpt2().transformer.h[0].attn)
    git = tiny_git()
    assert not uses_interface(git.git.encoder.layer[0].attention)
    assert uses_interface(git.git.image_encoder.vision_model.encoder.layers[0].self_attn)


def test_an_exact_plan_on_explicit_attention_changes_no_value() -> None:
    """Regression: GIT's scores got masks in the format of the attention interface, which changed its results."""
    model, ids = tiny_git(), token_ids(1, 40)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        captured = capture(model, (), {"input_ids": ids[:, :16], "use_cache": False})
        sites = run.find_compressible(CalibrationData(captured, [], name="git")).sites.values()
        fhopt.apply(model, fit_plan.exact_plan(sites, recent=8, block=8))
        found = model(input_ids=ids, use_cache=True).logits
    fhopt.unapply(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


SECTIONS = {"rope_type": "default", "mrope_section": [16, 24, 24]}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [(SECTIONS, True), ({"full_attention": SECTIONS}, True), ({"rope_theta": 1e4}, False), (None, False)],
)
def test_positions_in_images_are_distinguished_from_those_of_tokens(parameters: Any, expected: bool) -> None:
    config = SimpleNamespace(rope_parameters=parameters)
    config.get_text_config = lambda decoder: config
    assert counts_in_images(config) is expected
    check_segments(config, 0, "model")
    with pytest.raises(FhoptError, match="--segment 0") if expected else nullcontext():
        check_segments(config, 512, "model")
