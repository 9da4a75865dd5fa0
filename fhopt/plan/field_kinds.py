"""Kinds of the fields that plans and statistics files share: attention sites, provenance, KV cache layers.

Bounds are far above the values of any model or fit and within float32 range: a file with a forged digest is rejected if
it would give non-finite results or unbounded memory use.

Nothing here needs torch.
"""

from __future__ import annotations

from typing import Any

from fhopt.plan.cache_size import KEY as LAYERS
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
    row,
    several,
    text,
    truth,
    whole,
    zero_or,
)
from fhopt.plan.site import CACHE_KINDS, MASKS

SIZE = whole(1, (1 << 20) - 1)  # heads, channels
STATE_BYTES = 1 << 50

# --------------------------------------------------------------------------------------------------- sites

_ROPE = record(
    {
        "pairing": one_of("half", "interleaved"),
        "rotary_dim": SIZE,
        "angles": several(number(-1e4, 1e4)),  # radians per position
        "offset": whole(0, (1 << 20) - 1),
        "blocks": SIZE,
        "positions": one_of("sequence", "grid"),
    }
)
_SITE = record(
    {
        "name": check_line,
        "projections": mapping(several(check_line)),
        "kind": one_of("self", "cross"),
        "heads": SIZE,
        "kv_heads": SIZE,
        "key_dim": SIZE,
        "value_dim": SIZE,
        "scale": number(1e-6, 1e6),
        "rope": maybe(_ROPE),
        "key_norm": truth,
        "mask": one_of(*MASKS),
        "softcap": zero_or(number(1e-3, 1e6)),
        "cache": one_of(*CACHE_KINDS),
        "source": text,
        "window": whole(),
        "sinks": truth,
    }
)


def site_kind(value: Any, where: str) -> None:
    """Check an attention site, in the form of `dataclasses.asdict`."""
    _SITE(value, where)
    if value["heads"] % value["kv_heads"]:
        raise WrongField(f"{where}.heads is {value['heads']}; expected a multiple of kv_heads, {value['kv_heads']}")
    rope = value["rope"]
    if rope is None:
        return
    count, blocks, end = rope["rotary_dim"], rope["blocks"], rope["offset"] + rope["rotary_dim"]
    if count % (2 * blocks) or end > value["key_dim"]:
        raise WrongField(
            f"{where}.rope.rotary_dim is {count} from channel {rope['offset']}; expected a multiple of {2 * blocks} "
            f"within {value['key_dim']} channels"
        )
    if len(rope["angles"]) != count // 2:
        raise WrongField(f"{where}.rope.angles has {len(rope['angles'])} values; expected {count // 2}")


# --------------------------------------------------------------------------------------------------- provenance

_CACHE_LAYERS = several(
    record(
        {"name": check_line},
        {
            "mask": one_of("", "sliding", "chunked"),
            "window": whole(),
            "is_full": truth,
            "numbers": whole(),
            "state_bytes": whole(0, STATE_BYTES),
        },
    )
)
_MEASURED = number(is_finite=False)  # perplexity can be infinite
_NATS = number(-1e30, 1e30)
_INTERVAL = maybe(row(_MEASURED, _MEASURED))
_LOSS: dict[str, Kind] = {
    "exact": _MEASURED,
    "plan": _MEASURED,
    "increase_percent": _MEASURED,
    "increase_percent_ci": _INTERVAL,
    "kl": _MEASURED,
    "tokens": whole(),
}
_SIDE: dict[str, Kind] = {
    "side": text,
    "spectrum": several(_MEASURED),
    "bits": several(whole(0, 16)),
    "nats": _MEASURED,
    "sensitivity_nats": _MEASURED,
}
_EVIDENCE = record(
    {
        "sites": mapping(several(record(_SIDE))),
        "curve": several(record({"ratio": number(0), "bytes_per_token": number(0), "nats": _NATS})),
    }
)
_TASK = record({"items": whole(), "exact": _MEASURED, "plan": _MEASURED})


def _gate(value: Any, where: str) -> None:
    """Check the measurements of a loss target; if it names its texts it is displayed, and all fields are required."""
    is_whole = isinstance(value, dict) and "texts" in value
    needed = _LOSS | {"texts": several(text)} if is_whole else {}
    record(needed, _LOSS | {"max_loss": number()}, check_plain)(value, where)


def _loss_check(value: Any, where: str) -> None:
    """Check the losses of plans of increasing size on a held-out text."""
    record({"text": text, "predicted_nats": several(_NATS), "nats": several(_NATS)})(value, where)
    if not 0 < len(value["nats"]) == len(value["predicted_nats"]):
        raise WrongField(f"{where}.nats has {len(value['nats'])} values; expected as many as predicted_nats")


provenance_kind = record(
    {},
    {
        "model": text,
        "fingerprint": maybe(text),
        "weights": mapping(text),
        "layout": text,
        "ratio": number(0),
        "predicted_nats": _MEASURED,
        "expected_loss": record({"nats": _MEASURED, "least": _MEASURED, "most": _MEASURED}),
        "loss_checks": several(_loss_check),
        LAYERS: _CACHE_LAYERS,
        "seed": whole(),
        "sequences": whole(),
        "tokens": whole(),
        "context": whole(),
        "texts": several(text),
        "text_sha256": text,
        "versions": mapping(text),
        "request": text,
        "evidence": maybe(_EVIDENCE),
        "gate": maybe(_gate),
        "healing": record(
            {}, {"tokens": whole(), "texts": several(text), "before": check_plain, "after": check_plain}, check_plain
        ),
        "pages": maybe(record({}, {"read": mapping(number(0, 1))}, check_plain)),
        "quality": maybe(record({}, {"texts": mapping(record(_LOSS)), "tasks": mapping(_TASK)})),
    },
    check_plain,
)
