"""Types of arguments: what they name is looked at before a command runs, and before torch is imported.

A wrong argument is refused in a fraction of a second that way; importing torch alone takes 2 seconds.
"""

from __future__ import annotations

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


class Model(ParamType):
    """MODEL of a command. Raises FhoptError where there is none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check that a model is there, and return its name."""
        check_model(str(value))
        return str(value)


class Plan(ParamType):
    """The folder of a plan. may_come: it may not be written yet. Raises FhoptError for anything else."""

    name = "path"

    def __init__(self, may_come: bool = False) -> None:
        self.may_come = may_come

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the files of a plan, and return its folder."""
        folder = Path(value)
        if self.may_come and not _exists(folder / PLAN_FILES[0]) and (folder.is_dir() or not _exists(folder)):
            return folder
        check_plan_files(folder)
        return folder


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


class Statistics(ParamType):
    """A file of `fhopt calibrate`. Raises FhoptError for anything else."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the description of a file of statistics, and return its path."""
        check_statistics(Path(value))
        return Path(value)


class Folder(ParamType):
    """A folder that `fhopt rewrite`, or export, wrote: one of these files is in it. Raises FhoptError without one."""

    name = "path"

    def __init__(self, *files: str) -> None:
        self.files = files

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check that a folder has its manifest or description, and return its path."""
        folder = Path(value)
        if not any((folder / name).is_file() for name in self.files):
            raise FhoptError(
                f"{folder} is not a rewritten model: it has no {' or '.join(self.files)}. Expected a folder that "
                "`fhopt rewrite MODEL --plan PLAN -o FOLDER` wrote."
            )
        return folder


class Device(ParamType):
    """The name of a device of the cost model. Raises FhoptError for any other."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check a name, but of this machine's own CPU, which is measured later."""
        if not str(value).startswith("here"):
            find_device(str(value))
        return str(value)


class Text(ParamType):
    """A text: a built-in one, a file or a folder. Raises FhoptError for a path that is none of these."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check that a text is there, and return its name."""
        check_text(str(value))
        return str(value)


MODEL, STATISTICS, DEVICE, TEXT = Model(), Statistics(), Device(), Text()
PLAN, COMING_PLAN = Plan(), Plan(may_come=True)
REWRITTEN, EXPORTED = Folder(MANIFEST), Folder(MANIFEST, "step.json")
