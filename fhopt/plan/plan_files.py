"""Loading and checks of a plan's files, plan.json and plan.safetensors; never pickle.

Nothing here needs torch, so that `check_plan_files` rejects an invalid or damaged file before torch is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError, one_line
from fhopt.files import JSON_BYTES, check_no_pickle, is_pickle, read_file, tensor_limit
from fhopt.plan.description import PLAN_VERSIONS, check_description, is_intact, parse_description
from fhopt.plan.json_kinds import WrongField

PLAN_FILES = ("plan.json", "plan.safetensors")


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Convert exceptions caused by damaged files to a FhoptError that names the folder."""
    from safetensors import SafetensorError

    try:
        yield
    except WrongField as error:
        raise FhoptError(f"{folder} is damaged: {error}. Fit the plan again.") from error
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise _damaged(folder, error) from error
    except SafetensorError as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> FhoptError:
    return FhoptError(f"{folder} is damaged ({type(error).__name__}: {one_line(error)}). Fit the plan again.")


def check_plan_files(folder: Path) -> None:
    """Raise FhoptError if `folder` has no plan or a damaged one, as far as this can be checked without torch."""
    with damage_named(folder):
        read_files(folder)


def read_files(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Load the checked description of a plan, and its tensor file. Raises FhoptError, ValueError."""
    text, blob = _read(folder)
    description = parse_description(text)
    if description.get("version") not in PLAN_VERSIONS:
        raise FhoptError(
            f"{folder} has plan version {one_line(description.get('version'), 20)}; expected version "
            f"{' or '.join(map(str, PLAN_VERSIONS))}. Fit the plan again with this fhopt."
        )
    check_description(description)
    if not is_intact(description, blob):
        raise altered(folder)
    return description, blob


def altered(folder: Path) -> FhoptError:
    """Make the error for a plan with a wrong digest or checksum."""
    return FhoptError(f"{folder} was altered after it was written (digest mismatch). Fit the plan again.")


def _read(folder: Path) -> tuple[bytes, bytes]:
    cure = "Write a plan with: fhopt fit MODEL -o FOLDER."
    try:
        if folder.is_file():
            check_no_pickle(folder, cure)
        text = read_file(folder / PLAN_FILES[0], JSON_BYTES, cure)
        blob = read_file(folder / PLAN_FILES[1], tensor_limit(), cure)
    except (OSError, ValueError) as error:
        name = Path(getattr(error, "filename", None) or folder).name
        reason = getattr(error, "strerror", None) or error
        raise FhoptError(f"{folder} is not a plan: {reason} ({name}). {cure}") from error
    for name, content in zip(PLAN_FILES, (text, blob), strict=True):
        if is_pickle(content[:9]):
            check_no_pickle(folder / name, cure)
    return text, blob
