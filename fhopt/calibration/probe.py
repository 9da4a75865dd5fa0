"""Attention probes: keys, values and their gradients at every site during a forward and backward pass."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from fhopt.calibration import segments
from fhopt.calibration.float32_graph import Float32Interpreter, is_widened
from fhopt.calibration.probed_attention import BITS, OnGradients, ProbedAttention, ProbedTile, additive_mask, tiled
from fhopt.errors import FhoptError
from fhopt.models.capture import Captured
from fhopt.ops import masks as ops_masks
from fhopt.passes.outcome import Outcome
from fhopt.passes.recognize.masks import MIN_BIAS
from fhopt.plan.site import AttentionSite

ACTIVATION_BYTES = 5 * 2**29  # max activations of a graph differentiated at once; larger ones are cut into segments
MASKS = 2  # masks whose tiles are cached: full and sliding-window causal
PROBABILITIES = 2**19  # max elements at once
Batch = Mapping[str, Tensor]


# --------------------------------------------------------------------------------------------------- the probe


class Watch:
    """Attention of known sites with unchanged results, which reports keys, values and their gradients.

    `see(site name, k, v)` is called once per site in the backward pass, with all tokens but the sinks, [B,G,T,D]. It
    returns a function that is called for every tile of QUERIES queries that attend to far keys and values. Its
    arguments are the gradients through these queries only, of the first N tokens [B,G,N,D]; gradients of later tokens
    are zero. Squaring tile by tile has the same expectation as squaring the sum, with less variance: scores of
    different positions are independent, so products of two tiles' gradients have zero expectation unless later layers
    mix these positions again (measured on SmolLM2: the squares are 1.01 times the square of the sum, with 128 queries
    or 16).

    far: number of attention sinks, and of newest tokens that stay exact. leaf: differentiate the output with respect to
    this to run the backward pass.
    """

    def __init__(self, far: tuple[int, int], see: Callable[[str, Tensor, Tensor], OnGradients]) -> None:
        self.far, self.see = far, see
        self.leaf = torch.zeros((), requires_grad=True)
        self._matrices: deque[tuple[Any, Tensor | None, list[ProbedTile]]] = deque(maxlen=MASKS)

    def attend(
        self, site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        extra: Tensor | None = None, *, scale: float, is_causal: bool = False, softcap: float = 0.0,
        dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Compute `ops.attention.attention_reference` in float32 or wider, and report to `see`."""
        exact, given = site.exact_tokens(*self.far), q.dtype
        q, k, v = (x.to(torch.promote_types(given, torch.float32)) for x in (q + self.leaf.to(q), k, v))
        matrix, extra, sinks = self._tiled(q, k, mask, is_causal, exact), additive_mask(extra, q), exact[0]

        def observe(key: Tensor, value: Tensor) -> OnGradients:
            add = self.see(site.name, key[:, :, sinks:], value[:, :, sinks:])
            return lambda *gradients: add(*[gradient[:, :, sinks:] for gradient in gradients])

        result: Tensor = ProbedAttention.apply(q, k, v, matrix, extra, scale, softcap, observe)
        return result.to(given, copy=True)  # the graph may write to its copy, but backward needs `result`

    def _tiled(
        self, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, exact: tuple[int, int]
    ) -> list[ProbedTile]:
        """Return the tiles of an attention matrix, cached for layers that share a mask."""
        version = None if mask is None or mask.is_inference() else mask._version
        key = (version, is_causal, exact, q.shape[2], k.shape[2], q.dtype, q.device)
        for known, of_mask, matrix in self._matrices:
            if of_mask is mask and known == key and (mask is None or version is not None):
                return matrix
        bias = additive_mask(ops_masks.total_mask(q, k, mask, is_causal), q)
        _, far = ops_masks.split_mask(q, k, None, False, *exact)
        if bias is not None:  # some masks hide keys by large finite values; treat these as -inf
            bias = bias.masked_fill(bias < MIN_BIAS, -math.inf)
        matrix = tiled(q, k, bias, far)
        self._matrices.append((key, mask, matrix))
        return matrix


class Attends(Protocol):
    """Attention of known sites that replaces the model's: a `Watch`, or the attention of a plan."""

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
        """Run forward on a batch with attention by `attends`, without gradients; return the main output.

        In float32 if supported: 16-bit rounding errors exceed the KL of plans.
        """

    def probe(self, batch: Batch, watch: Watch, likelihood: Callable[[Tensor], Tensor]) -> None:
        """Run forward on a batch, and backward from `likelihood` of the main output to the watch."""


class _Instrumented(fx.Interpreter):
    """Graph interpreter that replaces the attention nodes of known sites."""

    def __init__(self, captured: Captured, outcome: Outcome, watch: Attends) -> None:
        super().__init__(captured.program.module)
        self.sites, self.watch = outcome.sites, watch

    def run_on(self, node: fx.Node, values: segments.Environment) -> Any:
        """Run a node on the values of its inputs."""
        self.env = values
        return self.run_node(node)

    def run_node(self, n: fx.Node) -> Any:
        """Run the attention node of a site by the watch, and any other node normally."""
        if n.name not in self.sites:
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.watch.attend(self.sites[n.name], *args, **kwargs)


class _InstrumentedInFloat32(_Instrumented, Float32Interpreter):
    """The same, with 16-bit tensors widened to float32."""


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
        """Run forward on a batch with attention by `attends`. Raises FhoptError if the batch does not fit the graph.

        In float32 if the graph is 16-bit and supported by `is_widened`.
        """
        kind = _InstrumentedInFloat32 if self._is_widened else _Instrumented
        runner, arguments = kind(self.captured, self.outcome, attends), graph_arguments(self.captured, batch)
        with torch.no_grad():
            output: Tensor = runner.run(*arguments)[self.captured.result]
        return output

    def probe(self, batch: Batch, watch: Watch, likelihood: Callable[[Tensor], Tensor]) -> None:
        """Run forward and backward on a batch. Raises FhoptError if the batch does not fit the graph."""
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
        """Node of the main output."""
        result: fx.Node = self.captured.program.graph.output_node().args[0][self.captured.result]  # type: ignore[index, assignment]
        return result

    @functools.cached_property
    def _is_widened(self) -> bool:
        """Whether `run` computes a 16-bit graph in float32."""
        return is_widened(self.captured.program.graph, self.captured.program.values.values())

    @functools.cached_property
    def _segments(self) -> list[segments.Segment]:
        """Segments to differentiate one at a time: a single one if the activations are small."""
        graph = self.captured.program.graph
        if segments.activation_bytes(graph, self.outcome.sites) <= ACTIVATION_BYTES:
            return segments.split_graph(graph, (), self._result)
        return segments.split_graph(graph, self.outcome.sites, self._result)


def probed(captured: Captured | Probed, outcome: Outcome) -> Probed:
    """Return the model to probe; a captured graph gets probes at the sites of `outcome`."""
    return ProbedGraph(captured, outcome) if isinstance(captured, Captured) else captured


def run_probed(
    captured: Captured | Probed, outcome: Outcome, batches: Iterable[tuple[int, Batch]], far: tuple[int, int],
    seed: int, see: Callable[[str, Tensor, Tensor], OnGradients], done: Callable[[int], None],
) -> None:  # fmt: skip
    """Run forward and backward over numbered batches.

    Random draws for a batch depend only on its number and the seed. far, see: as in `Watch`. `done(number)` is called
    after each batch. Raises FhoptError if a batch does not fit the graph.
    """
    model = probed(captured, outcome)
    for number, batch in batches:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        score = functools.partial(_random_score, is_logits=model.is_logits, generator=generator)
        model.probe(batch, Watch(far, see), score)
        done(number)


# --------------------------------------------------------------------------------------------------- arguments


def graph_arguments(captured: Captured, batch: Batch) -> list[Any]:
    """Return values of all placeholders of a graph: from the batch, else the example values.

    Raises FhoptError if a tensor of the batch has another shape than at capture.
    """
    values: list[Any] = []
    for name, example in captured.program.values.items():
        argument = captured.inputs.get(name)
        value = batch[argument] if argument is not None and argument in batch else example
        if isinstance(value, Tensor) and value.shape != example.shape:
            raise FhoptError(
                f"a batch has {argument} of shape {tuple(value.shape)}; expected {tuple(example.shape)}. Pass "
                "batches of one shape."
            )
        values.append(value.detach().to(example.device) if isinstance(value, Tensor) else value)
    return values


def _random_score(output: Tensor, is_logits: bool, generator: torch.Generator) -> Tensor:
    """Return a scalar whose squared gradient has the Fisher information as its expectation; its value is meaningless.

    For logits [..., V] see `_LogitScore`. Any other output is treated as the mean of a unit Gaussian. Raises FhoptError
    if the output has no gradient.
    """
    if not output.requires_grad:
        raise FhoptError(
            "cannot calibrate: no gradient flows from the output back to the attention inputs; a layer in "
            "between is not differentiable (e.g. integer activation quantization). Calibrate before "
            "quantizing activations, or use weight-only quantization (torchao: Int8WeightOnlyConfig)."
        )
    if not is_logits:
        return (output * torch.randn(output.shape, generator=generator).to(output)).sum()
    result: Tensor = _LogitScore.apply(output, generator)
    return result


def _random_signs(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    """Return random signs of a shape [N, V], eight per random byte, with the dtype and device of `like`."""
    rows, width = shape
    drawn = torch.randint(0, 256, (rows, -(-width // 8)), dtype=torch.uint8, generator=generator)
    signs = nn.functional.embedding(drawn.int().to(like.device), _signs_of_bytes().to(like))
    return signs.flatten(1)[:, :width]


@functools.cache
def _signs_of_bytes() -> Tensor:
    """Return the signs that the bits of each byte encode: [256, 8]."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return bits.float().mul_(2).sub_(1)


def positions(rows: Tensor) -> int:
    """Return for how many positions of logits [N, V] probabilities are computed at once."""
    return max(1, PROBABILITIES // max(1, rows.shape[-1]))


class _LogitScore(torch.autograd.Function):
    """Zero, with the gradient g = sqrt(p) * z - p (sqrt(p) . z) at each position: p = softmax(logits [..., V]).

    With random signs z [V], E[g g^T] = diag(p) - p p^T, the Fisher information of the logits. The gradient of log p(y)
    for a label y ~ p has the same expectation, but a higher variance: if the model is sure of the next token, nearly
    all of it comes from the few positions where an unlikely label is drawn, so a few thousand positions are too few.
    With signs, the length of g barely varies between draws.

    Probabilities are computed in float32 for `PROBABILITIES` elements at a time. With a large vocabulary, those of all
    positions would take several times the memory of everything else; a part fits into the CPU caches. sqrt(p) is
    computed first, by exp2, and p as its square.
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
        for part, made in zip(*(x.split(positions(rows)) for x in (rows, gradient)), strict=True):
            logit = part.float()
            root = (logit - logit.amax(-1, keepdim=True)).mul_(BITS / 2).exp2_()
            norm = torch.linalg.vector_norm(root, dim=-1, keepdim=True)
            drawn = _random_signs(root.shape, ctx.generator, root).mul_(root)
            dot = drawn.sum(-1, keepdim=True)
            made.copy_(drawn.mul_(grad / norm).sub_(root.square_().mul_(grad * dot / norm**3)))
        return gradient.view(logits.shape), None
