"""The zoo's transformers models: two layers, random weights, every implementation, and decode steps with caches.

    decoders           prefill (no cache) | decode (with a DynamicCache) | decode static (with a StaticCache)
    encoder-decoders   prefill            | decode: self attention appends, cross attention reads a bare cache
    encoders           forward

Sizes that could be confused differ (S=9, H=4, G=2, D=16, 5 cached tokens, 12 slots in a static cache): a graph that
takes one dimension for another cannot give the right shape by luck.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import Entry, ZooCase, has_transformers

VOCABULARY = 97
BATCH, TOKENS, CACHED, STATIC_PLACES = 2, 9, 5, 12
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
HIDDEN = HEADS * HEAD_DIM
BOTH = ("eager", "sdpa")
EAGER = ("eager",)
FLEX = "flex"  # several graphs, about 10 s: transformers compiles the block mask inside the forward pass
CONVOLUTIONAL = "ResNetConfig"  # a part without attention, which refuses an attention implementation
DECODER_STEPS = ("prefill", "decode", "decode static")


@dataclass(frozen=True)
class ZooModel:
    """One row of the table: a transformers model, and how to run it.

    config, cls: names of the classes in transformers. options: fields of the configuration. inputs: makes the
    arguments of a full forward pass. sites: attentions of the full forward pass. decode_sites: of a decode step.
    """

    name: str
    config: str
    cls: str
    options: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    implementations: tuple[str, ...] = BOTH
    steps: tuple[str, ...] = ("forward",)
    sites: int = LAYERS
    decode_sites: int = LAYERS
    heads: int = HEADS
    kv_heads: int = HEADS
    head_dim: int = HEAD_DIM
    query_gain: float = 1.0  # for weights named `.q.weight`, in models that scale by their initialization
    reason: str | None = None  # why the sites are not rewritten; None: they must be found
    composed: tuple[tuple[str, str, Mapping[str, Any]], ...] = ()  # (field, configuration class, options)
    slow: bool = False

    def entries(self) -> list[Entry]:
        """Return one entry for each implementation and step."""
        return [self.entry(i, step) for i in self.implementations for step in self.steps]

    def entry(self, implementation: str, step: str) -> Entry:
        """Return the entry of one implementation and step."""
        is_found = self.reason is None
        count = self.decode_sites if step.startswith("decode") else self.sites
        return Entry(
            name=self.name,
            family="huggingface",
            build=partial(_build, self, implementation, step),
            sites=count if is_found else 0,
            implementation=implementation,
            step=step,
            explained=0 if is_found else count,
            reason=self.reason or "",
            heads=self.heads if is_found else 0,
            kv_heads=self.kv_heads if is_found else 0,
            head_dim=self.head_dim if is_found else 0,
            slow=self.slow or implementation == FLEX,
        )


# --------------------------------------------------------------------------------------------------- building


def _build(model: ZooModel, implementation: str, step: str) -> ZooCase:
    torch.manual_seed(0)
    module = _make(model, implementation)
    inputs: dict[str, Any] = model.inputs()
    if step == "forward":
        return ZooCase(module, (), inputs)
    if step == "prefill":
        return ZooCase(module, (), inputs | {"use_cache": False})
    if "decoder_input_ids" in inputs:
        return _behind_two_caches(module, inputs)
    return _behind_a_cache(module, step)


def _make(model: ZooModel, implementation: str) -> nn.Module:
    parts = {name: _named(cls)(**options) for name, cls, options in model.composed}
    chosen = "flex_attention" if implementation == FLEX else implementation
    attends = ["", *(name for name, cls, _ in model.composed if cls != CONVOLUTIONAL)]  # "": the model itself
    config = _named(model.config)(**parts, **model.options, attn_implementation=dict.fromkeys(attends, chosen))
    module: nn.Module = _named(model.cls)(config).eval()
    with torch.no_grad():
        enliven(module)
        for name, parameter in module.named_parameters():
            if name.endswith(".q.weight"):
                parameter.mul_(model.query_gain)
    return module.requires_grad_(implementation != FLEX)  # flex attention refuses gradients on CPU


def _named(name: str) -> Any:
    """Return a class of transformers by name, from its module if the package does not export it."""
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(f"transformers.{module}".rstrip(".")), cls)


def enliven(module: nn.Module) -> None:
    """Set every weight to a magnitude that affects the output, in place.

    Fresh models have projections so small that attention is uniform, and biases, tables and norms at exactly 0 or 1: a
    graph that omits one of them would compute the same values. Here every layer preserves the size of its input, so
    that scores deviate by about 1, and no other parameter stays at its neutral value.
    """
    drawn: set[nn.Parameter] = set()
    for part in module.modules():
        weight, inputs = getattr(part, "weight", None), _inputs(part)
        if isinstance(weight, nn.Parameter) and inputs:
            weight.normal_(0.0, inputs**-0.5)
            drawn.add(weight)
    for parameter in module.parameters():
        if parameter not in drawn:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def _inputs(part: Any) -> int:
    """Number of terms that each output of a layer sums; 0 if the layer does not sum."""
    if type(part).__name__ == "Conv1D":  # a linear layer of transformers, with its weight transposed
        return int(part.weight.shape[0])
    if isinstance(part, nn.Embedding):
        return 1
    return part.weight[0].numel() if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)) else 0


def _behind_a_cache(module: Any, step: str) -> ZooCase:
    """Prepare a single token after 5 cached ones; `decode second` has run one more step, eagerly."""
    from transformers import DynamicCache, StaticCache

    chosen, static = module.config._attn_implementation, step == "decode static"
    cache = StaticCache(module.config, max_cache_len=STATIC_PLACES) if static else DynamicCache(config=module.config)
    keyword = _cache_keyword(module)
    flex = chosen == "flex_attention"
    if flex:  # flex would compile for the prompt, whose cache is the same in any implementation
        module.set_attn_implementation("eager")
    with torch.no_grad():
        module(input_ids=_ids(CACHED), **{keyword: cache})
        if step == "decode second":
            module(input_ids=_ids(1), **{keyword: cache})
    if flex:
        module.set_attn_implementation(chosen)
    return ZooCase(module, (), {"input_ids": _ids(1), keyword: cache})


def _behind_two_caches(module: Any, inputs: dict[str, Any]) -> ZooCase:
    """Prepare a decoder's next token after 5 cached ones, with the encoder's keys in the cache."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    keyword = _cache_keyword(module)
    with torch.no_grad():
        first = module(**inputs | {"decoder_input_ids": _ids(CACHED), keyword: cache})
    encoded = (first.encoder_last_hidden_state,)
    return ZooCase(module, (), {"encoder_outputs": encoded, "decoder_input_ids": _ids(1), keyword: cache})


def _cache_keyword(module: nn.Module) -> str:
    """Return the keyword for the cache, which transformers is renaming from `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


# --------------------------------------------------------------------------------------------------- inputs


def _ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, tokens))  # 0 to 2 are padding, begin and end


def text() -> dict[str, Tensor]:
    """Token ids only."""
    return {"input_ids": _ids()}


def padded_text() -> dict[str, Tensor]:
    """Token ids; the second sequence is padded at the end."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, TOKENS - 3 :] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def text_to_text() -> dict[str, Tensor]:
    """Token ids for both sides, of different lengths."""
    return {"input_ids": _ids(), "decoder_input_ids": _ids(7)}


def speech_to_text() -> dict[str, Tensor]:
    """8 mel bands at 20 times, reduced to 10 by a convolution of stride 2."""
    return {"input_features": torch.randn(BATCH, 8, 20), "decoder_input_ids": _ids(7)}


def image(size: int = 12) -> dict[str, Tensor]:
    """Pixels: 9 patches of 4 x 4, or as many as `size` gives."""
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def sized_image() -> dict[str, Any]:
    """Two images packed into one sequence."""
    return {**image(), "image_sizes": [(12, 12), (12, 12)]}


def patches() -> dict[str, Tensor]:
    """Two images of 4 x 4 patches, packed into one sequence."""
    return {"hidden_states": torch.randn(2 * 16, 3 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def text_and_image() -> dict[str, Tensor]:
    """Return a caption and an image, for two towers."""
    return text() | image()


def text_with_image() -> dict[str, Tensor]:
    """Return a prompt in which an image's patches fill 9 slots."""
    ids = _ids(12)
    ids[:, 1:10] = VOCABULARY - 1
    return {"input_ids": ids, **image()}


def sound() -> dict[str, Tensor]:
    """Return a waveform."""
    return {"input_values": torch.randn(BATCH, 160)}


# --------------------------------------------------------------------------------------------------- the table

SPECIAL: dict[str, Any] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES: dict[str, Any] = dict(
    hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS
)
TEXT: dict[str, Any] = SPECIAL | SIZES | dict(vocab_size=VOCABULARY, max_position_embeddings=64)
GROUPED: dict[str, Any] = TEXT | dict(num_key_value_heads=KV_HEADS)
WINDOW: dict[str, Any] = GROUPED | dict(head_dim=HEAD_DIM, sliding_window=4)
GPT: dict[str, Any] = SPECIAL | dict(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64)
VISION: dict[str, Any] = SIZES | dict(image_size=12, patch_size=4)
WINDOWED_VISION: dict[str, Any] = dict(
    image_size=32, patch_size=4, window_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4]
)
BART: dict[str, Any] = SPECIAL | dict(
    vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS, encoder_ffn_dim=96, decoder_ffn_dim=96, decoder_start_token_id=1,
)  # fmt: skip


def _decoder(name: str, prefix: str, options: Mapping[str, Any], **traits: Any) -> ZooModel:
    """Return a row for `{prefix}Config` and `{prefix}ForCausalLM` (or as given by traits), with all decoder steps."""
    row: dict[str, Any] = dict(
        name=name, config=f"{prefix}Config", cls=f"{prefix}ForCausalLM", options=options, inputs=text,
        steps=DECODER_STEPS, kv_heads=options.get("num_key_value_heads", HEADS),
    )  # fmt: skip
    return ZooModel(**(row | traits))


def _encoder_decoder(name: str, prefix: str, options: Mapping[str, Any], **traits: Any) -> ZooModel:
    """Return a row for an encoder-decoder: each decoder layer has a self and a cross attention."""
    row: dict[str, Any] = dict(
        name=name, config=f"{prefix}Config", cls=f"{prefix}ForConditionalGeneration", options=options,
        inputs=text_to_text, steps=("prefill", "decode"), sites=3 * LAYERS, decode_sites=2 * LAYERS,
    )  # fmt: skip
    return ZooModel(**(row | traits))


LLAMA = _decoder("llama", "Llama", GROUPED, steps=(*DECODER_STEPS, "decode second"))
GEMMA2 = _decoder(
    "gemma2", "Gemma2", WINDOW | dict(query_pre_attn_scalar=HEAD_DIM, attn_logit_softcapping=2.0), implementations=EAGER
)

DECODERS = [
    LLAMA,
    _decoder("qwen2", "Qwen2", GROUPED),
    _decoder("qwen3", "Qwen3", GROUPED | dict(head_dim=HEAD_DIM)),
    GEMMA2,
    _decoder(
        "gemma3", "Gemma3",
        WINDOW | dict(query_pre_attn_scalar=HEAD_DIM, layer_types=["sliding_attention", "full_attention"]),
        config="Gemma3TextConfig",
    ),
    _decoder("mistral", "Mistral", WINDOW),
    _decoder("mixtral", "Mixtral", GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)),
    _decoder("phi3", "Phi3", GROUPED | dict(rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    _decoder("gpt2", "GPT2", GPT, cls="GPT2LMHeadModel"),
    _decoder("gpt_neox", "GPTNeoX", TEXT),
    _decoder("gptj", "GPTJ", GPT | dict(rotary_dim=8), implementations=BOTH if has_transformers(5, 24) else EAGER),
    _decoder("opt", "OPT", TEXT | dict(ffn_dim=96, word_embed_proj_dim=HIDDEN), steps=("prefill", "decode")),
    _decoder("bloom", "Bloom", SPECIAL | dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
             implementations=EAGER),
    _decoder("falcon", "Falcon", TEXT, kv_heads=1),
    # Two key groups; older versions repeat them for all heads before rotation and caching.
    _decoder("falcon_new", "Falcon", TEXT | dict(new_decoder_architecture=True, num_kv_heads=KV_HEADS),
             kv_heads=KV_HEADS if has_transformers(5, 25) else HEADS),
    _decoder("falcon_alibi", "Falcon", TEXT | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True),
             steps=("prefill", "decode")),
    _decoder("mpt", "Mpt", SPECIAL | dict(
        vocab_size=VOCABULARY, d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, max_seq_len=64),
        implementations=EAGER, steps=("prefill", "decode")),
    _decoder("stablelm", "StableLm", GROUPED | dict(use_qkv_bias=True)),
    _decoder("stablelm_qk_norm", "StableLm", GROUPED | dict(qk_layernorm=True, use_parallel_residual=True)),
    _decoder("cohere", "Cohere", GROUPED),
    _decoder("olmo2", "Olmo2", GROUPED),
    _decoder("gpt_oss", "GptOss", WINDOW | dict(num_local_experts=4, num_experts_per_tok=2), implementations=EAGER),
    _decoder("deepseek_v3", "DeepseekV3", TEXT | dict(
        num_key_value_heads=HEADS, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        moe_intermediate_size=32), reason="latent"),
    _decoder("glm", "Glm", GROUPED | dict(head_dim=HEAD_DIM, pad_token_id=0)),
    _decoder("starcoder2", "Starcoder2", GROUPED),
    _decoder("gpt_bigcode", "GPTBigCode", GPT, kv_heads=1),
    _decoder("granite", "Granite", GROUPED | dict(attention_multiplier=0.2, residual_multiplier=0.5)),
]  # fmt: skip

ENCODER_DECODERS = [
    _encoder_decoder("t5", "T5", SPECIAL | dict(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=HEAD_DIM, d_ff=96, num_layers=LAYERS, num_heads=HEADS,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0),
        query_gain=HEAD_DIM**-0.5),
    _encoder_decoder("bart", "Bart", BART | dict(max_position_embeddings=64)),
    _encoder_decoder("whisper", "Whisper", BART | dict(
        num_mel_bins=8, max_source_positions=10, max_target_positions=64), inputs=speech_to_text),
]  # fmt: skip

ENCODERS = [
    ZooModel("bert", "BertConfig", "BertModel", TEXT, padded_text),
    ZooModel("distilbert", "DistilBertConfig", "DistilBertModel", SPECIAL | dict(
        vocab_size=VOCABULARY, dim=HIDDEN, hidden_dim=96, n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=64),
        padded_text),
    ZooModel("roberta", "RobertaConfig", "RobertaModel", TEXT, padded_text),
    ZooModel("deberta_v2", "DebertaV2Config", "DebertaV2Model", TEXT | dict(
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, max_relative_positions=16),
        padded_text, EAGER),
    ZooModel("vit", "ViTConfig", "ViTModel", VISION, image),
    ZooModel("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTModel", VISION | dict(num_register_tokens=2), image),
    ZooModel("pixtral_vision", "PixtralVisionConfig", "PixtralVisionModel", VISION | dict(image_size=32), sized_image),
    ZooModel("llama4_vision", "Llama4VisionConfig", "Llama4VisionModel", VISION | dict(
        image_size=16, intermediate_size=4 * HIDDEN, vision_output_dim=HIDDEN, projector_input_dim=HIDDEN,
        projector_output_dim=HIDDEN), partial(image, 16)),
    ZooModel("qwen2_vl_vision", "Qwen2VLVisionConfig",
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel", dict(
        depth=LAYERS, embed_dim=HIDDEN, hidden_size=HIDDEN, num_heads=HEADS, patch_size=4, temporal_patch_size=1,
        spatial_merge_size=2), patches, reason="", sites=BATCH),
    ZooModel("clip", "CLIPConfig", "CLIPModel", dict(projection_dim=32), text_and_image, sites=2 * LAYERS, composed=(
        ("text_config", "CLIPTextConfig", TEXT | dict(projection_dim=32)),
        ("vision_config", "CLIPVisionConfig", VISION | dict(projection_dim=32)))),
    ZooModel("siglip_vision", "SiglipVisionConfig", "SiglipVisionModel", VISION, image, sites=LAYERS + 1),
    ZooModel("swin", "SwinConfig", "SwinModel", WINDOWED_VISION, partial(image, 32), sites=4, heads=0, kv_heads=0),
    ZooModel("swinv2", "Swinv2Config", "Swinv2Model", WINDOWED_VISION, partial(image, 32), EAGER, sites=4, heads=0,
          kv_heads=0),
    ZooModel("detr", "DetrConfig", "DetrModel", dict(
        d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=96, decoder_ffn_dim=96, num_queries=7),
        partial(image, 32), sites=3 * LAYERS, composed=(("backbone_config", CONVOLUTIONAL, dict(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"])),)),
    ZooModel("wav2vec2", "Wav2Vec2Config", "Wav2Vec2Model", SIZES | dict(
        conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8], num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4), sound),
    ZooModel("llava", "LlavaConfig", "LlavaForConditionalGeneration", dict(
        image_token_index=VOCABULARY - 1, image_seq_length=9, vision_feature_layer=-1), text_with_image,
        steps=("prefill",), sites=2 * LAYERS, kv_heads=0, slow=True, composed=(
        ("text_config", "LlamaConfig", GROUPED), ("vision_config", "CLIPVisionConfig", VISION))),
]  # fmt: skip

MODELS = [*DECODERS, *ENCODER_DECODERS, *ENCODERS]

ENTRIES: list[Entry] = [
    *(entry for model in MODELS for entry in model.entries()),
    *(model.entry("flex", step) for model in (LLAMA, GEMMA2) for step in ("prefill", "decode")),
]
