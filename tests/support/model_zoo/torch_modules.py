"""The zoo's torch modules: attention inside one torch call, and flex attention.

    nn.MultiheadAttention       one node, F.multi_head_attention_forward
    nn.TransformerEncoder       the same; frozen: torch._transformer_encoder_layer_fwd, a whole layer in one node
    checkpoint(block, x)        a higher-order node, the attention inside its body
    flex_attention(q, k, v)     a higher-order node, the bias, softcap or mask inside its bodies

"Frozen" means that no parameter requires a gradient; torch takes its fast paths only then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from . import Entry, ZooCase
from .huggingface import enliven

BATCH, TOKENS, MEMORY = 2, 7, 5
HEADS, HEAD_DIM = 4, 8
WIDTH = HEADS * HEAD_DIM
LAYERS = 2


def _entry(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], ZooCase],
    sites: int,
    frozen: bool = False,
    kv: int = 0,
) -> Entry:
    return Entry(
        name, "torch", partial(_build, make, inputs, frozen), sites, heads=HEADS, kv_heads=kv or HEADS,
        head_dim=HEAD_DIM,
    )  # fmt: skip


def _build(make: Callable[[], nn.Module], inputs: Callable[[], ZooCase], frozen: bool) -> ZooCase:
    torch.manual_seed(0)
    module = make().eval().requires_grad_(not frozen)
    with torch.no_grad():
        enliven(module)
    call = inputs()
    return ZooCase(module, call.args, call.kwargs)


def _call(*args: Any, **kwargs: Any) -> ZooCase:
    """The arguments only; the module is added later."""
    return ZooCase(nn.Identity(), args, kwargs)


# --------------------------------------------------------------------------------------------------- masks


def causal() -> Tensor:
    """Return a causal mask [S, S], True where attention is forbidden, as in nn.MultiheadAttention."""
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)


def padding(tokens: int = TOKENS) -> Tensor:
    """Return a mask [B, T], True for padding: the second sequence lacks its last two tokens."""
    mask = torch.zeros(BATCH, tokens, dtype=torch.bool)
    mask[1, tokens - 2 :] = True
    return mask


def biases() -> Tensor:
    """A different bias for every sequence, head, query and key. [B*H, S, S]."""
    return torch.randn(BATCH * HEADS, TOKENS, TOKENS)


# --------------------------------------------------------------------------------------------------- MultiheadAttention


def _alone(batch_first: bool, **kwargs: Callable[[], Tensor]) -> ZooCase:
    """Self attention; each case makes new masks."""
    x = torch.randn(BATCH, TOKENS, WIDTH) if batch_first else torch.randn(TOKENS, BATCH, WIDTH)
    return _call(x, x, x, **{name: value() for name, value in kwargs.items()})


def _unbatched() -> ZooCase:
    x = torch.randn(TOKENS, WIDTH)
    return _call(x, x, x)


def _cross(key_width: int = WIDTH, value_width: int = WIDTH) -> ZooCase:
    query, key = torch.randn(TOKENS, BATCH, WIDTH), torch.randn(MEMORY, BATCH, key_width)
    return _call(query, key, key if value_width == key_width else torch.randn(MEMORY, BATCH, value_width))


def _asking(inputs: Callable[[], ZooCase], **asked: bool) -> ZooCase:
    case = inputs()
    return _call(*case.args, **case.kwargs, **asked)


MULTIHEAD: list[tuple[str, dict[str, Any], Callable[[], ZooCase]]] = [
    ("self", {}, partial(_alone, False)),
    ("batch_first", dict(batch_first=True), partial(_alone, True)),
    ("no_bias", dict(bias=False), partial(_alone, False)),
    ("unbatched", {}, _unbatched),
    ("cross", {}, _cross),
    ("cross_other_widths", dict(kdim=24, vdim=20), partial(_cross, 24, 20)),
    ("bool_mask", {}, partial(_alone, False, attn_mask=causal)),
    ("float_mask", dict(batch_first=True), partial(_alone, True, attn_mask=biases)),
    ("padding_mask", dict(batch_first=True), partial(_alone, True, key_padding_mask=padding)),
    ("both_masks", {}, partial(_alone, False, attn_mask=causal, key_padding_mask=padding)),
    ("bias_kv", dict(add_bias_kv=True), partial(_alone, False)),
    ("zero_attn", dict(add_zero_attn=True), partial(_alone, False)),
    ("bias_kv_zero_attn_masked", dict(add_bias_kv=True, add_zero_attn=True), partial(_alone, False, attn_mask=causal)),
]


def _multihead(options: Mapping[str, Any]) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, **options)


def _multihead_entries() -> list[Entry]:
    """Make each case with weights, which forces matmuls and a softmax, and without, which allows SDPA."""
    entries = []
    for name, options, inputs in MULTIHEAD:
        for suffix, asked in (("weights", True), ("output", False)):
            asking = partial(_asking, inputs, need_weights=asked)
            entries.append(_entry(f"multihead_{name}_{suffix}", partial(_multihead, options), asking, 1))
    first: dict[str, Any] = dict(batch_first=True)
    every_head = partial(_asking, partial(_alone, False), average_attn_weights=False)
    hinted = partial(_asking, partial(_alone, False, attn_mask=causal), need_weights=False, is_causal=True)
    alone = partial(_asking, partial(_alone, True), need_weights=False)
    padded = partial(_asking, partial(_alone, True, key_padding_mask=padding), need_weights=False)
    return [
        *entries,
        _entry("multihead_weights_of_every_head", partial(_multihead, {}), every_head, 1),
        _entry("multihead_causal_hint", partial(_multihead, {}), hinted, 1),
        _entry("multihead_frozen", partial(_multihead, first), alone, 1, frozen=True),
        _entry("multihead_frozen_padded", partial(_multihead, first), padded, 1, frozen=True),
    ]


# --------------------------------------------------------------------------------------------------- Transformer


def _layer_options(**changes: Any) -> dict[str, Any]:
    return dict(d_model=WIDTH, nhead=HEADS, dim_feedforward=48, batch_first=True) | changes


def _encoder(**changes: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**_layer_options(**changes))
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)  # nested tensors break the graph


def _decoder(**changes: Any) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(**_layer_options(**changes)), LAYERS)


def _whole() -> nn.Module:
    return nn.Transformer(**_layer_options(), num_encoder_layers=LAYERS, num_decoder_layers=LAYERS)


def _source(**kwargs: Callable[[], Any]) -> ZooCase:
    return _call(torch.randn(BATCH, TOKENS, WIDTH), **{name: value() for name, value in kwargs.items()})


def _target_and_memory() -> ZooCase:
    target, memory = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, MEMORY, WIDTH)
    return _call(target, memory, tgt_mask=causal(), tgt_is_causal=True, memory_key_padding_mask=padding(MEMORY))


def _source_and_target() -> ZooCase:
    source, target = torch.randn(BATCH, MEMORY, WIDTH), torch.randn(BATCH, TOKENS, WIDTH)
    return _call(source, target, tgt_mask=causal(), tgt_is_causal=True)  # without the hint, a graph break


def _transformer_entries() -> list[Entry]:
    padded = partial(_source, src_key_padding_mask=padding)
    masked = partial(_source, mask=causal, is_causal=lambda: True)
    sequence_first = partial(_encoder, batch_first=False)
    entries = [
        _entry(f"encoder_{name}_{mode}", make, inputs, LAYERS, frozen=mode == "fast_path")
        for mode in ("with_gradient", "fast_path")
        for name, make, inputs in (
            ("plain", _encoder, _source),
            ("norm_first", partial(_encoder, norm_first=True), _source),
            ("gelu", partial(_encoder, activation="gelu"), _source),
            ("padded", _encoder, padded),
            ("causal", _encoder, masked),
        )
    ]
    return [
        *entries,
        _entry("encoder_sequence_first", sequence_first, _source, LAYERS),
        _entry("decoder", _decoder, _target_and_memory, 2 * LAYERS),
        _entry("decoder_norm_first", partial(_decoder, norm_first=True), _target_and_memory, 2 * LAYERS),
        _entry("transformer", _whole, _source_and_target, 3 * LAYERS),
    ]


# --------------------------------------------------------------------------------------------------- checkpoint, flex


class Projections(nn.Module):
    """Query, key, value and output projections, and the heads between them."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * HEAD_DIM), nn.Linear(WIDTH, kv_heads * HEAD_DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, S, H*D] to q [B, H, S, D], k and v [B, G, S, D]."""
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v

    def join(self, o: Tensor) -> Tensor:
        """Join the heads of o [B, H, S, D] to [B, S, H*D]."""
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y


class ResidualBlock(Projections):
    """Attention in a common handwritten style, with a residual."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)  # [B, H, S, S]
        return x + self.join(scores.softmax(-1) @ v)


class CheckpointedBlocks(nn.Module):
    """Blocks whose activations are recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = checkpoint(block, x, use_reentrant=False)
            assert isinstance(y, Tensor)
            x = y
        return x


class Flex(Projections):
    """flex_attention called directly. modifiers: makes score_mod and block_mask outside the graph."""

    def __init__(self, modifiers: Callable[[], Mapping[str, Any]] = dict, kv_heads: int = HEADS) -> None:
        super().__init__(kv_heads)
        self.options = {"enable_gqa": kv_heads != HEADS, **modifiers()}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        o = flex_attention(q, k, v, **self.options)
        assert isinstance(o, Tensor)
        return self.join(o)


def alibi() -> dict[str, Any]:
    """Return flex_attention options: a bias that grows with the distance, by a different factor per head."""
    slopes = 2.0 ** -torch.arange(HEADS)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query - key).abs()

    return {"score_mod": score_mod}


def softcap() -> dict[str, Any]:
    """Return flex_attention options: scores limited to between -2 and 2."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return 2.0 * torch.tanh(score / 2.0)

    return {"score_mod": score_mod}


def causal_blocks() -> dict[str, Any]:
    """Return flex_attention options: a causal block mask."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return {"block_mask": create_block_mask(mask_mod, None, None, TOKENS, TOKENS, device="cpu")}


def capped_window() -> dict[str, Any]:
    """Return flex_attention options: a softcap and a sliding window of three tokens."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < 3)

    return softcap() | {"block_mask": create_block_mask(mask_mod, None, None, TOKENS, TOKENS, device="cpu")}


def _flex_entries() -> list[Entry]:
    """Make frozen entries only: flex attention has no backward pass on CPU."""
    return [
        _entry("flex_plain", Flex, _source, 1, frozen=True),
        _entry("flex_alibi", partial(Flex, alibi), _source, 1, frozen=True),
        _entry("flex_softcap", partial(Flex, softcap), _source, 1, frozen=True),
        _entry("flex_causal", partial(Flex, causal_blocks), _source, 1, frozen=True),
        _entry("flex_capped_window", partial(Flex, capped_window), _source, 1, frozen=True),
        _entry("flex_grouped", partial(Flex, kv_heads=2), _source, 1, frozen=True, kv=2),
        _entry("flex_grouped_causal", partial(Flex, causal_blocks, 2), _source, 1, frozen=True, kv=2),
    ]


ENTRIES: list[Entry] = [
    *_multihead_entries(),
    *_transformer_entries(),
    _entry("checkpointed", CheckpointedBlocks, _source, LAYERS),
    *_flex_entries(),
]
