"""Fixtures: a clean state for every test, kernels in a folder of the session, and fitted small models."""

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
from small_models import Fitted

os.environ["HF_HUB_OFFLINE"] = "1"
# One core for each worker: threads of processes that a test starts would only wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# On Intel's CPUs MKL rounds by where a matrix lies in memory, and a code of a latent may then be its neighbour: not so.
os.environ["MKL_CBWR"] = "AUTO,STRICT"
TESTS = Path(__file__).parent
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
# A suite that fails does so again: the same inputs every time. `make fuzz` takes other ones.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `make sanitize` and of test_golden_kernels.py."""
    parser.addoption("--sanitize", action="store_true", help="Compile kernels with AddressSanitizer and UBSan.")
    parser.addoption(
        "--budget", type=float, help="Seconds that a test may take that tests/durations.json does not have."
    )
    parser.addoption("--save-durations", action="store_true", help="Write tests/durations.json.")
    parser.addoption("--regenerate-golden", action="store_true", help="Write the kernels in tests/golden anew.")


@pytest.hookimpl(trylast=True)  # there is no terminal reporter before
def pytest_configure(config: pytest.Config) -> None:
    """Failures are told at once; kernels that read or write where they must not, or overflow, end the run."""
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
    """Run the files that take longest first, so that no worker is left alone with one of them at the end."""
    seconds = Durations.load().files
    items.sort(key=lambda item: -seconds.get(item.path.relative_to(TESTS).as_posix(), 0.0))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(4 * float(item.config.getini("timeout") or 300)))


class Failures:
    """Names a test as soon as it has failed, for a run that is ended before its summary."""

    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            told = next((line for line in lines if line.startswith("E ")), lines[-1] if lines else "")
            self.terminal.ensure_newline()
            self.terminal.line(f"FAILED {report.nodeid} ({report.when}, {report.duration:.0f} s): {told.strip()}"[:400])


def pytest_collection_finish() -> None:
    """What was imported stays: Python's collector, a seventh of the time of tracing, is spared looking at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_unconfigure() -> None:
    """Libraries that count what is left of them at the end find it again."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Generated kernels go to a folder of the test session, which its workers share."""
    before, folder = os.environ.get("FHOPT_CACHE_DIR"), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["FHOPT_CACHE_DIR"] = str(folder / "kernels")
    os.environ["FHOPT_MODELS_GB"] = "0"  # pytest keeps the folders of several sessions, of half a gigabyte each
    yield
    for name in ("FHOPT_CACHE_DIR", "FHOPT_MODELS_GB"):
        os.environ.pop(name)
    if before is not None:
        os.environ["FHOPT_CACHE_DIR"] = before


@pytest.fixture(scope="session", autouse=True)
def kernels_are_waited_for() -> None:
    """What stands in for a kernel until it is built has tests of its own."""
    importlib.import_module("fhopt.codegen.background").builder.waits = True


@pytest.fixture(scope="session", autouse=True)
def no_lines_of_progress() -> None:
    """What a command says must not depend on how fast the machine is; progress has tests of its own."""
    progress: Any = importlib.import_module("fhopt.cli.progress")
    progress.SECONDS = 1e6


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    """What a module leaves behind, such as compiled graphs, is not looked at by the collections of those after it."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Same random numbers in every test, one thread (the models are tiny), and no compiled graphs of the one before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield


@pytest.fixture(autouse=True)
def kernels_where_they_are_the_point(request: pytest.FixtureRequest) -> None:
    """Compiling takes seconds a kernel, and every plan has kernels of its own."""
    if request.path.relative_to(TESTS).as_posix().startswith(WITHOUT_KERNELS):
        request.getfixturevalue("without_compiling")


@pytest.fixture
def without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on latents runs on torch operations, for tests in which no generated C++ is the point."""
    dispatch, background = (importlib.import_module(f"fhopt.codegen.{name}") for name in ("dispatch", "background"))
    monkeypatch.setattr(background, "build", importlib.import_module("fhopt.codegen.build").without_compiler)
    monkeypatch.setattr(dispatch, "builder", background.Builder(waits=True))
    monkeypatch.setattr(dispatch, "_kernels", {})


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """AOTAutograd as in inductor, without the minutes that generating C++ takes, but for tests marked `inductor`."""
    from torch._dynamo.backends.debugging import aot_eager

    if request.node.get_closest_marker("inductor") is None:
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda m, i, **options: aot_eager(m, i))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing has been kept yet, in the cache folder or in that of Triton."""
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "cache"


@pytest.fixture
def importable() -> str:
    """A MODEL of the form module:function."""
    return "command_models:encoder"


@pytest.fixture(scope="session")
def llama() -> Fitted:
    return Fitted("llama")


@pytest.fixture(scope="session")
def gpt2() -> Fitted:
    return Fitted("gpt2")


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def fitted(request: pytest.FixtureRequest) -> Fitted:
    model: Fitted = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def lettered() -> Any:
    """A tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["[UNK]", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
