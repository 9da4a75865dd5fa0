"""`fhopt fit`: sizes, reproducible files, processes that share a calibration."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_models import call, save_tiny_model
from rich.console import Console
from small_models import FittedModel

from fhopt.cli.fit import _show_device, _show_plan
from fhopt.cli.options import resumable
from fhopt.fitting import fit_plan
from fhopt.fitting.statistics import empty_statistics
from fhopt.inspection.tables import plan_table
from fhopt.plan.site import AttentionSite


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "4", "--max-loss", "1%"), "mutually exclusive"),
        (("--ratio", "4", "--ratio", "8"), "fhopt plans fit MODEL --ratio 4 --ratio 8, or"),
        (("--ratio", "4", "--bytes-per-token", "100"), "mutually exclusive"),
        (("--max-loss", "much"), "is invalid; expected a share"),
        (("--max-loss", "0"), "is invalid"),
        (("--layout", "mla"), "is unknown"),
        (("--sequences", "1", "--context", "200"), "more or longer sequences"),
        (("--rate-sequences", "0"), "one more sequence"),
        (("--recent", "0"), "recent and block of at least 1"),
        (("--tokens", "100"), "covered by sinks and residual window"),
        (("--explain", "picture"), "is not an image file name"),
        (("--explain", "."), "is not an image file name"),
        (("--gate-data", "source"), "gate_data requires max_loss"),
        (("--max-loss", "1%", "--pages", "1/8"), "without page selection"),
        (("--max-loss", "1%", "--mass", "0.9"), "without page selection"),
        (("--device", "abacus"), "abacus"),
        (("--code", "trellis", "--device", "h100"), "trellis codes require a CPU"),
    ],
)
def test_sizes_and_samples_that_cannot_work_are_refused_at_once(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = call("fit", "demo", *options, "-o", str(tmp_path / "plan"))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert os.listdir(tmp_path) == []


SAMPLE = ("--sequences", "6", "--rate-sequences", "2", "--context", "256", "--recent", "64", "--json")


def test_sizes_are_those_of_the_context_that_a_plan_is_made_for(
    llama: FittedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = llama.plan(4)
    _show_plan(plan, 512, tmp_path, {}, True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["tokens"] == 512 and printed["ratio"] == plan.ratio(512) < plan.ratio() - 0.1
    _show_plan(plan, 512, tmp_path, {}, False)
    assert f"{plan.ratio(512):.2f}x plan at 512 tokens for 2 sites" in capsys.readouterr().out


def test_a_size_below_the_least_is_refused_before_the_calibration(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    result = call("fit", str(tmp_path / "model"), *SAMPLE, "--ratio", "100", "-o", str(tmp_path / "plan"))
    assert result.exit_code == 2 and "expected at least" in result.stderr, result.output
    assert os.listdir(tmp_path) == ["model"]


def test_the_same_data_and_seed_give_the_same_files(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    for name in "ab":
        result = call("fit", str(tmp_path / "model"), *SAMPLE, "-o", str(tmp_path / name))
        assert result.exit_code == 0, result.output
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_processes_under_torchrun_share_a_calibration(tmp_path: Path) -> None:
    """Sums over two processes differ from those of one by the order of addition, so the bits are the same."""
    from fhopt.plan.latent_plan import LatentPlan

    save_tiny_model(tmp_path / "model")
    fit = ["fit", str(tmp_path / "model"), *SAMPLE]
    alone = call(*fit, "-o", str(tmp_path / "1"))
    assert alone.exit_code == 0, alone.output
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fhopt.cli"]
    command = [sys.executable, *launch, *fit, "-o", str(tmp_path / "2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sites"] == 2  # one process reports
    one, two = (LatentPlan.load(tmp_path / str(count)) for count in (1, 2))
    for left, right in zip(one.sites, two.sites, strict=True):
        assert (left.layout, left.key.tiers, left.value.tiers) == (right.layout, right.key.tiers, right.value.tiers)
        torch.testing.assert_close(left.key.encode, right.key.encode, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kv_heads", "layout", "told"), [(8, "band", True), (8, "head", False), (2, "band", False)])
def test_it_warns_of_a_plan_that_is_slow_on_a_cpu(
    kv_heads: int, layout: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    site = AttentionSite("a", {}, "self", 16, kv_heads, 64, 64, 0.125, None, False, "causal", 0.0, "none", "")
    plan = fit_plan.fit_ratio(empty_statistics([site]), ratio=4, layout=layout, context=64)
    _show_device(plan, 8192, as_json=False)
    assert ("1 of 1 sites share one latent across all kv heads" in capsys.readouterr().out) is told


@pytest.mark.parametrize("finished", [True, False])
def test_ctrl_c_reports_what_is_kept_and_how_to_resume(
    finished: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / ".plan.calibration"
    with pytest.raises(SystemExit) as ended, resumable(checkpoint):
        if finished:
            Path(f"{checkpoint}.moments").touch()
        raise KeyboardInterrupt
    told = capsys.readouterr().err
    assert ended.value.code == 130
    expected = f"are in {checkpoint}.moments. Run the same command to resume." if finished else "Nothing is kept"
    assert told.startswith("stopped. ") and expected in told


def test_the_table_of_a_plan_has_a_line_for_each_site_in_80_columns(llama: FittedModel) -> None:
    plan = llama.plan(4)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    lines = console.export_text().splitlines()
    assert len(lines) == len(plan.sites) + 6 and max(map(len, lines)) <= 80, lines  # title, head, three rules, names
