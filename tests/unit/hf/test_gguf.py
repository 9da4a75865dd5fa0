"""GGUF files whose weights stay in their blocks: equal to the dequantized model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import save_text_gguf
from latent_caches import coded, plans
from needs import covering, needs_compiler
from torch import Tensor

import fhopt
from fhopt import codegen
from fhopt.codegen.cpu import gguf_blocks
from fhopt.codegen.cpu.skinny_linear import MAX_ROWS
from fhopt.decode.programs import decode_programs
from fhopt.errors import FhoptError
from fhopt.hf import gguf as gguf_loader
from fhopt.hf.block_weight import BlockWeight
from fhopt.models.gguf_files import read_gguf

gguf: Any = pytest.importorskip("gguf")
pytestmark = needs_compiler
ALL = {"": "Q8_0"}
UNLIKE = {"blk.0.ffn_down": "F16", "blk.0.ffn": "Q4_0", "blk.1.attn_q": "Q8_0", "": "Q4_1"}  # by layer, as in Q4_K_M
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
MIXED = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q8_0", "ffn_down": "Q5_1", "ffn": "Q4_1", "token": "Q8_0"}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(kinds: dict[str, str] | None, tied: bool = True) -> Path:
        save_text_gguf(tmp_path / "model.gguf", kinds, tied)
        return tmp_path / "model.gguf"

    return save


def logits(model: Any, tokens: int = 40) -> Tensor:
    """Return logits of a prompt, and of decode steps after it."""
    ids = torch.arange(tokens)[None] % 200
    with torch.inference_mode():
        first = model(ids[:, :-8], use_cache=True)
        found, cache = [first.logits], first.past_key_values
        found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(tokens - 8, tokens)]
    return torch.cat(found, 1)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kinds", [ALL, MIXED])
def test_the_model_agrees_with_the_dequantized_file(
    kinds: dict[str, str], tied: bool, saved: Callable[..., Path]
) -> None:
    """The file stores Llama's queries and keys in another order, so rows of blocks are permuted."""
    path = saved(kinds, tied)
    expected, tokenizer = read_gguf(path, torch.float32)
    model, its_tokenizer = fhopt.load_gguf(path, torch.float32)
    assert close(logits(model), logits(expected.eval()))
    for name, weight in expected.named_parameters():
        assert torch.equal(model.get_parameter(name) + 0.0, weight), name
    assert its_tokenizer("ab c").input_ids == tokenizer("ab c").input_ids
    assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_matrices_with_a_kernel_stay_in_blocks(saved: Callable[..., Path]) -> None:
    model, _ = fhopt.load_gguf(saved(MIXED), torch.bfloat16)
    kinds = Counter(w.gguf_blocks.format if isinstance(w, BlockWeight) else 0 for w in model.parameters())
    assert kinds == {2: 2, 3: 6, 8: 3, 0: 9}  # two layers; 0: norms, attn_output, ffn_down
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


@covering(1, kinds={"all": ALL, "mixed": MIXED, "unlike": UNLIKE}, dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_a_plan_of_the_dequantized_model_applies_and_decodes_as_a_program(
    kinds: dict[str, str], dtype: torch.dtype, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts use the same matmuls as the dequantized model; otherwise a last bit could change a code."""
    monkeypatch.setattr(gguf_blocks, "most_rows", lambda format, dtype: MAX_ROWS)
    path = saved(kinds)
    whole = read_gguf(path, dtype)[0].eval()
    plan = coded(plans(lambda: read_gguf(path, torch.float32)[0].eval(), 8))
    expected = logits(fhopt.apply(whole, plan))
    model, _ = fhopt.load_gguf(path, dtype)
    fhopt.prepare(fhopt.apply(model, plan))
    found = logits(model).float()
    assert float((found - expected.float()).norm() / expected.float().norm()) < TOLERANCES[dtype]
    state = decode_programs(model)
    assert state is not None and [program.native_calls for program in state.programs] == [1]


def test_files_without_quantized_weights_are_supported(saved: Callable[..., Path]) -> None:
    path = saved(None)
    expected, _ = read_gguf(path, torch.float32)
    assert close(logits(fhopt.load_gguf(path, torch.float32)[0]), logits(expected.eval()))


def test_a_transposed_matrix_is_dequantized(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers transposes those of GPT-2; a matrix whose values it changes is dequantized, too."""
    import transformers.modeling_gguf_pytorch_utils as of

    class Changes(of.LlamaTensorProcessor):  # type: ignore[misc]
        def process(self, weights: Any, name: str, **options: Any) -> Any:
            made = super().process(weights, name, **options)
            if ".attn_output" in name:
                made = made._replace(weights=made.weights.T)
            return made._replace(weights=made.weights * 2) if ".ffn_up" in name else made

    monkeypatch.setitem(of.TENSOR_PROCESSORS, "llama", Changes)
    path = saved(ALL)
    expected, _ = read_gguf(path, torch.float32)
    model, _ = fhopt.load_gguf(path, torch.float32)
    layer = model.model.layers[1]
    assert not isinstance(layer.self_attn.o_proj.weight, BlockWeight)
    assert not isinstance(layer.mlp.up_proj.weight, BlockWeight)
    assert isinstance(layer.mlp.down_proj.weight, BlockWeight)
    assert close(logits(model), logits(expected.eval()))


def test_errors_name_the_problem(tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FhoptError, match="is not a file; expected a GGUF file"):
        fhopt.load_gguf(tmp_path / "absent.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FhoptError, match="could not be read as a GGUF model"):
        fhopt.load_gguf(broken)
    path = saved(ALL)
    monkeypatch.setattr(gguf_loader, "_READER", "transformers.there_is_no_such_module")
    with pytest.raises(FhoptError, match=r"has no mapping of .* to the weights"):
        fhopt.load_gguf(path)


def test_without_a_compiler_a_file_is_refused(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "prepare_blocks", lambda: False)
    with pytest.raises(FhoptError, match="Install g"):
        fhopt.load_gguf(saved(ALL))


def test_a_file_without_a_weight_is_refused(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, names = saved(ALL), gguf_loader._names_and_process

    def fewer(*args: Any) -> Any:
        known, process = names(*args)
        return {k: v for k, v in known.items() if "blk.1.ffn_up" not in k}, process

    monkeypatch.setattr(gguf_loader, "_names_and_process", fewer)
    with pytest.raises(FhoptError, match=r"has no model.layers.1.mlp.up_proj.weight"):
        fhopt.load_gguf(path)
