"""Schema of plan.json: the kind of every field, and the digests that cover them.

    version                             3: neither pages nor means. 4: pages. 5: means. 6: any, every byte covered
    sinks, recent, block, window_bits   the residual window
    mean_tokens, pages                  if the plan has them
    sites                               for each: the attention, its layout, bit groups of keys, values and sketches,
                                        and tokens per segment, if keys are relative to segments
    provenance                          origin of the plan, and its measured quality
    digest                              of everything that affects results: description without provenance, tensors
    tensors_sha256, checksum            since version 6: of plan.safetensors, and of everything else in plan.json

The digest is the identity of a plan; prompt caches and rewritten folders name it. It excludes provenance (whose pages
and fingerprints are used), so re-measuring a plan does not change it. Files of version 6 also have a checksum of every
field; in earlier versions every field and the digest are checked.

Nothing here needs torch, so that an invalid file is rejected before torch is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fhopt.plan.field_kinds import SIZE, provenance_kind, site_kind
from fhopt.plan.json_kinds import Kind, WrongField, number, one_of, record, row, several, text, whole
from fhopt.plan.site_plan import (
    LAYOUTS,
    MAX_SEGMENT,
    MAX_STEP,
    MAX_TRELLIS_STEP,
    MIN_STEP,
    SKETCH_BITS,
    SUPPORTED_BITS,
    TIER_QUANTUM,
    TRELLIS_BITS,
    TRELLIS_TABLES,
    is_step,
    is_trellis,
)
from fhopt.plan.window import MAX_WINDOW

PLAIN, PAGED, WITH_MEANS, CHECKED = 3, 4, 5, 6
PLAN_VERSIONS = (PLAIN, PAGED, WITH_MEANS, CHECKED)  # readable versions; plans are written in the last
CHECKSUM, TENSORS = "checksum", "tensors_sha256"


def _tiers(*bits: int, is_signed: bool) -> Kind:
    """Return the kind of bit groups [[bits, width, step], ...]. is_signed: allow trellis codes (negative steps)."""
    fields = row(one_of(*bits), SIZE, number(-MAX_STEP if is_signed else 0, MAX_STEP))

    def check(value: Any, where: str) -> None:
        fields(value, where)
        if value[1] % TIER_QUANTUM:
            raise WrongField(f"{where}.1 is {value[1]}; expected a multiple of {TIER_QUANTUM} channels")
        if not is_step(value[0], value[2]):
            trellis = (
                f", or {-MAX_TRELLIS_STEP:g} to {-MIN_STEP:g} for a trellis code of {max(TRELLIS_BITS)} bits or fewer"
            )
            raise WrongField(
                f"{where}.2 is {value[2]:g} for {value[0]} bits; expected a step of {MIN_STEP:g} to {MAX_STEP:g}"
                f"{trellis if is_signed else ''}"
            )

    return several(check)


_SIDE = _tiers(*SUPPORTED_BITS, is_signed=True)
_SITE_PLAN = record(
    {"site": site_kind, "layout": one_of(*LAYOUTS), "key": _SIDE, "value": _SIDE},
    {"sketch": _tiers(*SKETCH_BITS, is_signed=False), "segment": whole(1, MAX_SEGMENT)},
)
_SHARES = several(number(0, 1))
_FACTORS = several(number(0, 1e6))
_PAGES = record(
    {"tokens": whole(1), "shares": _SHARES, "masses": _SHARES, "least": whole(), "limit": number(0, 1)},
    {"fill": several(_FACTORS), "lifts": _FACTORS},
)


# --------------------------------------------------------------------------------------------------- the file

_NEEDED: dict[str, Kind] = {
    "version": one_of(*PLAN_VERSIONS),
    "sinks": whole(0, MAX_WINDOW),
    "recent": whole(1, MAX_WINDOW),
    "block": whole(1, MAX_WINDOW),
    "window_bits": one_of(8, 16),
    "sites": several(_SITE_PLAN),
    "provenance": provenance_kind,
    "digest": text,
}
_OPTIONAL: dict[str, Kind] = {"pages": _PAGES, "mean_tokens": whole(1)}


def parse_description(content: bytes) -> dict[str, Any]:
    """Parse the JSON object of plan.json. Raises ValueError, RecursionError."""
    description = json.loads(content, object_pairs_hook=_once)
    if not isinstance(description, dict):
        raise ValueError(f"plan.json holds a {type(description).__name__}; expected an object")
    return description


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("one object has a duplicate name")
    return found


def check_description(description: Mapping[str, Any]) -> None:
    """Raise WrongField for a field that is missing, unknown, of the wrong type or out of range."""
    covered: dict[str, Kind] = {CHECKSUM: text, TENSORS: text} if description.get("version") == CHECKED else {}
    record(_NEEDED | covered, _OPTIONAL)(description, "")


def content_version(description: Mapping[str, Any]) -> int:
    """Return the earliest version that can represent a plan; it is part of the plan's digest."""
    if "mean_tokens" in description:
        return WITH_MEANS
    has_pages = "pages" in description or any("sketch" in one for one in description["sites"])
    return PAGED if has_pages else PLAIN


def numbers_of(description: Mapping[str, Any]) -> bytes:
    """Return the part of a description that the digest covers, as JSON in UTF-8."""
    kept = {k: v for k, v in description.items() if k not in ("provenance", "digest", CHECKSUM, TENSORS)}
    sides = [dict(one).get(name, ()) for one in description["sites"] for name in ("key", "value")]
    if any(is_trellis(bits, step) for tiers in sides for bits, _, step in tiers):
        kept["trellis"] = TRELLIS_TABLES
    return json.dumps(kept | {"version": content_version(description)}, sort_keys=True).encode()


def covered(description: Mapping[str, Any], tensors: bytes) -> dict[str, Any]:
    """Return the description of a version 6 file: with the hash of the tensor file, and the checksum."""
    whole_file = dict(description) | {"version": CHECKED, TENSORS: hashlib.sha256(tensors).hexdigest()}
    return whole_file | {CHECKSUM: checksum(whole_file)}


def checksum(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a description without the checksum itself."""
    kept = json.loads(json.dumps({k: v for k, v in description.items() if k != CHECKSUM}))  # converts tuples to lists
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def digest_of(description: Mapping[str, Any], tensors: bytes) -> str:
    """Compute the digest of a plan from its files. Raises ValueError, LookupError and TypeError for a damaged header.

    Equals `plan_digest` (fhopt/plan/serialization.py): the file has the tensors' names and their bytes as in memory.
    """
    header = tensor_header(tensors)
    start = 8 + int.from_bytes(tensors[:8], "little")
    h = hashlib.sha256(numbers_of(description))
    for name, about in sorted(header.items()):
        first, last = (start + place for place in about["data_offsets"])
        h.update(name.encode())
        h.update(memoryview(tensors)[first:last])
    return h.hexdigest()


def tensor_header(tensors: bytes) -> dict[str, Any]:
    """Return dtype, shape and offsets of each tensor in a safetensors file, by name. Raises ValueError."""
    length = int.from_bytes(tensors[:8], "little")
    if not 2 <= length <= len(tensors) - 8:
        raise ValueError(f"plan.safetensors has {len(tensors):,} bytes, and its header should have {length:,}")
    header = json.loads(tensors[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header of plan.safetensors is not a JSON object")
    header.pop("__metadata__", None)
    return header


def is_intact(description: Mapping[str, Any], tensors: bytes) -> bool:
    """Return True if digest, checksum and hash are correct; before version 6, digest and version."""
    if digest_of(description, tensors) != description["digest"]:
        return False
    if description["version"] != CHECKED:
        return bool(description["version"] == content_version(description))
    is_same = hashlib.sha256(tensors).hexdigest() == description[TENSORS]
    return is_same and checksum(description) == description[CHECKSUM]
