"""The layers of a model's KV cache: masks and windows from the configuration, sizes from a cache of two tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from window_models import WINDOW, WINDOWED, windowed

from fhopt.models.cache_layers import _layer_paths, cache_layers, measured_layers
from fhopt.plan.cache_size import CacheLayer, cache_size

TOKENS = (512, 8192, 32768)
FULL = ("", 0, True)
STATE, SHARED = ("", 0, False), ("", 0, False)
KINDS: dict[str, list[tuple[str, int, bool]]] = {
    "gemma3": [("sliding", WINDOW, True)] * 5 + [FULL],
    "gpt_oss": [("sliding", WINDOW, True), FULL],
    "qwen3_next": [STATE, FULL],
    "gemma3n": [*[("sliding", WINDOW, True)] * 2, FULL, ("sliding", WINDOW, True), SHARED, SHARED],
    "llama4": [("chunked", WINDOW, True)] * 3 + [FULL],
    "deepseek": [FULL] * 2,
    "mistral": [("sliding", WINDOW, True)] * 2,
    "llama": [FULL] * 2,
}


@pytest.mark.parametrize("name", WINDOWED)
def test_layers_are_those_of_the_cache_of_the_configuration(name: str) -> None:
    layers = cache_layers(windowed(name))
    assert [(layer.mask, layer.window, layer.is_full) for layer in layers] == KINDS[name]
    assert [layer.name.split(".")[:3] for layer in layers] == [["model", "layers", str(i)] for i in range(len(layers))]


@pytest.mark.parametrize("name", WINDOWED)
def test_bytes_equal_those_that_transformers_own_cache_allocates(name: str) -> None:
    model = windowed(name)
    layers = measured_layers(model)
    cache = ordinary_cache(model)
    for tokens in TOKENS:
        fill(cache, tokens - filled(cache))
        held = sum(t.nbytes for layer in cache.layers for t in tensors(layer))
        counted = cache_size(None, tokens, layers, itemsize=4)
        assert counted.exact_bytes == pytest.approx(held, rel=0.02)
        assert counted.exact_bytes == counted.plan_bytes


@pytest.mark.parametrize(
    "module", [torch.nn.Linear(4, 4), torch.nn.TransformerEncoderLayer(16, 2)], ids=["linear", "encoder"]
)
def test_modules_without_a_cache_of_transformers_have_no_layers(module: torch.nn.Module) -> None:
    assert cache_layers(module) == () == measured_layers(module)


def test_an_encoder_with_windows_has_no_layers_and_a_model_without_weights_is_not_run() -> None:
    from transformers import ModernBertConfig, ModernBertModel

    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = ModernBertConfig(vocab_size=40, pad_token_id=0, cls_token_id=1, sep_token_id=2, **sizes)
    assert cache_layers(ModernBertModel(config)) == ()
    model = windowed("gemma3").to("meta")
    assert len(cache_layers(model)) == 6 and measured_layers(model) == ()


def test_a_layer_has_the_sites_below_its_path() -> None:
    layer = CacheLayer("model.layers.1")
    names = ("model.layers.1.self_attn", "model.layers.1", "model.layers.1#2", "model.layers.11.self_attn", "model")
    assert [layer.has(name) for name in names] == [True, True, True, False, False]
    assert not CacheLayer("").has("model")


def test_all_sites_of_a_layer_count_even_if_one_has_no_index() -> None:
    """Zamba 2: layers share an attention, which has no index."""
    from torch import nn

    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"mamba": nn.Linear(1, 1), "shared": nn.Linear(1, 1)}) for _ in range(2))
    for index, layer in enumerate(model.layers):
        layer["mamba"].layer_idx, layer["shared"].layer_idx = index, -1  # type: ignore[index]
    paths = _layer_paths(model)
    assert {index: paths[index] for index in (0, 1)} == {0: "layers.0", 1: "layers.1"}


# --------------------------------------------------------------------------------------------------- caches


def ordinary_cache(model: Any) -> Any:
    """Return the cache of a model after one token, so that states exist."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache


def filled(cache: Any) -> int:
    return max(int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length"))


def fill(cache: Any, tokens: int) -> None:
    """Write `tokens` random keys and values into all layers that store any, the last token in a separate call."""
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            continue
        for count in (tokens - 1, 1):
            layer.update(*(torch.randn(*x.shape[:2], count, x.shape[3]) for x in (keys, values)))


def tensors(layer: Any) -> list[torch.Tensor]:
    held = list(vars(layer).values())
    held += [x for value in held if isinstance(value, dict) for x in value.values()]
    held += [x for value in held if isinstance(value, (list, tuple)) for x in value]
    return [x for x in held if isinstance(x, torch.Tensor)]
