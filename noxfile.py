"""The versions that fhopt is tested with, an environment each. `make test-matrix` runs all and makes a table of it.

    nox --list                            what there is
    nox --session "matrix(oldest)"        one of them

Not every version with every other: each version that matters is in one environment at least, the oldest with the
oldest and the newest with the newest. A release of PyTorch for CUDA brings its own release of Triton. An interpreter
that is not installed, or a version that the index does not have, is a skip with its reason. An environment that passes
is removed (with CUDA's libraries it takes 6 GB); one that fails stays in .nox, to be looked into and used again.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import nox

nox.needs_version = ">=2026.2"
nox.options.sessions = ["matrix"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

REPORTS = Path("build", "matrix")  # <environment>.json: versions; <environment>.xml: the outcome of each test
INSTALLED = (
    "import json, platform; from importlib.metadata import version as v;"
    "packages = ('torch', 'transformers', 'triton', 'numpy');"
    "print(json.dumps({'python': platform.python_version()} | {name: v(name) for name in packages}))"
)
TESTED = (
    "unit/backend/test_bound_inputs.py", "unit/backend/test_compile.py", "unit/backend/test_compiled_generate.py",
    "unit/backend/test_inductor.py", "unit/backend/test_settings.py", "unit/attention/test_latent_tensor.py",
    "unit/cache/test_dynamic_layer.py", "unit/cache/test_latent_cache.py", "unit/cache/test_cross_layer.py",
    "unit/cache/test_report.py", "unit/cache/test_residual_window.py", "unit/cache/test_static_layer.py",
    "unit/cli/test_app.py", "unit/cli/test_fit.py", "unit/cli/test_inspect.py", "unit/codegen/cpu/test_attention.py",
    "unit/codegen/cpu/test_gguf_blocks.py", "unit/codegen/cpu/test_graph_kernels.py",
    "unit/codegen/cpu/test_skinny_linear.py",
    "unit/codegen/cpu/test_wide_linear.py", "unit/codegen/test_build.py",
    "unit/codegen/test_compiler.py", "unit/codegen/test_dispatch.py", "unit/codegen/test_eager.py",
    "unit/codegen/gpu/test_encode_rows.py", "unit/fitting/test_fit_summary.py", "unit/hf/test_apply.py",
    "unit/hf/test_prompt_cache.py", "unit/inspection/test_drawing.py", "unit/inspection/test_facts.py",
    "unit/inspection/test_graph_files.py", "unit/inspection/test_kernel_listing.py",
    "unit/inspection/test_snapshots.py", "unit/models/test_loader.py", "unit/ops/test_algebra.py",
    "unit/ops/test_attention.py", "unit/ops/test_latent_attention.py", "unit/ops/test_packing.py",
    "unit/passes/prepare", "unit/passes/recognize", "unit/plan", "unit/test_system.py",
    "integration/test_compiled_models.py", "integration/test_encoder_decoder_cache.py",
    "integration/test_families.py", "integration/test_latent_generation.py", "integration/test_static_cache.py",
    "robustness/test_fuzz_capture.py", "robustness/test_fuzz_functionalize.py", "robustness/test_threads.py",
    "benchmarks/cpu/test_memory.py",
)  # fmt: skip
# Those that depend on versions: graphs as Dynamo makes them, passes, drawings, caches, generated kernels, models, the
# commands.


def lowest() -> tuple[str, ...]:
    """Return the lower bound of each package that fhopt needs, and of those that models of transformers need."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    return tuple(f"{name}=={bound}" for name, bound in re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(ranges), re.M))


@dataclass(frozen=True)
class Environment:
    """An interpreter, and packages that pip installs beside fhopt; what is not named is the newest that fits."""

    python: str
    packages: tuple[str, ...]


ENVIRONMENTS = {
    "oldest": Environment("3.10", lowest()),
    "torch-2.12": Environment("3.11", ("torch==2.12.*", "transformers==5.21.*", "triton==3.7.*")),
    "torch-2.13": Environment("3.12", ("torch==2.13.*", "transformers==5.22.*", "triton==3.7.*")),
    "torch-2.14": Environment("3.12", ("torch==2.14.*", "transformers==5.23.*", "triton==3.8.*")),
    "newest": Environment("3.13", ("torch", "transformers", "triton")),
}


@nox.session
@nox.parametrize(["python", "name"], [(e.python, name) for name, e in ENVIRONMENTS.items()], ids=list(ENVIRONMENTS))
def matrix(session: nox.Session, name: str) -> None:
    """Run the tests that depend on versions in one environment."""
    reports = REPORTS.resolve()
    reports.mkdir(parents=True, exist_ok=True)
    install(session, ENVIRONMENTS[name].packages)
    versions = session.run("python", "-c", INSTALLED, silent=True)
    if versions is None:  # --install-only
        return
    (reports / f"{name}.json").write_text(str(versions))
    files = [f"tests/{path}" for path in TESTED]
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = ["python", "-m", "pytest", *options, f"--junitxml={reports / name}.xml", *files]
    session.run(*command, env=environment)
    shutil.rmtree(session.virtualenv.location)


def install(session: nox.Session, packages: tuple[str, ...]) -> None:
    """Install everything in one call, so that pip sees all bounds; skip the session where the index lacks a version."""
    command = ["python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-compile"]
    output = session.run_install(
        *command, "-c", "constraints.txt", *packages, "-e", ".[test]", silent=True, success_codes=[0, 1]
    )
    errors = re.findall(r"^ERROR: (.*)$", str(output), re.M)
    if any(error.startswith("No matching distribution found") for error in errors):
        session.skip("; ".join(errors))
    if errors:
        session.error("; ".join(errors))
