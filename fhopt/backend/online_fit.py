"""A plan without a calibration run: the first calls of a compiled model are watched, then a plan is fitted to them.

    gathering     calls run exactly; the tokens that pass are noted (not their activations)
    compressed    the plan fitted to them passed the gate: new sequences are cached as latents (`fhopt.apply`)
    rejected      no plan passed, or the model is of another kind: it stays exact, and the journal says why

The stream of tokens is cut in two: on the first three quarters a plan is calibrated, on the last quarter it is measured
against the exact model, through the real cache (fhopt/refine/loss_target.py). Sequences that have begun keep the cache
they have. Fitting happens in the call that completes the stream, which takes minutes for it.

This is for causal language models of transformers, since a plan saves what they cache: attention that caches nothing
gains nothing from latents.
"""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.backend import compile_report
from fhopt.backend.compile_report import Journal
from fhopt.calibration import options as calibration_options
from fhopt.calibration import run as calibration_run
from fhopt.errors import FhoptError
from fhopt.models.capture import capture
from fhopt.models.loaded_model import LoadedModel
from fhopt.passes.graph.nodes import VIEWS, op_name
from fhopt.passes.graph.program import source_name
from fhopt.plan.latent_plan import LatentPlan
from fhopt.refine import loss_target
from fhopt.refine.loss_target import Gate

MAX_LOSS, CALIBRATION_TOKENS = 0.01, 16384
MADE_FOR = {"cpu": "cpu", "cuda": "h100"}  # what plans are fitted for, by type of device: GPUs choose alike
LEAST_TOKENS = 4096
SHORTEST = 16  # tokens of a sequence that says something of the model's text
CONTEXT = 1024  # tokens of a calibration sequence, fewer where the stream or the model is short
logger = logging.getLogger("fhopt")


@dataclass(frozen=True)
class Wish:
    """What the plan shall be. ratio None: the smallest whose loss is at most `max_loss` (a share)."""

    ratio: float | None = None
    max_loss: float = MAX_LOSS
    calibration_tokens: int = CALIBRATION_TOKENS

    @staticmethod
    def parse(options: Mapping[str, Any]) -> Wish:
        """From the options of the backend. Raises FhoptError."""
        try:
            ratio = None if options.get("ratio") is None else float(options["ratio"])
            limit = options.get("max_loss", MAX_LOSS)
            limit = loss_target.parse_loss(limit) if isinstance(limit, str) else float(limit)
            tokens = int(options.get("calibration_tokens", CALIBRATION_TOKENS))
        except (TypeError, ValueError) as error:
            raise FhoptError(
                f"ratio, max_loss and calibration_tokens: {error}; expected numbers, or a share such as '1%' for "
                "max_loss."
            ) from error
        if ratio is not None and not 1 < ratio < 1000:
            raise FhoptError(f"option ratio is {ratio:g}; expected 1 (exact) or a number above it, such as 4.")
        if tokens < LEAST_TOKENS:
            raise FhoptError(f"option calibration_tokens is {tokens}; expected at least {LEAST_TOKENS:,}.")
        Gate(limit).check()
        return Wish(ratio, limit, tokens)


# --------------------------------------------------------------------------------------------------- the stream


@dataclass
class Stream:
    """Token ids of sequences, in the order in which they began."""

    padding: int | None = None  # the token that fills batches, where the model has one
    rows: list[list[int]] = field(default_factory=list)
    open: list[list[int]] = field(default_factory=list)  # those that grow, one a row of the batch
    count: int = 0

    def add(self, ids: Tensor, mask: Tensor | None) -> None:
        """Take ids [B, S]: one token goes behind the sequences that are open, several begin new ones.

        mask [B, T], T >= S: 0 where a token is padding; the last S columns are those of ids.
        """
        if ids.shape[1] == 1 and len(self.open) == ids.shape[0]:
            for row, token in zip(self.open, ids[:, 0].tolist(), strict=True):
                row.append(token)
            self.count += len(self.open)
            return
        kept = None if mask is None or mask.shape[0] != ids.shape[0] else mask[:, -ids.shape[1] :].bool().tolist()
        self.open = [
            [t for t, keep in zip(row, kept[i], strict=True) if keep] if kept else row
            for i, row in enumerate(ids.tolist())
        ]
        self.rows += self.open
        self.count += sum(map(len, self.open))

    def cut(self, context: int, begin: float, end: float, shortest: int = SHORTEST) -> Tensor:
        """The share from `begin` to `end` of all tokens as sequences [N, context], one behind the other.

        Sequences of fewer than `shortest` tokens are left out.
        """
        rows = [trimmed(row, self.padding) for row in self.rows]
        flat = [token for row in rows if len(row) >= shortest for token in row]
        part = torch.tensor(flat[int(begin * len(flat)) : int(end * len(flat))])
        return part[: len(part) // context * context].unflatten(0, (-1, context))


def trimmed(row: list[int], padding: int | None) -> list[int]:
    """A sequence without what fills it up in front and behind; one token stays, which may end a text."""
    first = next((i for i, token in enumerate(row) if token != padding), len(row))
    last = next((i for i, token in enumerate(reversed(row)) if token != padding), len(row))
    return row[first : len(row) - max(0, last - 1)]


# --------------------------------------------------------------------------------------------------- a profile


class Profile:
    """The profile of one model. It holds the model weakly."""

    def __init__(self, model: torch.nn.Module, wish: Wish, notes: Journal) -> None:
        self.model, self.wish, self.notes = weakref.ref(model), wish, notes
        self.stream = Stream(getattr(model.config.get_text_config(), "pad_token_id", None))  # type: ignore[operator, union-attr]
        self.lock = threading.Lock()
        self.is_done = False
        notes.state = compile_report.GATHERING

    def see(self, ids: Tensor, mask: Tensor | None) -> None:
        """Note the tokens of a call; fit when there are enough."""
        if self.is_done or not self.lock.acquire(blocking=False):  # another thread's call is noting, or fits
            return
        try:
            self.stream.add(ids.detach().cpu(), None if mask is None else mask.detach().cpu())
            if self.stream.count >= self.wish.calibration_tokens and not self.is_done:
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
                plan = fit(twin(model), self.stream, self.wish)
                apply(model, plan)
        except FhoptError as error:
            self._conclude(compile_report.REJECTED, f"stays exact: {error}")
            return
        except Exception as error:  # the call that the user made must not fail for it
            logger.debug("fhopt: fitting failed", exc_info=True)
            self._conclude(compile_report.REJECTED, f"stays exact: fitting failed ({type(error).__name__}: {error})")
            return
        gated = plan.provenance["gate"]
        _make_room(len(self.notes.graphs) + 1)
        self._conclude(
            compile_report.COMPRESSED,
            f"new sequences are cached as latents, {plan.ratio():.2f}x smaller, {len(plan.sites)} sites: perplexity "
            f"{gated['increase_percent']:+.2f} % on {gated['tokens']} held-out tokens (limit "
            f"{100 * self.wish.max_loss:g} %). fhopt.unapply(model) takes it back",
        )

    def _conclude(self, state: str, message: str) -> None:
        self.notes.state = state
        self.notes.say(message)
        self.stream = Stream()
        logger.warning("fhopt: %s %s", self.notes.model, message)


def _make_room(graphs: int) -> None:
    """Let Dynamo compile so many graphs more for a function: those from before and the captured one are of no use now.

    Past its limit it silently runs uncompiled code.
    """
    torch._dynamo.config.recompile_limit += graphs
    _room.append(graphs)


_room: list[int] = []  # what was added


def twin(model: Any) -> Any:
    """A model on the same weights, uncompiled and in evaluation mode: candidates are tried on it, not in use."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in shared}).eval()


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def fit(model: Any, stream: Stream, wish: Wish) -> LatentPlan:
    """A plan for a causal language model from the tokens that it has seen. Raises FhoptError when none passes."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    context = min(CONTEXT, stream.count // 8, positions)
    known, held_out = stream.cut(context, 0, 0.75), stream.cut(context, 0.75, 1)
    rate_sequences = max(1, len(known) // 3)
    device = _device(model)
    options = calibration_options.FitOptions(
        texts=(), ratio=wish.ratio or loss_target.RATIOS[0], context=context, sequences=len(known) - rate_sequences,
        rate_sequences=rate_sequences, device=MADE_FOR.get(device.type),
    )  # fmt: skip
    options.check()
    arguments = {"input_ids": known[:1].to(device), "use_cache": False}
    captured = capture(model, (), arguments, reset=False)
    batches = ({"input_ids": row.unsqueeze(0)} for row in known)
    weights, name = dict(model.named_parameters()), type(model).__name__
    measured = calibration_run.measure_batches(captured, batches, options, weights, name)
    measured.provenance |= {"model": name, "texts": ["the calls of the model"], "tokens": int(known.numel())}
    ratios = loss_target.RATIOS if wish.ratio is None else (wish.ratio,)
    loaded = LoadedModel(name, model, tokenizer=model)  # nothing asks for a tokenizer: the gate reads token ids
    chosen = Gate(wish.max_loss, sequences=len(held_out), context=context)
    return loss_target.smallest_plan(loaded, measured, options, chosen, held_out.to(device), ratios=ratios)[0]


# --------------------------------------------------------------------------------------------------- watching


_profiles: weakref.WeakKeyDictionary[torch.nn.Module, Profile] = weakref.WeakKeyDictionary()


def forget() -> None:
    """Begin all profiles anew, and take back the room that was made for their graphs."""
    _profiles.clear()
    while _room:
        torch._dynamo.config.recompile_limit -= _room.pop()


def watched(
    compiled: Callable[..., Any], module: fx.GraphModule, example_inputs: Sequence[Any], root: torch.nn.Module,
    wish: Wish, notes: Journal,
) -> Callable[..., Any]:  # fmt: skip
    """The compiled graph, with its tokens noted while the profile of `root` gathers."""
    if hasattr(root, "_fhopt_applied"):
        return compiled
    reason = unfit(root)
    if reason:
        notes.say(f"stays exact: {reason}. Fit a plan (fhopt fit, fhopt.fit) and give it: options={{'plan': plan}}")
        return compiled
    place = _tokens_of(module, example_inputs, root)
    if place is None:
        return compiled
    profile = _profiles.get(root)
    if profile is None:
        profile = _profiles[root] = Profile(root, wish, notes)
    if profile.is_done:
        return compiled
    ids, mask = place

    def run(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        if not profile.is_done:
            profile.see(inputs[ids], None if mask is None else inputs[mask])
        return outputs

    return run


def unfit(model: Any) -> str:
    """Why no plan can be fitted to the calls of a model; empty where one can."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "generate"):
        return f"{type(model).__name__} is no language model of transformers, whose cache a plan could shrink"
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} also reads an encoder, whose calls are not profiled"
    if not getattr(model, "can_generate", lambda: True)():
        return f"{type(model).__name__} caches nothing that a plan could shrink"
    return ""


def _tokens_of(module: fx.GraphModule, example_inputs: Sequence[Any], root: Any) -> tuple[int, int | None] | None:
    """Which inputs are the token ids that the input embedding looks up, and the padding mask; None without ids."""
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


__all__ = ["Profile", "Stream", "Wish", "fit", "forget", "unfit", "watched"]
