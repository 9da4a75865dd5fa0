"""Probes in a model's attention: keys, values and their gradients at every site of a forward and backward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fhopt.calibration import segments
from fhopt.errors import FhoptError
from fhopt.models.capture import Captured
from fhopt.ops import attention
from fhopt.ops import masks as ops_masks
from fhopt.passes.outcome import Outcome
from fhopt.passes.recognize.masks import LEAST
from fhopt.plan.site import AttentionSite

QUERIES = 128  # rows of the attention matrix that exist at once
ACTIVATION_BYTES = 5 * 2**29  # of a graph that is differentiated at once; larger ones are run in segments
POSITIONS = 64  # whose probabilities over the vocabulary exist at once
EVERY = slice(None)
Batch = Mapping[str, Tensor]
OnGradients = Callable[[Tensor, Tensor], None]  # called with the gradients of keys and of values, see `Watch`


# --------------------------------------------------------------------------------------------------- the probe


class _ProbedAttention(torch.autograd.Function):
    """Attention whose backward pass also gives the gradients that reach far keys and values to what `observe` returns.

    It works on QUERIES rows at a time and leaves out the columns that none of them sees. With P the weights, o the
    output and g its gradient, those of scores are P (g v^T - g . o), as FlashAttention has them (2205.14135, appendix
    B.2); columns that all rows have far have the same gradients from far pairs as from all.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, far: Tensor, scale: float,
        softcap: float, observe: Callable[[Tensor, Tensor], OnGradients],
    ) -> Tensor:  # fmt: skip
        output, lse = _attend(q, k, v, bias, sinks, scale, softcap)
        ctx.save_for_backward(q, k, v, bias, output, lse)
        ctx.far, ctx.options, ctx.observe = far, (scale, softcap), observe
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, output, lse = ctx.saved_tensors
        groups, (scale, softcap) = k.shape[1], ctx.options
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        add, scaled = ctx.observe(k.detach(), v.detach()), q * scale
        dots = (gradients[0] * output).sum(-1, keepdim=True)
        lse = torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1)  # of queries that see nothing
        for rows, columns in tiles(q, k, bias):
            part, grad, seen = scaled[:, :, rows], gradients[0][:, :, rows], cut(bias, rows, columns)
            logits, slope = _logits(part, k[:, :, columns], seen, softcap)
            p = logits.sub_(lse[:, :, rows]).exp_()
            d_s = attention.grouped_scores(grad, v[:, :, columns]).sub_(dots[:, :, rows]).mul_(p)
            d_s = d_s if slope is None else d_s.mul_(slope)
            d_q[:, :, rows] = attention.grouped_mix(d_s, k[:, :, columns])
            to_keys, to_values = _to_keys(d_s, part, groups), _to_keys(p, grad, groups)
            d_k[:, :, columns] += to_keys
            d_v[:, :, columns] += to_values
            far = cut(ctx.far, rows, columns)
            reached, some, none = _far_columns(far, seen, columns.stop)
            if reached:
                of_some = far if far.shape[-1] == 1 else far[..., some]
                for gradient, weights, of_rows in ((to_keys, d_s, part), (to_values, p, grad)):
                    gradient[:, :, some] = _to_keys(weights[..., some] * of_some, of_rows, groups)
                    gradient[:, :, none] = 0.0
                add(to_keys[:, :, :reached], to_values[:, :, :reached])
        return d_q.mul_(scale), d_k, d_v, None, None, None, None, None, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Compute attention: (output, log-sum-exp [B,H,S], sinks included)."""
    parts = []
    for rows, columns in tiles(q, k, bias):
        logits, _ = _logits(q[:, :, rows] * scale, k[:, :, columns], cut(bias, rows, columns), softcap)
        if sinks is not None:
            more = cut(sinks, rows, EVERY).to(logits).expand(*logits.shape[:3], -1)
            logits = torch.cat((logits, more), -1)
        p, lse = attention.safe_softmax(logits)
        parts.append((attention.grouped_mix(p[..., : columns.stop], v[:, :, columns]), lse))
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Return (logits [B,H,S,T] of queries that are scaled already, slope of the softcap or None)."""
    logits, slope = attention.grouped_scores(q, k), None
    if softcap:
        capped = torch.tanh(logits / softcap)
        slope, logits = 1 - capped**2, capped * softcap
    return (logits if bias is None else logits.add_(bias)), slope


def _far_columns(far: Tensor, bias: Tensor | None, columns: int) -> tuple[int, Tensor, Tensor]:
    """Divide the columns of a tile by which rows that see them have them far.

    Returns how many there are up to the last that some have, the numbers of those that some have and others have not,
    and of those that none has.
    """
    seen = None if bias is None else bias > -math.inf
    pairs = (far, ~far) if seen is None else (far & seen, ~far & seen)
    of_far, of_near = (_in_any_row(mask, columns) for mask in pairs)
    last = of_far.nonzero()
    both = (of_far & of_near).nonzero().squeeze(-1)
    return int(last[-1]) + 1 if len(last) else 0, both, (~of_far).nonzero().squeeze(-1)


def tiles(q: Tensor, k: Tensor, bias: Tensor | None) -> list[tuple[slice, slice]]:
    """Return (queries, keys that any of them sees) of each tile."""
    queries, keys = q.shape[2], k.shape[2]
    out = []
    for start in range(0, queries, QUERIES):
        rows = slice(start, min(start + QUERIES, queries))
        seen = keys
        if bias is not None:
            seen = max(1, _columns_until(cut(bias, rows, EVERY) > -math.inf, keys))
        out.append((rows, slice(0, seen)))
    return out


def _columns_until(mask: Tensor, keys: int) -> int:
    """Return the number of the last of the first `keys` columns with anything true, in a mask [..., S, T]; 0: none."""
    columns = _in_any_row(mask, keys).nonzero()
    return int(columns.max()) + 1 if len(columns) else 0


def _in_any_row(mask: Tensor, keys: int) -> Tensor:
    """Return which of the first `keys` columns have anything true, in a mask [..., S, T]."""
    return mask.flatten(0, -2).any(0).expand(keys)


def additive_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask as numbers with at least two dimensions, so that it has rows and columns to cut."""
    return None if mask is None else torch.atleast_2d(ops_masks.additive(mask, query.dtype))


def cut(mask: Tensor | None, rows: slice, columns: slice) -> Any:
    """Cut a mask broadcastable to [..., S, T] to a tile."""
    if mask is None:
        return None
    mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    return mask if mask.shape[-1] == 1 else mask[..., columns]


def _to_keys(weights: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Sum over queries and over the heads of a group: weights [B,H,S,T], rows [B,H,S,D] -> [B,G,T,D]."""
    b, h, s, t = weights.shape
    grouped = weights.reshape(b, groups, h // groups * s, t)
    return grouped.mT @ rows.reshape(b, groups, h // groups * s, rows.shape[-1])


class Watch:
    """Runs attention of known sites: with the same numbers, and it shows keys, values and their gradients.

    `see(site name, k, v)`, called once in the backward pass with all tokens but the sinks, [B,G,T,D], returns a
    function that is called for every QUERIES queries that read far keys and values: with their gradients through these
    queries alone, of the first N tokens [B,G,N,D]; those of the others are zero. Squared one by one they say what their
    sum says, squared, and leave less to chance: random scores of different positions are independent, so the products
    of two of these gradients are zero in expectation, as far as layers behind do not bring them together again
    (measured on SmolLM2: their squares are 1.01 times the square of their sum, with 128 queries or 16).

    far: attention sinks, and newest tokens that stay exact. leaf: with respect to which the gradient of the output is
    to be taken.
    """

    def __init__(self, far: tuple[int, int], see: Callable[[str, Tensor, Tensor], OnGradients]) -> None:
        self.far, self.see = far, see
        self.leaf = torch.zeros((), requires_grad=True)

    def attend(
        self, site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        extra: Tensor | None = None, *, scale: float, is_causal: bool = False, softcap: float = 0.0,
        dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Compute `ops.attention.attention_reference` in float32 at least, observed."""
        sinks, recent = site.exact_tokens(*self.far)
        _, far = ops_masks.split_mask(q, k, None, False, sinks, recent)
        given = q.dtype
        q, k, v = (x.to(torch.promote_types(given, torch.float32)) for x in (q + self.leaf.to(q), k, v))
        bias, extra = additive_mask(ops_masks.total_mask(q, k, mask, is_causal), q), additive_mask(extra, q)
        if bias is not None:  # some masks hide by large numbers: a query that sees nothing then sees nothing here, too
            bias = bias.masked_fill(bias < LEAST, -math.inf)

        def observe(key: Tensor, value: Tensor) -> OnGradients:
            add = self.see(site.name, key[:, :, sinks:], value[:, :, sinks:])
            return lambda *gradients: add(*[gradient[:, :, sinks:] for gradient in gradients])

        result: Tensor = _ProbedAttention.apply(q, k, v, bias, extra, far, scale, softcap, observe)
        return result.to(given, copy=True)  # the backward pass needs it as it is; a graph may write to what it gets


class Attends(Protocol):
    """What runs attention of known sites in place of the model: a `Watch`, or the attention of a plan."""

    def attend(
        self, site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        extra: Tensor | None = None, *, scale: float, is_causal: bool = False, softcap: float = 0.0,
        dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Compute attention, with the arguments of `ops.attention.attention_reference`."""


class Probed(Protocol):
    """A model whose attention can be run by a `Watch`."""

    @property
    def is_logits(self) -> bool:
        """Whether the main output is logits."""

    def run(self, batch: Batch, attends: Attends) -> Tensor:
        """Run forward on a batch with attention by `attends`, without gradients; return the main output."""

    def probe(self, batch: Batch, watch: Watch, likelihood: Callable[[Tensor], Tensor]) -> None:
        """Run forward on a batch, and backward from `likelihood` of the main output to the watch."""


class _Instrumented(fx.Interpreter):
    """Runs a graph with the attention nodes of known sites replaced."""

    def __init__(self, captured: Captured, outcome: Outcome, watch: Attends) -> None:
        super().__init__(captured.program.module)
        self.sites, self.watch = outcome.sites, watch

    def run_on(self, node: fx.Node, values: segments.Environment) -> Any:
        """Run a node on the values of its inputs."""
        self.env = values
        return self.run_node(node)

    def run_node(self, n: fx.Node) -> Any:
        """Run an attention node of a site by the watch, any other as it is."""
        if n.name not in self.sites:
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.watch.attend(self.sites[n.name], *args, **kwargs)


@dataclass(frozen=True)
class ProbedGraph:
    """A captured graph whose attention is watched at the sites of `outcome`."""

    captured: Captured
    outcome: Outcome

    @property
    def is_logits(self) -> bool:
        """Whether the main output is logits."""
        return self.captured.is_logits

    def run(self, batch: Batch, attends: Attends) -> Tensor:
        """Run forward on a batch with attention by `attends`. Raises FhoptError where it does not fit the graph."""
        runner, arguments = _Instrumented(self.captured, self.outcome, attends), graph_arguments(self.captured, batch)
        with torch.no_grad():
            output: Tensor = runner.run(*arguments)[self.captured.result]
        return output

    def probe(self, batch: Batch, watch: Watch, likelihood: Callable[[Tensor], Tensor]) -> None:
        """Run forward and backward on a batch. Raises FhoptError when the batch does not fit the graph."""
        runner, arguments = _Instrumented(self.captured, self.outcome, watch), graph_arguments(self.captured, batch)
        if len(self._segments) == 1:
            with torch.enable_grad():
                output = runner.run(*arguments)[self.captured.result]
                torch.autograd.grad(likelihood(output), watch.leaf)
            return
        given, constants = iter(arguments), segments.Environment()
        for node in self.captured.program.graph.nodes:
            if node.op == "placeholder":
                constants[node] = next(given)
            elif node.op == "get_attr":
                constants[node] = runner.run_node(node)
        segments.backward(self._segments, constants, runner.run_on, self._result, likelihood, watch.leaf)

    @property
    def _result(self) -> fx.Node:
        """The node of the main output."""
        result: fx.Node = self.captured.program.graph.output_node().args[0][self.captured.result]  # type: ignore[index, assignment]
        return result

    @functools.cached_property
    def _segments(self) -> list[segments.Segment]:
        """What is differentiated at once: all of it where its activations are small."""
        graph = self.captured.program.graph
        if segments.activation_bytes(graph, self.outcome.sites) <= ACTIVATION_BYTES:
            return segments.cut(graph, (), self._result)
        return segments.cut(graph, self.outcome.sites, self._result)


def probed(captured: Captured | Probed, outcome: Outcome) -> Probed:
    """Return the model to probe: of a captured graph, attention at the sites of `outcome`."""
    return ProbedGraph(captured, outcome) if isinstance(captured, Captured) else captured


def run_probed(
    captured: Captured | Probed, outcome: Outcome, batches: Iterable[tuple[int, Batch]], far: tuple[int, int],
    seed: int, see: Callable[[str, Tensor, Tensor], OnGradients], done: Callable[[int], None],
) -> None:  # fmt: skip
    """Run forward and backward over numbered batches.

    What is random of a batch depends on its number and the seed alone. far, see: as of `Watch`. `done(number)` is
    called after each batch. Raises FhoptError when a batch does not fit the graph.
    """
    model = probed(captured, outcome)
    for number, batch in batches:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        score = functools.partial(_random_score, is_logits=model.is_logits, generator=generator)
        model.probe(batch, Watch(far, see), score)
        done(number)


# --------------------------------------------------------------------------------------------------- arguments


def graph_arguments(captured: Captured, batch: Batch) -> list[Any]:
    """Return values of all placeholders of a graph: those of a batch, and example values for the others.

    Raises FhoptError when a batch has another shape than the graph was captured with.
    """
    values: list[Any] = []
    for name, example in captured.program.values.items():
        argument = captured.inputs.get(name)
        value = batch[argument] if argument is not None and argument in batch else example
        if isinstance(value, Tensor) and value.shape != example.shape:
            raise FhoptError(f"a batch has {argument} of shape {tuple(value.shape)}, expected {tuple(example.shape)}.")
        values.append(value.detach().to(example.device) if isinstance(value, Tensor) else value)
    return values


def _random_score(output: Tensor, is_logits: bool, generator: torch.Generator) -> Tensor:
    """Return a scalar whose gradient, squared, has the Fisher information as its expectation; its value says nothing.

    For logits [..., V] see `_LogitScore`. Any other output counts as the mean of a unit Gaussian around itself. Raises
    FhoptError where no gradient would go through it.
    """
    if not output.requires_grad:
        raise FhoptError(
            "no gradient goes back from the model's output to its attention: layers between them have none, as where "
            "activations are quantized to integers. Calibrate the model before it is quantized so, or quantize its "
            "weights only (torchao: Int8WeightOnlyConfig)."
        )
    if not is_logits:
        return (output * torch.randn(output.shape, generator=generator).to(output)).sum()
    result: Tensor = _LogitScore.apply(output, generator)
    return result


def _random_signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return random signs, int8 of a shape, eight of each random byte: drawn one by one they took much longer."""
    rows, width = shape
    drawn = torch.randint(0, 256, (rows, -(-width // 8), 1), dtype=torch.uint8, generator=generator)
    bits = (drawn & (1 << torch.arange(8)).to(torch.uint8)).flatten(1)[:, :width]
    return (bits != 0).to(torch.int8).mul_(2).sub_(1)


class _LogitScore(torch.autograd.Function):
    """Zero, with the gradient g = sqrt(p) * z - p (sqrt(p) . z) at each position: p = softmax(logits [..., V]).

    With random signs z [V], E[g g^T] = diag(p) - p p^T, which is the Fisher information of the logits. So it is of the
    gradient of log p(y) with a label y ~ p. But where a model is sure of the next token, nearly all of that comes from
    the few positions at which an unlikely label is drawn, and a few thousand positions say little. With signs, g is
    about as long in every draw.

    Probabilities are float32, of `POSITIONS` positions at a time: of a large vocabulary, those of all of them would be
    several times the memory of everything else.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, generator: torch.Generator) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.generator = generator
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        rows = logits.reshape(-1, logits.shape[-1])
        gradient = torch.empty_like(rows)
        for start in range(0, len(rows), POSITIONS):
            part = slice(start, start + POSITIONS)
            p = rows[part].float().softmax(-1)
            signs = _random_signs(p.shape, ctx.generator).to(p.device, p.dtype)
            drawn = signs.mul_(p.sqrt())
            gradient[part] = grad * drawn.sub_(p.mul_(drawn.sum(-1, keepdim=True)))
        return gradient.view(logits.shape), None
