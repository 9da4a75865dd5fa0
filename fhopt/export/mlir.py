"""`fhopt export`: a decode step as MLIR, and as an IREE module for this machine or another.

    step.mlir, seal.mlir            the two functions of fhopt/export/decode_step.py, in linalg on tensors or in the
                                    torch dialect
    step.vmfb, seal.vmfb            both functions compiled by IREE, if the target is one of its devices
    weights.safetensors             weights of the model and bases of the plan
    step.json                       names of the weights in the order of arguments, and the state
    plan/                           the plan

`step` takes the weights, ids, counts and state; `seal` takes the bases and a block of tokens. Weights are arguments, so
the functions are small, and the same for all weights of one model and plan.

torch-mlir imports the exported program, IREE compiles it: `pip install 'fhopt[mlir]'`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fhopt.errors import FhoptError
from fhopt.export.decode_step import ExportedStep, Seal, unrounded
from fhopt.export.pt2_step import (
    DESCRIPTION,
    VERSION,
    check_out,
    describe_state,
    dynamic_rows,
    example_inputs,
    read_step_description,
    write_description,
)
from fhopt.export.step_attention import StateTensor
from fhopt.export.step_state import StepState
from fhopt.export.targets import TARGETS, Target
from fhopt.files import appearing_folder, check_tensor_file
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.rewritten_folder import PLAN
from fhopt.plan.latent_plan import LatentPlan

DIALECTS = {"linalg": "linalg-on-tensors", "torch": "torch"}
WEIGHTS = "weights.safetensors"

_TRIPLES = {
    "aarch64": "aarch64-linux-gnu",
    "x86_64": "x86_64-linux-gnu",
    "riscv64": "riscv64-linux-gnu",
    "arm": "armv7a-linux-gnueabihf",
}


@dataclass(frozen=True)
class Lowered:
    """Both functions as MLIR modules, with the weights and the state that they take, in order."""

    step: Any
    seal: Any
    weights: dict[str, Tensor]
    bases: tuple[str, ...]  # the weights that `seal` takes
    state: tuple[StateTensor, ...]


class _Functional(nn.Module):
    """A module that takes its parameters and buffers as its first argument."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.hidden, self.names = (module,), list(names)  # in a tuple, so that its parameters are not registered here

    def forward(self, weights: list[Tensor], inputs: list[Tensor]) -> Any:
        """Call the module with these weights on `inputs`."""
        return torch.func.functional_call(self.hidden[0], dict(zip(self.names, weights, strict=True)), tuple(inputs))


def lower_step(model: nn.Module, plan: LatentPlan, dialect: str = "linalg") -> Lowered:
    """Lower the decode step of a causal language model, for one sequence and token, to MLIR. Raises FhoptError."""
    step = ExportedStep(model, unrounded(plan)).eval()
    ids, counts, state = example_inputs(step)
    weights = {n: t.detach() for n, t in [*step.named_parameters(), *step.named_buffers()]}
    inputs = [ids, counts, *state]
    sizes = ([None] * len(weights), [None, None, *dynamic_rows(step)])
    seal = Seal(step)
    bases = tuple(name for name, _ in seal.named_buffers() if name.endswith("_encode"))
    blocks = [t.empty(0)[:, :, : plan.block].clone() for t in step.tensors if None not in t.shape]
    return Lowered(
        _imported(_Functional(step, list(weights)), list(weights.values()), inputs, sizes, dialect, "step"),
        _imported(_Functional(seal, bases), [weights[n] for n in bases], blocks, None, dialect, "seal"),
        weights,
        bases,
        tuple(step.tensors),
    )


def _imported(
    module: nn.Module, weights: list[Tensor], inputs: list[Tensor], sizes: Any, dialect: str, name: str
) -> Any:
    fx = _package("torch_mlir.fx")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(module, (weights, inputs), dynamic_shapes=sizes, strict=False)
            return fx.export_and_import(exported, output_type=DIALECTS[dialect], func_name=name)
    except Exception as error:  # torch-mlir raises many types
        first = (str(error).strip() or "no message").splitlines()[0][:200]
        raise FhoptError(
            f"the {name} cannot be lowered to {dialect}: {first}; expected only torch operations. Export with "
            "--dialect torch, or use `fhopt rewrite --format pt2`."
        ) from error


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FhoptError(
            f"{name.partition('.')[0]} is not installed; the export requires the extra mlir. Install it with: "
            "pip install 'fhopt[mlir]'"
        ) from error


# --------------------------------------------------------------------------------------------------- folder


def export(loaded: LoadedModel, plan: LatentPlan, target: Target, out: Path) -> Path:
    """Write the files of the module docstring to the folder `out`, atomically, and return it. Raises FhoptError."""
    from safetensors.torch import save_file

    target.check()
    check_out(out, DESCRIPTION)
    lowered = lower_step(loaded.language_model(), plan, target.dialect)
    with appearing_folder(out) as staging:
        for name in ("step", "seal"):
            _write_module(getattr(lowered, name), staging / name, target)
        save_file({n: t.contiguous().clone() for n, t in lowered.weights.items()}, staging / WEIGHTS)
        plan.save(staging / PLAN)
        _describe(loaded, plan, lowered, target, staging)
    return out


def _write_module(module: Any, path: Path, target: Target) -> None:
    if target.bytecode:
        with path.with_suffix(".mlirbc").open("wb") as file:
            module.operation.write_bytecode(file)
    else:
        path.with_suffix(".mlir").write_text(str(module))
    if target.name != "mlir":
        path.with_suffix(".vmfb").write_bytes(compile_module(str(module), target))


def compile_module(text: str, target: Target) -> bytes:
    """Compile the functions in `text` to an IREE module. Raises FhoptError."""
    compiler = _package("iree.compiler")
    backend, default, options = TARGETS[target.name]
    arch = target.arch or default
    extra = [option.format(arch=arch) for option in options if arch]
    extra += _cpu_options(arch) if target.name == "iree-cpu" else []
    try:
        made: bytes = compiler.compile_str(text, target_backends=[backend], input_type="auto", extra_args=extra)
    except Exception as error:  # errors of an external program
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise FhoptError(
            f"IREE could not compile for {backend} {arch}: {(lines or [str(error)])[0][:300]}. Set --arch to "
            "an architecture that IREE knows, or choose another target."
        ) from error
    return made


def _cpu_options(arch: str) -> list[str]:
    """Return the options for `host`, or for an architecture with an optional CPU after a colon: aarch64:cortex-a76."""
    if arch == "host":
        return ["--iree-llvmcpu-target-cpu=host"]
    name, _, cpu = arch.partition(":")
    triple = _TRIPLES.get(name, name)
    return [f"--iree-llvmcpu-target-triple={triple}", f"--iree-llvmcpu-target-cpu={cpu or 'generic'}"]


def _describe(loaded: LoadedModel, plan: LatentPlan, lowered: Lowered, target: Target, staging: Path) -> None:
    about = {
        "target": asdict(target),
        "sinks": plan.sinks,
        "recent": plan.recent,
        "block": plan.block,
        "weights": list(lowered.weights),
        "bases": list(lowered.bases),
        "state": describe_state(lowered.state),
    }
    write_description(staging, DESCRIPTION, VERSION, loaded, plan, about)


# --------------------------------------------------------------------------------------------------- running


def open_module(folder: Path) -> StepState:
    """Open an exported IREE module for this CPU as a `StepState` that takes tokens. Raises FhoptError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about, plan = read_step_description(folder), LatentPlan.load(folder / PLAN)
    if about.get("target", {}).get("name") != "iree-cpu":
        raise FhoptError(
            f"{folder} was exported for {about.get('target')}; expected iree-cpu. Export with --target iree-cpu."
        )
    try:
        check_tensor_file(folder / WEIGHTS)
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise FhoptError(f"{folder / WEIGHTS} cannot be read ({error}). Export the folder again.") from error
    state = [StateTensor(t["name"], tuple(t["shape"]), getattr(torch, t["dtype"])) for t in about["state"]]
    step = _Function(folder / "step.vmfb", "step", [weights[n] for n in about["weights"]])
    seal = _Function(folder / "seal.vmfb", "seal", [weights[n] for n in about["bases"]])
    return StepState(plan, state, step, seal)


class _Function:
    """A function of an IREE module on this CPU, with its weights."""

    def __init__(self, path: Path, name: str, weights: Sequence[Tensor]) -> None:
        runtime = _package("iree.runtime")
        config = runtime.Config("local-task")
        module = runtime.VmModule.mmap(config.vm_instance, str(path))
        self.function = runtime.load_vm_module(module, config)[name]
        self.weights = [runtime.asdevicearray(config.device, w.numpy()) for w in weights]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        arrays = [_signed_bytes(x.contiguous().numpy()) for x in inputs]
        results = self.function(*self.weights, *arrays)
        results = results if isinstance(results, (tuple, list)) else [results]
        return [torch.from_numpy(_unsigned_bytes(np.array(r.to_host()))) for r in results]


def _signed_bytes(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """View unsigned bytes as signed: MLIR's i8 has no sign, and IREE treats it as signed."""
    return x.view(np.int8) if x.dtype == np.uint8 else x


def _unsigned_bytes(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.view(np.uint8) if x.dtype == np.int8 else x
