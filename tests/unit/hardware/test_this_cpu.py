"""The device "here": measured once, cached, and accepted by every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fhopt.cli.app import main
from fhopt.codegen.build import describe_kernels
from fhopt.errors import FhoptError
from fhopt.hardware import this_cpu
from fhopt.hardware.devices import find_device
from fhopt.system import cores


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use an empty cache folder, and measurements of a few milliseconds."""
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(this_cpu, "SECONDS", 0.0)
    monkeypatch.setattr(this_cpu, "VECTOR", 1 << 20)
    monkeypatch.setattr(this_cpu, "SIDE", 64)
    this_cpu.measured.cache_clear()


def test_measurements_are_cached_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = this_cpu.measured(1)
    (kept,) = (tmp_path / "cache").glob("machine-*.json")
    assert json.loads(kept.read_text())["threads"] == 1
    this_cpu.measured.cache_clear()
    monkeypatch.setattr(this_cpu, "measure_cpu", None)  # would fail
    assert this_cpu.measured(1) == first


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"threads": 1}'])
def test_an_invalid_file_is_measured_again(tmp_path: Path, text: str) -> None:
    this_cpu.measured(1)
    (kept,) = (tmp_path / "cache").glob("machine-*.json")
    kept.write_text(text)
    this_cpu.measured.cache_clear()
    assert this_cpu.measured(1).read_gb_s > 0
    assert json.loads(kept.read_text())["threads"] == 1


def test_an_unwritable_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "file"))
    assert this_cpu.measured(1).copy_gb_s > 0


def test_the_number_of_threads_is_restored_after_a_measurement() -> None:
    before = torch.get_num_threads()
    this_cpu.measure_cpu(before + 1)
    assert torch.get_num_threads() == before


def test_here_is_a_device_with_the_measured_rates() -> None:
    found = find_device("here:1")
    measured = this_cpu.measured(1)
    assert (found.name, found.kind) == ("here:1", "cpu")
    assert (found.bandwidth_gb_s, found.vector_tflops) == (measured.read_gb_s, measured.float32_tflops)
    assert found.matrix_tflops >= found.vector_tflops
    assert find_device("here").name == f"here:{torch.get_num_threads()}"


@pytest.mark.parametrize(("units", "matrix"), [(("AVX-512", "AMX BF16"), 0.8), (("AVX-512 BF16",), 2.8)])
def test_a_matrix_unit_does_not_speed_up_decode_steps(
    units: tuple[str, ...], matrix: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = this_cpu.CpuRates("a CPU", 2, 25.0, 27.0, 0.4, 2.8, 25.0)
    monkeypatch.setattr(this_cpu, "measured", lambda threads: rates)
    monkeypatch.setattr(this_cpu, "vector_units", lambda: units)
    assert find_device("here").matrix_tflops == pytest.approx(matrix)


@pytest.mark.parametrize(
    ("flags", "alike"),
    [
        ("avx2 avx512f avx512vbmi umip avx512_vbmi2 avx512_vnni avx512_bf16", "cpu"),  # Zen 4, as Linux names its flags
        ("avx2 avx512f avx512bw avx512_vnni", "cpu-avx2"),  # Cascade Lake
        ("fma avx f16c avx2", "cpu-avx2"),  # Zen 3
        ("", "cpu-avx2"),
    ],
)
def test_the_cpu_of_the_table_has_the_same_instructions(
    flags: str, alike: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(this_cpu, "reported", lambda field: flags if field == "flags" else "")
    assert this_cpu.closest_cpu() == alike
    assert find_device(alike).kind == "cpu"


@pytest.mark.parametrize("name", ["here:0", "here:many", f"here:{cores() + 1}", "her"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(FhoptError, match=r"is unknown; expected .*here"):
        find_device(name)


def test_the_command_prints_the_measurements() -> None:
    result = CliRunner().invoke(main, ["device", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "read, GB/s" in result.output and f"Kernels: {describe_kernels()}." in " ".join(result.output.split())
    found = json.loads(CliRunner().invoke(main, ["device", "--threads", "1", "--json"]).output)
    assert found["measured"][0]["threads"] == 1 and found["kernels"] == describe_kernels()


def test_more_threads_than_cores_are_refused_in_one_line() -> None:
    result = CliRunner().invoke(main, ["device", "--threads", "99999"])
    assert result.exit_code == 2 and "expected at most" in result.output


@pytest.mark.parametrize(
    ("flags", "has_them"),
    [
        ("fpu avx2 fma", False),
        ("avx512f avx512_bf16", True),
        ("avx2 amx_bf16 amx_tile", True),
        ("avx512f bf16x", False),
    ],
)
def test_bfloat16_instructions_are_known_by_their_flags(
    monkeypatch: pytest.MonkeyPatch, flags: str, has_them: bool
) -> None:
    monkeypatch.setattr(this_cpu, "reported", lambda field: flags if field == "flags" else "")
    for by_loops in (False, True):  # torch need not use the CPU's instructions
        monkeypatch.setattr(this_cpu, "multiplies_by_loops", lambda dtype, value=by_loops: value)
        assert this_cpu.multiplies_bfloat16() == (has_them and not by_loops)
