"""Fixtures: a clean state for every test, kernels in a folder of the session, and fitted small models."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from small_models import Fitted

os.environ["HF_HUB_OFFLINE"] = "1"
# One core for each worker: threads of processes that a test starts would only wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
LONGEST = (
    "test_demo.py",
    "test_soak.py",
    "test_exporting.py",
    "test_verifying.py",
    "test_codegen.py",
    "test_backend.py",
    "test_head_command.py",
    "test_zoo.py",
    "test_triton_attention.py",
    "test_profiling.py",
    "test_rewriting.py",
    "test_static_cache.py",
    "test_compiled_generation.py",
    "test_latent_buffers.py",
    "test_fitting.py",
    "test_tasks.py",
    "test_gpu_filter.py",
    "test_triton_chunk.py",
    "test_encoder_decoder_cache.py",
)  # files that take minutes
# A suite that fails does so again: the same inputs every time. `make fuzz` takes other ones.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `make sanitize` and of test_golden_kernels.py."""
    parser.addoption("--sanitize", action="store_true", help="Compile kernels with AddressSanitizer and UBSan.")
    parser.addoption("--regenerate-golden", action="store_true", help="Write the kernels in tests/golden anew.")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels that read or write where they must not, or overflow, end the run."""
    if config.getoption("--sanitize"):
        compiler: Any = importlib.import_module("fhopt.codegen.compiler")
        compiler.FLAGS += SANITIZED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, in this order, so that no worker is left alone with one at the end."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


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
    yield
    os.environ.pop("FHOPT_CACHE_DIR")
    if before is not None:
        os.environ["FHOPT_CACHE_DIR"] = before


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


@pytest.fixture
def without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on latents runs on torch operations, for tests in which no generated C++ is the point."""
    dispatch = importlib.import_module("fhopt.codegen.dispatch")
    monkeypatch.setattr(dispatch, "build", importlib.import_module("fhopt.codegen.build").build_torch)
    monkeypatch.setattr(dispatch, "_kernels", {})


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
