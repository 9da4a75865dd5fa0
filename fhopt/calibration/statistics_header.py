"""The JSON header of a statistics file, checked without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError, one_line
from fhopt.files import check_writable, read_description
from fhopt.plan.field_kinds import provenance_kind, site_kind
from fhopt.plan.json_kinds import (
    Kind,
    WrongField,
    check_line,
    check_plain,
    mapping,
    maybe,
    number,
    one_of,
    record,
    several,
    text,
    whole,
)
from fhopt.plan.site_plan import LAYOUTS, MAX_SEGMENT, SUPPORTED_BITS
from fhopt.plan.window import MAX_WINDOW

STATISTICS_VERSION, WITH_SEGMENTS = 1, 2  # the second: keys relative to segments
_OPTIONS: dict[str, Kind] = {
    "texts": several(text),
    "ratio": number(1, 1000),
    "layout": check_line,
    "bits": several(one_of(*SUPPORTED_BITS)),
    "sequences": whole(),
    "rate_sequences": whole(),
    "context": whole(1),
    "sinks": whole(0, MAX_WINDOW),
    "recent": maybe(whole(1, MAX_WINDOW)),
    "block": whole(1, MAX_WINDOW),
    "window_bits": one_of(8, 16),
    "tokens": whole(1),
    "seed": whole(),
    "device": maybe(check_line),
    "mean_tokens": whole(),
    "segment": maybe(whole(0, MAX_SEGMENT)),
}
_FIELDS: dict[str, Kind] = {
    "version": one_of(STATISTICS_VERSION, WITH_SEGMENTS),
    "sites": several(site_kind),
    "layouts": mapping(record({}, dict.fromkeys(LAYOUTS, whole(1, 2)))),
    "levels": several(one_of(0, *SUPPORTED_BITS)),
    "options": record({}, _OPTIONS, check_plain),  # earlier versions have fewer
    "prints": record({"fingerprint": text}, {"weights": mapping(text)}),
    "provenance": provenance_kind,
    "digest": text,
}


def check_statistics(file: Path) -> dict[str, Any]:
    """Return the header of a statistics file. Raises FhoptError if the file is damaged or not one."""
    try:
        about = read_description(file)
    except OSError as error:
        raise FhoptError(
            f"cannot read {file}: {error.strerror or error}; expected a statistics file. Write one with: "
            "fhopt calibrate MODEL -o FILE."
        ) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged_statistics(file, error) from error
    if "levels" not in about:
        raise FhoptError(
            f"{file} has no statistics; expected a statistics file. Write one with: fhopt calibrate MODEL -o FILE."
        )
    if about.get("version") not in (STATISTICS_VERSION, WITH_SEGMENTS):
        raise FhoptError(
            f"{file} has statistics version {one_line(about.get('version'), 20)}; expected version "
            f"{STATISTICS_VERSION} or {WITH_SEGMENTS}. Calibrate again with this fhopt."
        )
    return about


def check_fields(about: Mapping[str, Any]) -> None:
    """Raise WrongField for a header field that is missing, unknown, of another type or out of range."""
    record(_FIELDS)(about, "")
    names = [site["name"] for site in about["sites"]]
    if not names or len(set(names)) < len(names):
        raise WrongField(f"sites has {len(names)} names, {len(set(names))} of them distinct; expected distinct names")
    if set(about["layouts"]) != set(names) or not all(about["layouts"].values()):
        raise WrongField(f"layouts has {len(about['layouts'])} sites; expected the bases of each of {len(names)}")
    for name, layouts in about["layouts"].items():
        for layout, sides in layouts.items():
            if sides != (1 if layout == "input" else 2):
                raise WrongField(f"layouts.{name}.{layout} is {sides}; expected 1 for the layout input, 2 for others")
    levels = about["levels"]
    if levels != sorted(set(levels)) or levels[:1] not in ([], [0]):
        raise WrongField(f"levels is {str(levels)[:60]}; expected null or ascending numbers of at least 0")


def damaged_statistics(file: Path, error: Exception) -> FhoptError:
    """Build the error for a file that was modified or truncated."""
    if isinstance(error, WrongField):
        return FhoptError(f"{file} is damaged: {error}. Calibrate again.")
    return FhoptError(f"{file} is damaged ({type(error).__name__}: {one_line(error)}). Calibrate again.")


def check_file(file: Path) -> None:
    """Raise FhoptError if statistics cannot be written to `file`, or would overwrite anything but statistics."""
    check_writable(file.parent)
    if file.is_dir():
        raise FhoptError(f"{file} is a folder; expected a file name. Choose one, such as {file.name}.stats.")
    if file.exists() and not _is_statistics(file):
        raise FhoptError(
            f"{file} exists and is not a statistics file; expected a new file or older statistics. Choose another file."
        )


def _is_statistics(file: Path) -> bool:
    try:
        return "levels" in read_description(file)
    except (OSError, FhoptError, ValueError, LookupError, TypeError, RecursionError):
        return False
