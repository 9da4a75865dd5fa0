"""Kernel configurations."""

from __future__ import annotations

import pytest
import torch
from triton_machine_code import INT4, StubModule

from fhopt.codegen.gpu.configs import Config, candidate_configs, default_config
from fhopt.codegen.gpu.launch import TritonKernel
from fhopt.plan.kernel_spec import KernelSpec

# --------------------------------------------------------------------------------------------------- candidates


def test_candidates_begin_with_the_default_and_are_unique() -> None:
    for rows in (1, 8, 20, 500):
        found = candidate_configs(INT4, rows)
        assert found[0] == default_config(INT4, rows)
        assert len(set(found)) == len(found) > 5
        assert all(config.block_m & (config.block_m - 1) == 0 for config in found)


# --------------------------------------------------------------------------------------------------- calls


def test_the_tuned_configuration_is_used_and_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    asked, tuned = [], Config(128, 16, 8, 4)

    def tuned_config(spec: KernelSpec, rows: int, name: str) -> Config | None:
        asked.append((rows, name))
        return tuned if rows <= 4 else None

    monkeypatch.setattr("fhopt.codegen.gpu.launch.tuned_config", tuned_config)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    kernel = TritonKernel(StubModule("stub"), INT4)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert kernel._config(3, first) == kernel._config(4, first) == kernel._config(4, second) == tuned
    assert kernel._config(5, first) == default_config(INT4, 5)
    assert asked == [(4, "card 0"), (4, "card 1"), (8, "card 0")]
    assert kernel._config(3, torch.device("cpu")) == default_config(INT4, 3)
    assert len(asked) == 3
