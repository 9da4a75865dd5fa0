"""Complete small models in common handwritten styles, two layers unless stated otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo import Entry, ZooCase
from model_zoo.functional import settled
from model_zoo.handwritten.decoders import AbsorbedLatentAttention, GPTFast, Llama, NanoGPT, ParallelBlock, SharedCache
from model_zoo.handwritten.diffusion import ChannelFirstAttention, ConditionedBlock, ModulatedBlock, PixelAttention
from model_zoo.handwritten.images import (
    ImageTransformer,
    NullKeyAttention,
    RearrangedAttention,
    RowsThenColumns,
    ShiftedWindows,
)
from model_zoo.handwritten.parts import LAYERS, B, C, D, G, H, PreNorm, T, Threaded, states, words
from model_zoo.handwritten.sets_and_texts import (
    Conformer,
    EncoderDecoder,
    OneLayerManyTimes,
    PerceiverLatents,
    RelativeBias,
    SetTransformer,
    scale_into_weights,
)
from model_zoo.handwritten.variants import (
    AdditiveAttention,
    Agents,
    BucketsAndBefore,
    ChunkedQueries,
    GraphAttention,
    Nystrom,
    OnlineSoftmax,
    SlotAttention,
    UnfoldedNeighbours,
)


def _model(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], tuple[Any, ...]],
    sites: int,
    finish: Callable[[Any], None] | None = None,
    **traits: Any,
) -> Entry:
    """Make an entry of `make()`: settle the module, then apply `finish`."""

    def build() -> ZooCase:
        torch.manual_seed(1)
        model = settled(make())
        if finish:
            finish(model)
        return ZooCase(model, inputs())

    shapes = dict(heads=H, kv_heads=H, head_dim=D) if sites else {}
    return Entry(name, "hand-written", build, sites, **(shapes | traits))


def _both(
    name: str, make: Callable[[bool], nn.Module], inputs: Callable[[], tuple[Any, ...]], sites: int
) -> list[Entry]:
    """Make two entries, one with a softmax and one with SDPA."""
    return [
        _model(name, partial(make, fused), inputs, sites, implementation=implementation)
        for implementation, fused in (("eager", False), ("sdpa", True))
    ]


def _read() -> tuple[Any, ...]:
    return (words(),)


def _edges() -> Tensor:
    near = (torch.arange(T)[:, None] - torch.arange(T)).abs() < 3
    return near.float().expand(B, T, T)


_GROUPED: dict[str, Any] = dict(kv_heads=G)
_ONE_HEAD: dict[str, Any] = dict(heads=1, kv_heads=1, head_dim=C)
ENTRIES: list[Entry] = [
    *_both("nanogpt", NanoGPT, _read, LAYERS),
    _model("gpt_fast", GPTFast, lambda: (words(), torch.arange(T)), LAYERS, step="prefill", **_GROUPED),
    _model("gpt_fast", GPTFast, lambda: (words(1), torch.tensor([T])), LAYERS, step="decode static", **_GROUPED),
    _model("llama_original", Llama, lambda: (words(), 0), LAYERS, step="prefill", **_GROUPED),
    _model("llama_original", Llama, lambda: (words(1), T), LAYERS, step="decode static", **_GROUPED),
    _model("palm_block", lambda: Threaded(ParallelBlock), lambda: (states(),), LAYERS, kv_heads=1),
    _model("shared_cache", SharedCache, lambda: (states(),), LAYERS, **_GROUPED),
    _model("absorbed_latents", AbsorbedLatentAttention, lambda: (states(1, C), T), 1, step="decode static", kv_heads=1,
           head_dim=0),
    _model("einops", lambda: Threaded(lambda: PreNorm(RearrangedAttention())), lambda: (states(),), LAYERS),
    _model("null_key", lambda: Threaded(lambda: PreNorm(NullKeyAttention())), lambda: (states(),), LAYERS),
    *_both("image_transformer", ImageTransformer, lambda: (states(3, 12, 12),), LAYERS),
    _model("windows", lambda: nn.Sequential(ShiftedWindows(0), ShiftedWindows(1)), lambda: (states(4, 4, C),), 2),
    _model("axial", RowsThenColumns, lambda: (states(3, 4, C),), 2),
    _model("latent_diffusion", PixelAttention, lambda: (states(C, 3, 4),), 1, **_ONE_HEAD),
    _model("guided_diffusion", ChannelFirstAttention, lambda: (states(C, 3, 4),), 1),
    *_both("stable_diffusion", ConditionedBlock, lambda: (states(), states(7, 24)), 2),
    _model("dit", lambda: Threaded(ModulatedBlock), lambda: (states(), states(C)), LAYERS),
    _model("perceiver", PerceiverLatents, lambda: (states(),), 3),
    _model("set_transformer", SetTransformer, lambda: (states(),), 3),
    _model("t5_encoder", RelativeBias, _read, LAYERS, finish=scale_into_weights),
    _model("conformer", Conformer, lambda: (states(),), 1),
    _model("albert", OneLayerManyTimes, _read, LAYERS),
    _model("encoder_decoder", EncoderDecoder, lambda: (words(), words(9)), 3),
    _model("agents", Agents, lambda: (states(),), 2),
    _model("unfolded_neighbours", UnfoldedNeighbours, lambda: (states(),), 1),
    _model("buckets_and_before", BucketsAndBefore, lambda: (states(),), 1),
    _model("chunked_queries", ChunkedQueries, lambda: (states(),), T // 4),
    _model("nystrom", Nystrom, lambda: (states(),), 3),
    _model("online_softmax", OnlineSoftmax, lambda: (states(),), 0, explained=1),
    _model("slots", SlotAttention, lambda: (states(),), 0, explained=2),
    _model("additive", AdditiveAttention, lambda: (states(C), states()), 0),
    _model("graph_attention", GraphAttention, lambda: (states(), _edges()), 0),
]  # fmt: skip
