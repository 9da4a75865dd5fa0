"""The description in a file of statistics, which shows without torch whether it is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError
from fhopt.files import check_writable, read_description

STATISTICS_VERSION, WITH_SEGMENTS = 1, 2  # the second: of keys relative to segments


def check_statistics(file: Path) -> dict[str, Any]:
    """Return the description of a file of `fhopt calibrate`. Raises FhoptError where it is none, or damaged."""
    try:
        about = read_description(file)
    except OSError as error:
        raise FhoptError(
            f"cannot read {file}: {error.strerror or error}. Expected a file of `fhopt calibrate MODEL -o FILE`."
        ) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged_statistics(file, error) from error
    if "levels" not in about:
        raise FhoptError(f"{file} has no statistics; expected a file of `fhopt calibrate MODEL -o FILE`.")
    if about.get("version") not in (STATISTICS_VERSION, WITH_SEGMENTS):
        raise FhoptError(
            f"{file} has statistics of version {str(about.get('version'))[:20]}; this fhopt reads versions "
            f"{STATISTICS_VERSION} and {WITH_SEGMENTS}. Calibrate again with this version."
        )
    return about


def damaged_statistics(file: Path, error: Exception) -> FhoptError:
    """Make the error for a file that was altered or cut short."""
    reason = " ".join(str(error).split())[:300]
    return FhoptError(f"{file} is damaged ({type(error).__name__}: {reason}). Calibrate again.")


def check_file(file: Path) -> None:
    """Raise FhoptError when statistics could not be written to `file`, or would overwrite anything but statistics."""
    check_writable(file.parent)
    if file.is_dir():
        raise FhoptError(f"{file} is a folder; expected a file for the statistics, such as {file.name}.stats.")
    if file.exists() and not _is_statistics(file):
        raise FhoptError(f"{file} exists and holds other things; expected a new file or older statistics.")


def _is_statistics(file: Path) -> bool:
    try:
        return "levels" in read_description(file)
    except (OSError, FhoptError, ValueError, LookupError, TypeError, RecursionError):
        return False
