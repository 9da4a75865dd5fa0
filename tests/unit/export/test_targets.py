"""Export targets, checked before torch is imported."""

from __future__ import annotations

import pytest
from imports import imported_by

from fhopt.errors import FhoptError
from fhopt.export.targets import TARGETS, Target


@pytest.mark.parametrize("name", ["mlir", *TARGETS])
def test_a_target_of_the_table_is_accepted(name: str) -> None:
    Target(name).check()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("bogus"), "target 'bogus' is unknown; expected one of mlir, iree-cpu, .*iree-metal"),
        (Target("mlir", arch="sm_90"), "--arch requires an IREE target"),
        (Target("iree-cpu", dialect="torch"), "IREE compiles linalg"),
    ],
)
def test_another_target_is_refused(target: Target, message: str) -> None:
    with pytest.raises(FhoptError, match=message):
        target.check()


def test_targets_need_no_torch() -> None:
    assert "torch" not in imported_by("fhopt.export.targets")
