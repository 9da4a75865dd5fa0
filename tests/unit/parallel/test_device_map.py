"""Device maps given as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from offloaded_models import PLACES

from fhopt.cli.app import main
from fhopt.errors import FhoptError
from fhopt.parallel import device_map


def test_processes_of_a_machine_share_its_gpus_and_its_memory() -> None:
    memory: dict[int | str, int] = {0: 10, 1: 11, 2: 12, 3: 13, "cpu": 100}
    assert device_map.share_memory(memory, 1, 2) == {2: 12, 3: 13, "cpu": 50}
    shares = [device_map.share_memory(memory, rank, 3) for rank in range(3)]
    assert sorted(d for s in shares for d in s if isinstance(d, int)) == [0, 1, 2, 3]
    assert device_map.share_memory({"cpu": 100}, 0, 4) == {"cpu": 25}
    with pytest.raises(FhoptError, match=r"8 processes exceed 4 GPUs.*--nproc-per-node"):
        device_map.share_memory(memory, 0, 8)


def test_device_maps_given_as_text_become_options(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(PLACES))
    assert device_map.placement(None) == {} and device_map.placement("cpu") == {"device_map": {"": "cpu"}}
    assert device_map.placement(str(tmp_path / "map.json")) == {"device_map": PLACES}
    auto = device_map.placement("auto")
    assert auto["device_map"] == "auto" and auto["max_memory"]["cpu"] > 0


@pytest.mark.parametrize("text", ["warp", "cuda:99", "absent.json"])
def test_unknown_devices_are_refused(text: str) -> None:
    with pytest.raises(FhoptError, match="expected"):
        device_map.placement(text)


def test_a_device_map_needs_a_folder() -> None:
    done = CliRunner().invoke(main, ["eval", "demo", "--device-map", "cpu"])
    assert done.exit_code == 2 and "'demo' is not a folder" in done.output
