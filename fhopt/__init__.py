"""fhopt: find attention in any PyTorch graph, put a compressed latent in place of keys and values, prove what it cost.

    plan = fhopt.fit(model, tokenizer, text="topics", ratio=4)      calibrate and fit
    fhopt.apply(model, plan); model.generate(...)                   cache latents
    torch.compile(model, backend="flashhead")                       the compiler backend, registered by installation
    model = fhopt.load(FOLDER)                                      what `fhopt rewrite` wrote, ready to generate

Importing this package is cheap: names are loaded when they are first used. The one thing that it does: when
transformers loads its registry of quantizers, fhopt's is entered, so that `from_pretrained` opens rewritten folders.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fhopt.errors import FhoptError
from fhopt.late_import import when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fhopt.api import fit as fit
    from fhopt.applying import apply as apply
    from fhopt.applying import unapply as unapply
    from fhopt.cache import LatentCache as LatentCache
    from fhopt.cache_files import load_cache as load_cache
    from fhopt.cache_files import save_cache as save_cache
    from fhopt.journal import report as report
    from fhopt.loading import load as load
    from fhopt.seeing.drawing import draw as draw
    from fhopt.spec import LatentPlan as LatentPlan

_WHERE = {
    "LatentCache": "fhopt.cache",
    "LatentPlan": "fhopt.spec",
    "apply": "fhopt.applying",
    "draw": "fhopt.seeing.drawing",
    "fit": "fhopt.api",
    "load": "fhopt.loading",
    "load_cache": "fhopt.cache_files",
    "report": "fhopt.journal",
    "save_cache": "fhopt.cache_files",
    "unapply": "fhopt.applying",
}

__all__ = [
    "FhoptError",
    "LatentCache",
    "LatentPlan",
    "__version__",
    "apply",
    "draw",
    "fit",
    "load",
    "load_cache",
    "report",
    "save_cache",
    "unapply",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fhopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def _register_quantizer() -> None:
    importlib.import_module("fhopt.quantizer")


when_imported("transformers.quantizers.auto", _register_quantizer)
