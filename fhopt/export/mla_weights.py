"""Conversion of a model and its plan to the weights of multi-head latent attention, as in DeepSeek-V2.

Letters: H query heads, G kv heads, D and E sizes of keys and values, F rotary frequencies, C width of the latent c, X
hidden size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.export import mla
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.transformers_import import transformers
from fhopt.plan.fingerprint import check_model
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.layer_index import layer_indices
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SitePlan

EPSILON = 1e-6  # of all norms (fhopt/export/mla_checkpoint.py)
SHRINK, WEIGHT = 2.0**-40, 2.0**30  # of the rows that make c, and of its norm: powers of two change no digit
GAIN = math.sqrt(EPSILON) / (SHRINK * WEIGHT)  # of the decoder of c, which compensates both
ALIGNED = 8  # the latent's width is a multiple of it: the class reads the pairs behind it as complex numbers
FREQUENCY_ERROR = 1e-3  # largest relative difference of a measured angle from the table


@dataclass(frozen=True)
class Sizes:
    """Sizes in the configuration. latent: of c; rotated and still: of a key's two parts; value: of a value.

    stride: the model's frequencies are every `stride`-th of the class's table.
    """

    latent: int
    rotated: int
    still: int
    value: int
    stride: int

    @property
    def scale(self) -> float:
        """Factor of the logits in the class."""
        return float((self.still + self.rotated) ** -0.5)


@dataclass(frozen=True)
class Converted:
    """A DeepSeek-V2 configuration, and its weights by name, float32."""

    config: Any
    sizes: Sizes
    tensors: dict[str, Tensor]

    @property
    def token_bytes(self) -> int:
        """Bytes of a cached token in 16 bits, over all layers."""
        return 2 * int(self.config.num_hidden_layers) * (self.sizes.latent + self.sizes.rotated)


# --------------------------------------------------------------------------------------------------- conversion


def convert(loaded: LoadedModel, plan: LatentPlan, widths: Sequence[tuple[int, int]] = ()) -> Converted:
    """Convert a model and its plan to DeepSeek-V2's class. Raises FhoptError for what the class cannot express.

    widths: supported (latent, rotated) in rising order, of which the first that is large enough is taken; the sizes are
    not padded where none is.
    """
    model: Any = loaded.module
    _check_class(model)
    weights = _Weights(loaded.weights())
    plan.check_no_means("an exported checkpoint")
    check_model(plan, weights.named, loaded.name)
    sites = sites_by_layer(plan, int(model.config.num_hidden_layers))
    factors = [mla.factor(site) for site in sites]
    theta = _theta(model, [site.site for site in sites])
    sizes = _sizes(sites, factors, widths)
    scale = math.sqrt(EPSILON / float(model.config.rms_norm_eps))
    tensors = weights.outer(scale)
    for layer, (site, factor) in enumerate(zip(sites, factors, strict=True)):
        tensors |= weights.block(layer, scale)
        attention = _attention(site.site, factor, sizes, *weights.projections(layer, site.site, scale))
        tensors |= {f"model.layers.{layer}.self_attn.{name}.weight": x for name, x in attention.items()}
    weights.check_all_used()
    config = _config(model.config, sizes, theta)
    return Converted(config, sizes, {name: tensor.float() for name, tensor in tensors.items()})


def _check_class(model: Any) -> None:
    config = getattr(model, "config", None)
    required = ("rms_norm_eps", "hidden_act", "rope_parameters", "max_position_embeddings")
    is_known = all(hasattr(config, name) for name in required) and config.hidden_act in ("silu", "swish")  # type: ignore[union-attr]
    if not is_known or not hasattr(inspect.getmodule(type(model)), "ALL_ATTENTION_FUNCTIONS"):
        raise FhoptError(
            f"{type(model).__name__} is not built like Llama (RMSNorm, gated SiLU, attention by transformers' "
            "interface); engines have latent attention for such blocks only. Serve the original."
        )


def sites_by_layer(plan: LatentPlan, layers: int) -> list[SitePlan]:
    """Order a plan's sites by layer. Raises FhoptError where a layer has none."""
    by_index = {index: name for name, index in layer_indices([s.site for s in plan.sites]).items()}
    if sorted(by_index) != list(range(layers)):
        raise FhoptError(
            f"the plan has sites for {len(by_index)} of {layers} layers; expected one for each. Fit it again."
        )
    return [plan.site(by_index[i]) for i in range(layers)]


def _theta(model: Any, sites: Sequence[AttentionSite]) -> float:
    """Return the base of the model's rotary table. Raises FhoptError for tables that engines do not have."""
    parameters = model.config.rope_parameters
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    ropes = [site.rope for site in sites if site.rope is not None]
    if not ropes:
        return 10_000.0
    rope = ropes[0]
    if theta is None or any(other.pairs != rope.pairs for other in ropes):
        raise FhoptError(
            "its layers have different rotary embeddings; expected the same angles in all, as DeepSeek's attention has "
            "one table. Serve the original."
        )
    plain = [float(theta) ** (-2 * i / rope.rotary_dim) for i in range(len(rope.angles))]
    pairs = [pair for other in ropes for pair in zip(other.angles, plain, strict=True)]
    if any(abs(angle - expected) > FREQUENCY_ERROR * expected for angle, expected in pairs):
        raise FhoptError(
            f"its rotary table is not the plain one (rope_type {parameters.get('rope_type')!r}); engines use the plain "
            "table or their own YaRN for DeepSeek's attention. Expected rope_type 'default'. Serve the original."
        )
    return float(theta)


def _sizes(sites: Sequence[SitePlan], factors: Sequence[mla.Factors], widths: Sequence[tuple[int, int]]) -> Sizes:
    """Compute the sizes of the one configuration of all layers: the largest of each."""
    latent = -(-max(f.width for f in factors) // ALIGNED) * ALIGNED
    least = 2 * max(len(f.shared) for f in factors) or 2  # the class has a rotated part even where nothing rotates
    fitting = ((c, r) for c, r in widths if latent <= c and r % least == 0)
    latent, rotated = next(fitting, (latent, least))
    value = max(site.site.value_dim for site in sites)
    still = max(value, *(len(f.still) for f in factors))  # engines pad values to the width of keys
    return Sizes(latent, rotated, still, value, rotated // least)


def _config(old: Any, sizes: Sizes, theta: float) -> Any:
    config = transformers().DeepseekV2Config(
        vocab_size=old.vocab_size, hidden_size=old.hidden_size, intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers, num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_attention_heads, first_k_dense_replace=old.num_hidden_layers,
        max_position_embeddings=old.max_position_embeddings, rms_norm_eps=EPSILON, hidden_act="silu",
        q_lora_rank=None, kv_lora_rank=sizes.latent, qk_rope_head_dim=sizes.rotated, qk_nope_head_dim=sizes.still,
        v_head_dim=sizes.value, rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False, bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )  # fmt: skip
    config.architectures = ["DeepseekV2ForCausalLM"]
    return config


def _attention(
    site: AttentionSite, factors: mla.Factors, sizes: Sizes, query: Tensor, key: Tensor, value: Tensor, output: Tensor
) -> dict[str, Tensor]:
    """Compute the class's five weights, float64, from query [H,D,X], key [G,D,X], value [G,E,X] and output [X,H*E].

    Rows of queries are [channels without rotation | rotated channels] for each head.
    """
    heads, still = torch.arange(site.heads) * site.kv_heads // site.heads, list(factors.still)
    pad = torch.nn.functional.pad
    unrotated = pad(query[:, still], (0, 0, 0, sizes.still - len(still)))  # [H, still, X]
    rotated, shared = _rotated_rows(site, factors, sizes, query, key, heads)
    queries = torch.cat([unrotated, rotated], 1) * (site.scale / sizes.scale)
    latent = torch.einsum("cgn,gnx->cx", factors.encode_key, key[:, still])
    latent = latent + torch.einsum("cge,gex->cx", factors.encode_value, value)
    room = sizes.latent - factors.width
    decoders = [pad(d, (0, room, 0, size - d.shape[1])) for d, size in
                ((factors.decode_key, sizes.still), (factors.decode_value, sizes.value))]  # fmt: skip
    return {
        "q_proj": queries.flatten(0, 1),
        "kv_a_proj_with_mqa": torch.cat([pad(latent * SHRINK, (0, 0, 0, room)), shared]),
        "kv_a_layernorm": torch.full((sizes.latent,), WEIGHT, dtype=torch.float64),
        "kv_b_proj": torch.cat(decoders, 1)[heads].flatten(0, 1) * GAIN,
        "o_proj": output,
    }


def _rotated_rows(
    site: AttentionSite, factors: mla.Factors, sizes: Sizes, query: Tensor, key: Tensor, heads: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the rows [H, rotated, X] of queries and [rotated, X] of the shared key, with pairs in adjacent rows."""
    pairs = () if site.rope is None else site.rope.pairs
    real, imaginary = [a for a, _ in pairs], [b for _, b in pairs]
    queries = torch.complex(query[:, real], query[:, imaginary])  # [H, F, X]
    keys = torch.complex(key[:, real], key[:, imaginary])  # [G, F, X]
    queries = queries * factors.query.conj().T[heads].unsqueeze(-1)
    shared = torch.einsum("fg,gfx->fx", factors.shared.conj(), keys)

    def placed(x: Tensor) -> Tensor:
        table = x.real.new_zeros(*x.shape[:-2], sizes.rotated // 2, 2, x.shape[-1])
        table[..., : x.shape[-2] * sizes.stride : sizes.stride, :, :] = torch.view_as_real(x).transpose(-1, -2)
        return table.flatten(-3, -2)

    return placed(queries), placed(shared)


class _Weights:
    """The weights of a model built like Llama, by name, and which of them have been used: the others would be lost."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named, self.used = named, set[str]()

    def take(self, name: str) -> Tensor:
        """Return one weight, float64, and mark it as used. Raises FhoptError when the model has none of this name."""
        if name not in self.named:
            raise FhoptError(
                f"the model has no {name}; expected the weights of a model built like Llama. Serve the original."
            )
        self.used.add(name)
        return self.named[name].detach().double().cpu()

    def outer(self, scale: float) -> dict[str, Tensor]:
        """Return embeddings, last norm and head, with the residual stream scaled.

        A head that is tied to the embeddings is written all the same: vLLM's class does not tie it.
        """
        embedded = self.take("model.embed_tokens.weight")
        is_tied = "lm_head.weight" not in self.named
        return {
            "lm_head.weight": embedded.clone() if is_tied else self.take("lm_head.weight"),
            "model.embed_tokens.weight": embedded * scale,
            "model.norm.weight": self.take("model.norm.weight"),
        }

    def block(self, layer: int, scale: float) -> dict[str, Tensor]:
        """Return the weights of a layer without its attention."""
        prefix = f"model.layers.{layer}."
        names = [f"{prefix}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        gate, up = self._parts(f"{prefix}mlp.gate_up_proj.weight", ("gate_proj", "up_proj"), (1, 1))
        return {name: self.take(name) for name in names} | {
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": self.take(f"{prefix}mlp.down_proj.weight") * scale,
        }

    def projections(self, layer: int, site: AttentionSite, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query [H,D,X], key [G,D,X], value [G,E,X] and output [X,H*E], the last scaled."""
        prefix = f"model.layers.{layer}.self_attn."
        sizes = (site.heads * site.key_dim, site.kv_heads * site.key_dim, site.kv_heads * site.value_dim)
        names = ("q_proj", "k_proj", "v_proj")
        query, key, value = self._parts(f"{prefix}qkv_proj.weight", names, sizes)
        return (
            query.unflatten(0, (site.heads, -1)), key.unflatten(0, (site.kv_heads, -1)),
            value.unflatten(0, (site.kv_heads, -1)), self.take(f"{prefix}o_proj.weight") * scale,
        )  # fmt: skip

    def _parts(self, fused: str, names: Sequence[str], shares: Sequence[int]) -> list[Tensor]:
        """Return several weights, split in these shares from the fused one where the model has that."""
        if fused not in self.named:
            prefix = fused.rsplit(".", 2)[0]
            return [self.take(f"{prefix}.{name}.weight") for name in names]
        whole = self.take(fused)
        return list(whole.split([share * len(whole) // sum(shares) for share in shares]))

    def check_all_used(self) -> None:
        """Raise FhoptError when a weight was not used."""
        left = sorted(self.named.keys() - self.used)
        if not left:
            return
        why = "engines read no biases there" if left[0].endswith("bias") else "DeepSeek's block has no such weight"
        raise FhoptError(f"{left[0]} and {len(left) - 1} more weights would be lost: {why}. Serve the original.")
