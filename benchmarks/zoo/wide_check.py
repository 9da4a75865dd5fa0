"""Check of one model of the wide zoo: count its attentions, find them, run both graphs, compare."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from model_zoo.checking import fresh_values, largest_output_difference, run_outputs
from torch import nn

from benchmarks.zoo.attention_count import count
from fhopt.errors import FhoptError
from fhopt.models.capture import Captured, capture_graphs
from fhopt.passes import pipeline
from fhopt.passes.graph.nodes import remove_dead_code
from fhopt.passes.graph.program import Program
from fhopt.passes.outcome import Explanation

TOLERANCE = 1e-4  # float32, other summation orders, through two layers and a softmax
DOUBLE_TOLERANCE = 1e-9  # float64, in models that amplify rounding
IS_NO_ATTENTION = ("not the softmax of an attention", "no matmul of the weights and values")
BAD = ("silent", "wrong", "crashed")  # statuses that must not occur
AMPLIFIED = "compared in float64: in float32 the model itself amplifies rounding"
FAULT = "a bug in fhopt"  # in the reason of a site on which a pass failed


@dataclass
class WideRow:
    """The result of one class with one attention implementation.

    found: attentions that were rewritten exactly; sites: those of them that a plan could compress. explained: not
    rewritten, with a reason. status: "found", "explained", "silent", "wrong", "crashed", "no attention", "not
    captured", "not built". why: reasons, each once.
    """

    case: str
    family: str
    impl: str = ""
    expected: int = 0
    found: int = 0
    sites: int = 0
    explained: int = 0
    max_error: float = 0.0
    graphs: int = 0
    seconds: float = 0.0
    status: str = ""
    why: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a dictionary, with two digits of the error; None for an infinite one."""
        error = float(f"{self.max_error:.1e}") if math.isfinite(self.max_error) else None
        return asdict(self) | {"max_error": error, "seconds": round(self.seconds, 1)}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> WideRow:
        """Return the row of `as_dict`."""
        error = math.inf if fields["max_error"] is None else fields["max_error"]
        return WideRow(**dict(fields) | {"max_error": error})

    @staticmethod
    def from_result(fields: Mapping[str, Any]) -> WideRow:
        """Return the row of `as_result`, with its reasons, and without its time."""
        known = {name: fields[name] for name in WideRow.__dataclass_fields__ if name in fields}
        counted = {"found": fields["value"], "expected": fields["baseline"]}
        return WideRow.from_dict({"max_error": 0.0} | known | counted)

    def as_result(self) -> dict[str, Any]:
        """Return the row in the form of the results: the common fields, and further ones."""
        said = {k: v for k, v in self.as_dict().items() if v not in (0, 0.0, "", [])}
        figures = {"metric": "attentions_found", "value": self.found, "unit": "", "baseline": self.expected}
        ratio = round(self.found / self.expected, 3) if self.expected else None
        for name in ("case", "impl", "found", "expected", "seconds"):
            said.pop(name, None)
        if self.why:
            said["why"] = [reason[:160] for reason in self.why[:2]]
        return {"case": self.case, "impl": self.impl, **figures, "ratio": ratio, **said}

    @property
    def line(self) -> str:
        """Return one line for the screen."""
        found = f"{self.found} of {self.expected} found" + (f", {self.explained} explained" if self.explained else "")
        why = f": {'; '.join(self.why)[:200]}" if self.why else ""
        return f"{self.case}/{self.impl} {self.status}, {found}, {self.max_error:.0e}, {self.seconds:.1f} s{why}"


@dataclass
class _Graph:
    """One graph: attentions that it computes, those that were rewritten, explanations of others, the difference.

    unread: attentions with unused results; they are not in `expected`.
    """

    expected: int
    found: int = 0
    sites: int = 0
    reasons: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # why softmaxes are not attention
    error: float = 0.0
    fault: str = ""
    unread: int = 0


def check(row: WideRow, model: nn.Module, arguments: Mapping[str, Any]) -> WideRow:
    """Fill the row with the finder's results for `model(**arguments)`."""
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        row.expected = count(lambda: model(**arguments), model.parameters())
    except (RuntimeError, MemoryError) as error:  # counting retains every tensor
        if not is_out_of_memory(error):
            raise
        row.status, row.why = "not built", ["its attentions take more memory to count than a class may"]
        return row
    if row.expected and not _is_finite(model(**arguments)):
        row.status, row.why, row.expected = "not built", ["its own numbers are not finite on small inputs"], 0
        return row
    try:
        captured = capture_graphs(model, (), arguments)
    except FhoptError as error:
        row.status = "not captured" if row.expected else "no attention"
        row.why = [one_line(error)]
        row.seconds = time.perf_counter() - start
        return row
    row.graphs = len(captured)
    graphs = [_check_graph(one) for one in captured]
    _sum_up(row, [one.runs for one in captured], graphs)
    if row.status == "wrong":
        _compare_in_double(row, model, arguments)
    row.seconds = time.perf_counter() - start
    return row


def _compare_in_double(row: WideRow, model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Repeat the comparison in float64, since a model itself may amplify float32 rounding beyond the tolerance.

    The model is then converted to float64. A model that does not run in it stays wrong.
    """
    doubled = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    try:
        captured = capture_graphs(model.double(), (), doubled)
        graphs = [_check_graph(one) for one in captured]
    except Exception:  # kernels of float64 are missing, or the model hard-codes a dtype
        return
    again = WideRow(row.case, row.family, row.impl, row.expected)
    _sum_up(again, [one.runs for one in captured], graphs)
    if again.found == row.found and again.max_error <= DOUBLE_TOLERANCE:
        row.max_error, row.status = again.max_error, again.status
        row.why.append(AMPLIFIED)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed: torch has no dedicated error for that on a CPU."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _is_finite(result: Any) -> bool:
    """Return whether the first floating-point tensor of a result, the main one, is finite."""
    leaves = torch.utils._pytree.tree_leaves(result)
    main = next((x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
    return main is None or bool(main.isfinite().all())


def _check_graph(captured: Captured) -> _Graph:
    program = captured.program
    weights = [program.values[name] for name in program.parameters]
    with torch.no_grad():
        before = run_outputs(program)
        fresh = fresh_values(program)
        before_fresh = _outputs_or_none(program, fresh)
        whole = count(lambda: run_outputs(program, keeps=True), weights)
        remove_dead_code(program)
        program.module.recompile()
        graph = _Graph(count(lambda: run_outputs(program, keeps=True), weights))
        graph.unread = whole - graph.expected
    try:
        _find(program, graph)
        graph.error = largest_output_difference(before, run_outputs(program))
        if before_fresh is not None:
            second = largest_output_difference(before_fresh, run_outputs(program, values=fresh))
            graph.error = max(graph.error, second)
    except Exception as error:  # a broken pass is the row's failure, not the end of the zoo
        graph.fault = one_line(error)
    return graph


def _outputs_or_none(program: Program, values: dict[str, Any]) -> list[Any] | None:
    """Run a program on other values; None if it rejects them, such as an index out of range."""
    try:
        return run_outputs(program, values=values)
    except Exception:  # an operation may raise anything for unsupported values
        return None


def _find(program: Program, graph: _Graph) -> None:
    outcome = pipeline.find_attentions(program)
    graph.found = sum(n.target is torch.ops.fhopt.attention.default for n in program.graph.nodes)
    graph.sites = len(outcome.sites)
    graph.reasons = [m.reason for m in outcome.missed if _is_of_attention(m)]
    graph.others = [m.reason for m in outcome.missed if not _is_of_attention(m)]
    graph.fault = next((m.reason for m in outcome.missed if FAULT in m.reason), "")
    pipeline.lower_program(outcome)
    program.module.recompile()


def _is_of_attention(missed: Explanation) -> bool:
    return missed.stage != "find_attention" and not missed.reason.lower().startswith(IS_NO_ATTENTION)


def _sum_up(row: WideRow, runs: list[int], graphs: list[_Graph]) -> None:
    """Set counts and status; a graph counts as often as it ran."""
    counted = [(graph, n) for graph, n in zip(graphs, runs, strict=True)]
    row.expected -= sum(g.unread * n for g, n in counted)
    row.found = sum(g.found * n for g, n in counted)
    row.sites = sum(g.sites * n for g, n in counted)
    row.explained = sum(min(len(g.reasons), max(g.expected - g.found, 0)) * n for g, n in counted)
    row.max_error = max((g.error for g in graphs), default=0.0)
    outside = row.expected - sum(g.expected * n for g, n in counted)
    row.why = list(dict.fromkeys(reason for g in graphs for reason in g.reasons))
    faults = [g.fault for g in graphs if g.fault]
    silent = sum(max(g.expected - g.found - len(g.reasons), 0) * n for g, n in counted)
    if outside > 0:
        row.why.append(f"{outside} outside of what torch.compile traces")
    row.status = _status(row, faults, silent, max(outside, 0))
    if row.status == "silent":
        row.why += dict.fromkeys(reason for g in graphs for reason in g.others)
    row.why = faults or row.why


def _status(row: WideRow, faults: list[str], silent: int, outside: int) -> str:
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: bool(faults), "crashed"),
        (lambda: not row.max_error <= TOLERANCE, "wrong"),
        (lambda: silent > 0, "silent"),
        (lambda: not row.expected and not row.found, "no attention"),
        (lambda: outside > 0 and not row.found, "not captured"),
        (lambda: row.explained + outside > 0, "explained"),
    ]
    return next((name for holds, name in checks if holds()), "found")


def one_line(error: BaseException) -> str:
    """Return class and message of an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
