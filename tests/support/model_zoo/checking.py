"""Check that the finder's graph computes the same function, and that every attention is found.

    entry.build() -> capture -> run (outputs, changed inputs, gradients)      the graph as captured
                             -> passes.find -> run, on equal inputs           the rewritten graph

Both run on the values of the capture and on a second set (`fresh_values`): a rewrite holds for all values, or is wrong.
The captured graph runs before the finder sees it: all copies of a graph share its higher-order bodies, so that a finder
which changed one body would change every copy.
"""

from __future__ import annotations

import importlib
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fhopt.models.capture import Captured, capture_graphs, from_exported
from fhopt.passes import pipeline
from fhopt.passes.graph.program import Program
from fhopt.passes.outcome import Explanation
from fhopt.plan.site import AttentionSite

from . import Entry, ZooCase

MODULES = ("huggingface", "torch_modules", "handwritten", "spellings", "lookalikes")
TOLERANCE = 1e-5  # float32 sums in another order: about 100 roundings of 1.2e-7


def entries() -> list[Entry]:
    """Return the whole zoo. Raises ValueError if two entries have the same label."""
    zoo = [entry for name in MODULES for entry in _entries_of(name)]
    twice = [label for label, count in Counter(entry.label for entry in zoo).items() if count > 1]
    if twice:
        raise ValueError(f"several entries of the zoo are called {', '.join(twice)}; expected one of each label.")
    return zoo


def _entries_of(name: str) -> list[Entry]:
    try:
        module = importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        return []
    return list(module.ENTRIES)


@dataclass
class ZooResult:
    """Results of the finder on one entry, over all its graphs.

    max_error: of any output or changed input, relative to the largest element of that tensor. max_gradient_error: of
    any gradient, relative to the largest gradient; 0 if the captured graph has none.
    """

    entry: Entry
    graphs: int = 0
    nodes: int = 0
    max_error: float = 0.0
    max_gradient_error: float = 0.0
    sites: list[AttentionSite] = field(default_factory=list)
    missed: list[Explanation] = field(default_factory=list)
    seconds_capture: float = 0.0
    seconds_find: float = 0.0
    graphs_run_twice: int = 0  # with a second set of values, which some graphs refuse
    problems: list[str] = field(default_factory=list)

    @property
    def sites_expected(self) -> int:
        """Attentions that must be found."""
        return self.entry.sites

    @property
    def sites_found(self) -> int:
        """Attentions that were found."""
        return len(self.sites)

    @property
    def sites_explained(self) -> int:
        """Misses with the reason that the entry expects; 0 if it expects none."""
        return len(self.explanations) if self.entry.explained else 0

    @property
    def explanations(self) -> list[Explanation]:
        """Sites that were not rewritten for the reason that the entry expects."""
        return [missed for missed in self.missed if re.search(self.entry.reason, missed.reason)]

    @property
    def failures(self) -> list[str]:
        """Failed expectations of the entry; empty if all hold."""
        failures = list(self.problems)
        if self.sites_found != self.sites_expected:
            failures.append(f"{self.sites_found} sites found, expected {self.sites_expected}")
        if self.sites_explained < self.entry.explained:
            reason = f" with the reason {self.entry.reason!r}" if self.entry.reason else ""
            failures.append(f"{self.sites_explained} explained{reason}, expected {self.entry.explained}")
        for name, error in (("outputs", self.max_error), ("gradients", self.max_gradient_error)):
            if not error <= TOLERANCE:
                failures.append(f"{name} differ by {error:.1e} of the largest, expected at most {TOLERANCE:.0e}")
        return failures

    @property
    def ok(self) -> bool:
        """Whether every attention was found or explained, and all values agree."""
        return not self.failures


def check(entry: Entry, exported: bool = False) -> ZooResult:
    """Capture the entry, with `torch.export` if `exported`, run the finder, and compare.

    Exceptions are not raised but added to the result's `failures`.
    """
    result = ZooResult(entry)
    case = entry.build()
    start = time.perf_counter()
    try:
        captured = [_export(case)] if exported else capture_graphs(case.module, case.args, case.kwargs)
    except Exception as error:  # any error that torch raises on a model it cannot capture
        result.problems.append(f"{'export' if exported else 'capture'} failed: {_one_line(error)}")
        return result
    result.seconds_capture = time.perf_counter() - start
    for graph in captured:
        _check_graph(graph.program, result)
    result.problems.extend(_unexpected_shapes(entry, result.sites))
    return result


def _export(case: ZooCase) -> Captured:
    if any(type(value).__name__ == "DynamicCache" for value in case.kwargs.values()):
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()  # registers which tensors such a cache holds
    return from_exported(torch.export.export(case.module, case.args, dict(case.kwargs), strict=False))


def _check_graph(program: Program, result: ZooResult) -> None:
    """Run the finder on one graph and add the outcome to the result."""
    result.graphs += 1
    result.nodes += len(program.graph.nodes)
    before = _Run(program)
    fresh = fresh_values(program)
    before_fresh = _run_if_possible(program, fresh)
    versions = {name: _version(value) for name, value in program.values.items()}
    start = time.perf_counter()
    try:
        outcome = pipeline.find_attentions(program)
    except Exception as error:  # a failing pass fails this entry, not the whole zoo
        result.problems.append(f"find failed: {_one_line(error)}")
        return
    result.seconds_find += time.perf_counter() - start
    result.sites.extend(outcome.sites.values())
    result.missed.extend(outcome.missed)
    changed = [name for name, version in versions.items() if _version(program.values.get(name)) != version]
    if changed:
        result.problems.append(f"the finder changed the example inputs {', '.join(changed)}")
    for module in program.module.modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()  # run the current graph even if a pass forgot to recompile
    for expected, values in ((before, None), (before_fresh, fresh)):
        if expected is None:
            continue
        try:
            after = _Run(program, values)
        except Exception as error:
            result.problems.append(f"the rewritten graph does not run: {_one_line(error)}")
            return
        result.graphs_run_twice += values is not None
        result.max_error = max(result.max_error, _largest_difference(expected, after))
        _compare_gradients(expected, after, result)


def fresh_values(program: Program, seed: int = 7) -> dict[str, Any]:
    """Draw another value of the same form and range for every tensor of a program.

    Elements are permuted, masks of zeros and ones are redrawn, and constant tensors get varying elements, so that no
    tensor keeps a value without effect.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _fresh(value, generator) for name, value in program.values.items()}


def _fresh(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or value.is_complex() or not value.numel() or value.is_quantized:
        return value
    source = value.detach()
    if not source.is_floating_point():
        if source.dtype == torch.bool or bool(((source == 0) | (source == 1)).all() and source.dim()):
            return (torch.rand(source.shape, generator=generator) < 0.8).to(source.dtype)
        return source.flatten()[torch.randperm(source.numel(), generator=generator)].view(source.shape)
    if bool((source == source.flatten()[0]).all()):
        noise = torch.rand(source.shape, generator=generator) * 0.2 + 0.9
        return (source * noise.to(source.dtype) + (noise * 0.1).to(source.dtype)).to(source.dtype)
    return source.flatten()[torch.randperm(source.numel(), generator=generator)].view(source.shape)


def _run_if_possible(program: Program, values: dict[str, Any]) -> _Run | None:
    """Run a program on other values; None if it refuses them, such as an index out of range."""
    try:
        return _Run(program, values)
    except Exception:  # any error that an operation raises on values it refuses
        return None


def _version(value: Any) -> int:
    """In-place version counter of a tensor; -1 for anything else."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else -1


def _unexpected_shapes(entry: Entry, sites: Iterable[AttentionSite]) -> list[str]:
    expected = {"heads": entry.heads, "kv_heads": entry.kv_heads, "key_dim": entry.head_dim}
    return [
        f"{site.name} has {name}={getattr(site, name)}, expected {value}"
        for site in sites
        for name, value in expected.items()
        if value and getattr(site, name) != value
    ]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# --------------------------------------------------------------------------------------------------- running


class _Run:
    """A program's outputs, its inputs after the run, and its gradients, each run on new clones of its example values.

    gradients: by placeholder, None if no output depends on it. refusal: why there are no gradients.
    """

    def __init__(self, program: Program, values: dict[str, Any] | None = None) -> None:
        values = program.values if values is None else values
        with torch.no_grad():
            inputs = {name: _clone(value) for name, value in values.items()}
            self.outputs = _call(program, inputs)
        self.inputs = {name: value for name, value in inputs.items() if name not in program.parameters}
        self.gradients: dict[str, Tensor | None] = {}
        self.refusal = ""
        try:
            self.gradients = _gradients(program, values)
        except Exception as error:  # fast paths and flex attention on CPU raise different errors
            self.refusal = _one_line(error)


def run_outputs(program: Program, keeps: bool = False, values: dict[str, Any] | None = None) -> list[Any]:
    """Run a program; return its outputs, then its non-parameter inputs after the run.

    keeps: use the model's own parameters, not clones. values: of all inputs; None: the example values. The caller
    disables gradients.
    """
    whole = program.parameters if keeps else {}
    given = program.values if values is None else values
    inputs = {name: value if name in whole else _clone(value) for name, value in given.items()}
    outputs = _call(program, inputs)
    return [*outputs, *(value for name, value in inputs.items() if name not in program.parameters)]


def largest_output_difference(before: Sequence[Any], after: Sequence[Any]) -> float:
    """Return the largest difference of two results of `run_outputs`, relative to the largest element of its tensor."""
    if len(before) != len(after):
        return math.inf
    return max((_relative(*_difference(x, y)) for x, y in zip(before, after, strict=True)), default=0.0)


def _clone(value: Any) -> Any:
    """Clone tensors; replace symbols by their hints; return other values unchanged."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


def _call(program: Program, inputs: dict[str, Any]) -> list[Any]:
    torch.manual_seed(0)
    return tree_leaves(program.module(*inputs.values()))


def _gradients(program: Program, values: dict[str, Any]) -> dict[str, Tensor | None]:
    """Return gradients of one random projection of all outputs with respect to all floating inputs and parameters."""
    inputs = {name: _clone(value) for name, value in values.items()}
    leaves = {name: v.requires_grad_() for name, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    with torch.enable_grad():
        passed = {name: v.clone() if name in leaves else v for name, v in inputs.items()}  # leaves reject writes
        outputs = [o for o in _call(program, passed) if isinstance(o, Tensor) and o.requires_grad]
        if not outputs:
            return dict.fromkeys(leaves)
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), directions, allow_unused=True)
    return dict(zip(leaves, gradients, strict=True))


# --------------------------------------------------------------------------------------------------- comparing


def _largest_difference(before: _Run, after: _Run) -> float:
    """Return the largest difference over all outputs and non-parameter inputs."""
    if len(before.outputs) != len(after.outputs):
        return math.inf
    pairs = [*zip(before.outputs, after.outputs, strict=True)]
    pairs += [(value, after.inputs.get(name)) for name, value in before.inputs.items()]
    return max((_relative(*_difference(expected, actual)) for expected, actual in pairs), default=0.0)


def _compare_gradients(before: _Run, after: _Run, result: ZooResult) -> None:
    if before.refusal:
        return
    if after.refusal:
        result.problems.append(f"the rewritten graph cannot be differentiated: {after.refusal}")
        return
    differences = [(0.0, 0.0)]
    for name, expected in before.gradients.items():
        actual = after.gradients.get(name)
        if (expected is None) != (actual is None):
            result.problems.append(f"{name} has a gradient only {'before' if actual is None else 'after'} the rewrite")
        elif expected is not None:
            differences.append(_difference(expected, actual))
    errors, sizes = zip(*differences, strict=True)
    result.max_gradient_error = max(result.max_gradient_error, _relative(max(errors), max(sizes)))


def _difference(expected: Any, actual: Any) -> tuple[float, float]:
    """Return (largest difference, largest expected element); infinite if they cannot be compared."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return (0.0 if type(expected) is type(actual) and expected == actual else math.inf), 1.0
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return math.inf, 1.0
    if expected.is_complex():
        return _difference(torch.view_as_real(expected), torch.view_as_real(actual))
    if not expected.is_floating_point():
        return (0.0 if torch.equal(expected, actual) else math.inf), 1.0
    expected, actual = expected.double(), actual.double()
    finite = expected.isfinite()
    if not torch.allclose(expected[~finite], actual[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return math.inf, 1.0
    if not finite.any():
        return 0.0, 0.0
    largest = float((expected - actual)[finite].abs().nan_to_num(math.inf).max())
    return largest, float(expected[finite].abs().max())


def _relative(difference: float, size: float) -> float:
    return difference / max(size, 1e-30) if difference else 0.0
