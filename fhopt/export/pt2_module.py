"""`fhopt rewrite --format pt2` for a module that is not a language model: its forward with the plan, in torch only.

    program.pt2                     an exported program of torch operations: torch.export.load(...).module()
    start.pt2                       an exported program that returns the initial state, if there is a state
    program-aot.pt2                 the program compiled by AOTInductor, attention on quantized latents as a C++ op
    fhopt_kernels.so                that op and its kernels, if there are any (see fhopt/export/pt2_step.py)
    program.json                    inputs and state in order: names, shapes, dtypes
    plan/                           the plan

    program(inputs..., state...)  ->  outputs..., state after the call
    start()                       ->  state before the first call

A module that stores nothing between calls has no state. If it writes keys and values to buffers of its own, their
latents are state (fhopt/cache/module_buffers.py), empty at the start; so is any other buffer that it writes.

Inputs are the tensors of the module's example arguments, with their shapes: for a decode step, use an example with one
token. Arguments are not modified. Outputs are the tensors of the module's result, in order.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fhopt.attention import attend as attention_attend
from fhopt.cache import module_buffers
from fhopt.codegen.cpu import graph_kernels
from fhopt.errors import FhoptError
from fhopt.export.kernel_library import compile_library
from fhopt.export.pt2_step import check_out, compile_program, describe_state, first_line, write_description
from fhopt.export.step_attention import StateTensor
from fhopt.files import appearing_folder
from fhopt.models.capture import from_exported
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.rewritten_folder import PLAN
from fhopt.ops import encode_rows, latent_attention, packing, prefill_attention
from fhopt.passes import pipeline
from fhopt.passes.graph.program import Program
from fhopt.plan.fingerprint import check_fingerprint
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan

DESCRIPTION = "program.json"
VERSION = 1
_REFERENCES: dict[Any, Callable[..., Any]] = {
    torch.ops.fhopt.pack.default: packing.pack_reference,
    torch.ops.fhopt.unpack.default: packing.unpack_reference,
    torch.ops.fhopt.latent_attention.default: latent_attention.latent_attention_reference,
    torch.ops.fhopt.attend_latents.default: attention_attend.attend_latents_reference,
    torch.ops.fhopt.encode_rows.default: encode_rows.encode_rows_reference,
    torch.ops.fhopt.rebuilt_attention.default: prefill_attention.rebuilt_attention_reference,
}  # in torch operations, available in a process without fhopt
_README = """# {name}: a program with latents

```python
import torch

program = torch.export.load("program.pt2").module()
{call}
```

It needs only torch. `program.json` lists the inputs, with their shapes, {state}.

{compiled}The plan keeps {ratio:.2f}x fewer bytes at 8,192 tokens.
"""
_STATELESS = "outputs = program(*inputs)"
_STATEFUL = """state = torch.export.load("start.pt2").module()()
results = program(*inputs, *state)
outputs, state = results[:{outputs}], results[{outputs}:]"""
_STATE = """and the state: after its {outputs} outputs the
program returns the {states} tensors of the state, to be passed to the next call"""
_COMPILED = """`program-aot.pt2` is the program compiled for this kind of CPU (machine code: load it only from sources
that you trust):

```python
{library}program = torch._inductor.aoti_load_package("program-aot.pt2")
```

"""
_LIBRARY = 'torch.ops.load_library("fhopt_kernels.so")  # not in a process that imports fhopt\n'


@dataclass(frozen=True)
class ExportedModule:
    """A module's forward pass as exported programs. kernels: those of fhopt that `program` calls, if any."""

    program: torch.export.ExportedProgram
    start: torch.export.ExportedProgram | None  # None without a state
    inputs: tuple[StateTensor, ...]
    state: tuple[StateTensor, ...]
    outputs: int
    kernels: tuple[KernelSpec, ...]


def export_module(loaded: LoadedModel, plan: LatentPlan, kernels: bool = False) -> ExportedModule:
    """Export the programs of a module with a plan, for inputs of the shapes of its example arguments.

    kernels: attention on quantized latents is the op of C++ kernels. Raises FhoptError if the module cannot be
    exported, or the plan names sites that it does not have.
    """
    check_fingerprint(plan, loaded.weights(), loaded.name)
    plan.check_no_means("an exported module")
    plan.check_uniform("an exported module")
    rewritten = _rewritten(loaded, plan)
    specs: list[KernelSpec] = []
    table = _REFERENCES | ({torch.ops.fhopt.latent_attention.default: _kernel_call(specs)} if kernels else {})
    program = _exported(loaded.name, rewritten, (*rewritten.inputs, *rewritten.state)).run_decompositions(table)
    _check_targets(program, kernels)
    return ExportedModule(
        program,
        _exported(loaded.name, _Start(rewritten.state), ()) if rewritten.state else None,
        _described(rewritten.input_names, rewritten.inputs),
        _described(rewritten.state_names, rewritten.state),
        rewritten.outputs,
        tuple(dict.fromkeys(specs)),
    )


def _described(names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[StateTensor, ...]:
    return tuple(StateTensor(name, tuple(x.shape), x.dtype) for name, x in zip(names, tensors, strict=True))


def _exported(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> torch.export.ExportedProgram:
    with torch.no_grad():
        try:
            return torch.export.export(module, args, dict(kwargs or {}), strict=False)
        except Exception as error:  # the module's code may do what export does not support
            raise FhoptError(
                f"{name} cannot be exported: {type(error).__name__}: {first_line(error)}; expected a module "
                "that torch.export accepts. Correct what is named there."
            ) from error


def _check_targets(program: torch.export.ExportedProgram, kernels: bool) -> None:
    """Raise FhoptError for an op that a process without fhopt does not have."""
    known = {torch.ops.fhopt.latent_kernel.default} if kernels else set[Any]()
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", "") == "fhopt" and node.target not in known:
            raise FhoptError(f"{node.target} has no implementation in torch operations. Use another plan or layout.")


def _kernel_call(specs: list[KernelSpec]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Build the decomposition of `fhopt::latent_attention` to the C++ op, which adds the kernels it calls to `specs`.

    Attention on unquantized latents becomes torch operations.
    """

    def attend(
        query: Tensor, key: Tensor, key_scale: Tensor | None, value: Tensor, value_scale: Tensor | None,
        mask: Tensor | None, *, scale: float, softcap: float = 0.0, lengths: Tensor | None = None, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        operands = (query, key, key_scale, value, value_scale, mask)
        spec = _spec(query, options, softcap)
        readable = mask is None or mask.dtype in (torch.bool, torch.float32)
        if spec is None or not readable or not graph_kernels.register_kernel(spec):
            return latent_attention.latent_attention_reference(
                *operands, scale=scale, softcap=softcap, lengths=lengths, **options
            )
        specs.append(spec)
        return torch.ops.fhopt.latent_kernel(spec.name, *operands, lengths, None, 0, scale, softcap, spec.value_width)

    return attend


def _spec(query: Tensor, options: dict[str, Any], softcap: float) -> KernelSpec | None:
    """Return the kernel for latents that are quantized on both sides; None for others."""
    tiers = [
        tuple(zip(*(options[f"{side}_{what}"] for what in ("bits", "widths", "steps")), strict=True))
        for side in ("key", "value")
    ]
    if not all(tiers) or query.dtype == torch.float64:
        return None
    widths = [sum(width for _, width, _ in side) for side in tiers]
    return KernelSpec(tiers[0], tiers[1], widths[0], widths[1], "float32", softcap != 0.0)


# --------------------------------------------------------------------------------------------------- module


class _Rewritten(nn.Module):
    """A rewritten graph as a module that maps inputs and state to outputs and state."""

    def __init__(self, program: Program, inputs: Sequence[str], state: Sequence[str]) -> None:
        super().__init__()
        self.graph = program.module
        self.placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
        used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
        self.fixed: dict[str, Any] = {}
        for name in self.placeholders:
            value = program.values[name]
            if name in inputs or name in state:
                continue
            if isinstance(value, Tensor) and name in used:
                self.register_buffer(f"value_{name}", value.detach())
            else:
                self.fixed[name] = value
        self.input_placeholders, self.state_placeholders = list(inputs), list(state)
        self.inputs = tuple(program.values[name] for name in inputs)
        self.state = tuple(program.values[name].detach().clone() for name in state)
        self.state_names: tuple[str, ...] = ()
        self.input_names: tuple[str, ...] = ()
        self.outputs = 0

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on (inputs..., state...) and return (outputs..., state...)."""
        count = len(self.input_placeholders)
        state = [x.clone() for x in tensors[count:]]
        known = dict(zip(self.input_placeholders, tensors, strict=False))
        known |= dict(zip(self.state_placeholders, state, strict=True))
        arguments = [
            known[n] if n in known else self.fixed[n] if n in self.fixed else getattr(self, f"value_{n}")
            for n in self.placeholders
        ]
        outputs = [x for x in self.graph(*arguments) if isinstance(x, Tensor)]
        return (*outputs, *state)


class _Start(nn.Module):
    """The initial state, as a module without inputs."""

    def __init__(self, state: Sequence[Tensor]) -> None:
        super().__init__()
        for index, tensor in enumerate(state):
            self.register_buffer(f"part_{index}", tensor)

    def forward(self) -> tuple[Tensor, ...]:
        """Return every tensor of the state."""
        return tuple(part.clone() for part in self.buffers())


def _rewritten(loaded: LoadedModel, plan: LatentPlan) -> _Rewritten:
    """Run all passes over the module's graph. Raises FhoptError if a site of the plan is not compressed."""
    exported = loaded.program or _exported(loaded.name, cast(nn.Module, loaded.module), *loaded.inputs)
    captured = from_exported(exported)
    program = captured.program
    _mark_buffers(program)
    with torch.no_grad():
        outcome = pipeline.find_attentions(program, assume_finite=True)
        _remove_dead_attention(program)
        pipeline.optimize(outcome, plan, keeper=_ProgramKeeper())
    left = sorted({site.site.name for site in plan.sites} - outcome.compressed.keys())
    if left:
        reasons = "; ".join(sorted({m.reason for m in outcome.missed})) or "no attention of this name was found"
        raise FhoptError(f"the plan's {left[0]} was not compressed in {loaded.name}: {reasons}. See fhopt explain.")
    return _as_module(program, captured.inputs)


class _ProgramKeeper(module_buffers.BufferKeeper):
    """Buffer keeper for exported programs, which never writes the module's own buffers."""

    why_kept = staticmethod(lambda buffer: "")
    parts = staticmethod(module_buffers.blank)


def _mark_buffers(program: Program) -> None:
    """Set the source of buffers as in Dynamo's graphs: the passes only rewrite buffers of a module."""
    for node in program.graph.nodes:
        if node.name in program.buffers:
            *path, name = program.buffers[node.name].split(".")
            modules = "".join(f"._modules['{part}']" for part in path)
            node._dynamo_source = types.SimpleNamespace(name=f"L['self']{modules}._buffers['{name}']")


def _remove_dead_attention(program: Program) -> None:
    """Remove unused attention calls, which dead-code elimination keeps because they may draw random dropout."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default and not node.users:
            program.graph.erase_node(node)
    program.module.recompile()


def _as_module(program: Program, inputs: dict[str, str]) -> _Rewritten:
    tensors = [name for name in inputs if isinstance(program.values[name], Tensor)]
    parts = [name for name, bound in program.bound.items() if any(s in program.buffers for s in bound.sources)]
    written = [name for name in program.buffers if any(_writes(n, name) for n in program.graph.nodes)]
    module = _Rewritten(program, tensors, [*parts, *written])
    module.input_names = tuple(inputs[name] for name in tensors)
    module.state_names = (*(_part_name(program, parts, name) for name in parts), *(program.buffers[n] for n in written))
    outputs: Any = next(n for n in program.graph.nodes if n.op == "output").args[0]
    module.outputs = sum(isinstance(x, fx.Node) for x in outputs)
    return module


def _writes(node: fx.Node, name: str) -> bool:
    is_copy = node.target is torch.ops.aten.copy_.default
    return is_copy and isinstance(node.args[0], fx.Node) and node.args[0].name == name


def _part_name(program: Program, parts: Sequence[str], name: str) -> str:
    """Name a tensor of the state: `buffer of keys, buffer of values: number`."""
    keys, values = program.bound[name].sources[:2]
    alike = [other for other in parts if program.bound[other].sources[:2] == (keys, values)]
    return f"{program.buffers[keys]}, {program.buffers[values]}: {alike.index(name)}"


# --------------------------------------------------------------------------------------------------- files


def write_module(loaded: LoadedModel, plan: LatentPlan, out: Path, compiled: bool = True) -> Path:
    """Write the files of the module docstring to the folder `out`, atomically, and return it.

    compiled: also write the program compiled by AOTInductor, which takes minutes. Replaces an older export. Raises
    FhoptError.
    """
    check_out(out, DESCRIPTION)
    with appearing_folder(out) as staging:
        plain = export_module(loaded, plan)
        torch.export.save(plain.program, staging / "program.pt2")
        if plain.start is not None:
            torch.export.save(plain.start, staging / "start.pt2")
        called: tuple[KernelSpec, ...] = ()
        if compiled:
            with_kernels = export_module(loaded, plan, kernels=True)
            called = with_kernels.kernels
            compile_program(with_kernels.program, staging / "program-aot.pt2")
            if called:
                compile_library(called, staging / "fhopt_kernels.so")
        plan.save(staging / PLAN)
        _describe(
            loaded, plan, plain, staging, _COMPILED.format(library=_LIBRARY if called else "") if compiled else ""
        )
    return out


def _describe(loaded: LoadedModel, plan: LatentPlan, made: ExportedModule, staging: Path, compiled: str) -> None:
    about = {
        "torch": torch.__version__,
        "inputs": describe_state(made.inputs),
        "state": describe_state(made.state),
        "outputs": made.outputs,
    }
    write_description(staging, DESCRIPTION, VERSION, loaded, plan, about)
    counts = dict(outputs=made.outputs, states=len(made.state))
    text = _README.format(
        name=loaded.name, compiled=compiled, ratio=plan.ratio(),
        call=_STATEFUL.format(**counts) if made.state else _STATELESS,
        state=_STATE.format(**counts) if made.state else f"and returns {made.outputs} outputs; it has no state",
    )  # fmt: skip
    (staging / "README.md").write_text(text)
