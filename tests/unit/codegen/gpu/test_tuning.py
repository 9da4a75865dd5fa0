"""Choosing and tuning a kernel configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gpu_kernels import H100, SMALL
from needs import needs_triton

from fhopt.codegen.build import render_kernel
from fhopt.codegen.gpu import configs, tuning
from fhopt.codegen.gpu.configs import Config, default_config, tuned_config
from fhopt.codegen.gpu.gpus import GPUS, gpu_named
from fhopt.codegen.gpu.launch import MAX_SPLITS
from fhopt.codegen.gpu.resources import CompileRequest, Resources, compile_kernels, objection, occupancy
from fhopt.codegen.gpu.signatures import attention_example
from fhopt.codegen.gpu.tuning import Workload, choose_each, token_bytes, tune, tune_kernel
from fhopt.errors import FhoptError
from fhopt.fitting.allocation import STEPS
from fhopt.plan.kernel_spec import KernelSpec

pytestmark = pytest.mark.usefixtures("own_cache")

SPECS = (
    KernelSpec(((8, 32, 0.02), (4, 64, 0.2), (2, 32, 0.5)), ((4, 64, 0.2), (2, 64, 0.5)), 128, 128, "bfloat16", False),
    KernelSpec(((4, 256, 0.2),), ((4, 256, 0.2),), 256, 256, "bfloat16", False),
)
# An A100 has the configurations and instructions of an L4, and more room: it gets only the widest rows.
PAIRS = [("l4", SPECS[1]), ("h100", SPECS[0]), ("a100-80", SPECS[1])]


# --------------------------------------------------------------------------------------------------- compiling


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "spec"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_the_chosen_configuration_fits_and_uses_tensor_cores(spec: KernelSpec, name: str) -> None:
    best = tune_kernel(spec, 4, GPUS[name], 2).best
    assert best is not None and not objection(best.resources, GPUS[name])
    assert best.resources.spilled == 0 and sum(best.resources.tensor_cores.values()) > 0
    assert best.resources.loop_copies  # rows are prefetched
    assert tuned_config(spec, 4, name) == best.config


def fitted_rows(key: dict[int, int], value: dict[int, int], dtype: str = "bfloat16") -> KernelSpec:
    """Bit groups (bits: width) as fitted for a GPU."""
    sides = [tuple((bits, width, STEPS[bits]) for bits, width in tiers.items()) for tiers in (key, value)]
    return KernelSpec(sides[0], sides[1], sum(key.values()), sum(value.values()), dtype, False)


FITTED = (  # and M
    (fitted_rows({8: 16, 4: 32}, {4: 64}), 4),
    (fitted_rows({8: 48, 4: 96, 2: 64}, {8: 16, 4: 160}), 9),
    (fitted_rows({8: 32, 4: 128, 2: 192}, {8: 48, 4: 96, 2: 256}), 8),
    (fitted_rows({8: 64, 4: 256, 2: 256}, {8: 32, 4: 288, 2: 256}), 32),
)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100-80", "l4", "h100"])
def test_rows_fitted_for_a_gpu_fit_it_with_the_default(name: str) -> None:
    fitted = {"a100-80": FITTED[3:], "l4": FITTED[::3], "h100": FITTED[1:]}[name]
    for (spec, rows), choice in zip(fitted, choose_each(fitted, GPUS[name], 1), strict=True):
        (verdict,) = choice.verdicts
        assert not verdict.reason, (spec.name, rows, verdict.reason)
        assert verdict.config == default_config(spec, rows)


PLANED = KernelSpec(((6, 64, 0.08), (3, 64, 0.5)), ((5, 64, 0.15), (16, 64, 0.0)), 128, 128, "float16", True)


def merge_request(spec: KernelSpec) -> CompileRequest:
    """Request the kernel that merges the maximum number of token ranges."""
    types, constants, attrs = attention_example(spec, default_config(spec, 1))["merge_kernel"]
    return CompileRequest(
        render_kernel(spec, "triton"), "merge_kernel", types, constants | {"BLOCK_S": MAX_SPLITS}, attrs
    )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100-80", "l4", "h100"])
def test_ranges_of_tokens_can_be_merged_for_any_rows(name: str) -> None:
    every = (PLANED, *SPECS, *(spec for spec, _ in FITTED))
    first = ("h100", "l4", "a100-80").index(name)
    specs = every[first::3]  # without tensor cores, with little memory: architectures barely matter
    requests = [merge_request(spec) for spec in specs]
    for spec, found in zip(specs, compile_kernels(requests, GPUS[name]), strict=True):
        assert not objection(found, GPUS[name]), (spec.name, found)
        assert not found.tensor_cores and found.shared < 4096, (spec.name, found)
        assert occupancy(found, GPUS[name]).share >= 0.25, (spec.name, found)


# --------------------------------------------------------------------------------------------------- choosing


Compiler = Callable[[dict[Config, Resources]], tuple[Config, ...]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Replace the candidates by given configurations with given resources."""

    def plant(found: dict[Config, Resources]) -> tuple[Config, ...]:
        def compile_them(requests: Sequence[CompileRequest], *_: Any) -> list[Resources]:
            blocks = {(c.block_t, c.num_warps, c.num_stages): r for c, r in found.items()}
            keys = [
                (r.constexprs["BLOCK_T"], r.options["num_warps"], r.options["num_stages"]) for r in requests
            ]  # fmt: skip
            return [blocks[key] for key in keys]

        monkeypatch.setattr(tuning, "compile_kernels", compile_them)
        monkeypatch.setattr(tuning, "candidate_configs", lambda *_: tuple(found))
        monkeypatch.setattr(tuning, "default_config", lambda *_: next(iter(found)))
        monkeypatch.setattr(configs, "triton_version", lambda: "3")
        return tuple(found)

    return plant


def test_a_candidate_that_is_too_large_is_rejected_with_its_reason(compiled: Compiler) -> None:
    small, large, plain = compiled(
        {
            Config(64, 16, 4, 3): SMALL,
            Config(512, 16, 4, 3): dataclasses.replace(SMALL, shared=300_000),
            Config(32, 16, 4, 3): dataclasses.replace(SMALL, tensor_cores={}),
        }
    )
    choice = tune_kernel(SPECS[0], 4, H100)
    assert choice.best is not None and choice.best.config == small
    reasons = {v.config: v.reason for v in choice.verdicts}
    assert reasons[small] == ""
    assert reasons[large] == "needs 300,000 bytes of shared memory; a block may have 232,448"
    assert reasons[plain] == "uses no tensor core"


def test_bytes_in_flight_come_first_then_instructions_per_token(compiled: Compiler) -> None:
    ahead = dataclasses.replace(SMALL, loop_reads={"16": 4}, loop_copies={"16": 4})
    few, many, busy, idle = compiled(
        {
            Config(16, 16, 4, 2): dataclasses.replace(SMALL, registers=255),  # 2 blocks of 16 tokens
            Config(32, 16, 4, 4): dataclasses.replace(ahead, registers=64),
            Config(64, 16, 4, 4): dataclasses.replace(ahead, registers=64, loop_instructions=400),
            Config(64, 16, 8, 4): dataclasses.replace(ahead, registers=64, loop_instructions=50),
        }
    )
    choice = tune_kernel(SPECS[0], 4, H100)
    verdicts = {v.config: v for v in choice.verdicts}
    row = token_bytes(SPECS[0])
    assert row == 32 + 32 + 8 + 2 + 32 + 16 + 2
    assert verdicts[few].bytes_ahead == 2 * 16 * row
    assert verdicts[many].bytes_ahead == 8 * 32 * 3 * row  # all prefetched: one stage less than configured
    assert verdicts[busy].token_instructions == 400 * 4 / 64
    assert verdicts[idle].token_instructions == 50 * 4 / 64  # compiled with 4 warps
    assert choice.best is not None and choice.best.config == idle


def test_more_rows_than_a_tile_holds_are_more_work(compiled: Compiler) -> None:
    compiled({Config(64, 16, 4, 3): SMALL})
    assert tune_kernel(SPECS[0], 33, H100).verdicts[0].token_instructions == 3 * 100 * 4 / 64


def test_a_limited_number_of_candidates_is_compiled_evenly_spaced_from_the_first(compiled: Compiler) -> None:
    all_of_them = compiled({Config(64, 16, 4, stages): SMALL for stages in range(1, 11)})
    tried = [v.config for v in tune_kernel(SPECS[0], 4, H100, 3).verdicts]
    assert tried == [all_of_them[0], all_of_them[3], all_of_them[6]]
    assert len(tune_kernel(SPECS[0], 4, H100).verdicts) == len(tune_kernel(SPECS[0], 4, H100, 99).verdicts) == 10


def test_nothing_is_chosen_if_nothing_fits(compiled: Compiler) -> None:
    compiled({Config(64, 16, 4, 3): dataclasses.replace(SMALL, spilled=4)})
    choice = tune_kernel(SPECS[0], 4, H100)
    assert choice.best is None and [v.reason for v in choice.verdicts] == ["spills 4 bytes per thread"]
    assert tuned_config(SPECS[0], 4, "h100") is None


# --------------------------------------------------------------------------------------------------- tuning


H100_NAME = "NVIDIA H100 80GB HBM3"
WORKLOAD = Workload(batch=1, heads=4, key_heads=2, value_heads=2, tokens=64)


def stopwatch(times: dict[Config, float], calls: list[Config]) -> dict[str, Any]:
    """A kernel that records its configuration, and a timer that returns its time."""

    def kernel(*_: Any, config: Config, **__: Any) -> None:
        if config not in times:
            raise OSError("out of resource")
        calls.append(config)

    def timer(call: Callable[[], object]) -> float:
        call()
        return times[calls[-1]]

    return {"kernel": kernel, "timer": timer, "device": "cpu", "device_name": H100_NAME}


def test_tuning_stores_the_fastest_for_device_and_spec(compiled: Compiler) -> None:
    one, two, three, four = compiled(
        {
            Config(16, 16, 4, 3): SMALL,
            Config(32, 16, 4, 3): SMALL,
            Config(64, 16, 4, 3): dataclasses.replace(SMALL, spilled=4),
            Config(128, 16, 4, 3): SMALL,
        }
    )
    calls: list[Config] = []
    found = tune(SPECS[0], WORKLOAD, **stopwatch({one: 2.0, two: 1.0, three: 0.5}, calls))
    assert calls == [one, two]  # kernels that spill are not run
    assert found.best == two and found.times_ms == {one: 2.0, two: 1.0}
    assert found.rejected == {three: "spills 4 bytes per thread", four: "does not run: out of resource"}
    assert tuned_config(SPECS[0], WORKLOAD.rows, H100_NAME) == two
    assert tuned_config(SPECS[0], 64, H100_NAME) is None
    assert tuned_config(SPECS[1], WORKLOAD.rows, H100_NAME) is None
    assert tuned_config(SPECS[0], WORKLOAD.rows, "NVIDIA A100-SXM4-80GB") is None


def test_the_chosen_configuration_is_used_until_one_is_tuned(compiled: Compiler) -> None:
    one, two = compiled({Config(16, 16, 4, 3): SMALL, Config(32, 16, 4, 3): SMALL})
    assert tuned_config(SPECS[0], 2, H100_NAME) is None
    best = tune_kernel(SPECS[0], 2, H100).best
    assert best is not None and tuned_config(SPECS[0], 2, H100_NAME) == best.config == two
    tune(SPECS[0], WORKLOAD, **stopwatch({one: 1.0, two: 2.0}, []))
    assert tuned_config(SPECS[0], 2, H100_NAME) == one
    tune(SPECS[0], WORKLOAD, **stopwatch({one: 3.0, two: 2.0}, []))  # tuned again: the newest counts
    assert tuned_config(SPECS[0], 2, H100_NAME) == two


def test_tuning_says_when_nothing_runs(compiled: Compiler) -> None:
    compiled({Config(16, 16, 4, 3): SMALL})
    with pytest.raises(FhoptError, match=r"no configuration of latent_k.* runs on NVIDIA H100.*out of resource"):
        tune(SPECS[0], WORKLOAD, **stopwatch({}, []))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(FhoptError, match="there is no GPU to tune on"):
        tune(SPECS[0], WORKLOAD)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (H100_NAME, "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("a100-80", "a100-80"),
    ],
)
def test_devices_are_known_by_their_torch_names(told: str, name: str | None) -> None:
    found = gpu_named(told)
    assert (found and found.name) == name
