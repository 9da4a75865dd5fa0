"""Fixtures: a clean state for every test, a kernel cache of the repository, and small fitted models."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from durations import DurationRecorder, Durations
from hypothesis import settings
from needs import sampled
from small_models import FittedModel

from fhopt.codegen import build

os.environ["HF_HUB_OFFLINE"] = "1"
# One core per worker: threads of subprocesses would only contend with each other.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# On Intel CPUs, MKL's rounding depends on the address of a matrix, which can change a quantized value by one: pin it.
os.environ["MKL_CBWR"] = "AUTO,STRICT"
TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "build" / "test-kernels"
# Where no generated C++ is the point: attention on latents runs on torch operations, and no kernel is compiled.
WITHOUT_KERNELS = (
    "benchmarks/tasks/",
    "unit/backend/test_online_fit.py",
    "unit/calibration/",
    "unit/cli/",
    "unit/evaluation/",
    "unit/fitting/",
    "unit/hf/",
    "unit/inspection/",
    "unit/models/",
    "unit/passes/",
    "unit/planning/",
    "unit/refine/",
    "integration/test_deepseek_decoding.py",
    "integration/test_encoder_decoder_cache.py",
    "integration/test_examples.py",
    "integration/test_families.py",
    "integration/test_input_layout.py",
    "integration/test_readme.py",
    "robustness/test_fuzz_capture.py",
)
# The same inputs in every run, so that failures are repeatable. `make fuzz` draws others.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make sanitize` and test_golden_kernels.py."""
    parser.addoption("--sanitize", action="store_true", help="Compile kernels with AddressSanitizer and UBSan.")
    parser.addoption(
        "--budget", type=float, help="Seconds that a test may take that tests/durations.json does not have."
    )
    parser.addoption("--save-durations", action="store_true", help="Write tests/durations.json.")
    parser.addoption("--regenerate-golden", action="store_true", help="Write the kernels in tests/golden anew.")


@pytest.hookimpl(trylast=True)  # the terminal reporter is registered before
def pytest_configure(config: pytest.Config) -> None:
    """Report failures at once; with --sanitize, end the run at a kernel's first invalid access or overflow."""
    if (terminal := config.pluginmanager.getplugin("terminalreporter")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(terminal))
        recorder = DurationRecorder(
            Durations.load(), config.getoption("--budget"), config.getoption("--save-durations")
        )
        config.pluginmanager.register(recorder)
    if config.getoption("--sanitize"):
        compiler: Any = importlib.import_module("fhopt.codegen.compiler")
        compiler.FLAGS += SANITIZED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first, so that none of them runs last on a single worker."""
    seconds = Durations.load().files
    items.sort(key=lambda item: -seconds.get(item.path.relative_to(TESTS).as_posix(), 0.0))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(4 * float(item.config.getini("timeout") or 300)))


class Failures:
    """Names a test as soon as it fails, in case the run is stopped before its summary."""

    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            told = next((line for line in lines if line.startswith("E ")), lines[-1] if lines else "")
            self.terminal.ensure_newline()
            self.terminal.line(f"FAILED {report.nodeid} ({report.when}, {report.duration:.0f} s): {told.strip()}"[:400])


def pytest_collection_finish() -> None:
    """Freeze imported objects, so that Python's collector, a seventh of tracing time, skips them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_unconfigure() -> None:
    """Unfreeze, so that libraries which count their live objects at exit find them."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def kernel_cache() -> Iterator[None]:
    """Store generated kernels in a folder of the repository: their names have a hash of their source and compiler.

    Prebuilt ones, of an editable install, are not used: tests compile for other CPUs, and run without a compiler.
    """
    variables = {
        "FHOPT_CACHE_DIR": str(KERNELS),
        "FHOPT_ISA": "native",
        "FHOPT_MODELS_GB": "0",  # converted models would take half a gigabyte
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_lines_of_progress() -> None:
    """Turn off progress lines, so that output does not depend on machine speed; progress has its own tests."""
    background, progress = map(importlib.import_module, ("fhopt.codegen.background", "fhopt.cli.progress"))
    vars(background)["QUIET"] = vars(progress)["SECONDS"] = 1e6


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    """Freeze the objects that a test module leaves, such as compiled graphs, so that later collections skip them."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Reset the random seed, the thread count (one: the models are tiny) and Dynamo before every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield


@pytest.fixture(autouse=True)
def kernels_where_they_are_the_point(request: pytest.FixtureRequest) -> None:
    """Skip compilation in the files of WITHOUT_KERNELS: it takes seconds per kernel, and each plan has its own."""
    if request.path.relative_to(TESTS).as_posix().startswith(WITHOUT_KERNELS):
        request.getfixturevalue("without_compiling")


@pytest.fixture
def without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run latent attention on torch operations, for tests of anything but generated C++."""
    dispatch, background = (importlib.import_module(f"fhopt.codegen.{name}") for name in ("dispatch", "background"))
    monkeypatch.setattr(background, "build_kernel", build.without_compiler)
    monkeypatch.setattr(dispatch, "builder", background.Builder())
    monkeypatch.setattr(dispatch, "_kernels", {})


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Trace with AOTAutograd but skip inductor, whose C++ builds take minutes, except in tests marked `inductor`."""
    from torch._dynamo.backends.debugging import aot_eager

    if request.node.get_closest_marker("inductor") is None:
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda m, i, **options: aot_eager(m, i))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty fhopt and Triton cache folders."""
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "cache"


@pytest.fixture
def importable() -> str:
    """A MODEL argument of the form module:function."""
    return "command_models:encoder"


@pytest.fixture(scope="session")
def llama() -> FittedModel:
    return FittedModel("llama")


@pytest.fixture(scope="session")
def gpt2() -> FittedModel:
    return FittedModel("gpt2")


@pytest.fixture(scope="session", params=sampled(["llama", "gpt2"], 2))
def fitted(request: pytest.FixtureRequest) -> FittedModel:
    model: FittedModel = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def lettered() -> Any:
    """A character-level tokenizer for the letters a, b and c."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["[UNK]", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
