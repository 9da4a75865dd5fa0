"""Schedules of graphs: native segments, and nodes that run eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowered_functions import CapturedFunction
from needs import needs_compiler
from torch import Tensor

from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.codegen.programs.schedule import EagerNode, NativeSegment, Scheduler, StepSchedule

pytestmark = needs_compiler


def scheduled(captured: CapturedFunction) -> StepSchedule:
    """Return the schedule of a graph without attention, after checking its results."""
    schedule = Scheduler(captured.graph, lambda node: False, {}).schedule()
    for found, expected in zip(captured.run_schedule(schedule), captured.results, strict=True):
        torch.testing.assert_close(found, expected)
    return schedule


def kinds(schedule: StepSchedule) -> list[str]:
    """Return a name for each item: that of an eager node, and "segment"."""
    return [x.node.name.rstrip("_0123456789") if isinstance(x, EagerNode) else "segment" for x in schedule.items]


def test_nodes_with_instructions_are_one_segment() -> None:
    schedule = scheduled(CapturedFunction(lambda x: (x * 2).exp().sum(-1), [torch.randn(3, 4)]))
    (segment,) = schedule.items
    assert isinstance(segment, NativeSegment) and len(segment.nodes) == 3 and len(segment.outputs) == 1


def test_eager_nodes_run_before_native_ones_that_they_do_not_need() -> None:
    schedule = scheduled(CapturedFunction(lambda x, y: (x * 2) + y.erfinv(), [torch.rand(3), torch.rand(3)]))
    assert kinds(schedule) == ["erfinv", "segment"]


def test_an_eager_node_between_native_ones_splits_them() -> None:
    schedule = scheduled(CapturedFunction(lambda x: (x / 2).erfinv() + 1, [torch.rand(3)]))
    assert kinds(schedule) == ["segment", "erfinv", "segment"]
    (eager,) = [item for item in schedule.items if isinstance(item, EagerNode)]
    assert eager.reason == "erfinv has no instructions"


def test_a_node_that_cannot_be_lowered_runs_eagerly_with_a_reason() -> None:
    schedule = scheduled(CapturedFunction(lambda x: (x * 2).sum(0) + 1, [torch.rand(3, 4)]))
    assert kinds(schedule) == ["segment", "sum", "segment"]
    assert "other dimensions than the last" in next(x.reason for x in schedule.items if isinstance(x, EagerNode))


def test_integers_run_eagerly() -> None:
    schedule = scheduled(CapturedFunction(lambda x, n: x * 2 + (n + 1), [torch.rand(3), torch.arange(3)]))
    assert "segment" in kinds(schedule)
    assert next(x.reason for x in schedule.items if isinstance(x, EagerNode)) == "add of torch.int64"


def test_values_that_nothing_uses_are_not_stored() -> None:
    schedule = scheduled(CapturedFunction(lambda x: torch.nn.functional.layer_norm(x * 2, (4,)), [torch.randn(3, 4)]))
    (segment,) = schedule.items
    assert isinstance(segment, NativeSegment) and [n.name for n in segment.outputs] == ["getitem"]


def _in_place_through_a_view(x: Tensor) -> Any:
    made = x * 2
    made[:, :2].mul_(3)
    return made + 1


def _in_place_after_a_reader(x: Tensor, y: Tensor) -> Any:
    made = y.erfinv()
    before = made * x  # reads the value before it changes
    made.fill_(0.25)
    return before + made


def test_a_view_that_is_changed_in_place_changes_its_base() -> None:
    schedule = scheduled(CapturedFunction(_in_place_through_a_view, [torch.rand(3, 4)]))
    assert any("in place" in x.reason for x in schedule.items if isinstance(x, EagerNode))


def test_readers_run_before_an_eager_node_that_changes_their_value() -> None:
    schedule = scheduled(CapturedFunction(_in_place_after_a_reader, [torch.rand(3), torch.rand(3)]))
    assert kinds(schedule).index("segment") < kinds(schedule).index("fill")


def test_equal_segments_share_a_program() -> None:
    def twice(x: Tensor) -> Tensor:
        return ((x * 0.5).erfinv() * 0.5).erfinv() * 0.5

    programs = [
        x.program for x in scheduled(CapturedFunction(twice, [torch.rand(3)])).items if isinstance(x, NativeSegment)
    ]
    assert len(programs) == 3 and len({id(program) for program in programs}) == 1


def test_a_graph_without_native_nodes_is_refused() -> None:
    captured = CapturedFunction(lambda x: x.erfinv().lgamma(), [torch.rand(3)])
    with pytest.raises(UnsupportedError, match="no operation of the step has instructions"):
        scheduled(captured)
