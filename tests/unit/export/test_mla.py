"""Plans cut to one latent for keys and values."""

from __future__ import annotations

from pathlib import Path

import torch
from mla_export import ANY, ROUNDING, sites_of, tiny
from small_models import Fitted

from fhopt.export import mla
from fhopt.export import mla_checkpoint as deepseek
from fhopt.fitting import fit_plan
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan


def test_a_fitted_plan_is_cut_to_one_complex_latent_a_frequency(llama: Fitted, tmp_path: Path) -> None:
    full = fit_plan.fit(llama.statistics, ratio=1, layout="freq")
    plan = mla.truncate(full, 24)
    assert [(s.key.width, s.value.width) for s in plan.sites] == [(16, 24), (16, 24)]
    out = deepseek.export(LoadedModel("small", llama.model), plan, tmp_path / "out", ANY)
    assert out.error < ROUNDING and out.token_bytes == 2 * 2 * (24 + 16)
    for before, after in zip(full.sites, plan.sites, strict=True):  # the strongest of each frequency
        blocks = []
        for site in (before, after):
            encode, decode = mla._merge_heads(site.key, 2)
            assert site.site.rope is not None
            blocks.append(mla._rotated_part(torch.einsum("gdr,rhe->gdhe", decode, encode), site.site.rope.pairs))
        assert torch.allclose(blocks[0], torch.eye(2, dtype=torch.complex128).expand(8, 2, 2), atol=1e-4)
        assert int(torch.linalg.matrix_rank(blocks[1], rtol=1e-4).max()) == 1


def test_halves_of_the_width_go_to_keys_and_values_that_do_not_rotate() -> None:
    model = tiny("SmolLM3", no_rope_layers=[0, 0])
    sites = sites_of(model)
    eyes = [SidePlan(torch.eye(32).unsqueeze(0), torch.eye(32).unflatten(0, (2, 16)), ()) for _ in sites]
    plan = LatentPlan(tuple(SitePlan(s, "freq", e, e) for s, e in zip(sites, eyes, strict=True)), 0, 1, 1)
    assert [(s.key.width, s.value.width) for s in mla.truncate(plan, 21).sites] == [(11, 10)] * 2
