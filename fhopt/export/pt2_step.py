"""`fhopt rewrite --format pt2`: a decode step that runs without fhopt, with latents as explicit state.

    step.pt2, seal.pt2              exported programs of torch operations only: torch.export.load(...).module()
    step-aot.pt2                    the step compiled by AOTInductor, attention on latents as a C++ op
    fhopt_kernels.so                that op and its kernels: torch.ops.load_library before the first call
    step.json                       the state: names, shapes, dtypes, and the sizes of sinks, window and block
    plan/                           the plan

fhopt/export/decode_step.py and the folder's README.md describe arguments and results of the two programs, and what the
caller does between calls. `seal` runs once per block of tokens and is not compiled. The library and the compiled
program are native code for this kind of CPU: unlike a rewritten folder, load them only from trusted sources. A process
that has imported fhopt already has the op.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fhopt.errors import FhoptError
from fhopt.export.decode_step import ExportedStep, Seal, unrounded
from fhopt.export.kernel_library import compile_library
from fhopt.export.step_attention import StateTensor
from fhopt.files import appearing_folder
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.rewritten_folder import PLAN, describe_files
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan
from fhopt.version import __version__

DESCRIPTION = "step.json"
VERSION = 1
EXAMPLE_BLOCKS = 2  # of quantized tokens in example inputs: a size of 0 or 1 would be specialized
_README = """# {name}: a decode step with latents as state

`step.pt2` and `seal.pt2` need only torch:

```python
import torch

step, seal = (torch.export.load(f"{{name}}.pt2").module() for name in ("step", "seal"))
```

{compiled}`step(ids [1,1], counts [2], *state)` returns the logits of one new token, then its key and value for each
attention. counts: how many tokens the sinks and the residual window (tensors `open_key` and `open_value`) hold, and how
many are quantized (`key_rows`, `value_rows` and their scales). `step.json` lists the state.

1. Append the new keys and values to the window (dimension 2, at counts[0]).
2. When sinks and window hold {sinks} + {recent} + {block} tokens, pass places {sinks} to {last} of all their tensors to
   `seal`, append what it returns to the packed latents (at counts[1]; make these longer when they are full), and move
   the tokens behind that block {block} places down.

The plan keeps {ratio:.2f}x fewer bytes at 8,192 tokens: {token_bytes:,} bytes for a quantized token, exact {exact:,}.
"""
_COMPILED = """`step-aot.pt2` is the step compiled for this kind of CPU (machine code: load it only from sources that
you trust):

```python
torch.ops.load_library("fhopt_kernels.so")  # not in a process that imports fhopt
step = torch._inductor.aoti_load_package("step-aot.pt2")
```

"""


@dataclass(frozen=True)
class Exported:
    """A decode step as exported programs. `state`: the state tensors of `ExportedStep`, in order."""

    step: torch.export.ExportedProgram
    seal: torch.export.ExportedProgram
    state: tuple[StateTensor, ...]


def export_pt2(model: nn.Module, plan: LatentPlan, kernels: bool = False) -> Exported:
    """Export the programs `step` and `seal` of a causal language model for one sequence, a token at a time.

    kernels: attention on quantized tokens is the op of C++ kernels. Raises FhoptError if no step can be exported.
    """
    step = ExportedStep(model, unrounded(plan), kernels).eval()
    ids, counts, state = example_inputs(step)
    sizes = dynamic_rows(step)
    blocks = tuple(t.empty(0)[:, :, : plan.block].clone() for t in step.tensors if None not in t.shape)
    with torch.no_grad():
        try:
            exported = torch.export.export(
                step, (ids, counts, *state), dynamic_shapes=(None, None, sizes), strict=False
            )
        except Exception as error:  # the model's code may do what export does not support
            raise FhoptError(
                f"{type(model).__name__} cannot be exported: {type(error).__name__}: {first_line(error)}; "
                "expected a model that torch.export accepts. Correct what is named there."
            ) from error
        seal = torch.export.export(Seal(step), blocks, strict=False)
    return Exported(exported, seal, tuple(step.tensors))


def example_inputs(step: ExportedStep) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Create the inputs (ids, counts, state) that a step is exported with."""
    rows = EXAMPLE_BLOCKS * step.plan.block
    return (
        torch.zeros(1, 1, dtype=torch.int64),
        torch.tensor([step.plan.sinks, 0]),
        [t.empty(rows) for t in step.tensors],
    )


def dynamic_rows(step: ExportedStep) -> tuple[dict[int, Any] | None, ...]:
    """Return the dynamic dimensions of each tensor of the state: one size for all of them."""
    rows = torch.export.Dim("rows", min=2)
    return tuple({2: rows} if None in t.shape else None for t in step.tensors)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0][:200]


def write_programs(loaded: LoadedModel, plan: LatentPlan, out: Path, compiled: bool = True) -> Path:
    """Write the files of the module docstring to the folder `out`, atomically, and return it.

    compiled: also write the program compiled by AOTInductor, which takes minutes. Replaces an older export. Raises
    FhoptError.
    """
    check_out(out, DESCRIPTION)
    model = loaded.language_model()
    with appearing_folder(out) as staging:
        plain = export_pt2(model, plan)
        for name in ("step", "seal"):
            torch.export.save(getattr(plain, name), staging / f"{name}.pt2")
        if compiled:
            _write_compiled(model, plan, staging)
        plan.save(staging / PLAN)
        _describe(loaded, plan, plain.state, staging, compiled)
    return out


def check_out(out: Path, *descriptions: str) -> None:
    """Raise FhoptError if `out` contains anything but an older export, which has one of the files `descriptions`."""
    is_older = any((out / name).is_file() for name in descriptions)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not is_older)):
        raise FhoptError(
            f"{out} exists and is not an export; expected a new folder or an older export. Choose another folder."
        )


def _write_compiled(model: nn.Module, plan: LatentPlan, staging: Path) -> None:
    compile_program(export_pt2(model, plan, kernels=True).step, staging / "step-aot.pt2")
    compile_library([KernelSpec.of(site, "float32") for site in plan.sites], staging / "fhopt_kernels.so")


def compile_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile a program by AOTInductor to a package. Raises FhoptError."""
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # inductor and the compiler raise many types
        raise FhoptError(
            f"AOTInductor failed: {first_line(error)}. Pass --no-aot to export without compiled programs."
        ) from error


def describe_state(tensors: Sequence[StateTensor]) -> list[dict[str, Any]]:
    """Describe the tensors of a program's state or input as JSON values."""
    return [asdict(t) | {"dtype": str(t.dtype).removeprefix("torch.")} for t in tensors]


def write_description(
    staging: Path, name: str, version: int, loaded: LoadedModel, plan: LatentPlan, about: Mapping[str, Any]
) -> None:
    """Write the JSON file `name` of an export: model, plan, version, the values `about`, and its files."""
    names = [str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file()]
    common = {"version": version, "fhopt": __version__, "model": loaded.name, "plan": plan.digest()}
    content = {**common, **about, "files": describe_files(staging, names)}
    (staging / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _describe(
    loaded: LoadedModel, plan: LatentPlan, state: Sequence[StateTensor], staging: Path, compiled: bool
) -> None:
    about = {
        "torch": torch.__version__,
        "sinks": plan.sinks,
        "recent": plan.recent,
        "block": plan.block,
        "state": describe_state(state),
    }
    write_description(staging, DESCRIPTION, VERSION, loaded, plan, about)
    text = _README.format(
        name=loaded.name, compiled=_COMPILED if compiled else "", sinks=plan.sinks, recent=plan.recent,
        block=plan.block, last=plan.sinks + plan.block, ratio=plan.ratio(), exact=plan.exact_token_bytes(),
        token_bytes=sum(t.token_bytes for t in state),
    )  # fmt: skip
    (staging / "README.md").write_text(text)


def read_step_description(folder: Path) -> dict[str, Any]:
    """Load `step.json`. Raises FhoptError if it is missing, damaged or of another version."""
    from fhopt.models.rewritten_folder import read_json

    if not (folder / DESCRIPTION).is_file():
        raise FhoptError(
            f"{folder} has no {DESCRIPTION}; expected an exported folder. Write one with: fhopt rewrite "
            "--format pt2, or fhopt export."
        )
    about = read_json(folder, DESCRIPTION)
    if about.get("version") != VERSION:
        raise FhoptError(f"{folder} has version {about.get('version')}; expected {VERSION}. Export it again.")
    return about
