"""What kernels need of GPUs that are not here, which configuration is chosen, and what tuning keeps."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fhopt.codegen import render
from fhopt.codegen.gpu import configs, tuning
from fhopt.codegen.gpu import resources as gpu_resources
from fhopt.codegen.gpu.configs import Config, default_config, tuned_config
from fhopt.codegen.gpu.gpus import GPUS, find_gpu, gpu_named
from fhopt.codegen.gpu.resources import Request, Resources, compile_kernels, fits, objection, occupancy
from fhopt.codegen.gpu.tuning import Workload, choose, choose_each, merge_request, row_bytes, tune
from fhopt.cost import DEVICES
from fhopt.errors import FhoptError
from fhopt.fitting import STEPS
from fhopt.spec import KernelSpec

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SPECS = (
    KernelSpec(((8, 32, 0.02), (4, 64, 0.2), (2, 32, 0.5)), ((4, 64, 0.2), (2, 64, 0.5)), 128, 128, "bfloat16", False),
    KernelSpec(((4, 256, 0.2),), ((4, 256, 0.2),), 256, 256, "bfloat16", False),
)
SMALL = Resources(num_warps=4, registers=64, shared=8192, tensor_cores={"mma.sync": 8}, loop_instructions=100)
H100 = GPUS["h100"]
# An A100 has the configurations and instructions of an L4, and more room for them: it gets the widest rows only.
PAIRS = [("l4", SPECS[1]), ("h100", SPECS[0]), ("a100-80", SPECS[1])]

KERNELS = '''
import triton
import triton.language as tl


@triton.jit
def product(x, y, out, steps, N: tl.constexpr):
    """The sum over steps of products of tiles [N, N]."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    total = tl.zeros([N, N], tl.float32)
    for step in range(steps):
        total = tl.dot(tl.load(x + step * N * N + at), tl.load(y + step * N * N + at), total)
    tl.store(out + at, total)


@triton.jit
def wrong(x, y, out, steps, N: tl.constexpr):
    """The compiler refuses it: shapes do not agree."""
    tl.store(out + tl.arange(0, N), tl.arange(0, 2 * N) + tl.arange(0, N))
'''


def product(size: int = 64, kernel: str = "product", text: str = KERNELS, **options: int) -> Request:
    types = {"x": "*fp16", "y": "*fp16", "out": "*fp32", "steps": "i32", "N": "constexpr"}
    aligned: dict[tuple[int, ...], Any] = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    return Request(text, kernel, types, {"N": size}, aligned, {"num_warps": 4, "num_stages": 3} | options)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "cache"


# --------------------------------------------------------------------------------------------------- limits


def test_every_gpu_of_the_cost_model_has_limits() -> None:
    assert set(GPUS) == {name for name, device in DEVICES.items() if device.kind == "gpu"}


def test_an_unknown_gpu_gets_the_names() -> None:
    with pytest.raises(FhoptError, match=r"'v100'; expected one of h100, h200, a100-80"):
        find_gpu("v100")


@pytest.mark.parametrize(
    ("name", "warps", "registers", "shared", "blocks", "limit"),
    [
        ("h100", 4, 128, 0, 4, "registers"),  # 16 warps of 4,096 registers
        ("h100", 4, 32, 0, 16, "registers"),  # as many as there are warps: 64
        ("h100", 4, 16, 0, 16, "warps"),
        ("h100", 1, 16, 0, 32, "blocks"),
        ("h100", 4, 129, 0, 3, "registers"),  # 136 are taken: 15 warps, in whole ones of a quarter 12
        ("h100", 4, 32, 100 * 1024, 2, "shared memory"),  # 228 KB; a block takes 1 KB more
        ("h100", 4, 32, 113 * 1024 + 1, 1, "shared memory"),
        ("4090", 8, 32, 0, 6, "warps"),
        ("4090", 4, 32, 49 * 1024, 2, "shared memory"),
        ("mi300x", 4, 128, 0, 4, "registers"),  # 512 registers a lane of each SIMD
        ("mi300x", 4, 64, 32 * 1024, 2, "shared memory"),
    ],
)
def test_occupancy_is_that_of_the_vendors(
    name: str, warps: int, registers: int, shared: int, blocks: int, limit: str
) -> None:
    held = occupancy(Resources(num_warps=warps, registers=registers, shared=shared), GPUS[name])
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.warps == blocks * warps
    assert held.share == held.warps / GPUS[name].warps


def test_tensor_memory_limits_blocks_of_blackwell() -> None:
    held = occupancy(dataclasses.replace(SMALL, registers=32, tensor_columns=256), GPUS["b200"])
    assert (held.blocks, held.limit) == (2, "tensor memory")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spilled": 8}, "spills 8 bytes a thread"),
        ({"shared": 227 * 1024 + 1}, "needs 232,449 bytes of shared memory, a block may have 232,448"),
        ({"tensor_columns": 640}, "needs 640 columns of tensor memory, there are 512"),
        ({"num_warps": 32, "registers": 72}, "needs 73,728 registers, there are 65,536"),
        ({"error": "CompilationError: no"}, "does not compile: CompilationError: no"),
    ],
)
def test_what_speaks_against_a_kernel_is_said(change: dict[str, Any], reason: str) -> None:
    assert fits(SMALL, H100)
    wanting = dataclasses.replace(SMALL, **change)
    assert not fits(wanting, H100)
    assert objection(wanting, H100) == reason


# --------------------------------------------------------------------------------------------------- compiling


@needs_triton
def test_kernels_are_compiled_for_gpus_that_are_not_here() -> None:
    found = {name: compile_kernels([product()], GPUS[name])[0] for name in ("a100-80", "h100", "mi300x")}
    for name, resources in found.items():
        assert fits(resources, GPUS[name]), resources
        assert resources.num_warps == 4 and 16 < resources.registers < 256
        assert resources.loop_instructions > 10
    assert set(found["a100-80"].tensor_cores) == {"mma.sync"}
    assert set(found["h100"].tensor_cores) == {"wgmma.mma_async"}
    assert set(found["mi300x"].tensor_cores) == {"v_mfma"}
    for name in ("a100-80", "h100"):  # 64 x 64 float16 of 128 threads: 4 reads of 16 bytes each of x and y
        assert found[name].loop_reads == found[name].loop_copies == {"16": 8}
        assert found[name].copied_share == 1.0
    assert found["mi300x"].loop_reads == {"16": 4} and not found["mi300x"].loop_copies  # 256 threads
    assert found["a100-80"].shared >= 2 * 2 * 64 * 64 * 2  # two tiles of two stages


@needs_triton
def test_what_the_compiler_refuses_is_a_result_beside_the_others() -> None:
    bad, missing, good = compile_kernels([product(kernel="wrong"), product(kernel="absent"), product(32)], H100)
    assert "CompilationError" in bad.error or "ValueError" in bad.error, bad
    assert objection(bad, H100).startswith("does not compile: ")
    assert "absent" in missing.error
    assert fits(good, H100)


@needs_triton
def test_a_kernel_that_kills_the_compiler_is_a_result_and_is_not_remembered(own_cache: Path) -> None:
    deadly = product(text=KERNELS + "\nimport os, sys\nsys.stderr.write('that was it')\nos._exit(3)\n")
    first, dead, last = compile_kernels([product(), deadly, product(32)], H100)
    assert dead.error == "the compiler died: that was it"
    assert fits(first, H100) and fits(last, H100)
    assert len(list(own_cache.glob("*.json"))) == 2


@needs_triton
def test_what_was_found_is_kept_by_text_arguments_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [product(), dataclasses.replace(product(32), texts=("ttir", "ptx"))]
    before = compile_kernels(requests, H100)
    assert "tt.dot" in before[1].texts["ttir"] and ".target sm_90" in before[1].texts["ptx"]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to compile")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert compile_kernels(requests, H100) == before
    assert compile_kernels(requests[:1], GPUS["h200"]) == before[:1]  # of the same architecture
    for other in (product(num_stages=2), product(16), product(text=KERNELS + "\n")):
        with pytest.raises(AssertionError, match="nothing is left"):
            compile_kernels([other], H100)
    with pytest.raises(AssertionError, match="nothing is left"):
        compile_kernels(requests, GPUS["a100-80"])
    monkeypatch.setattr(gpu_resources, "triton_version", lambda: "another")
    with pytest.raises(AssertionError, match="nothing is left"):
        compile_kernels(requests, H100)


def test_without_triton_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    gpu_resources.triton_version.cache_clear()
    with pytest.raises(FhoptError, match=r"Triton is not installed\. Install it: pip install 'triton>=3\.6'"):
        compile_kernels([product()], H100)
    gpu_resources.triton_version.cache_clear()


@needs_triton
def test_what_asks_for_more_shared_memory_than_exists_is_found() -> None:
    large, small = compile_kernels([product(128, num_stages=8), product(128, num_stages=2)], H100)
    assert not large.error and large.shared > H100.block_shared
    assert objection(large, H100) == f"needs {large.shared:,} bytes of shared memory, a block may have 232,448"
    assert fits(small, H100)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "spec"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_the_chosen_configuration_fits_and_uses_tensor_cores(spec: KernelSpec, name: str) -> None:
    best = choose(spec, 4, GPUS[name], 2).best
    assert best is not None and fits(best.resources, GPUS[name])
    assert best.resources.spilled == 0 and sum(best.resources.tensor_cores.values()) > 0
    assert best.resources.loop_copies  # rows are copied ahead of their use
    assert tuned_config(spec, 4, name) == best.config


def fitted_rows(key: dict[int, int], value: dict[int, int], dtype: str = "bfloat16") -> KernelSpec:
    """Tiers (bits: width) as fitting makes them for a GPU."""
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
def test_rows_that_are_fitted_for_a_gpu_fit_it_with_the_default(name: str) -> None:
    fitted = {"a100-80": FITTED[3:], "l4": FITTED[::3], "h100": FITTED[1:]}[name]
    for (spec, rows), choice in zip(fitted, choose_each(fitted, GPUS[name], 1), strict=True):
        (verdict,) = choice.verdicts
        assert not verdict.reason, (spec.name, rows, verdict.reason)
        assert verdict.config == default_config(spec, rows)


PLANED = KernelSpec(((6, 64, 0.08), (3, 64, 0.5)), ((5, 64, 0.15), (16, 64, 0.0)), 128, 128, "float16", True)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100-80", "l4", "h100"])
def test_ranges_of_tokens_can_be_merged_whatever_the_rows_are(name: str) -> None:
    every = (PLANED, *SPECS, *(spec for spec, _ in FITTED))
    first = ("h100", "l4", "a100-80").index(name)
    specs = every[first::3]  # no tensor cores, little memory: processors hardly matter
    requests = [merge_request(render(spec, "triton"), spec) for spec in specs]
    for spec, found in zip(specs, compile_kernels(requests, GPUS[name]), strict=True):
        assert not objection(found, GPUS[name]), (spec.name, found)
        assert not found.tensor_cores and found.shared < 4096, (spec.name, found)
        assert occupancy(found, GPUS[name]).share >= 0.25, (spec.name, found)


# --------------------------------------------------------------------------------------------------- choosing


Compiler = Callable[[dict[Config, Resources]], tuple[Config, ...]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Makes given configurations the candidates, with given resources."""

    def plant(found: dict[Config, Resources]) -> tuple[Config, ...]:
        def compile_them(requests: Sequence[Request], *_: Any) -> list[Resources]:
            blocks = {(c.block_t, c.num_warps, c.num_stages): r for c, r in found.items()}
            keys = [
                (r.constexprs["BLOCK_T"], r.options["num_warps"], r.options["num_stages"]) for r in requests
            ]  # fmt: skip
            return [blocks[key] for key in keys]

        monkeypatch.setattr(tuning, "compile_kernels", compile_them)
        monkeypatch.setattr(tuning, "candidates", lambda *_: tuple(found))
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
    choice = choose(SPECS[0], 4, H100)
    assert choice.best is not None and choice.best.config == small
    reasons = {v.config: v.reason for v in choice.verdicts}
    assert reasons[small] == ""
    assert reasons[large] == "needs 300,000 bytes of shared memory, a block may have 232,448"
    assert reasons[plain] == "uses no tensor core"


def test_bytes_under_way_come_first_then_instructions_a_token(compiled: Compiler) -> None:
    ahead = dataclasses.replace(SMALL, loop_reads={"16": 4}, loop_copies={"16": 4})
    few, many, busy, idle = compiled(
        {
            Config(16, 16, 4, 2): dataclasses.replace(SMALL, registers=255),  # 2 blocks of 16 tokens
            Config(32, 16, 4, 4): dataclasses.replace(ahead, registers=64),
            Config(64, 16, 4, 4): dataclasses.replace(ahead, registers=64, loop_instructions=400),
            Config(64, 16, 8, 4): dataclasses.replace(ahead, registers=64, loop_instructions=50),
        }
    )
    choice = choose(SPECS[0], 4, H100)
    verdicts = {v.config: v for v in choice.verdicts}
    row = row_bytes(SPECS[0])
    assert row == 32 + 32 + 8 + 2 + 32 + 16 + 2
    assert verdicts[few].bytes_ahead == 2 * 16 * row
    assert verdicts[many].bytes_ahead == 8 * 32 * 3 * row  # all copied: a stage less than there are
    assert verdicts[busy].token_instructions == 400 * 4 / 64
    assert verdicts[idle].token_instructions == 50 * 4 / 64  # as compiled: of 4 warps
    assert choice.best is not None and choice.best.config == idle


def test_more_rows_than_a_tile_holds_are_more_work(compiled: Compiler) -> None:
    compiled({Config(64, 16, 4, 3): SMALL})
    assert choose(SPECS[0], 33, H100).verdicts[0].token_instructions == 3 * 100 * 4 / 64


def test_only_so_many_candidates_are_compiled_evenly_with_the_first(compiled: Compiler) -> None:
    all_of_them = compiled({Config(64, 16, 4, stages): SMALL for stages in range(1, 11)})
    tried = [v.config for v in choose(SPECS[0], 4, H100, 3).verdicts]
    assert tried == [all_of_them[0], all_of_them[3], all_of_them[6]]
    assert len(choose(SPECS[0], 4, H100).verdicts) == len(choose(SPECS[0], 4, H100, 99).verdicts) == 10


def test_nothing_is_chosen_where_nothing_fits(compiled: Compiler) -> None:
    compiled({Config(64, 16, 4, 3): dataclasses.replace(SMALL, spilled=4)})
    choice = choose(SPECS[0], 4, H100)
    assert choice.best is None and [v.reason for v in choice.verdicts] == ["spills 4 bytes a thread"]
    assert tuned_config(SPECS[0], 4, "h100") is None


# --------------------------------------------------------------------------------------------------- tuning


H100_NAME = "NVIDIA H100 80GB HBM3"
WORKLOAD = Workload(batch=1, heads=4, key_heads=2, value_heads=2, tokens=64)


def stopwatch(times: dict[Config, float], calls: list[Config]) -> dict[str, Any]:
    """A kernel that notes its configuration and a timer that tells the time of it."""

    def kernel(*_: Any, config: Config, **__: Any) -> None:
        if config not in times:
            raise OSError("out of resource")
        calls.append(config)

    def timer(call: Callable[[], object]) -> float:
        call()
        return times[calls[-1]]

    return {"kernel": kernel, "timer": timer, "device": "cpu", "device_name": H100_NAME}


def test_tuning_keeps_the_fastest_for_device_and_spec(compiled: Compiler) -> None:
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
    assert calls == [one, two]  # what spills is not even tried
    assert found.best == two and found.times_ms == {one: 2.0, two: 1.0}
    assert found.rejected == {three: "spills 4 bytes a thread", four: "does not run: out of resource"}
    assert tuned_config(SPECS[0], WORKLOAD.rows, H100_NAME) == two
    assert tuned_config(SPECS[0], 64, H100_NAME) is None
    assert tuned_config(SPECS[1], WORKLOAD.rows, H100_NAME) is None
    assert tuned_config(SPECS[0], WORKLOAD.rows, "NVIDIA A100-SXM4-80GB") is None


def test_what_was_chosen_serves_until_something_is_tuned(compiled: Compiler) -> None:
    one, two = compiled({Config(16, 16, 4, 3): SMALL, Config(32, 16, 4, 3): SMALL})
    assert tuned_config(SPECS[0], 2, H100_NAME) is None
    best = choose(SPECS[0], 2, H100).best
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
def test_devices_are_known_by_the_names_that_torch_tells(told: str, name: str | None) -> None:
    found = gpu_named(told)
    assert (found and found.name) == name
