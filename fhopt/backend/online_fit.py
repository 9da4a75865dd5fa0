"""Online fit: fits a plan to the tokens of a compiled model's first calls, without a calibration run.

    gathering     calls run exactly; their tokens are recorded (not their activations)
    compressed    the plan fitted to them passed the gate: new sequences are cached as latents (`fhopt.apply`)
    rejected      no plan passed, or fitting failed: the model stays exact, and the compile report says why

A plan is calibrated on the first three quarters of the recorded tokens, and compared with the exact model on the last
quarter, with the real KV cache (fhopt/refine/loss_target.py). Sequences in progress keep using their cache. The call
that completes the tokens fits the plan, which takes minutes.

Only causal language models of transformers are supported: a plan compresses their KV cache, and attention without a
cache gains nothing from latents.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.backend import compile_report
from fhopt.backend.compile_report import CompileReport
from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.hardware import this_cpu
from fhopt.passes.graph.nodes import VIEWS, op_name
from fhopt.passes.graph.program import source_name
from fhopt.plan.latent_plan import LatentPlan
from fhopt.planning.pipeline import calls_source, fit_plan
from fhopt.planning.request import PlanRequest
from fhopt.refine.options import RATIOS, Gate, read_loss

MAX_LOSS, CALIBRATION_TOKENS = 0.01, 16384
FIT_OPTIONS = ("ratio", "max_loss", "calibration_tokens")
MIN_TOKENS = 4096
SHORTEST = 16  # tokens; shorter sequences are ignored
CONTEXT = 1024  # tokens of a calibration sequence; fewer if tokens or positions are few
RECENT = 256  # tokens of the recent window, if calibration sequences are long enough
logger = logging.getLogger("fhopt")


@dataclass(frozen=True)
class FitTarget:
    """Target of a fit. ratio None: the smallest plan whose loss is at most `max_loss` (a share).

    is_requested: whether an option requested the fit; a default fit is silent if nothing can be fitted.
    """

    ratio: float | None = None
    max_loss: float = MAX_LOSS
    calibration_tokens: int = CALIBRATION_TOKENS
    is_requested: bool = field(default=False, compare=False)

    @staticmethod
    def parse(options: Mapping[str, Any]) -> FitTarget:
        """Parse and check the options of the backend. Raises FhoptError."""
        given = {name: options[name] for name in FIT_OPTIONS if options.get(name) is not None}
        for name, value in given.items():
            if isinstance(value, bool):
                raise FhoptError(f"option {name} is {value}; expected a number. Drop it, or set a number.")
        try:
            ratio = None if options.get("ratio") is None else float(options["ratio"])
            limit = options.get("max_loss", MAX_LOSS)
            limit = read_loss(limit)
            tokens = int(options.get("calibration_tokens", CALIBRATION_TOKENS))
        except (TypeError, ValueError) as error:
            raise FhoptError(
                f"options ratio, max_loss and calibration_tokens are invalid ({error}); expected numbers, or "
                "a percentage such as '1%' for max_loss."
            ) from error
        if ratio is not None and not 1 <= ratio < 1000:
            raise FhoptError(f"option ratio is {ratio:g}; expected 1 (exact mode) or a larger number, such as 4.")
        if tokens < MIN_TOKENS:
            raise FhoptError(f"option calibration_tokens is {tokens}; expected at least {MIN_TOKENS:,}.")
        Gate(limit).check()
        return FitTarget(ratio, limit, tokens, bool(given))

    def __str__(self) -> str:
        """Describe the target."""
        return f"max_loss={self.max_loss:g}" if self.ratio is None else f"ratio={self.ratio:g}"


# --------------------------------------------------------------------------------------------------- tokens


@dataclass
class TokenStream:
    """Token ids of sequences, in the order in which they began."""

    padding: int | None = None  # the padding token, if the model has one
    rows: list[list[int]] = field(default_factory=list)
    open: list[list[int]] = field(default_factory=list)  # sequences in progress, one per row of the batch
    count: int = 0

    def add(self, ids: Tensor, mask: Tensor | None) -> None:
        """Add ids [B, S]: single tokens continue the sequences of the last call, several begin new ones.

        mask [B, T], T >= S: 0 for padding; the last S columns are those of ids.
        """
        if ids.shape[1] == 1 and len(self.open) == ids.shape[0]:
            for row, token in zip(self.open, ids[:, 0].tolist(), strict=True):
                row.append(token)
            self.count += len(self.open)
            return
        is_token = None if mask is None or mask.shape[0] != ids.shape[0] else mask[:, -ids.shape[1] :].bool().tolist()
        self.open = [
            [t for t, keep in zip(row, is_token[i], strict=True) if keep] if is_token else row
            for i, row in enumerate(ids.tolist())
        ]
        self.rows += self.open
        self.count += sum(map(len, self.open))

    def cut(self, context: int, begin: float, end: float, shortest: int = SHORTEST) -> Tensor:
        """Cut the tokens between the shares `begin` and `end` into sequences [N, context].

        Ignores sequences of fewer than `shortest` tokens.
        """
        rows = [without_padding(row, self.padding) for row in self.rows]
        flat = [token for row in rows if len(row) >= shortest for token in row]
        part = torch.tensor(flat[int(begin * len(flat)) : int(end * len(flat))])
        return part[: len(part) // context * context].unflatten(0, (-1, context))


def without_padding(row: list[int], padding: int | None) -> list[int]:
    """Strip padding from both ends of a sequence, except one token at the end, which may mark the end of a text."""
    first = next((i for i, token in enumerate(row) if token != padding), len(row))
    last = next((i for i, token in enumerate(reversed(row)) if token != padding), len(row))
    return row[first : len(row) - max(0, last - 1)]


# --------------------------------------------------------------------------------------------------- fitting


class OnlineFit:
    """Online fit of one model, which it references weakly."""

    def __init__(self, model: torch.nn.Module, target: FitTarget, report: CompileReport) -> None:
        self.model, self.target, self.report = weakref.ref(model), target, report
        self.stream = TokenStream(getattr(model.config.get_text_config(), "pad_token_id", None))  # type: ignore[operator, union-attr]
        self.lock = threading.Lock()
        self.is_done = False
        report.state = compile_report.GATHERING

    def record(self, ids: Tensor, mask: Tensor | None) -> None:
        """Record the tokens of a call; fit a plan when there are enough."""
        if self.is_done or not self.lock.acquire(blocking=False):  # a call in another thread records or fits
            return
        try:
            self.stream.add(ids.detach().cpu(), None if mask is None else mask.detach().cpu())
            if self.stream.count >= self.target.calibration_tokens and not self.is_done:
                self.is_done = True
                self._finish()
        finally:
            self.lock.release()

    def _finish(self) -> None:
        model = self.model()
        if model is None:
            return
        logger.info("fhopt: fitting a plan for %s to %d tokens", type(model).__name__, self.stream.count)
        from fhopt.hf.apply import apply

        try:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(_device(model).type, enabled=False):
                plan = fit_recorded(shared_weight_copy(model), self.stream, self.target)
                apply(model, plan)
        except FhoptError as error:
            self._conclude(compile_report.REJECTED, f"stays in exact mode: {error}")
            return
        except Exception as error:  # the user's call must not fail because of it
            logger.debug("fhopt: fitting failed", exc_info=True)
            self._conclude(
                compile_report.REJECTED, f"stays in exact mode: fitting failed ({type(error).__name__}: {error})"
            )
            return
        gated = plan.provenance["gate"]
        _raise_recompile_limit(len(self.report.graphs) + 1)
        self._conclude(
            compile_report.COMPRESSED,
            f"new sequences are cached as latents, {plan.ratio():.2f}x smaller, {len(plan.sites)} sites: "
            f"perplexity {gated['increase_percent']:+.2f}% on {gated['tokens']} held-out tokens (limit "
            f"{100 * self.target.max_loss:g}%). Undo it with fhopt.unapply(model)",
        )

    def _conclude(self, state: str, message: str) -> None:
        self.report.state = state
        self.report.add_event(message)
        self.stream = TokenStream()
        logger.warning("fhopt: %s %s", self.report.model, message)


def _raise_recompile_limit(graphs: int) -> None:
    """Let Dynamo compile this many more graphs for a function, since the earlier ones are no longer used.

    Beyond its limit it silently runs uncompiled code.
    """
    torch._dynamo.config.recompile_limit += graphs
    _limit_raises.append(graphs)


_limit_raises: list[int] = []


def shared_weight_copy(model: Any) -> Any:
    """Copy a model with shared weights, uncompiled and in evaluation mode, to try plans while the model is in use."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in shared}).eval()


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _made_for(device: torch.device) -> str | None:
    """Return the device of the cost model that a plan is fitted for. Plans for all GPUs are the same."""
    if device.type == "cpu":
        return this_cpu.closest_cpu()
    return "h100" if device.type == "cuda" else None


def fit_recorded(model: Any, stream: TokenStream, target: FitTarget) -> LatentPlan:
    """Fit a plan for a causal language model to recorded tokens. Raises FhoptError if no plan passes the gate."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    context = min(CONTEXT, stream.count // 8, positions)
    calibrated, held_out = stream.cut(context, 0, 0.75), stream.cut(context, 0.75, 1)
    rate_sequences, device = max(1, len(calibrated) // 3), _device(model)
    options = FitOptions(
        texts=(), context=context, sequences=len(calibrated) - rate_sequences, rate_sequences=rate_sequences,
        recent=min(RECENT, context // 4), device=_made_for(device), mean_tokens=0,
    )  # fmt: skip
    ratios = RATIOS if target.ratio is None else (target.ratio,)
    options = replace(options, ratio=ratios[0])
    options.check()
    gate = Gate(target.max_loss, sequences=len(held_out), context=context, ratios=ratios)
    return fit_plan(calls_source(model, calibrated, held_out.to(device)), PlanRequest(options, gate=gate)).plan


# --------------------------------------------------------------------------------------------------- recording


_fits: weakref.WeakKeyDictionary[torch.nn.Module, OnlineFit] = weakref.WeakKeyDictionary()


_warned: set[str] = set()


def forget_fits() -> None:
    """Discard all online fits, and restore Dynamo's recompile limit."""
    _fits.clear()
    _warned.clear()
    while _limit_raises:
        torch._dynamo.config.recompile_limit -= _limit_raises.pop()


def recording(
    compiled: Callable[..., Any], module: fx.GraphModule, example_inputs: Sequence[Any],
    root: torch.nn.Module | None, target: FitTarget, report: CompileReport, training: bool, has_attention: bool,
) -> Callable[..., Any]:  # fmt: skip
    """Wrap a compiled graph so that its tokens are recorded until a plan for `root` has been fitted.

    Returns a graph that stays exact unchanged, with a warning if a fit was requested. training, has_attention:
    properties of the graph.
    """
    online = None if root is None else _fits.get(root)
    if online is None and (_is_part_of_a_fit(root) or (root is None and not has_attention)):
        return compiled
    obstacle = _obstacle(root, online, target, training)
    if obstacle or root is None:
        _stay_exact(obstacle, root, target, report)
        return compiled
    positions = _token_inputs(module, example_inputs, root)
    if positions is None:
        if online is None and has_attention:  # the graph with the token ids is compiled before this one
            _stay_exact(
                f"fhopt cannot record calls of {type(root).__name__} without token ids. {_BY_PLAN}",
                root,
                target,
                report,
            )
        return compiled
    if online is None:
        online = _fits[root] = OnlineFit(root, target, report)
        if target.is_requested:
            logger.warning(
                "fhopt: %s runs in exact mode until %d tokens are recorded; then fhopt fits a plan to them (%s). %s",
                type(root).__name__, target.calibration_tokens, target, _BY_PLAN,
            )  # fmt: skip
    if online.is_done:
        return compiled
    ids, mask = positions

    def run(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        if not online.is_done:
            online.record(inputs[ids], None if mask is None else inputs[mask])
        return outputs

    return run


def _is_part_of_a_fit(root: torch.nn.Module | None) -> bool:
    """Return whether a module is part of a model whose calls are recorded, such as a frame after a graph break."""
    return root is not None and any(root is part for model in _fits for part in model.modules())


_BY_PLAN = "Fit a plan (fhopt fit, fhopt.fit) and set options={'plan': plan} to compress without recorded calls"


def _obstacle(root: torch.nn.Module | None, online: OnlineFit | None, target: FitTarget, training: bool) -> str:
    """Return why calls of a graph are not recorded, with the fix; "" if they are."""
    if root is None:
        return f"fhopt cannot record a graph that belongs to no module. {_BY_PLAN}, or compile the model itself"
    if online is not None and online.target != target and target.is_requested:
        return (
            f"fhopt already records its calls for {online.target}, not for {target}. Call torch.compiler.reset() "
            "to change the target"
        )
    if hasattr(root, "_fhopt_applied"):
        return "" if online else "a plan is already applied. Call fhopt.unapply(model) to fit another one"
    if reason := why_no_fit(root):
        return f"{reason}. {_BY_PLAN}"
    if training:
        return "fhopt cannot record calls with gradients. Call the model inside torch.no_grad() to fit a plan"
    return ""


def _stay_exact(obstacle: str, root: torch.nn.Module | None, target: FitTarget, report: CompileReport) -> None:
    """Report why a graph stays exact, and warn once if a fit was requested."""
    if not target.is_requested and (root is None or not why_no_fit(root)):
        return
    report.add_event(f"stays in exact mode: {obstacle}")
    message = f"fhopt: {type(root).__name__ if root is not None else 'a function'} stays in exact mode: {obstacle}."
    if target.is_requested and message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def why_no_fit(model: Any) -> str:
    """Return why no plan can be fitted to the calls of a model; "" if one can."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "generate"):
        return f"{type(model).__name__} is not a transformers language model with a KV cache that a plan could compress"
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} has an encoder, and fhopt records only decoder-only models"
    if not getattr(model, "can_generate", lambda: True)():
        return f"{type(model).__name__} has no KV cache that a plan could compress"
    return ""


def _token_inputs(module: fx.GraphModule, example_inputs: Sequence[Any], root: Any) -> tuple[int, int | None] | None:
    """Find the indices of the inputs with the embedding's token ids and the padding mask; None without ids."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    values = dict(zip(placeholders, example_inputs, strict=True))
    table = root.get_input_embeddings()
    for node in module.graph.nodes:
        if op_name(node) != "embedding":
            continue
        weights = [n for n in node.all_input_nodes if values.get(n) is getattr(table, "weight", node)]
        ids = [_origin(n) for n in node.all_input_nodes if n not in weights]
        if weights and len(ids) == 1 and isinstance(values.get(ids[0]), Tensor) and values[ids[0]].dim() == 2:
            masks = [i for i, n in enumerate(placeholders) if source_name(n).endswith("attention_mask")]
            is_flat = masks and isinstance(example_inputs[masks[0]], Tensor) and example_inputs[masks[0]].dim() == 2
            return placeholders.index(ids[0]), masks[0] if is_flat else None
    return None


def _origin(node: fx.Node) -> fx.Node:
    while op_name(node) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


__all__ = ["FitTarget", "OnlineFit", "TokenStream", "fit_recorded", "forget_fits", "recording", "why_no_fit"]
