"""Refusals before an engine reserves memory, each in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hand_plans import CODED, in_segments, random_plan

from fhopt.errors import FhoptError
from fhopt.models.rewritten_folder import RewrittenFolder
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup
from fhopt.serving import refusals

PLAN = random_plan("head", CODED)


def config(**changes: Any) -> SimpleNamespace:
    """The checked part of vLLM's configuration."""
    known: dict[str, Any] = dict(
        cache_dtype="auto", pipeline_parallel_size=1, decode_context_parallel_size=1, tensor_parallel_size=1,
        disable_hybrid_kv_cache_manager=False, method=None, kv_transfer_config=None, max_model_len=4096,
        device_type="cpu",
    )  # fmt: skip
    known |= changes
    part = SimpleNamespace(**known)
    speculative = part if known["method"] else None
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=known["max_model_len"]),
        cache_config=part, parallel_config=part, scheduler_config=part, speculative_config=speculative,
        kv_transfer_config=known["kv_transfer_config"],
        device_config=SimpleNamespace(device_type=known["device_type"]),
    )  # fmt: skip


def test_an_engine_with_ordinary_options_is_accepted() -> None:
    refusals.check_engine(PLAN, config())
    refusals.check_engine(PLAN, config(method="ngram"))
    refusals.check_engine(PLAN, config(tensor_parallel_size=2))


def test_trellis_codes_are_served_on_cpus_only() -> None:
    ring = random_plan("head", (BitGroup(4, 16, -0.031),))
    refusals.check_engine(ring, config())
    refusals.check_engine(PLAN, config(device_type="cuda"))
    with pytest.raises(FhoptError, match="vLLM on a GPU does not support trellis codes"):
        refusals.check_engine(ring, config(device_type="cuda"))


REFUSED: dict[str, dict[str, Any]] = {
    "--kv-cache-dtype fp8 is not supported": {"cache_dtype": "fp8"},
    "--pipeline-parallel-size 2 is not supported": {"pipeline_parallel_size": 2},
    "decode context parallelism is not supported": {"decode_context_parallel_size": 2},
    "speculative decoding by 'eagle' is not supported": {"method": "eagle"},
    "a KV connector is not supported": {"kv_transfer_config": object()},
    "--disable-hybrid-kv-cache-manager is not supported": {"disable_hybrid_kv_cache_manager": True},
    "--tensor-parallel-size 3 does not fit layers.0, with 2 kv heads in 2 latent heads": {"tensor_parallel_size": 3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_a_plan_does_not_support_are_refused(message: str) -> None:
    with pytest.raises(FhoptError, match=message) as raised:
        refusals.check_engine(PLAN, config(**REFUSED[message]))
    assert "\n" not in str(raised.value)


def test_the_maximum_sequence_length_is_that_of_rotated_queries() -> None:
    long = config(max_model_len=2_000_000)
    refusals.check_engine(PLAN, long)
    with pytest.raises(FhoptError, match=r"--max-model-len 2000000.*fhopt fit MODEL --segment 0"):
        refusals.check_engine(in_segments(PLAN), long)


def test_one_latent_of_all_heads_is_not_split() -> None:
    with pytest.raises(FhoptError, match=r"2 kv heads in 1 latent heads.*--layout head"):
        refusals.check_engine(random_plan("input", CODED), config(tensor_parallel_size=2))


def test_each_process_has_its_heads() -> None:
    parts = [refusals.local_site(PLAN.sites[0], 2, rank) for rank in range(2)]
    assert [part.site.kv_heads for part in parts] == [1, 1] and [part.key.groups for part in parts] == [1, 1]
    assert refusals.local_site(PLAN.sites[0], 1, 0) is PLAN.sites[0]


# --------------------------------------------------------------------------------------------------- folders, layers


def folder(plan: LatentPlan) -> RewrittenFolder:
    return RewrittenFolder(Path("folder"), plan, {}, {}, frozenset())


def with_site(**changes: Any) -> LatentPlan:
    site = PLAN.sites[0]
    return replace(PLAN, sites=(replace(site, site=replace(site.site, **changes)),))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"window": 64}, "a sliding window"),
        ({"softcap": 30.0}, "a softcap"),
        ({"sinks": True}, "sink logits"),
        ({"mask": "none"}, "a 'none' mask"),
        ({"kind": "cross"}, "cross attention"),
    ],
)
def test_attention_of_other_kinds_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(FhoptError, match=what):
        refusals.check_served_folder(folder(with_site(**changes)), None)


def test_a_plan_must_have_all_layers() -> None:
    refusals.check_served_folder(folder(PLAN), SimpleNamespace(num_hidden_layers=1))
    with pytest.raises(FhoptError, match="covers 1 of 2 layers"):
        refusals.check_served_folder(folder(PLAN), SimpleNamespace(num_hidden_layers=2))


def layer(**changes: Any) -> SimpleNamespace:
    impl = SimpleNamespace(logits_soft_cap=0, alibi_slopes=None, sinks=None)
    known: dict[str, Any] = dict(impl=impl, sliding_window=None, kv_sharing_target_layer_name=None, attn_type="decoder")
    return SimpleNamespace(**(known | changes))


def test_layers_that_compute_more_are_refused() -> None:
    refusals.check_layer(layer(), "layers.0")
    for changes, what in (
        ({"sliding_window": 128}, "a sliding window"),
        ({"kv_sharing_target_layer_name": "layers.1"}, "keys of another layer"),
        ({"attn_type": "encoder"}, "another type"),
        ({"impl": SimpleNamespace(logits_soft_cap=50.0)}, "a softcap"),
        ({"impl": SimpleNamespace(alibi_slopes=[1.0])}, "ALiBi"),
        ({"impl": SimpleNamespace(sinks=object())}, "sink logits"),
    ):
        with pytest.raises(FhoptError, match=what):
            refusals.check_layer(layer(**changes), "layers.0")
