"""Evaluation of the results of benchmarks/cpu/attention.py; `make bench-attention` measures them."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch

from benchmarks.cpu import attention, attention_contenders, attention_report, attention_shapes
from benchmarks.cpu.attention_contenders import AttentionContender
from benchmarks.cpu.attention_shapes import AttentionCase
from fhopt.codegen.dispatch import register_kernels


@pytest.mark.parametrize(("dim", "size"), [(64, 6), (64, 30), (64, 62), (128, 14), (128, 62), (128, 126)])
def test_bit_groups_fill_a_row_and_are_never_wider(dim: int, size: int) -> None:
    tiers = attention_contenders.spectrum_tiers(dim, size)
    assert size - dim // 8 < sum(bits * width for bits, width, _ in tiers) // 8 <= size
    assert sum(width for _, width, _ in tiers) <= dim
    assert [bits for bits, _, _ in tiers] == sorted({bits for bits, _, _ in tiers}, reverse=True)


@pytest.mark.slow
def test_each_implementation_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MIN_CALLS", 2)
    real = attention_contenders.torch_implementations

    def without_compiling(*operands: Any) -> Any:
        return ((name, call) for name, call in real(*operands) if "inductor" not in name and "flex" not in name)

    monkeypatch.setattr(attention_contenders, "torch_implementations", without_compiling)
    register_kernels()
    case = AttentionCase("GQA 9/3x64", 96, 2, "float32", 1)
    found = attention.measure(case, 0.0)
    assert {one.name: one.error for one in found if one.error} == {}
    assert {"sdpa", "bmm", "fhopt full", "fhopt half width, float16", "fhopt 8x"} <= {one.name for one in found}
    rows = attention.rows_of(case, found, 10.0)
    times = {row.impl: row for row in rows if row.metric == "time_ms"}
    best = min(row.value for name, row in times.items() if not name.startswith("fhopt"))
    assert all(row.baseline == best and row.ratio == best / row.value for row in times.values())
    sizes = {row.impl: row.value for row in rows if row.metric == "bytes"}
    assert sizes["fhopt full"] == sizes["sdpa"] == case.exact_bytes
    assert 0.9 * case.exact_bytes / 8 < sizes["fhopt 8x"] <= case.exact_bytes / 8


def test_a_wrong_result_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def contenders(case: AttentionCase) -> Any:
        yield AttentionContender("right", lambda: torch.ones(2), 8), lambda: torch.ones(2).double()
        yield AttentionContender("wrong", lambda: torch.zeros(2), 8), lambda: torch.ones(2).double()
        yield AttentionContender("failing", lambda: torch.ones(2).expand(3), 8), lambda: torch.ones(2).double()

    monkeypatch.setattr(attention, "contenders", contenders)
    right, wrong, failing = attention.measure(AttentionCase("GQA 9/3x64", 8, 1, "float32", 1), 0.0)
    assert right.seconds and not right.error
    assert "differs from float64 by 1.0e+00" in wrong.error and not wrong.seconds
    assert "RuntimeError" in failing.error and not failing.seconds


def test_cases_too_large_for_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 2e9})())
    fitting, left_out = attention_shapes.cases(("MHA 32x128",), (4096, 32768), (1,), ("float32",), (1, 2))
    assert [case.tokens for case in fitting] == [4096, 4096]
    assert len(left_out) == 2 and "needs 4 GB" in left_out[0]


def test_the_table_has_every_case_and_targets_are_compared() -> None:
    rows = []
    for tokens in (4096, 32768):
        case = AttentionCase("GQA 32/8x128", tokens, 1, "float32", 1)
        found = [
            AttentionContender("bmm", torch.ones, 100, False, [2.0]),
            AttentionContender("fhopt 8x", torch.ones, 12, True, [0.25]),
        ]
        rows += attention.rows_of(case, found, 20.0)
    assert attention_report.promised(rows) == [("GQA 32/8x128, T=32768, B=1, float32, 1 thread: fhopt 8x", 5.0, 8.0)]
    table = attention_report.summary(rows)
    assert [list(column.cells)[1] for column in table.columns if column.header == "fhopt 8x"] == ["250 (8.00x, 0 %)"]
