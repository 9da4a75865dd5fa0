"""Old names of modules: imports of them still work, with a DeprecationWarning.

`from fhopt.spec import LatentPlan` finds the class in `fhopt.plan`. Where several modules took the place of one, each
is imported when one of its names is first used.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old name below `fhopt`, and the modules below `fhopt` that took its place.
MODULES = {
    "applying": "hf.apply models.model_facts",
    "buffers": "cache.module_buffers cache.buffer_slots",
    "cache_files": "hf.prompt_cache",
    "calibrate": "calibration.collect calibration.probe fitting.statistics",
    "capture": "models.capture",
    "codegen.tuning": "codegen.gpu.tuning codegen.gpu.configs",
    "cost": "hardware.cost_model hardware.devices",
    "data": "texts.tokens texts.built_in texts.files",
    "evaluate": "evaluation.perplexity evaluation.statistics evaluation.decode_speed models.model_facts",
    "exporting": "export.pt2_step",
    "exporting_mlir": "export.mlir",
    "gate": "refine.loss_target",
    "harness": "evaluation.lm_eval",
    "head": "lm_head.head lm_head.api",
    "head_fitting": "lm_head.fitting",
    "head_module": "lm_head.module lm_head.intercept lm_head.install",
    "healing": "refine.heal refine.decoder_equations",
    "journal": "backend.compile_report",
    "kernels": "hardware.kernel_table",
    "latents": "attention.attend attention.cache_view attention.exact_tokens attention.manual_attention "
    "attention.paged",
    "layers": "cache.base_layer cache.dynamic_layer cache.static_layer cache.cross_layer",
    "loading": "hf.load models.rewritten_model",
    "machine": "hardware.this_cpu hardware.devices",
    "page_ops": "ops.paged_attention ops.page_selection",
    "pages": "attention.paged attention.sketches",
    "paging": "refine.page_probes refine.page_sketches refine.page_options refine.page_budget",
    "pipeline": "calibration.run progress calibration.options models.sites",
    "plans": "calibration.plan_store",
    "plots": "inspection.plots",
    "profiling": "backend.online_fit",
    "quantizer": "hf.quantizer",
    "rewriting": "export.rewrite_folder",
    "seeing": "inspection",
    "seeing.charts": "inspection.charts",
    "seeing.drawing": "inspection.drawing plan.display",
    "seeing.graphs": "inspection.graphs",
    "seeing.inspection": "inspection.facts plan.display",
    "seeing.model_explorer_extension": "inspection.model_explorer_extension",
    "seeing.report": "inspection.html_report",
    "seeing.snapshots": "inspection.snapshots inspection.graph_files",
    "spec": "plan.latent_plan plan.site plan.site_plan plan.kernel_spec plan.window plan.plan_files plan.validation "
    "plan.fingerprint fitting.statistics",
    "stepping": "export.decode_step export.step_attention export.step_state",
    "storage": "cache.quantized_rows cache.store cache.residual_window",
    "tables": "inspection.tables",
    "tasks": "evaluation.tasks",
    "verifying": "export.mlir_check",
}

# Names that are others in the new modules.
NAMES = {
    "cost.Bound": "SpeedupBound",
    "cost.Comparison": "CostComparison",
    "cost.Row": "CostRow",
    "cost.Rows": "LatentSizes",
    "cost.SEALED": "QUANTIZED",
    "cost.USUAL_OPEN_TOKENS": "DEFAULT_OPEN_TOKENS",
    "head_module.Products": "ProductMode",
    "head_module.Report": "HeadReport",
    "journal.Journal": "CompileReport",
    "journal.journal_of": "report_of",
    "machine.Measured": "CpuRates",
    "profiling.Profile": "OnlineFit",
    "profiling.Stream": "TokenStream",
    "profiling.Wish": "FitTarget",
    "profiling.trimmed": "without_padding",
    "profiling.twin": "shared_weight_copy",
    "profiling.watched": "recording",
    "verifying.Found": "CountedOperation",
}


class _Finder(MetaPathFinder):
    """A finder of old names. It stands last, so that a module that exists under the name is found before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old name, None for any other."""
        package, _, name = fullname.partition(".")
        if package != "fhopt" or name not in MODULES:
            return None
        return ModuleSpec(fullname, _Moved(), is_package=name == "seeing")


class _Moved(Loader):
    """A loader of modules that are empty but for a `__getattr__`, which looks into the modules that replace them."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return None, which makes an ordinary module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and give the module its `__getattr__`; the module of a single new place is imported at once."""
        places = [f"fhopt.{place}" for place in MODULES[module.__name__.partition(".")[2]].split()]
        warnings.warn(
            f"{module.__name__} has moved: import from {' or '.join(places)}.", DeprecationWarning, stacklevel=2
        )
        if len(places) == 1:
            importlib.import_module(places[0])
        module.__getattr__ = functools.partial(_find, module.__name__, places)  # type: ignore[method-assign]


def _find(module: str, places: Sequence[str], name: str) -> Any:
    """Return the object `name` from the first of `places` that has it. Raises AttributeError.

    Special names are nobody's: Python's `inspect` asks every module for its `__file__`, at any time.
    """
    if not (name.startswith("__") and name.endswith("__")):
        current = NAMES.get(f"{module.partition('.')[2]}.{name}", name)
        for place in places:
            replacement = importlib.import_module(place)
            if hasattr(replacement, current):
                return getattr(replacement, current)
    raise AttributeError(f"module {module!r} has no attribute {name!r}; it has moved to {places[0]}")


def install() -> None:
    """Let the import system find old names; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
