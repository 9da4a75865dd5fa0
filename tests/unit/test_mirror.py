"""Tests mirror the source: `fhopt/cache/store.py` is tested by `tests/unit/cache/test_store.py`.

A module may have several test files, `test_store_<topic>.py`. A module without one is listed in the table below, with
the tests that cover it; a module that gets a test file must leave the table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests" / "unit"
PACKAGES = ("fhopt", "passes", "codegen")
LINKS = (ROOT / "fhopt" / "passes", ROOT / "fhopt" / "codegen")  # to packages that are listed by their own names
OF_NO_MODULE = (  # for all modules together
    "test_durations",
    "test_golden_kernels",
    "test_language",
    "test_layers",
    "test_mirror",
    "test_names",
    "test_project",
)

CACHES = "whole caches, unit/cache/test_latent_cache.py and test_report.py"
MODELS = "whole models, integration/test_families.py and test_zoo.py"
GRAPHS = "every test of a pass: it is what passes read and write graphs by"
SPELLINGS = "every spelling of attention, unit/passes/recognize/test_normalize.py and integration/test_zoo.py"
PLANS = "unit/plan/test_serialization.py and test_validation.py, on whole plans"
ENGINES = "vLLM with plans, serving/test_engine.py and test_refused.py"
COMMANDS = "the commands, unit/cli"
PAGES = "the pages made of it, unit/inspection/test_html_report.py and test_server.py"
WITHOUT_A_FILE = {
    "codegen/cpu/calls/blocks": "unit/codegen/cpu/test_block_tables.py",
    "codegen/cpu/calls/caches": "every program and decode step, unit/codegen/programs",
    "codegen/cpu/calls/formats": "unit/codegen/cpu/test_gguf_blocks.py",
    "codegen/cpu/calls/kernels": "every kernel that is called, unit/codegen/cpu",
    "codegen/cpu/launch": "every kernel that is called, unit/codegen/cpu",
    "codegen/gpu/block_launch": "unit/codegen/gpu/test_block_tables.py",
    "codegen/gpu/compile_worker": "every compilation, unit/codegen/gpu/test_resources.py and test_tuning.py",
    "codegen/gpu/gpus": "unit/codegen/gpu/test_tuning.py and unit/hardware/test_kernel_table.py",
    "codegen/gpu/machine_code": "unit/codegen/gpu/test_resources.py",
    "codegen/gpu/prefill_launch": "unit/codegen/gpu/test_prefill.py",
    "codegen/gpu/signatures": "every compilation, unit/codegen/gpu/test_attention.py and test_prefill.py",
    "codegen/programs/errors": "every refusal, unit/codegen/programs and unit/decode",
    "codegen/rows": "every kernel that is called, unit/codegen",
    "codegen/tiers": "every kernel with bit groups, unit/codegen",
    "fhopt/attention/cache_view": CACHES,
    "fhopt/attention/exact_tokens": CACHES,
    "fhopt/attention/manual_attention": MODELS,
    "fhopt/attention/operands": CACHES,
    "fhopt/attention/recorded": "unit/decode/test_recording.py",
    "fhopt/cache/base_layer": "its kinds, unit/cache/test_dynamic_layer.py and test_static_layer.py",
    "fhopt/cache/layer_map": CACHES,
    "fhopt/cache/quantized_rows": CACHES,
    "fhopt/cache/store": CACHES,
    "fhopt/calibration/data": "unit/calibration/test_run.py and unit/planning/test_pipeline.py",
    "fhopt/calibration/options": "unit/calibration/test_run.py and unit/cli/test_fit.py",
    "fhopt/cli/demo": "integration/test_demo.py",
    "fhopt/cli/demo_run": "integration/test_demo.py",
    "fhopt/cli/options": COMMANDS,
    "fhopt/decode/program": "whole models, unit/decode/test_programs.py and test_guards.py",
    "fhopt/decode/step": "unit/decode/test_cache_steps.py",
    "fhopt/errors": "every test of a refusal",
    "fhopt/export/step_state": "unit/export/test_decode_step.py",
    "fhopt/files": "robustness/test_faults.py and test_fuzz_files.py",
    "fhopt/hf/model_checks": "unit/hf/test_apply.py, all that it refuses",
    "fhopt/hf/quantizer": "unit/hf/test_load.py",
    "fhopt/import_hook": "integration/test_rewritten_models.py, in processes that import in other orders",
    "fhopt/inspection/measured_tables": COMMANDS,
    "fhopt/inspection/optional": "commands without an extra, unit/cli/test_app.py",
    "fhopt/inspection/plots": PAGES,
    "fhopt/inspection/tables": COMMANDS,
    "fhopt/lm_head/evaluate": "unit/cli/test_head.py",
    "fhopt/lm_head/fitting": "unit/lm_head/test_install.py and test_quantize.py",
    "fhopt/models/example_inputs": MODELS,
    "fhopt/models/loaded_model": "unit/models/test_loader.py",
    "fhopt/models/rewritten_model": "unit/models/test_rewritten_folder.py and unit/hf/test_load.py",
    "fhopt/models/sites": MODELS,
    "fhopt/models/transformers_import": "unit/cli/test_app.py, without the extra",
    "fhopt/ops/masks": "every kind of mask, unit/codegen and unit/ops/test_prefill_attention.py",
    "fhopt/ops/registry": "unit/codegen/test_dispatch.py",
    "fhopt/plan/latent_plan": PLANS,
    "fhopt/plan/module_buffer": "unit/passes/rewrite/test_latent_buffers.py",
    "fhopt/plan/site": PLANS,
    "fhopt/plan/site_plan": PLANS,
    "fhopt/progress": "unit/inspection/test_progress_file.py",
    "fhopt/serving/backend": ENGINES,
    "fhopt/serving/decode_step": "decode steps of a layer's caches, unit/serving/test_layer_cache.py",
    "fhopt/serving/layer_rows": "all that is written and read by them, unit/serving/test_layer_cache.py",
    "fhopt/serving/plugin": ENGINES,
    "fhopt/serving/quantization": ENGINES,
    "fhopt/version": "every file that names a version",
    "passes/graph/evaluate": GRAPHS,
    "passes/graph/nodes": GRAPHS,
    "passes/graph/printing": GRAPHS,
    "passes/graph/program": GRAPHS,
    "passes/outcome": GRAPHS,
    "passes/prepare/trace": "the composites that are traced, unit/passes/prepare/test_composites.py",
    "passes/recognize/axes": SPELLINGS,
    "passes/recognize/canonical": SPELLINGS,
    "passes/recognize/canonical_check": SPELLINGS,
    "passes/recognize/empty_rows": "unit/passes/recognize/test_validity.py",
    "passes/recognize/selections": "unit/passes/recognize/test_validity.py",
    "passes/recognize/kept_latents": "unit/passes/rewrite/test_absorb_projection.py",
    "passes/recognize/kv_head_repetition": SPELLINGS,
    "passes/recognize/latent_expansion": "unit/passes/rewrite/test_absorb_projection.py",
    "passes/recognize/node_roles": SPELLINGS,
    "passes/recognize/scores": SPELLINGS,
    "passes/recognize/softmax": SPELLINGS,
    "passes/rewrite/absorb": "integration/test_compiled_models.py",
    "passes/rewrite/lower": "integration/test_compiled_models.py",
    "passes/verify": GRAPHS,
}  # module: what tests it


def modules() -> list[str]:
    """Return every module but `__init__` and `__main__`, as its path without the suffix."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    own = [path for path in paths if not any(link in path.parents for link in LINKS) and "__" not in path.stem]
    return [path.relative_to(ROOT).with_suffix("").as_posix() for path in own]


def file_for(module: str) -> Path:
    """Return the test file of a module; passes and codegen are siblings of fhopt's packages."""
    folder, _, name = module.removeprefix("fhopt/").rpartition("/")
    return UNIT / folder / f"test_{name}.py"


@pytest.mark.parametrize("module", modules())
def test_a_module_has_a_file_of_tests_or_a_reason(module: str) -> None:
    assert file_for(module).exists() != (module in WITHOUT_A_FILE)


def test_only_existing_modules_need_a_reason() -> None:
    assert set(WITHOUT_A_FILE) <= set(modules())


def test_every_test_file_belongs_to_a_module() -> None:
    known = [file_for(module) for module in modules()]
    strays = [
        file.relative_to(UNIT).as_posix()
        for file in sorted(UNIT.rglob("test_*.py"))
        if file.stem not in OF_NO_MODULE
        and not any(file.parent == k.parent and f"{file.stem}_".startswith(f"{k.stem}_") for k in known)
    ]
    assert strays == []
