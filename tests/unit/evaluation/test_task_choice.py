"""Task names as users write them, parsed without torch."""

from __future__ import annotations

import pytest
from imports import imported_by

from fhopt.errors import FhoptError
from fhopt.evaluation import ruler, task_choice, tasks


def test_the_names_are_those_of_the_tasks() -> None:
    assert tuple(tasks.TASKS) == task_choice.TASKS and tuple(ruler.RULER) == task_choice.RULER


def test_groups_and_names_are_chosen_in_order() -> None:
    assert task_choice.parse_tasks("copy,perplexity") == ["perplexity", "copy"]
    assert task_choice.parse_tasks("ruler") == list(task_choice.RULER)
    with pytest.raises(FhoptError, match="task 'x' is unknown"):
        task_choice.parse_tasks("copy,x")


def test_lengths_are_numbers() -> None:
    assert task_choice.read_lengths("512, 64,512") == (512, 64)
    with pytest.raises(FhoptError, match="expected comma-separated token counts"):
        task_choice.read_lengths("512,-1")


def test_they_need_no_torch() -> None:
    assert "torch" not in imported_by("fhopt.evaluation.task_choice")
