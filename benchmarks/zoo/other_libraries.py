"""Models of other libraries in the wide zoo, if these are installed."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, util
from typing import Any

import torch
from model_zoo.huggingface import enliven
from torch import nn

from benchmarks.zoo.forward_inputs import NoInputs
from benchmarks.zoo.transformers_classes import Candidate

IMAGE = 64
TIMM_WORDS = ("vit", "attn", "former", "swin", "beit", "cait", "xcit", "coat", "levit", "deit", "twins", "eva", "max")
VIT_PYTORCH = dict(
    image_size=IMAGE, patch_size=16, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=96, dim_head=16,
    frames=4, frame_patch_size=2, image_patch_size=16, spatial_depth=2, temporal_depth=2, max_tokens_per_depth=(8, 4),
    seq_len=64, cls_depth=1, token_dim=64, num_tokens=4, emb_dim=64, window_size=4, channels=3, img_size=64,
    frame_size=4, mlp_mult=2,
)  # fmt: skip
VIT_PYTORCH_OWN: dict[str, dict[str, Any]] = {
    "cross_vit": dict(sm_dim=32, lg_dim=64, sm_patch_size=8, lg_patch_size=16),
    "levit": dict(dim=(32, 64), depth=(1, 1), heads=(2, 4), stages=2),
    "max_vit": dict(depth=(1, 1), dim=32, dim_conv_stem=16, window_size=4),
    "max_vit_with_registers": dict(depth=(1, 1), dim=32, dim_conv_stem=16, window_size=4),
    "mobile_vit": dict(
        image_size=(64, 64), patch_size=(2, 2), dims=[32, 48, 64], depths=(1, 1, 1),
        channels=[16, 32, 48, 48, 64, 64, 80, 80, 96, 96, 128]),
    "nest": dict(num_hierarchies=2, block_repeats=(1, 1)),
    "pit": dict(depth=(1, 1), heads=4),
    "scalable_vit": dict(depth=(1, 1), heads=(2, 4), dim=32, reduction_factor=(2, 1), window_size=(4, None)),
    "sep_vit": dict(depth=(1, 1), heads=(2, 4), dim=32, window_size=4),
    "simple_vit_with_fft": dict(freq_patch_size=8),
    "simple_vit_with_hyper_connections": dict(num_residual_streams=2),
    "crossformer": dict(dim=(32, 64, 64, 64), depth=(1, 1, 1, 1), global_window_size=(4, 2, 1, 1), local_window_size=2),
    "twins_svt": dict(
        s1_emb_dim=32, s2_emb_dim=32, s3_emb_dim=32, s4_emb_dim=32, s1_local_patch_size=4, s2_local_patch_size=4,
        s3_local_patch_size=2, s4_local_patch_size=1, s1_global_k=2, s2_global_k=2, s3_global_k=2, s4_global_k=1,
        s3_depth=1),
    "wwt": dict(num_slots=4),
}  # fmt: skip


def library_candidates() -> Iterator[Candidate]:
    """Yield the models of every installed library."""
    for module, find in LIBRARIES.items():
        if util.find_spec(module) is not None:
            yield from find()


def _ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        enliven(model.eval())
    return model.requires_grad_(False)


def _candidate(name: str, family: str, make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> Candidate:
    def build(implementation: str) -> tuple[nn.Module, dict[str, Any]]:
        model, arguments = make()
        model = _ready(model)
        try:
            with torch.no_grad():
                model(**arguments)
        except Exception as error:  # incompatible sizes, or inputs of another type
            raise NoInputs(f"{type(error).__name__}: {error}") from error
        return model, arguments

    return Candidate(name, family, family, ("own",), build)


def _timm() -> Iterator[Candidate]:
    """Yield one model of each timm module that may have attention: the first it lists, with few blocks."""
    timm = import_module("timm")
    modules = sorted({timm.models.model_entrypoint(n).__module__.rpartition(".")[2] for n in timm.list_models()})
    for module in modules:
        names = timm.list_models(module=module)
        if names and any(word in f"{module} {names[0]}" for word in TIMM_WORDS):
            yield _candidate(f"timm {names[0]}", "timm", partial(_timm_model, names[0]))


def _timm_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model = import_module("timm").create_model(name, pretrained=False)
    _, height, width = model.default_cfg["input_size"]
    return model, {next(iter(inspect.signature(model.forward).parameters)): torch.randn(1, 3, height, width)}


def _vit_pytorch() -> Iterator[Candidate]:
    """Yield a model of each module of vit-pytorch: its last class."""
    for module in pkgutil.iter_modules(import_module("vit_pytorch").__path__):
        yield _candidate(f"vit_pytorch {module.name}", "vit-pytorch", partial(_vit_pytorch_model, module.name))


def _vit_pytorch_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    module = import_module(f"vit_pytorch.{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    cls = next(c for c in reversed(classes) if c.__module__ == module.__name__)
    parameters = inspect.signature(cls.__init__).parameters
    sizes: dict[str, Any] = VIT_PYTORCH | VIT_PYTORCH_OWN.get(name, {})
    model = cls(**{name: value for name, value in sizes.items() if name in parameters})
    shape = [1, 3, 64] if "seq_len" in parameters else [1, 3, IMAGE, IMAGE]
    if "frames" in parameters:
        shape = [1, 3, sizes["frames"], IMAGE, IMAGE]
    return model, {next(iter(inspect.signature(model.forward).parameters)): torch.randn(shape)}


X_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flash": dict(attn_flash=True),
    "rotary": dict(rotary_pos_emb=True),
    "alibi": dict(alibi_pos_bias=True),
    "relative": dict(rel_pos_bias=True),
    "one kv head": dict(attn_one_kv_head=True),
    "grouped": dict(attn_kv_heads=2),
    "qk norm": dict(attn_qk_norm=True),
    "talking heads": dict(attn_pre_talking_heads=True),
    "sparse": dict(attn_sparse_topk=4),
    "memory": dict(attn_num_mem_kv=4),
    "gated": dict(attn_gate_values=True),
    "softclamp": dict(attn_softclamp_logits=True),
}


def _x_transformers() -> Iterator[Candidate]:
    """Yield decoders of x-transformers, one per option."""
    for name, options in X_TRANSFORMERS.items():
        yield _candidate(f"x_transformers {name}", "x-transformers", partial(_x_transformers_model, options))


def _x_transformers_model(options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    x = import_module("x_transformers")
    layers = x.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
    model = x.TransformerWrapper(num_tokens=97, max_seq_len=64, attn_layers=layers)
    return model, {"x": torch.randint(0, 97, (2, 9))}


def _open_clip() -> Iterator[Candidate]:
    yield _candidate("open_clip CLIP", "open_clip", _open_clip_model)


def _open_clip_model() -> tuple[nn.Module, dict[str, Any]]:
    vision = dict(image_size=IMAGE, layers=2, width=64, head_width=16, patch_size=16)
    text = dict(context_length=16, vocab_size=97, width=64, heads=4, layers=2)
    model = import_module("open_clip").CLIP(64, vision_cfg=vision, text_cfg=text)
    return model, {"image": torch.randn(2, 3, IMAGE, IMAGE), "text": torch.randint(1, 97, (2, 16))}


DIFFUSERS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": dict(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    "Transformer2DModel": dict(num_attention_heads=4, attention_head_dim=16, in_channels=32, cross_attention_dim=32),
    "DiTTransformer2DModel": dict(num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8),
    "AutoencoderKL": dict(block_out_channels=(32,), norm_num_groups=8),
    "SD3Transformer2DModel": dict(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64),
    "FluxTransformer2DModel": dict(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
}  # fmt: skip
LATENTS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": dict(sample=(1, 4, 16, 16), timestep=10, encoder_hidden_states=(1, 7, 32)),
    "Transformer2DModel": dict(hidden_states=(1, 32, 8, 8), encoder_hidden_states=(1, 7, 32)),
    "DiTTransformer2DModel": dict(hidden_states=(1, 4, 8, 8), timestep=10, class_labels=0),
    "AutoencoderKL": dict(sample=(1, 3, 32, 32)),
    "SD3Transformer2DModel": dict(
        hidden_states=(1, 4, 8, 8), encoder_hidden_states=(1, 7, 32), pooled_projections=(1, 64), timestep=10
    ),
    "FluxTransformer2DModel": dict(
        hidden_states=(1, 16, 4),
        encoder_hidden_states=(1, 7, 32),
        pooled_projections=(1, 32),
        timestep=1,
        img_ids=(16, 3),
        txt_ids=(7, 3),
    ),
}


def _diffusers() -> Iterator[Candidate]:
    for name in DIFFUSERS:
        yield _candidate(f"diffusers {name}", "diffusers", partial(_diffusers_model, name))


def _diffusers_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model = getattr(import_module("diffusers"), name)(**DIFFUSERS[name])
    arguments = {k: torch.randn(v) if isinstance(v, tuple) else torch.tensor([v]) for k, v in LATENTS[name].items()}
    return model, arguments | {"return_dict": False}


LIBRARIES: dict[str, Callable[[], Iterator[Candidate]]] = {
    "timm": _timm,
    "diffusers": _diffusers,
    "x_transformers": _x_transformers,
    "vit_pytorch": _vit_pytorch,
    "open_clip": _open_clip,
}
