"""`fhopt export --target vllm|sglang`: a model and its plan as a DeepSeek-V2 checkpoint, which serving engines open.

    config.json                     model_type "deepseek_v2", dense in every layer
    model*.safetensors              its weights: projections with the plan in them
    tokenizer files, generation_config.json, licences, README.md
    export.json                     sizes, the plan's digest, bytes and SHA-256 of the files

The plan goes into the projections by fhopt/export/mla.py. Everything else that the class computes is compensated in
the weights, exactly:

- It normalizes the latent c, c / sqrt(mean(c^2) + eps), which cannot be left out. The rows that make c are scaled by
  2^-40, so that eps dominates under the root (to float32's last bit, for any c below 1e5): the norm is a constant then.
- Engines use the eps of all other norms for that norm, transformers always 1e-6. So all have 1e-6, and in a model with
  another eps the residual stream is scaled by sqrt(1e-6 / eps): embeddings, output and down projections.
- The scale of attention is one over the root of the keys' size: the difference goes into the queries.
- Rotation acts on neighbouring channels, with the plain table of frequencies, as long as the rotated part. A model's
  own frequencies are every n-th of a table n times as long.

Biases cannot be expressed: engines read none. At the end everything is checked: transformers opens the written folder,
and its logits must be those of the model with every token's keys and values reconstructed from the plan's latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.export.mla_weights import Converted, Sizes, convert, sites_by_layer
from fhopt.export.pt2_step import check_out, write_description
from fhopt.export.rewrite_folder import SHARD_SIZE, copy_settings
from fhopt.export.targets import ENGINES, Engine
from fhopt.files import appearing_folder
from fhopt.hf.apply import attended_by
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.transformers_import import QuietProgress, transformers
from fhopt.ops import algebra
from fhopt.ops import attention as ops_attention
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan

DESCRIPTION = "export.json"
VERSION = 1
IMPLEMENTATION = "fhopt_every_token"
CHECKED_TOKENS = 48
ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest logit: the rounding of weights


@dataclass(frozen=True)
class ExportedCheckpoint:
    """A written checkpoint. error: the largest difference of a logit from the plan's, as a share of the largest."""

    path: Path
    sizes: Sizes
    token_bytes: int
    exact_token_bytes: int
    error: float


def export(
    loaded: LoadedModel, plan: LatentPlan, out: Path, engine: Engine, source: Path | None = None,
    dtype: torch.dtype | None = None, shard_size: str = SHARD_SIZE, force: bool = False,
    announce: Callable[[int, int], None] | None = None,
) -> ExportedCheckpoint:  # fmt: skip
    """Write the module docstring's files to the folder `out`, whole or not at all.

    source: the folder whose tokenizer and settings are copied. dtype: of the weights; None: that of the model. force:
    write also where a cached token becomes larger than the original's. announce(bytes, exact_bytes): called with the
    bytes of a cached token, and of the original's, before anything is written. Raises FhoptError when the model or the
    plan cannot be expressed, a token becomes larger, or `out` holds anything but an older export of this kind.
    """
    from huggingface_hub import save_torch_state_dict

    check_out(out, DESCRIPTION)
    converted = convert(loaded, plan, engine.widths)
    _check_bytes(converted, plan.exact_token_bytes(), force)
    if announce is not None:
        announce(converted.token_bytes, plan.exact_token_bytes())
    dtype = dtype or next(iter(loaded.weights().values())).dtype
    if dtype not in ERROR:
        raise FhoptError(
            f"the range of {dtype} is too small for the factors that compensate the norm of the latent; expected "
            "bfloat16 or float32. Rewrite the model with --dtype bfloat16."
        )
    with appearing_folder(out) as staging:
        if source is not None:
            copy_settings(source, staging)
        elif loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(staging)
        _write_config(converted.config, dtype, staging)
        stored = {name: tensor.to(dtype).contiguous() for name, tensor in converted.tensors.items()}
        save_torch_state_dict(stored, staging, max_shard_size=shard_size)
        error = _check_logits(loaded.module, plan, staging, dtype)
        written = ExportedCheckpoint(out, converted.sizes, converted.token_bytes, plan.exact_token_bytes(), error)
        _describe(loaded, plan, written, staging)
        for file in staging.iterdir():
            file.chmod(0o644)  # readable by all users
    return written


# --------------------------------------------------------------------------------------------------- check


def _check_bytes(converted: Converted, exact: int, force: bool) -> None:
    """Raise FhoptError where a cached token would be larger than the original's, unless forced."""
    sizes = converted.sizes
    if converted.token_bytes > exact and not force:
        raise FhoptError(
            f"a cached token would take {converted.token_bytes:,} bytes ({sizes.latent} + {sizes.rotated} numbers in "
            f"each layer), the original's takes {exact:,}: the cache gets larger. This export pays for many kv heads. "
            "Serve the rewritten folder itself (pip install 'fhopt[vllm]'), or add --force."
        )


@contextmanager
def every_token_in_latents(model: Any, plan: LatentPlan) -> Iterator[None]:
    """Within the context, compute attention with every token's keys and values reconstructed from unquantized latents.

    There are no exact sinks and no residual window, since an engine's cache has none. For whole sequences only.
    """
    sites = dict(enumerate(sites_by_layer(plan, int(model.config.num_hidden_layers))))

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        site = sites[module.layer_idx]
        key, value = _reconstruct(site, key, value)
        out = ops_attention.attention_reference(query, key, value, scale=site.site.scale, is_causal=True)
        return out.transpose(1, 2), None

    with attended_by(model, IMPLEMENTATION, attention):
        yield


def _reconstruct(site: SitePlan, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Encode and decode keys and values by the plan of a site."""
    if site.is_shared:
        latent = algebra.encode(torch.cat([key, value], -1), site.key.encode)
        return algebra.decode(latent, site.key.decode), algebra.decode(latent, site.value.decode)
    key = algebra.decode(algebra.encode(key, site.key.encode), site.key.decode)
    return key, algebra.decode(algebra.encode(value, site.value.encode), site.value.decode)


@torch.no_grad()
def _check_logits(model: Any, plan: LatentPlan, folder: Path, dtype: torch.dtype) -> float:
    """Compare the logits of the written model with the plan's; see `ExportedCheckpoint.error`. Raises FhoptError."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.config.vocab_size), (1, CHECKED_TOKENS), generator=generator)
    with every_token_in_latents(model, plan):
        expected = model(ids.to(model.device), use_cache=False).logits.float().cpu()
    with QuietProgress():
        opened = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    logits = opened.eval()(ids, use_cache=False).logits
    error = float((logits - expected).abs().max() / expected.abs().max())
    if not error < ERROR[dtype]:
        raise FhoptError(
            f"as a DeepSeek-V2 model it computes other logits (by {error:.2g} of the largest, expected below "
            f"{ERROR[dtype]:g}): {type(model).__name__} computes more than a Llama block. Serve the original."
        )
    return error


# --------------------------------------------------------------------------------------------------- files

_README = """# {name} as latent attention

{name} in the form of DeepSeek-V2's attention (`kv_lora_rank` {latent}, `qk_rope_head_dim` {rotated}), dense in every
layer: keys and values are cached as latents of a plan of fhopt, {token_bytes:,} bytes a token in 16 bits where the
original's cache takes {exact:,}. {change}

    {commands}

Run it in bfloat16 or float32, not in float16. The plan's digest is `{digest}`.
"""
_SAME = "It computes what the original does, to rounding."
_OTHER = """**It is another model than the original**: every token is read from its
latent, no first or newest one stays exact. Measure what that costs: `fhopt eval` takes this folder."""


def _write_config(config: Any, dtype: torch.dtype, staging: Path) -> None:
    """Write the configuration, with the rotary base also where older versions of transformers read it."""
    config.dtype = dtype
    config.save_pretrained(staging)
    content = json.loads((staging / "config.json").read_text())
    content |= {"rope_theta": content["rope_parameters"]["rope_theta"], "rope_scaling": None}
    (staging / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _describe(loaded: LoadedModel, plan: LatentPlan, written: ExportedCheckpoint, staging: Path) -> None:
    commands = [e.serve.format(path="FOLDER", dtype=e.cache_dtypes["auto"]) for e in ENGINES.values()]
    sizes = written.sizes
    change = _SAME if all(site.is_exact for site in plan.sites) else _OTHER
    (staging / "README.md").write_text(_README.format(
        name=loaded.name, latent=sizes.latent, rotated=sizes.rotated, token_bytes=written.token_bytes,
        change=change, exact=written.exact_token_bytes, commands="\n    ".join(commands), digest=plan.digest(),
    ))  # fmt: skip
    about = {
        "sizes": asdict(sizes),
        "token_bytes": written.token_bytes,
        "exact_token_bytes": written.exact_token_bytes,
        "error": written.error,
    }
    write_description(staging, DESCRIPTION, VERSION, loaded, plan, about)
