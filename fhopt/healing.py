"""Heal a plan: give it the decoders that lose least of what attention reads in a text.

    keys    least  sum over tokens   w |k - D z|^2                    w: all the attention that the token gets
    values  least  sum over queries  |sum over tokens p (v - D z)|^2  p: the attention of this query to each token

Nothing but `decode` of each side of each site changes, so the healed plan has the size of the one it came from; z is
the rounded latent as the cache keeps it. A plan is fitted as if errors of tokens were independent. They are not: what
rounding does averages out over the tokens that a query reads together, and what all of them lack does not. So the
decoder of values is solved for the averages that attention makes. A key acts before the softmax, one token at a time:
there it is enough to count a token as often as it is read.

Both are linear least squares. Their normal equations are sums over what the exact model reads, once and forward only:
no gradient, no learning rate, and the order of the text is all the same. A ridge draws the solution to the decoder that
the plan had, because a text holds few averages that differ: solved for the values of 4 sequences with next to no ridge,
SmolLM2 loses 40 % less on these and 15 % more on others. Only tokens that a cache would see compressed count. Channels
that reach nothing in common stay apart, so a layout stays what it is.

Least squares on what a layer gives out, as for weights in AdaRound (2004.10568) and GPTQ (2210.17323).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fhopt import __version__, data, ops, passes
from fhopt.capture import Captured
from fhopt.errors import FhoptError, Miss
from fhopt.evaluate import Comparison, check_length, switched, token_costs
from fhopt.files import check_digest, check_writable, read_tensors, write_tensors
from fhopt.fitting import check_model, fingerprint
from fhopt.models import LoadedModel
from fhopt.passes.compress import Compress
from fhopt.pipeline import Progress, silent
from fhopt.spec import LatentPlan, SidePlan, SitePlan

LEAST_SEQUENCES = 4  # fewer say nothing of other text
SAVE_EVERY = 4  # sequences between two checkpoints
QUERIES = 128  # rows of the attention matrix that exist at once


@dataclass(frozen=True)
class HealOptions:
    """What `heal` needs beside a model and a plan.

    texts: read in turn, their first halves to solve, their second to measure. tokens: to solve for, in sequences of
    `context` tokens, each read once. ridge: how strongly a decoder is drawn to the one it was, in mean squares of what
    it reads. held_out: sequences of `context` tokens on which the loss is measured before and after. checkpoint: file
    that lets an interrupted healing go on.
    """

    texts: tuple[str, ...] = ("topics",)
    tokens: int = 50_000
    context: int = 1024
    ridge: float = 0.2
    held_out: int = 2
    checkpoint: Path | None = None

    @property
    def sequences(self) -> int:
        """How many sequences the tokens make."""
        return self.tokens // self.context

    def check(self) -> None:
        """Raise FhoptError for values that cannot work, before anything slow starts."""
        if self.context < 2 or self.held_out < 1:
            raise FhoptError(
                f"context={self.context}, held_out={self.held_out}: expected sequences of at least 2 tokens, and one "
                "to measure on."
            )
        if self.sequences < LEAST_SEQUENCES:
            raise FhoptError(
                f"{self.tokens} tokens make {max(0, self.sequences)} sequences of {self.context}; expected at least "
                f"{LEAST_SEQUENCES}. Read more tokens, or in a shorter context."
            )
        if not 0 < self.ridge < math.inf:
            raise FhoptError(
                f"a ridge of {self.ridge:g} is not possible; expected a finite share of what is read above 0, such as "
                f"{HealOptions.ridge:g}."
            )

    def check_plan(self, plan: LatentPlan) -> None:
        """Raise FhoptError when a context of this length does not see the latents of the plan."""
        first = plan.sinks + plan.recent
        if self.context <= first and all(p.site.kind == "self" for p in plan.sites):
            raise FhoptError(
                f"a context of {self.context} tokens has none beyond sinks and recent tokens of the plan; expected "
                f"more than {first}. Read a longer context."
            )


def heal(
    loaded: LoadedModel, plan: LatentPlan, options: HealOptions | None = None, progress: Progress = silent
) -> LatentPlan:
    """A plan of the same size with decoders that are solved for a text; its provenance says under `healing` how.

    `loaded` is a causal language model with its tokenizer, and is not changed. The losses in the provenance are
    measured through the real cache. Raises FhoptError for options that cannot work, for another model's plan or
    checkpoint, and when the loss did not fall.
    """
    options = options or HealOptions()
    options.check()
    options.check_plan(plan)
    network = loaded.language_model()
    check_length(network, options.context)
    check_model(plan, dict(network.named_parameters()), loaded.name)
    ids, test = _texts(loaded, options)
    saved = _Checkpoint(options.checkpoint, _key(loaded, plan, ids))
    saved.check()
    with switched(network, None):
        reader = Reader.of(loaded.capture(options.context), plan)
    before = _measure(network, test, plan, "before", progress)
    healed = solved(plan, read(reader, ids, saved, progress), options.ridge)
    after = _measure(network, test, healed, "after", progress)
    saved.remove()
    if not after.kl < before.kl:
        raise FhoptError(
            f"healing moved the loss from {before.kl:.4g} to {after.kl:.4g} nats per held-out token; expected it to "
            "fall. Read more tokens, or text that is more like the model's use, or raise the ridge."
        )
    return _with_provenance(healed, _told(plan, options, ids, before, after))


def _texts(loaded: LoadedModel, options: HealOptions) -> tuple[Tensor, Tensor]:
    """Token ids (to solve for [N, T], held out [M, T])."""
    length = options.context
    ids = data.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=length)
    return ids, data.held_out_ids(loaded.tokenizer, options.texts, count=options.held_out, length=length)


def _measure(network: nn.Module, ids: Tensor, plan: LatentPlan, stage: str, progress: Progress) -> Comparison:
    """The plan against the exact model on ids [N, T], through the real cache."""
    done = 0

    def count(sequences: int) -> None:
        nonlocal done
        done += sequences
        progress(stage, done, len(ids))

    return token_costs(network, ids, plan, count).compare()


def _told(plan: LatentPlan, options: HealOptions, ids: Tensor, before: Comparison, after: Comparison) -> dict[str, Any]:
    """The entry of the provenance; JSON values only."""
    return {
        "texts": list(options.texts),
        "text_sha256": data.digest(ids),
        "tokens": int(ids.numel()),
        "context": options.context,
        "ridge": options.ridge,
        "healed_from": plan.digest(),
        "before": asdict(before),
        "after": asdict(after),
        "versions": {"fhopt": __version__, "torch": torch.__version__},
    }


def _with_provenance(plan: LatentPlan, told: dict[str, Any]) -> LatentPlan:
    """What a gate measured is true of the decoders of before only."""
    kept = {name: value for name, value in plan.provenance.items() if name != "gate"}
    return replace(plan, provenance=kept | {"healing": told})


# --------------------------------------------------------------------------------------------------- equations


@dataclass
class Equations:
    """Normal equations, summed in float64 while text is read. Names: site.key and site.value.

    error [G,D,R]: sum of w (x - D z) z^T. moment [G,R,R]: sum of w z z^T. One for each kv head, since each is read
    with an attention of its own.
    """

    error: dict[str, Tensor] = field(default_factory=dict)
    moment: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, error: Tensor, latent: Tensor, weight: Tensor | None = None) -> None:
        """Rows of error [G,N,D] and of latents [G,N,R], each counted `weight` [G,N] times, or once."""
        counted = latent if weight is None else latent * weight.unsqueeze(-1)
        for sums, rows in ((self.error, error), (self.moment, latent)):
            total = (rows.double().mT @ counted.double()).cpu()
            sums[name] = sums[name] + total if name in sums else total

    def solution(self, name: str, decode: Tensor, ridge: float) -> Tensor:
        """The decoder [G,D,R] of least error, drawn to `decode` by the ridge; a site never read keeps it."""
        used = (decode != 0).double()  # [G, D, R]
        mixed = ((used.mT @ used) > 0).double()  # channels that reach a number in common
        moment = self.moment[name] * mixed
        mean = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-300  # [G, 1, 1]
        error = self.error[name] * ((used @ mixed) > 0)
        drawn = moment + ridge * mean * torch.eye(moment.shape[-1], dtype=moment.dtype)
        return decode + torch.linalg.solve(drawn, error, left=False).to(decode)


def solved(plan: LatentPlan, equations: Equations, ridge: float) -> LatentPlan:
    """The plan with the decoders that solve the equations; sites that have none stay as they are."""

    def side(site: SitePlan, name: str) -> SidePlan:
        old: SidePlan = getattr(site, name)
        return replace(old, decode=equations.solution(f"{site.site.name}.{name}", old.decode, ridge))

    sites = [
        replace(p, key=side(p, "key"), value=side(p, "value")) if f"{p.site.name}.key" in equations.error else p
        for p in plan.sites
    ]
    return replace(plan, sites=tuple(sites))


# --------------------------------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class Reader:
    """A captured language model, and the plans of its attention nodes that lose anything by `plan`."""

    captured: Captured
    plan: LatentPlan
    sites: Mapping[str, SitePlan]

    @staticmethod
    def of(captured: Captured, plan: LatentPlan) -> Reader:
        """The reader of a plan. Raises FhoptError when no site of the graph loses anything by the plan."""
        outcome, compress = passes.find(captured.program), Compress(plan)
        nodes = {n.name: n for n in outcome.program.graph.nodes}
        sites, reasons = {}, set[str]()
        for name, site in outcome.sites.items():
            try:
                compress.match(nodes[name], site)
            except Miss as miss:
                reasons.add(miss.reason)
                continue
            if not plan.site(site.name).is_exact:
                sites[name] = plan.site(site.name)
        if not sites:
            told = "; ".join(sorted(reasons)) or "every site of the plan is exact"
            raise FhoptError(f"there is nothing to heal: {told}. Expected a plan for this model that loses something.")
        return Reader(captured, plan, sites)

    @torch.no_grad()
    def read(self, ids: Tensor, equations: Equations) -> None:
        """Add what the exact model reads in token ids [B, T]. Raises FhoptError when that is not finite."""
        _Runner(self, equations).run(*_arguments(self.captured, ids))


def _arguments(captured: Captured, ids: Tensor) -> list[Any]:
    """Values of all placeholders, the token ids in their place."""
    values: list[Any] = []
    for name, example in captured.program.values.items():
        is_ids = captured.inputs.get(name) == "input_ids"
        values.append(ids.to(example.device) if is_ids else example)
    return values


class _Runner(fx.Interpreter):
    """Runs the graph as it is, and takes down what its attention nodes read."""

    def __init__(self, reader: Reader, equations: Equations) -> None:
        super().__init__(reader.captured.program.module)
        self.reader, self.equations = reader, equations

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        site = self.reader.sites.get(n.name)
        if site is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            far = site.site.exact_tokens(self.reader.plan.sinks, self.reader.plan.recent)
            take_down(self.equations, site, far, *args, **kwargs)
        return super().run_node(n)


def take_down(
    equations: Equations, plan: SitePlan, exact: tuple[int, int], q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None = None, extra: Tensor | None = None, *, scale: float, is_causal: bool = False,
    softcap: float = 0.0, dropout: float = 0.0,
) -> None:  # fmt: skip
    """Add attention of q [B,H,S,D] on keys k [B,G,T,D] and values v [B,G,T,E]; exact: (sinks, recent tokens)."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    near, far = (torch.atleast_2d(ops.additive(m, q.dtype)) for m in ops.split_mask(q, k, mask, is_causal, *exact))
    latents, errors = zip(*_coded(plan, k, v), strict=True)
    counts = k.new_zeros(k.shape[:3])  # [B, G, T]
    for start in range(0, q.shape[2], QUERIES):
        rows = slice(start, start + QUERIES)
        seen = slice(0, _last(near[..., rows, :], far[..., rows, :]))
        masks = near[..., rows, seen], far[..., rows, seen]
        p = _far_weights(q[:, :, rows] * scale, k[:, :, seen], *masks, softcap)
        p = p.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, G, H/G * n, t]
        counts[..., seen] += p.sum(2)
        equations.add(f"{plan.site.name}.value", *(_rows(p @ x[:, :, seen]) for x in (errors[1], latents[1])))
    equations.add(f"{plan.site.name}.key", _rows(errors[0]), _rows(latents[0]), counts.transpose(0, 1).flatten(1))


def _coded(plan: SitePlan, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of keys and of values: (latents [B,G,T,R] as a cache keeps them, what decoding leaves [B,G,T,D])."""
    read = (torch.cat([k, v], -1), None) if plan.is_shared else (k, v)
    out, latent = [], k
    for x, given, side in zip((k, v), read, (plan.key, plan.value), strict=True):
        latent = latent if given is None else _rounded(ops.encode(given, side.encode.to(x.device)), side)
        decode = side.decode.to(x.device)
        repeated = latent.repeat_interleave(len(decode) // latent.shape[1], 1)
        out.append((repeated, x - ops.decode(latent, decode)))
    return out


def _rounded(latent: Tensor, side: SidePlan) -> Tensor:
    return ops.straight_through(latent, *ops.tier_arguments(side)) if side.tiers else latent


def _last(near: Tensor, far: Tensor) -> int:
    """How many keys lie before the last that a row of the masks [.., n, T] sees; at least 1."""
    seen = (torch.maximum(near, far) > -math.inf).flatten(0, -2).any(0).nonzero()
    return int(seen.max()) + 1 if len(seen) else 1


def _far_weights(q: Tensor, k: Tensor, near: Tensor, far: Tensor, softcap: float) -> Tensor:
    """Attention [B,H,n,T] of the exact model to the tokens that are seen through latents, zero to others."""
    logits = ops.grouped_scores(q, k)
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return ops._softmax(logits + torch.maximum(near, far))[0] * (far > -math.inf)


def _rows(x: Tensor) -> Tensor:
    """[B,G,T,D] -> [G, B*T, D]."""
    return x.transpose(0, 1).flatten(1, 2)


# --------------------------------------------------------------------------------------------------- reading


def read(reader: Reader, ids: Tensor, saved: _Checkpoint, progress: Progress = silent) -> Equations:
    """The equations of all rows of ids [N, T]. Raises FhoptError when the model gives numbers that are not finite."""
    equations, done = saved.load()
    for row in range(done, len(ids)):
        reader.read(ids[row : row + 1], equations)
        if not all(bool(x.isfinite().all()) for x in equations.error.values()):
            saved.remove()
            raise FhoptError("keys or values of the model are not finite on this text. Use another dtype or text.")
        progress("heal", row + 1, len(ids))
        if (row + 1) % SAVE_EVERY == 0 or row + 1 == len(ids):
            saved.save(equations, row + 1)
    return equations


# --------------------------------------------------------------------------------------------------- checkpoints


def _key(loaded: LoadedModel, plan: LatentPlan, ids: Tensor) -> dict[str, Any]:
    """What an interrupted healing must have in common with the one that goes on; JSON values only."""
    weights = dict(loaded.language_model().named_parameters())
    return {
        "model": loaded.name,
        "weights": fingerprint(weights, [p.site for p in plan.sites]),
        "dtype": str(next(iter(weights.values())).dtype),
        "plan": plan.digest(),
        "data": data.digest(ids),
        "version": __version__,
    }


@dataclass(frozen=True)
class _Checkpoint:
    """The file of an interrupted healing: its equations so far. Without a path nothing is kept."""

    path: Path | None
    key: Mapping[str, Any]

    def check(self) -> None:
        """Raise FhoptError when the file cannot be written, is damaged, or is of another healing."""
        if self.path is not None:
            check_writable(Path(self.path).parent)
            self.load()

    def load(self) -> tuple[Equations, int]:
        """The equations so far, and of how many sequences. Raises FhoptError."""
        from safetensors import SafetensorError

        if self.path is None or not Path(self.path).exists():
            return Equations(), 0
        try:
            about, tensors = read_tensors(self.path)
            if about["key"] != dict(self.key):
                raise FhoptError(
                    f"{self.path} is of another healing (model, plan, text or version differ). Remove it, or give what "
                    "it was made with."
                )
            check_digest(about, tensors)
            parts = [{n: tensors[f"{n}.{part}"] for n in about["names"]} for part in _PARTS]
            return Equations(*parts), int(about["sequences"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise FhoptError(f"{self.path} is damaged ({error}). Remove it to heal from the start.") from error

    def save(self, equations: Equations, sequences: int) -> None:
        """Keep the equations of `sequences` sequences, whole or not at all. Raises FhoptError."""
        from safetensors import SafetensorError

        if self.path is None:
            return
        tensors = {f"{n}.{part}": x for part in _PARTS for n, x in getattr(equations, part).items()}
        about = {"key": dict(self.key), "sequences": sequences, "names": sorted(equations.error)}
        try:
            write_tensors(Path(self.path), about, tensors)
        except (OSError, SafetensorError) as error:
            raise FhoptError(f"cannot write {self.path}: {error}. Give another place for the checkpoint.") from error

    def remove(self) -> None:
        """Remove the file: the healing is done."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                Path(self.path).unlink(missing_ok=True)


_PARTS = ("error", "moment")
