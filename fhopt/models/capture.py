"""Capture of a module's graph as a `Program`, by Dynamo or from `torch.export`.

    capture(model, (), {"input_ids": ids})            -> Captured: the graph, its input values, its main output
    from_exported(torch.export.load("model.pt2"))     -> Captured

Dynamo graphs have a placeholder for every parameter, as lifted export graphs do: passes see one form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import FhoptError
from fhopt.models.cache_layers import cache_layers
from fhopt.passes.graph.program import Program, copy_program

SKIPPED = "Dynamo skips functions of torch and of the standard library, and those under torch.compiler.disable"


@dataclass
class Captured:
    """A captured forward pass.

    inputs: placeholder name -> argument name. result: index of the main output (logits, or the first tensor) among the
    graph's outputs. is_logits: the model returns that output as logits. runs: how often the forward pass ran the graph;
    layers of one class may share it.
    """

    program: Program
    inputs: dict[str, str]
    result: int
    is_logits: bool = False
    runs: int = 1


def capture(
    model: torch.nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, reset: bool = True
) -> Captured:
    """Run `model(*args, **kwargs)` once under Dynamo and return its graph. Raises FhoptError unless it is one graph.

    reset: clear Dynamo's compiled code of this process; False if it is in use.
    """
    captured = capture_graphs(model, args, kwargs, reset)
    if len(captured) != 1:
        raise FhoptError(
            f"{type(model).__name__} has {len(captured) - 1} graph breaks; expected one graph. List them with "
            "TORCH_LOGS=graph_breaks, and capture a part without them; use_cache=False avoids some."
        )
    if captured[0].result < 0:
        raise FhoptError(
            "the model returns no tensor computed by its graph; expected logits or hidden states. Return them."
        )
    return captured[0]


def capture_graphs(
    model: torch.nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, reset: bool = True
) -> list[Captured]:
    """Run `model(*args, **kwargs)` once under Dynamo and return all its graphs, in execution order.

    reset: clear Dynamo's compiled code of this process; False if it is in use. `result` is -1 for a graph that does not
    compute the model's main output. Raises FhoptError if the model cannot be run or traced.
    """
    keywords = dict(kwargs or {})
    seen: list[tuple[Program, _Runs]] = []
    result = _record_graphs(seen, model, args, keywords, reset)
    layers = cache_layers(model)
    captured = []
    for program, runs in seen:
        _name_parameters(program, model)
        program.layers = layers
        inputs, main = _name_inputs(program, args, keywords), _main_output(result, runs.outputs)
        captured.append(Captured(program, inputs, main, getattr(result, "logits", None) is not None, runs.count))
    for _, runs in seen:
        runs.outputs.clear()
    seen.clear()  # without a reset, Dynamo caches the backend and everything it references
    return captured


@dataclass
class _Runs:
    """Runs of a graph: their number, and the outputs of the last one."""

    count: int = 0
    outputs: list[Any] = field(default_factory=list)


def _record_graphs(
    seen: list[tuple[Program, _Runs]], model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
    reset: bool,
) -> Any:  # fmt: skip
    """Run a model in evaluation mode under Dynamo, append its graphs to `seen`, and return its result."""

    def keep(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        runs = _Runs()
        seen.append((copy_program(module, example_inputs), runs))  # now: Dynamo clears a backend's inputs

        def run(*inputs: Any) -> Any:
            runs.outputs[:] = module(*inputs)
            runs.count += 1
            return tuple(runs.outputs)

        return run

    was_training = model.training
    model.eval()
    known = set(_graph_breaks())
    try:
        result = _run(model, keep, args, kwargs, reset)
        breaks = [reason for reason in _graph_breaks() if reason not in known]
    except torch._dynamo.exc.TorchDynamoException as error:
        raise FhoptError(
            f"{type(model).__name__} could not be captured ({_cause(error)}). Rewrite the code named there, "
            "or capture a part of the model."
        ) from error
    except Exception as error:  # the model rejected these inputs
        raise FhoptError(
            f"{type(model).__name__} could not be run ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}). Call it with the same arguments in plain PyTorch first."
        ) from error
    finally:
        model.train(was_training)
        if reset:
            torch._dynamo.reset()
    if not seen:
        why = _cause(breaks[0]) if breaks else SKIPPED
        raise FhoptError(
            f"{type(model).__name__} runs, but torch.compile traced no graph ({why}). Move its attention into "
            "your own module."
        )
    return result


def _graph_breaks() -> list[str]:
    """Return the reasons of Dynamo's graph breaks in this process, in order."""
    return [str(reason) for reason in torch._dynamo.utils.counters["graph_break"]]


def _cause(error: object) -> str:
    """Return Dynamo's cause in one line, with the last user frame."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    first = lines[1] if lines[0].endswith("raised:") and len(lines) > 1 else lines[0]
    _, _, trace = text.partition("from user code:")
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    return f"{first}, at {'/'.join(frames[-1][0].split('/')[-2:])}:{frames[-1][1]}" if frames else first


def _run(model: torch.nn.Module, keep: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reset: bool) -> Any:
    if reset:
        torch._dynamo.reset()
        return torch.compile(model, backend=keep, dynamic=False)(*args, **kwargs)
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):  # for one more graph
        return torch.compile(model.forward, backend=keep, dynamic=False)(*args, **kwargs)


def from_exported(exported: torch.export.ExportedProgram) -> Captured:
    """Return an exported program's lifted graph with its example inputs. Raises FhoptError without inputs."""
    if exported.example_inputs is None:
        raise FhoptError(
            "the .pt2 program has no example inputs; expected a program saved with torch.export.save. Save it again."
        )
    signature = exported.graph_signature
    args, kwargs = exported.example_inputs
    user = list(torch.utils._pytree.tree_leaves((args, kwargs)))
    names = [s.arg.name for s in signature.input_specs]
    constants: dict[str, Any] = {**exported.state_dict, **exported.constants}
    values: list[Any] = [constants[s.target] if s.target is not None else user.pop(0) for s in signature.input_specs]
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph, {}))
    module = fx.GraphModule(exported.graph_module, graph)
    parameters = dict(signature.inputs_to_parameters)
    kept = {s.arg.name: str(s.target) for s in signature.input_specs if s.target is not None}
    buffers = {name: target for name, target in kept.items() if name not in parameters}
    program = Program(module, dict(zip(names, values, strict=True)), parameters, buffers)
    inputs = {name: name for name in signature.user_inputs if isinstance(name, str)}
    return Captured(program, inputs, 0)


def _name_parameters(program: Program, model: torch.nn.Module) -> None:
    """Set parameter names by tensor identity, which is more reliable than source names."""
    known = {id(p): name for name, p in model.named_parameters()}
    for name, value in program.values.items():
        if id(value) in known:
            program.parameters[name] = known[id(value)]


def _name_inputs(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Map placeholders to arguments: keywords, or positions as strings."""
    arguments = [*((str(i), a) for i, a in enumerate(args)), *kwargs.items()]
    names = {id(value): name for name, value in arguments if isinstance(value, Tensor)}
    return {name: names[id(value)] for name, value in program.values.items() if id(value) in names}


def _main_output(result: Any, outputs: list[Any]) -> int:
    """Find the graph output that is the model's logits, or else its first tensor; -1 if none is."""
    main = getattr(result, "logits", None)
    if main is None:
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        main = leaves[0] if leaves else None
    for index, output in enumerate(outputs):
        if isinstance(main, Tensor) and isinstance(output, Tensor) and output.data_ptr() == main.data_ptr():
            return index
    return -1


__all__ = ["Captured", "capture", "capture_graphs", "from_exported"]
