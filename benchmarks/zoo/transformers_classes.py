"""Classes of the wide zoo: every model of the installed transformers, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from model_zoo.huggingface import enliven
from torch import nn

from benchmarks.zoo.forward_inputs import forward_arguments
from benchmarks.zoo.tiny_configs import tiny

MAXIMUM_PARAMETERS = 60_000_000
FAMILIES = {"input_ids": "text", "pixel_values": "vision", "input_values": "audio", "input_features": "audio"}
DECODERS = "decoders"


@dataclass(frozen=True)
class Candidate:
    """One class, named with its configuration's type: `BertModel` of `bert`.

    build: creates the model and its arguments for an attention implementation, for another library.
    """

    name: str
    model_type: str
    family: str
    implementations: tuple[str, ...]
    build: Callable[[str], tuple[nn.Module, dict[str, Any]]] | None = None  # of another library; None: transformers


def candidates() -> list[Candidate]:
    """Return every causal language model, then the bare model of every other type."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    decoders = _first_names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = {name: Candidate(name, kind, DECODERS, ("eager", "sdpa")) for kind, name in reversed(decoders.items())}
    others = _first_names(auto.MODEL_MAPPING_NAMES)
    for mapping in sorted(name for name in dir(auto) if name.endswith("_MAPPING_NAMES")):
        others = _first_names(getattr(auto, mapping)) | others
    for kind, name in others.items():
        if kind in CONFIG_MAPPING_NAMES and kind not in decoders and name not in found:
            found[name] = Candidate(name, kind, _family(name), ("eager",))
    return sorted(found.values(), key=lambda c: (c.family != DECODERS, c.name.lower()))


def _first_names(mapping: Any) -> dict[str, str]:
    firsts = {kind: names if isinstance(names, str) else names[0] for kind, names in mapping.items()}
    return {kind: name for kind, name in firsts.items() if not name.endswith("Config")}


def _family(name: str) -> str:
    """Return the family by the class's main input; "others" if unknown."""
    import transformers

    try:
        return FAMILIES.get(getattr(transformers, name).main_input_name, "others")
    except Exception:  # a class with missing dependencies
        return "others"


def build(candidate: Candidate, implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """Create the model, and arguments with which it runs. Raises what the class raises."""
    model = make(candidate, implementation)
    return model, forward_arguments(model)


def make(
    candidate: Candidate, implementation: str, is_decoder: bool = False, change: Callable[[Any], None] | None = None
) -> nn.Module:
    """Create the model with random weights. is_decoder: as a decoder, if it may also be an encoder.

    change: of its configuration.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    cls: Any = getattr(transformers, candidate.name)
    config = tiny(cls.config_class or CONFIG_MAPPING[candidate.model_type])
    if is_decoder and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if change is not None:
        change(config)
    _check_size(cls, config)
    model: nn.Module = cls._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        enliven(model)
    return model.requires_grad_(False)


def _check_size(cls: Any, config: Any) -> None:
    """Raise ValueError if the small configuration is not small."""
    with torch.device("meta"):
        try:
            count = sum(p.numel() for p in cls._from_config(config).parameters())
        except NotImplementedError:  # initialization that depends on values
            return
    if count > MAXIMUM_PARAMETERS:
        raise ValueError(
            f"{count / 1e6:.0f} million parameters are left; expected {MAXIMUM_PARAMETERS / 1e6:.0f} at most"
        )
