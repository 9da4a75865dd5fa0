"""Plans for tensor-parallel models: shares of plans, then real models in 2 and 4 processes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from hand_plans import CODED, SITE, random_plan
from small_models import found, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import token_costs
from fhopt.export import rewrite_folder
from fhopt.hf.apply import applied_plan, latent_cache
from fhopt.models.loaded_model import LoadedModel
from fhopt.ops import algebra
from fhopt.parallel import tensor_parallel
from fhopt.parallel.tensor_parallel import Share, shard_site
from fhopt.plan import fingerprint
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan, SketchPlan

ROUNDING = 2e-6  # these float64 models return float32 logits of magnitude 10 from generate
PLAIN: dict[str, Any] = dict(sinks=4, recent=8, block=8)


def latents(site: AttentionSite, groups: int, tiers: tuple[BitGroup, ...] = CODED) -> SitePlan:
    """Latents of 16 channels with random bases for each side of a site, J = `groups`."""
    n, generator = site.kv_heads // groups, torch.Generator().manual_seed(groups)
    sides = []
    for dim in (site.key_dim, site.value_dim):
        encode = torch.randn(groups, 16, n * dim, generator=generator) / 2
        decode = torch.randn(site.kv_heads, dim, 16, generator=generator) / 4
        sides.append(SidePlan(encode, decode, tiers))
    return SitePlan(site, "head" if groups == site.kv_heads else "band", *sides)


# --------------------------------------------------------------------------------------------------- shares of plans


@pytest.mark.parametrize(("groups", "count"), [(8, 2), (8, 8), (4, 2), (2, 4), (1, 2), (1, 8), (2, 2), (4, 1)])
def test_the_latents_of_all_shares_are_those_of_the_whole(groups: int, count: int) -> None:
    site = replace(SITE, heads=16, kv_heads=8)
    whole, x = latents(site, groups), torch.randn(2, 8, 5, 16)
    rows, held = algebra.encode(x, whole.key.encode), torch.randn(2, 8, 5, 8)
    for rank in range(count):
        part = shard_site(whole, Share(rank, count))
        own = Share(rank, count).part(8)
        assert (part.gather is None) == (groups % count == 0)
        read = x[:, own] if part.gather is None else x[:, part.gather.key_heads]
        found = algebra.encode(read, part.key.encode)
        first = rank * groups // count
        torch.testing.assert_close(found, rows[:, first : first + found.shape[1]], rtol=0, atol=0)
        torch.testing.assert_close(
            algebra.decode(found, part.key.decode), algebra.decode(rows, whole.key.decode)[:, own]
        )
        assert held[:, own].shape[1] == part.site.kv_heads and part.site.heads == 16 // count


def test_a_share_of_a_plan_is_a_plan_with_the_bytes_of_its_latent_heads() -> None:
    site = replace(SITE, heads=16, kv_heads=8)
    for groups, count, bytes_left in ((8, 4, 1 / 4), (1, 4, 1), (2, 4, 1 / 2)):
        whole = LatentPlan((latents(site, groups),), **PLAIN)
        part = replace(whole, sites=(shard_site(whole.sites[0], Share(1, count)),))
        assert part.sites[0].token_bytes() == whole.sites[0].token_bytes() * bytes_left


def test_a_joint_latent_of_keys_and_values_uses_the_heads_of_all_processes() -> None:
    whole = random_plan("input", CODED).sites[0]
    part = shard_site(whole, Share(1, 2))
    assert part.gather is not None and part.gather.key_heads == part.gather.value_heads == slice(0, 2)
    assert torch.equal(part.key.encode, whole.key.encode) and torch.equal(part.key.decode, whole.key.decode[1:])
    LatentPlan((part,), **PLAIN)


def test_sketches_go_with_their_latent_heads() -> None:
    whole = latents(replace(SITE, kv_heads=4), 4)
    channels = torch.stack([torch.arange(8) + i for i in range(4)])
    sketch = SketchPlan(channels, torch.randn(4, 16), torch.ones(4, 16), (BitGroup(2, 8, 0.5),))
    part = shard_site(replace(whole, sketch=sketch), Share(1, 2))
    assert part.sketch is not None and torch.equal(part.sketch.channels, channels[2:])
    LatentPlan((part,), **PLAIN)


def test_latent_heads_that_straddle_processes_are_refused() -> None:
    site = replace(SITE, heads=12, kv_heads=6)
    with pytest.raises(FhoptError, match=r"3 latent heads do not divide evenly over 2 processes.*--layout head"):
        shard_site(latents(site, 3), Share(0, 2))


def test_more_processes_than_kv_heads_are_refused() -> None:
    with pytest.raises(FhoptError, match="4 processes do not divide 4 query heads and 2 kv heads"):
        shard_site(latents(SITE, 1), Share(0, 4))


def test_a_plan_whose_encoders_use_other_heads_is_refused() -> None:
    part = shard_site(latents(replace(SITE, kv_heads=4), 1), Share(1, 2))
    with pytest.raises(FhoptError, match="bases have shapes"):
        LatentPlan((replace(part, gather=None),), **PLAIN)


def test_a_model_in_one_process_has_its_whole_plan(llama: Any) -> None:
    plan = llama.plan(4)
    assert tensor_parallel.local_plan(llama.model, plan) is plan and not tensor_parallel.is_sharded(llama.model)


# --------------------------------------------------------------------------------------------------- in processes


def whole_model(folder: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)


def spread_model(folder: Path, name: str) -> Any:
    """Load the model in all processes, with transformers' own tensor-parallel plan."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():  # renamed to `distributed_config` in the newest transformers
        warnings.simplefilter("ignore", FutureWarning)
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64, tp_plan="auto")


def generated(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Generate 12 steps, in which a block is quantized; return tokens and logits."""
    out = model.generate(
        ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
        **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def compare(folder: Path, name: str, plan: LatentPlan, gathers: bool) -> None:
    """Compare tokens and logits with those of the whole model, with dynamic and static caches."""
    ids, whole, spread = token_ids(2, 40), whole_model(folder, name), spread_model(folder, name)
    fhopt.apply(whole, plan)
    fhopt.apply(spread, plan)
    count = torch.distributed.get_world_size()
    kept = applied_plan(spread).sites[0]
    assert kept.site.kv_heads * count == plan.sites[0].site.kv_heads and (kept.gather is not None) == gathers
    for options in ({}, {"cache_implementation": "static"}):
        expected, found = generated(whole, ids, **options), generated(spread, ids, **options)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=ROUNDING)
    exact = generated(fhopt.unapply(whole), ids)[1]
    assert (found[1] - exact).abs().max() > 100 * ROUNDING  # the latents were used
    torch.testing.assert_close(generated(fhopt.unapply(spread), ids)[1], exact, rtol=0, atol=ROUNDING)


def planned(folder: Path, name: str, groups: int) -> LatentPlan:
    return LatentPlan.load(folder / f"{name}-{groups}")


def check_grouped_heads_with_a_latent_each(folder: Path) -> None:
    compare(folder, "grouped", planned(folder, "grouped", 2), gathers=False)


def check_grouped_heads_with_one_latent_for_all(folder: Path) -> None:
    compare(folder, "grouped", planned(folder, "grouped", 1), gathers=True)


def check_many_heads_with_a_latent_each(folder: Path) -> None:
    compare(folder, "many", planned(folder, "many", 4), gathers=False)


def check_many_heads_with_two_latents(folder: Path) -> None:
    compare(folder, "many", planned(folder, "many", 2), gathers=torch.distributed.get_world_size() > 2)


def check_many_heads_with_one_latent_and_a_rounded_window(folder: Path) -> None:
    compare(folder, "many", replace(planned(folder, "many", 1), window_bits=8), gathers=True)


def check_a_fitted_plan_with_its_fingerprint(folder: Path) -> None:
    plan, ids = LatentPlan.load(folder / "plan"), token_ids(2, 60)
    whole, spread = whole_model(folder, "grouped"), spread_model(folder, "grouped")
    expected, found = token_costs(whole, ids, plan), token_costs(spread, ids, plan)
    torch.testing.assert_close(found.plan, expected.plan, rtol=0, atol=1e-8)  # float32 bases, float64 models
    assert not torch.equal(found.plan, found.exact)
    with pytest.raises(FhoptError, match="plan was not fitted to"):
        fhopt.apply(spread_model(folder, "other"), plan)


def check_latents_after_crops_and_from_files(folder: Path) -> None:
    plan, ids = planned(folder, "grouped", 1), token_ids(2, 60)
    rank = torch.distributed.get_rank()
    logits = []
    for model in (whole_model(folder, "grouped"), spread_model(folder, "grouped")):
        fhopt.apply(model, plan)
        cache = latent_cache(model)
        with torch.no_grad():
            model(ids[:, :50], past_key_values=cache)
            cache.crop(-30)  # into quantized blocks
            model(ids[:, 20:55], past_key_values=cache)
            fhopt.save_cache(model, cache, folder / f"cache-{rank}.safetensors")
            cache = fhopt.load_cache(model, folder / f"cache-{rank}.safetensors")
            logits.append(model(ids[:, 55:], past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-8)


def check_layers_spread_by_parallelize_module(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan, ids = planned(folder, "grouped", 2), token_ids(1, 60)
    whole, spread = whole_model(folder, "grouped"), whole_model(folder, "grouped")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    columns = {f"{x}_proj": ColwiseParallel() for x in "qkv"}
    for layer in spread.model.layers:
        parallelize_module(layer.self_attn, mesh, {**columns, "o_proj": RowwiseParallel()})
    fhopt.apply(whole, plan)
    fhopt.apply(spread, plan)
    assert applied_plan(spread).sites[1].site.kv_heads == 1
    with torch.no_grad():
        expected, found = generated(whole, ids), generated(spread, ids)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=ROUNDING)


def check_a_rewritten_folder_in_all_processes(folder: Path) -> None:
    ids = token_ids(1, 60)
    expected = generated(fhopt.load(folder / "rewritten"), ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = fhopt.load(folder / "rewritten", tp_plan="auto")
    assert applied_plan(model).sites[0].site.kv_heads == 1
    assert torch.equal(generated(model, ids)[0], expected[0])


def check_what_cannot_be_done_is_refused(folder: Path) -> None:
    plan, spread = planned(folder, "grouped", 2), spread_model(folder, "grouped")
    fhopt.apply(spread, plan)
    with pytest.raises(FhoptError, match=r"has 2 kv heads; expected 1, .*latent_cache\(model\)"):
        spread(token_ids(), past_key_values=fhopt.LatentCache(plan, spread.config))
    fhopt.unapply(spread)
    with pytest.raises(FhoptError, match=r"sharded over several processes.*whole model"):
        fhopt.fit(spread, batches=[{"input_ids": token_ids()}])


def check_fewer_kv_heads_than_processes_are_refused(folder: Path) -> None:
    with pytest.raises(FhoptError, match=r"k_proj.weight computes 8 of 32 features.*its 2 kv heads"):
        fhopt.apply(spread_model(folder, "grouped"), planned(folder, "grouped", 2))


@torch.no_grad()
def turned(model: Any) -> Any:
    """Return another model: all weights have the opposite sign."""
    for weight in model.parameters():
        weight.neg_()
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "grouped": tiny_llama,
    "many": lambda: tiny_llama(num_key_value_heads=4),
    "other": lambda: turned(tiny_llama()),
}
IN_TWO = [
    check_grouped_heads_with_a_latent_each,
    check_grouped_heads_with_one_latent_for_all,
    check_many_heads_with_two_latents,
    check_a_fitted_plan_with_its_fingerprint,
    check_latents_after_crops_and_from_files,
    check_layers_spread_by_parallelize_module,
    check_a_rewritten_folder_in_all_processes,
    check_what_cannot_be_done_is_refused,
]
IN_FOUR = [
    check_many_heads_with_a_latent_each,
    check_many_heads_with_two_latents,
    check_many_heads_with_one_latent_and_a_rounded_window,
    check_fewer_kv_heads_than_processes_are_refused,
]
CHECKS = {2: IN_TWO, 4: IN_FOUR}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama: Any) -> Path:
    """A folder with models and plans."""
    path = tmp_path_factory.mktemp("sharding")
    for name, make in MODELS.items():
        make().save_pretrained(path / name)
    for name, groups in (("grouped", 1), ("grouped", 2), ("many", 1), ("many", 2), ("many", 4)):
        sites = found(MODELS[name]())[1].sites.values()
        LatentPlan(tuple(latents(s, groups) for s in sites), **PLAIN).save(path / f"{name}-{groups}")
    plan = llama.plan(4, "head")
    weights = dict(llama.model.named_parameters())
    plan = plan.with_provenance(fingerprint=fingerprint.fingerprint(weights, [p.site for p in plan.sites]))
    plan.save(path / "plan")
    rewrite_folder.rewrite_folder(LoadedModel("small", llama.model), plan, path / "rewritten")
    return path


def check_in(count: int, check: str, folder: Path) -> None:
    """Check the outcome of one of the checks, all of which the first call runs."""
    if not any(folder.glob(f"*.0-of-{count}")):
        processes.launch(__file__, count, folder)
    told = processes.outcome(check, count, folder)
    assert not told, told


@pytest.mark.parametrize("check", [check.__name__ for check in IN_TWO])
def test_in_2_processes(check: str, folder: Path) -> None:
    check_in(2, check, folder)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in IN_FOUR])
def test_in_4_processes(check: str, folder: Path) -> None:
    check_in(4, check, folder)


if __name__ == "__main__":
    processes.run_checks(CHECKS[int(os.environ["WORLD_SIZE"])], Path(sys.argv[1]))
