"""The GPU benchmark (benchmarks/gpu/suite.py) without a GPU: dry runs, and the parts that need no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from needs import needs_triton

from benchmarks.gpu import attention, cases, checks, decode_steps, timing
from benchmarks.recording import Row
from fhopt.ops import packing

ROOT = Path(__file__).parents[3]


def run(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark in a subprocess: Triton interprets or compiles, never both."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    command = [sys.executable, "-m", "benchmarks.gpu.suite", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def results() -> dict[str, int]:
    """Return the modification time of each results file."""
    return {path.name: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}


# --------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@needs_triton
def test_a_dry_run_takes_every_step_and_does_not_change_the_results(tmp_path: Path) -> None:
    before, out = results(), tmp_path / "out"
    done = run(tmp_path, "--dry", "--tune", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": Config(block_t=") == len(cases.TINY.latents)
    assert results() == before
    rows = [Row(**row) for row in json.loads((out / "gpu-dry.json").read_text())["rows"]]
    assert all(row.case.startswith("dry, ") and row.value > 0 for row in rows)
    of_attention = [
        row for row in rows if row.metric == "time_ms" and row.case == "dry, GQA 4/2x16, batch 1, 32 tokens"
    ]
    impls = {row.impl for row in of_attention}
    assert {"sdpa math", "sdpa math, heads as queries", "products and softmax", "FlexAttention"} < impls
    dense = min(row.value for row in of_attention if not row.impl.startswith("fhopt"))
    ours = [row for row in of_attention if row.impl.startswith("fhopt")]
    assert {row.impl for row in ours} == {"fhopt, uncoded", "fhopt 11.6x"}
    assert all(row.baseline == dense and row.ratio == pytest.approx(dense / row.value, rel=1e-5) for row in ours)
    steps = [row for row in rows if row.metric == "step_ms"]
    assert [row.impl for row in steps] == ["transformers, sdpa", "transformers, grouped", "fhopt 11.6x"]
    assert {row.case for row in steps} == {"dry, tiny, batch 1, 40 tokens"}
    page = (out / "gpu-dry.md").read_text()
    assert "dense ways: left out, needs 0.000524 GB" in page and "| fhopt 11.6x |" in page
    assert (out / "gpu-dry.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


@pytest.mark.slow
@needs_triton
def test_a_wrong_kernel_ends_the_run_before_any_measurement(tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    (spoiled / "sitecustomize.py").write_text(
        "import fhopt.codegen.gpu.attention as module\n"
        "render = module.render_triton\n"
        "module.render_triton = lambda spec: render(spec).replace('* LN2', '* 0.7')\n"
    )
    path = os.pathsep.join([str(spoiled), str(ROOT)])
    done = run(tmp_path, "--dry", "--check", PYTHONPATH=path, FHOPT_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "Error: attention, latent_k16f_v16f_float32_" in done.stderr and "one range is wrong on dry" in done.stderr
    assert "Nothing was measured" in done.stderr and "calls are right" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_is_needed(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == timing.NEEDS and "--dry" in timing.NEEDS


# --------------------------------------------------------------------------------------------------- parts


def test_the_first_failed_check_is_named_with_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("out of\n resources")

    machine, sizes = timing.dry_machine(), cases.TINY_SIZES
    for compare, words in ((lambda: "3 numbers differ", "3 numbers differ"), (fail, "it fails (out of resources)")):
        monkeypatch.setattr(
            checks, "checks", lambda *_, c=compare: iter([("encode", str), ("pack", c), ("unpack", fail)])
        )
        with pytest.raises(checks.WrongKernel) as found:
            checks.check(machine, sizes)
        assert found.value.message.startswith(f"pack is wrong on dry: {words}. Nothing was measured.")


def test_the_packing_check_compares_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_pack = pytest.importorskip("fhopt.codegen.gpu.packing")
    machine = timing.dry_machine()
    monkeypatch.setattr(triton_pack, "pack_triton", packing.pack_reference)
    assert checks.compare_pack(machine) == ""
    monkeypatch.setattr(triton_pack, "pack_triton", lambda z, *plan: packing.pack_reference(z * 1.1, *plan))
    assert "numbers differ from the reference" in checks.compare_pack(machine)


class Recorder:
    """A mock of torch.cuda's graphs, streams and events; the time of a replay is the number of calls in the graph."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    now = 0.0
    recorded: ClassVar[list[Any]] = []

    def __enter__(self) -> Recorder:
        Recorder.recorded.clear()  # earlier calls are not in the graph
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def replay(self) -> None:
        Recorder.now += len(Recorder.recorded)

    def record(self) -> None:
        self.at = Recorder.now

    def elapsed_time(self, end: Recorder) -> float:
        return end.at - self.at

    def wait_stream(self, _: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def test_a_graph_has_every_call_once_per_repetition_and_gives_the_time_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "CUDAGraph", "Event"):
        monkeypatch.setattr(torch.cuda, name, Recorder)
    for name in ("stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Recorder())
    calls = [lambda i=i: Recorder.recorded.append(i) for i in range(3)]
    assert timing.graph_ms(calls, 2) == 1.0
    assert Recorder.recorded == [0, 1, 2, 0, 1, 2]


def test_the_measured_latents_have_the_target_ratios() -> None:
    found = {
        shape.name: [shape.label(latent, torch.bfloat16) for latent in shape.latents]
        for shape in cases.RunSizes().shapes
    }
    of_gqa = ["fhopt, uncoded", "fhopt 3.9x", "fhopt 5.2x", "fhopt 7.8x"]
    assert found == {
        "MHA 32x128": ["fhopt, uncoded", "fhopt 3.9x", "fhopt 6.6x", "fhopt 7.9x"],
        "GQA 32/8x128": of_gqa,
        "GQA 64/8x128": of_gqa,
    }


def test_rotating_buffers_exceed_the_cache_and_take_long_enough() -> None:
    machine = replace(timing.dry_machine(), cold=1000, long=5000)
    made, turns = timing.rotating(machine, 300, object)
    assert len(set(map(id, made))) == 4 and 300 * 4 * turns >= 5000
    assert timing.rotating(machine, 9000, int) == ([0], 1)
    with pytest.raises(MemoryError, match=r"needs 0\.001 GB, 0\.0007 GB are free"):
        timing.rotating(replace(machine, free=lambda: 700_000), 1_000_000, object)


def test_the_number_of_layers_leaves_room_for_weights_and_caches() -> None:
    model = cases.LLAMA_2_7B
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    cache = 2 * 8 * (32768 + cases.SPARE) * 4096
    rest = 2 * 32000 * 4096 + 2 * cache
    assert model.depth(8, 32768, rest + 5.5 * (layer + cache)) == 5
    assert model.depth(8, 32768, 1e15) == 32 and model.depth(8, 32768, 0) == 0


def test_a_scaled_step_is_extrapolated_linearly_from_two_measured_ones() -> None:
    times = {8: {"transformers, sdpa": 18.0, "fhopt 8x": 10.0}, 4: {"transformers, sdpa": 10.0, "fhopt 8x": 6.0}}
    rows = decode_steps.step_rows("case", 32, times)
    assert [(row.case, row.metric) for row in rows[:4]] == [
        (f"case, {n} of 32 layers", "step_ms") for n in (8, 8, 4, 4)
    ]
    assert [(row.case, row.metric, row.value, row.baseline, row.ratio) for row in rows[4:]] == [
        ("case", "step_ms_scaled", 66.0, 66.0, 1.0),
        ("case", "step_ms_scaled", 34.0, 66.0, 66 / 34),
    ]


def test_a_step_of_all_layers_is_not_scaled() -> None:
    rows = decode_steps.step_rows(
        "case", 2, {2: {"transformers, sdpa": 3.0, "transformers, grouped": 2.0, "fhopt 8x": 1.0}}
    )
    assert [(row.metric, row.ratio) for row in rows] == [("step_ms", 2 / 3), ("step_ms", 1.0), ("step_ms", 2.0)]
    assert decode_steps.depths(2, 2) == (2,) and decode_steps.depths(9, 32) == (9, 4)


@pytest.mark.parametrize(
    "latent", (*cases.TINY.latents[1:], cases.LatentStorage(2, cases.tiers((8, 16)), cases.tiers((2, 8))))
)
def test_a_handmade_plan_has_orthonormal_bases_and_the_counted_bytes(latent: Any) -> None:
    shape = cases.TINY
    plan = decode_steps.hand_plan(cases.TINY_NETWORK, latent, 2)
    assert sum(site.token_bytes() for site in plan.sites) == 2 * shape.latent_bytes(latent, torch.bfloat16)
    for side in (plan.sites[0].key, plan.sites[0].value):
        product = side.encode @ side.encode.mT
        torch.testing.assert_close(product, torch.eye(side.width).expand_as(product), rtol=0, atol=1e-5)
    assert not torch.equal(plan.sites[0].key.encode, plan.sites[1].key.encode)


def test_every_torch_implementation_gives_the_same_attention() -> None:
    from torch.nn.attention import SDPBackend

    query, key, value = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    wanted = attention.by_sdpa(SDPBackend.MATH, False, query, key, value)
    for found in (
        attention.by_products(query, key, value),
        attention.by_sdpa(SDPBackend.MATH, True, query, key, value),
    ):
        torch.testing.assert_close(found.reshape(wanted.shape), wanted)
