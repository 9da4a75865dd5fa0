"""The layer index of a site."""

from __future__ import annotations

from dataclasses import replace

import pytest
from encoder_decoders import model_of, plan_of
from hand_plans import SITE

from fhopt.cache.latent_cache import LatentCache
from fhopt.errors import FhoptError
from fhopt.plan.layer_index import layer_indices


def test_the_layer_is_the_number_in_which_the_paths_of_sites_differ() -> None:
    def indices(*names: str) -> list[int]:
        return list(layer_indices([replace(SITE, name=name) for name in names]).values())

    assert indices("model.layers.11.self_attn") == [11]
    assert indices("transformer.h.3.attn", "transformer.h.0.attn") == [3, 0]
    assert indices("decoder.block.0.layer.1.EncDecAttention", "decoder.block.1.layer.1.EncDecAttention") == [0, 1]
    assert indices("towers.1.layers.0.attn", "towers.1.layers.1.attn") == [0, 1]
    with pytest.raises(FhoptError, match="no layer number"):
        indices("attention")


def test_names_distinguish_layers_of_the_decoder_and_the_encoder() -> None:
    plan, config = plan_of("bart", "identity"), model_of("bart").config
    own, cross = LatentCache(plan, config), LatentCache(plan, config, kind="cross")
    assert [layer.site.site.name for layer in own.layers] == [f"model.decoder.layers.{i}.self_attn" for i in range(2)]
    assert [layer.site.site.name for layer in cross.layers] == [
        f"model.decoder.layers.{i}.encoder_attn" for i in range(2)
    ]
