"""Argument types that are checked before a command runs, and before torch is imported.

This rejects a wrong argument in a fraction of a second; importing torch takes 2 seconds. In processes that torchrun
started, the command checks instead: there a rejected argument ends all processes with one message, whereas otherwise
the others would wait for the one that exited.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fhopt.calibration.statistics_header import check_statistics
from fhopt.errors import FhoptError
from fhopt.hardware.devices import find_device
from fhopt.models.model_files import MANIFEST, check_model
from fhopt.plan.plan_files import PLAN_FILES, check_plan_files
from fhopt.texts.files import check_text

if TYPE_CHECKING:
    ParamType = click.ParamType[Any, Any]
else:
    ParamType = click.ParamType  # not generic in older versions


class Argument(ParamType):
    """An argument that is checked as soon as it is parsed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check a value, unless other processes depend on this one, and return it."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self.check(str(value))
        return Path(value) if self.name == "path" else str(value)

    def check(self, value: str) -> None:
        """Raise FhoptError for a value that the command cannot use."""
        raise NotImplementedError


class ModelParameter(Argument):
    """MODEL of a command. Raises FhoptError if it does not exist."""

    name = "text"

    def check(self, value: str) -> None:
        """Check that the model exists."""
        check_model(value)


class Plan(Argument):
    """Folder of a plan. may_come: it may not be written yet. Raises FhoptError for anything else."""

    name = "path"

    def __init__(self, may_come: bool = False) -> None:
        self.may_come = may_come

    def check(self, value: str) -> None:
        """Check the files of a plan."""
        folder = Path(value)
        is_coming = not _exists(folder / PLAN_FILES[0]) and (folder.is_dir() or not _exists(folder))
        if not (self.may_come and is_coming):
            check_plan_files(folder)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


class Statistics(Argument):
    """File of `fhopt calibrate`. Raises FhoptError for anything else."""

    name = "path"

    def check(self, value: str) -> None:
        """Check the header of a statistics file."""
        check_statistics(Path(value))


class Folder(Argument):
    """Folder that `fhopt rewrite` or export wrote, with one of these files in it. Raises FhoptError without one."""

    name = "path"

    def __init__(self, *files: str) -> None:
        self.files = files

    def check(self, value: str) -> None:
        """Check that a folder has its manifest or description."""
        folder = Path(value)
        if not any((folder / name).is_file() for name in self.files):
            raise FhoptError(
                f"{folder} is not a rewritten folder: it has no {' or '.join(self.files)}. Write one with: "
                "fhopt rewrite MODEL --plan PLAN -o FOLDER."
            )


class DeviceParameter(Argument):
    """Name of a device of the cost model. Raises FhoptError for any other."""

    name = "text"

    def check(self, value: str) -> None:
        """Check a name, except this machine's own CPU, which is measured later."""
        if not value.startswith("here"):
            find_device(value)


class TextParameter(Argument):
    """A text: a built-in one, a file or a folder. Raises FhoptError for any other path."""

    name = "text"

    def check(self, value: str) -> None:
        """Check that the text exists."""
        check_text(value)


MODEL, STATISTICS, DEVICE, TEXT = ModelParameter(), Statistics(), DeviceParameter(), TextParameter()
PLAN, COMING_PLAN = Plan(), Plan(may_come=True)
REWRITTEN, EXPORTED = Folder(MANIFEST), Folder(MANIFEST, "step.json")
