"""Models and plans that become checkpoints of multi-head latent attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_models import VOCABULARY, found, token_ids

from fhopt.export import mla_checkpoint as deepseek
from fhopt.export import targets
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SidePlan, SitePlan, Tier


def sites_of(model: Any) -> list[AttentionSite]:
    return list(found(model)[1].sites.values())


def with_tiers(plan: LatentPlan, bits: int) -> LatentPlan:
    def quantized(side: SidePlan) -> SidePlan:
        return SidePlan(side.encode, side.decode, (Tier(bits, side.width, 0.1),))

    sites = tuple(SitePlan(s.site, s.layout, quantized(s.key), quantized(s.value)) for s in plan.sites)
    return LatentPlan(sites, plan.sinks, plan.recent, plan.block)


ROUNDING = 2e-5  # of the largest logit, in float32: sums in another order, the residual stream in other units
ANY, VLLM = targets.ENGINES["sglang"], targets.ENGINES["vllm"]


def tiny(kind: str, **changes: Any) -> Any:
    """A model of transformers of Llama's kind or near it: 2 layers, H=4, D=16."""
    import transformers

    torch.manual_seed(1)
    options: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**(options | changes))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def exported(model: Any, plan: LatentPlan, out: Path, engine: targets.Engine = ANY, **options: Any) -> Any:
    """What transformers opens of the checkpoint."""
    from transformers import AutoModelForCausalLM

    deepseek.export(LoadedModel("small", model), plan, out, engine, **({"force": True} | options))
    return AutoModelForCausalLM.from_pretrained(out).eval()


@torch.no_grad()
def difference(a: Any, b: Any) -> float:
    """Of the logits of two models, as a share of the largest."""
    ids = token_ids(2, 40)
    wanted = b(ids).logits
    return float((a(ids).logits - wanted).abs().max() / wanted.abs().max())
