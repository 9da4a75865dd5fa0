"""fhopt: KV-cache compression for PyTorch transformers, with attention computed on quantized latents.

    plan = fhopt.fit(model, tokenizer, text="topics", ratio=4)      calibrate and fit
    fhopt.apply(model, plan); model.generate(...)                   cache latents
    torch.compile(model, backend="flashhead")                       the compiler backend, registered on installation
    model = fhopt.load(FOLDER)                                      output of `fhopt rewrite`, ready to generate
    model = fhopt.load("demo")                                      SmolLM2-135M-Instruct of `make demo`, offline
    model, tokenizer = fhopt.load_gguf(FILE)                        weights stay in their quantized blocks

Importing this package is cheap: names are imported on first use. The only side effect: when transformers loads its
registry of quantizers, fhopt's is added, so that `from_pretrained` opens rewritten folders.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fhopt.errors import FhoptError
from fhopt.import_hook import lazily, when_imported
from fhopt.version import __version__

if TYPE_CHECKING:
    from fhopt.backend.compile_report import report as report
    from fhopt.cache.latent_cache import LatentCache as LatentCache
    from fhopt.fitting.fit_plan import exact_plan as exact_plan
    from fhopt.hf.apply import apply as apply
    from fhopt.hf.apply import latent_cache as latent_cache
    from fhopt.hf.apply import prepare as prepare
    from fhopt.hf.apply import unapply as unapply
    from fhopt.hf.gguf import load_gguf as load_gguf
    from fhopt.hf.load import load as load
    from fhopt.hf.prompt_cache import load_cache as load_cache
    from fhopt.hf.prompt_cache import save_cache as save_cache
    from fhopt.inspection.drawing import draw as draw
    from fhopt.plan import LatentPlan as LatentPlan
    from fhopt.planning.api import fit as fit

_WHERE = {
    "LatentCache": "fhopt.cache.latent_cache",
    "LatentPlan": "fhopt.plan",
    "apply": "fhopt.hf.apply",
    "draw": "fhopt.inspection.drawing",
    "exact_plan": "fhopt.fitting.fit_plan",
    "fit": "fhopt.planning.api",
    "latent_cache": "fhopt.hf.apply",
    "load": "fhopt.hf.load",
    "load_cache": "fhopt.hf.prompt_cache",
    "load_gguf": "fhopt.hf.gguf",
    "prepare": "fhopt.hf.apply",
    "report": "fhopt.backend.compile_report",
    "save_cache": "fhopt.hf.prompt_cache",
    "unapply": "fhopt.hf.apply",
}

__all__ = [
    "FhoptError",
    "LatentCache",
    "LatentPlan",
    "__version__",
    "apply",
    "draw",
    "exact_plan",
    "fit",
    "latent_cache",
    "load",
    "load_cache",
    "load_gguf",
    "prepare",
    "report",
    "save_cache",
    "unapply",
]


__getattr__ = lazily(__name__, _WHERE)


def __dir__() -> list[str]:
    return __all__


def _register_quantizer() -> None:
    importlib.import_module("fhopt.hf.quantizer")


when_imported("transformers.quantizers.auto", _register_quantizer)
