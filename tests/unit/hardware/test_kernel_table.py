"""`fhopt kernels`: files, and the same table as JSON and as text."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hand_plans import CODED, random_plan
from needs import needs_triton

from fhopt.cli.app import main
from fhopt.codegen.build import render_kernel
from fhopt.codegen.gpu import configs, resources, tuning
from fhopt.codegen.gpu.gpus import GPUS
from fhopt.codegen.gpu.resources import CompileRequest, Resources
from fhopt.hardware import kernel_table
from fhopt.hardware.devices import DEVICES
from fhopt.hardware.kernel_table import Options, cells, kernels_of, write_kernels
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan

pytestmark = pytest.mark.usefixtures("own_cache")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["kernels", *map(str, arguments)])


@pytest.fixture
def plan() -> LatentPlan:
    """Two sites with one kernel, a third with half of its channels in other codes, and a sliding one."""
    quantized = random_plan("head", CODED)
    (site,) = quantized.sites
    other = random_plan("head", tuple(reversed(CODED))).sites[0]

    def named(name: str, like: Any, **changes: Any) -> Any:
        return dataclasses.replace(like, site=dataclasses.replace(like.site, name=name, **changes))

    sites = (site, named("layers.1", site), named("layers.2", other), named("layers.3", site, mask="sliding", window=8))
    return dataclasses.replace(quantized, sites=sites)


@pytest.fixture
def saved(plan: LatentPlan, tmp_path: Path) -> Path:
    return plan.save(tmp_path / "plan")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mock a compiler in which every second kernel spills."""

    def compile_them(requests: Sequence[CompileRequest], *_: Any) -> list[Resources]:
        good = Resources(4, 100, 0, 9000, 0, {"mma.sync": 12}, 200, {"16": 2, "4": 1}, {"16": 2})
        return [good if i % 2 == 0 else dataclasses.replace(good, spilled=12) for i in range(len(requests))]

    monkeypatch.setattr(tuning, "compile_kernels", compile_them)
    monkeypatch.setattr(configs, "triton_version", lambda: "3")
    monkeypatch.setattr(kernel_table, "triton_version", lambda: "3")


def markdown_rows(text: str) -> list[list[str]]:
    """Return the cells of the first table, without its rule."""
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [rows[0], *rows[2:]]


@pytest.mark.usefixtures("compiled")
def test_json_says_what_the_table_says(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call(saved, "--device", "h100", "--out", out, "--batch", "2", "--candidates", "0", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["folder"] == str(out)
    assert content == {"folder": str(out)} | json.loads((out / "kernels.json").read_text())
    assert (content["device"], content["batch"], content["tokens"], content["triton"]) == ("h100", 2, 32_768, "3")
    head, *rows = markdown_rows((out / "kernels.md").read_text())
    assert len(rows) == len(content["kernels"]) == 2
    for cell, row in zip(rows, content["kernels"], strict=True):
        shown, found = dict(zip(head, cell, strict=True)), row["compiled"]
        config = found["config"]
        assert shown == {
            "file": row["file"],
            "sites": ", ".join(row["sites"]),
            "H": "4",
            "J": "2",
            "bytes/token": f"{row['bytes_per_token']:,}",
            "operations/token": f"{row['operations_per_token']:,}",
            "roofline at 32,768": f"{1e6 * row['roofline_seconds']:.3g} µs",
            "bound by": row["bound"],
            "registers": "100",
            "spilled": "0 B",
            "shared": "9,000 B",
            "warps resident": "16 (25%, registers)",
            "instructions/token": f"{found['token_instructions']:.3g}",
            "reads of a thread": "2 x 16 B, 1 x 4 B",
            "tensor cores": "12 mma.sync",
            "configuration": f"{config['block_t']} x {config['block_m']}, {config['num_warps']} warps, "
            f"{config['num_stages']} stages",
            "rejected": str(len(row["rejected"])),
        }
        assert len(row["rejected"]) > 2 and {x["reason"] for x in row["rejected"]} == {"spills 12 bytes per thread"}
    lines = (out / "kernels.md").read_text().count("| spills 12 bytes per thread |")
    assert lines == sum(len(row["rejected"]) for row in content["kernels"])


@pytest.mark.usefixtures("compiled")
def test_the_terminal_shows_the_same_cells(saved: Path, tmp_path: Path, plan: LatentPlan) -> None:
    result = call(saved, "--device", "a100-80", "--out", tmp_path / "out", "--candidates", "0")
    assert result.exit_code == 0, result.output
    head, rows = cells(write_kernels(plan, tmp_path / "again", Options("a100-80", candidates=0)))
    for word in (*head, *(cell for row in rows for cell in row)):
        assert word in result.stdout, word
    assert "spills 12 bytes per thread" in result.stdout
    assert "2 files and kernels.md written to" in result.stdout


@pytest.mark.usefixtures("compiled")
def test_there_is_a_file_for_each_kernel(plan: LatentPlan, tmp_path: Path) -> None:
    made = write_kernels(plan, tmp_path / "out", Options("mi300x", dtype="float16"))
    found = kernels_of(plan, "float16")
    assert [[s.site.name for s in sites] for sites in found.values()] == [["layers.0", "layers.1"], ["layers.2"]]
    for row, ((spec, *_), sites) in zip(made.rows, found.items(), strict=True):
        assert spec == KernelSpec.of(sites[0], "float16") and spec.dtype == "float16"
        text = (tmp_path / "out" / row.file).read_text()
        assert text == render_kernel(spec, "triton") == made.files[row.file]
        ast.parse(text)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*made.files, "kernels.md", "kernels.json"}


def test_numbers_agree_with_the_plan_and_the_cost_model(plan: LatentPlan, tmp_path: Path) -> None:
    made = write_kernels(plan, tmp_path / "out", Options("cpu", batch=3, tokens=10_000, queries=2))
    quantized = 10_000 - plan.sinks - plan.recent - plan.block // 2
    for row in made.rows:
        site = plan.site(row.sites[0])
        assert row.bytes_per_token == site.token_bytes()
        codes = 2 * (16 + 16)  # two latent heads
        assert row.operations_per_token == 2 * 2 * 4 * (16 + 16) + codes
        assert row.rows == 2 * 2 and row.compiled is None and not row.rejected
        cpu = DEVICES["cpu"]
        operations = 3 * quantized * (2 * 2 * 4 * 32 / cpu.matrix_tflops + codes / cpu.vector_tflops)
        assert row.roofline_seconds == pytest.approx(operations / 1e12, rel=1e-9) and row.bound == "arithmetic"


def test_for_a_cpu_the_files_are_cpp_and_nothing_is_compiled(saved: Path, tmp_path: Path, plan: LatentPlan) -> None:
    out = tmp_path / "out"
    result = call(saved, "--device", "cpu:2", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["triton"] == "" and [row["compiled"] for row in content["kernels"]] == [None, None]
    for name, (spec, *_) in zip(
        content["files"], sorted(kernels_of(plan, "bfloat16"), key=lambda k: k[0].name), strict=True
    ):
        assert (out / name).read_text() == render_kernel(spec, "cpp")
    assert "registers" not in (out / "kernels.md").read_text().splitlines()[4]


@pytest.mark.slow
@needs_triton
def test_a_plan_is_compiled_for_an_absent_gpu(plan: LatentPlan, tmp_path: Path) -> None:
    saved = dataclasses.replace(plan, sites=plan.sites[:2]).save(tmp_path / "plan")  # one kernel, compiled for real
    result = call(saved, "--device", "h100", "--out", tmp_path / "out", "--candidates", "1", "--json")
    assert result.exit_code == 0, result.output
    for row in json.loads(result.stdout)["kernels"]:
        found = row["compiled"]
        assert found["spilled"] == 0 and found["shared"] <= GPUS["h100"].block_shared
        assert sum(found["tensor_cores"].values()) > 0 and found["occupancy"]["blocks"] > 0


@pytest.mark.usefixtures("compiled")
def test_if_nothing_fits_the_table_says_so(plan: LatentPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "compile_kernels", lambda requests, *_: [Resources(error="no")] * len(requests))
    made = write_kernels(plan, tmp_path / "out", Options("h100", candidates=2))
    assert [row.compiled for row in made.rows] == [None, None]
    text = (tmp_path / "out" / "kernels.md").read_text()
    assert text.count("| none fits | 2 |") == 2 and text.count("| does not compile: no |") == 4


@pytest.mark.usefixtures("compiled")
def test_more_than_the_default_is_compiled_only_if_it_does_not_fit(
    plan: LatentPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = Resources(4, 100, 0, 9000, 0, {"mma.sync": 12}), Resources(4, 255, 40)
    first = render_kernel(next(iter(kernels_of(plan, "bfloat16")))[0], "triton")
    asked: list[str] = []

    def compile_them(requests: Sequence[CompileRequest], *_: Any) -> list[Resources]:
        """Only the default of the first kernel does not fit."""
        known = len(asked)
        asked.extend(request.text for request in requests)
        return [bad if r.text == first and (known == 0 or i == 0) else good for i, r in enumerate(requests)]

    monkeypatch.setattr(tuning, "compile_kernels", compile_them)
    made = write_kernels(plan, tmp_path / "out", Options("h100", candidates=3))
    assert [text == first for text in asked] == [True, False, True, True, True]
    assert [len(row.rejected) for row in made.rows] == [1, 0] and all(row.compiled for row in made.rows)


def test_a_plan_without_latents_has_no_kernels(plan: LatentPlan, tmp_path: Path) -> None:
    (only,) = (site for site in plan.sites if site.site.mask == "sliding")
    sliding = dataclasses.replace(plan, sites=(only,))
    result = call(sliding.save(tmp_path / "sliding"), "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "none of its 1 sites caches latents" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{plan}", "--device", "v100", "--out", "{tmp}/out"], "expected one of h100, h200, a100-80, a10, l4, 4090"),
        (["{tmp}/none", "--device", "h100", "--out", "{tmp}/out"], "is not a plan"),
        (["{plan}", "--device", "cpu", "--out", "{tmp}/full"], "exists and is not a plan"),
        (["{plan}", "--device", "cpu", "--out", "{tmp}/file/below"], "Choose another folder"),
    ],
)
def test_wrong_input_gets_one_line_and_leaves_nothing(
    arguments: list[str], message: str, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = call(*(a.format(plan=saved, tmp=tmp_path) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_triton_a_gpu_is_refused_and_a_cpu_is_not(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "triton" else real(name, *_))
    resources.triton_version.cache_clear()
    result = call(saved, "--device", "h100", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "pip install 'triton>=3.6'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    assert call(saved, "--device", "cpu", "--out", tmp_path / "out").exit_code == 0
    resources.triton_version.cache_clear()


@pytest.mark.usefixtures("compiled")
def test_a_folder_is_written_completely_or_not_at_all(
    plan: LatentPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_kernels(plan, tmp_path / "out", Options("h100"))
    before = {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}
    write_kernels(plan, tmp_path / "out", Options("h100"))  # overwrites an older one
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == before

    def fail(*_: Any) -> str:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(kernel_table, "render_kernel", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        write_kernels(plan, tmp_path / "new", Options("h100"))
    assert not (tmp_path / "new").exists()
