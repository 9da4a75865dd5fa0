"""Heal a plan: train its bases until the compressed model predicts what the exact one does.

    loss = mean over tokens of KL(exact || compressed)          distillation (Hinton et al. 2015, 1503.02531), T = 1

Nothing but the bases is trained: encode and decode of each side of each site, per-channel scales with them. Layouts,
widths, tiers and steps stay, so the healed plan has the size of the one it came from. Codes are rounded as in the
cache, and the gradient passes straight through the rounding (Bengio et al. 2013, 1308.3432).

What is trained are matrices A and B by which the channels of a latent mix:

    encode' = (I + N A) encode        decode' = decode (I + N B)        N: what rounding does to each channel

Latents have unit variance, and a plan spends its bits so that the rounding of every channel costs about the same: in
units of N, a change is worth the same in all channels of all layers, which keys and values themselves, faint beside
loud, are far from. Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) moves all directions of A and B at one
pace, though a few tokens make most of the gradient: one learning rate fits every model. Channels that read nothing in
common do not mix, so a layout stays what it is.

The captured graph runs with every attention of the plan computed as `passes.compress` would put it, on a few rows of
the attention matrix at a time, of which nothing is kept for the way back:

    o = softmax([q k^T (near) | q decode(encode(k))^T (far)]) [v | decode(encode(v))]
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fhopt import __version__, data, ops, passes
from fhopt.capture import Captured
from fhopt.errors import FhoptError, Miss
from fhopt.evaluate import Comparison, check_length, switched, token_costs
from fhopt.files import appearing, check_writable
from fhopt.fitting import check_model, fingerprint
from fhopt.models import LoadedModel
from fhopt.passes.compress import Compress
from fhopt.pipeline import Progress, silent
from fhopt.spec import LatentPlan, SidePlan, SitePlan

LEAST_SEQUENCES = 4  # with fewer, warming up and cooling down are all there is
WARM_UP = 0.1  # share of the steps
MOMENTUM = 0.9  # a short run cannot wait for a longer average
SAVE_EVERY = 4  # steps between two checkpoints
UNCODED = 0.1  # what an uncoded channel moves by, in standard deviations
FAINT = 2.0**-10  # the same for a channel of 16 bits, the loudest of all
QUERIES = 128  # rows of the attention matrix that exist at once


@dataclass(frozen=True)
class HealOptions:
    """What `heal` needs beside a model and a plan.

    texts: read in turn, their first halves for training, their second to measure. tokens: of training, in sequences of
    `context` tokens, each read once. learning_rate: how far a step moves a channel, as a share of what rounding does
    to it. held_out: sequences of `context` tokens on which the loss is measured before and after. seed: of the order
    of the sequences. checkpoint: file that lets an interrupted training go on.
    """

    texts: tuple[str, ...] = ("topics",)
    tokens: int = 50_000
    context: int = 1024
    learning_rate: float = 0.02
    held_out: int = 2
    seed: int = 0
    checkpoint: Path | None = None

    @property
    def sequences(self) -> int:
        """How many sequences the tokens make; one a step."""
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
                f"{LEAST_SEQUENCES}. Train on more tokens, or in a shorter context."
            )
        if not 0 < self.learning_rate < 1:
            raise FhoptError(
                f"a learning rate of {self.learning_rate:g} is not possible; expected a share of the noise of rounding "
                f"above 0 and below 1, such as {HealOptions.learning_rate:g}."
            )

    def check_plan(self, plan: LatentPlan) -> None:
        """Raise FhoptError when a context of this length does not see the latents of the plan."""
        first = plan.sinks + plan.recent
        if self.context <= first and all(p.site.kind == "self" for p in plan.sites):
            raise FhoptError(
                f"a context of {self.context} tokens has none beyond sinks and recent tokens of the plan; expected "
                f"more than {first}. Train in a longer context."
            )


def heal(
    loaded: LoadedModel, plan: LatentPlan, options: HealOptions | None = None, progress: Progress = silent
) -> LatentPlan:
    """A plan of the same size with bases that are trained on text; its provenance says under `healing` how it went.

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
    saved = _Checkpoint(options.checkpoint, _key(loaded, plan, options, ids))
    saved.check()
    with switched(network, None):
        student = Student.of(loaded.capture(options.context), plan)
    before = _measure(network, test, plan, "before", progress)
    train(student, ids, options, saved, progress)
    healed = student.plan()
    after = _measure(network, test, healed, "after", progress)
    saved.remove()
    if not after.kl < before.kl:
        raise FhoptError(
            f"healing moved the loss from {before.kl:.4g} to {after.kl:.4g} nats per held-out token; expected it to "
            "fall. Lower the learning rate, train on more tokens, or on text that is more like the model's use."
        )
    return _with_provenance(healed, _told(plan, options, ids, before, after))


def _texts(loaded: LoadedModel, options: HealOptions) -> tuple[Tensor, Tensor]:
    """Token ids (for training [N, T] in the order of the seed, held out [M, T])."""
    length = options.context
    ids = data.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=length)
    test = data.held_out_ids(loaded.tokenizer, options.texts, count=options.held_out, length=length)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(options.seed))
    return ids[order], test


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
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "healed_from": plan.digest(),
        "before": asdict(before),
        "after": asdict(after),
        "versions": {"fhopt": __version__, "torch": torch.__version__},
    }


def _with_provenance(plan: LatentPlan, told: dict[str, Any]) -> LatentPlan:
    """What a gate measured is true of the bases of before only."""
    kept = {name: value for name, value in plan.provenance.items() if name != "gate"}
    return replace(plan, provenance=kept | {"healing": told})


# --------------------------------------------------------------------------------------------------- bases


class Basis(nn.Module):
    """One basis and the matrices [J, R, R] by which its channels mix: see the module docstring.

    start: encode [J, R, c] (is_encoder) or decode [G, D, R]. groups: J. noise: of each channel, R numbers.
    """

    start: Tensor
    size: Tensor

    def __init__(self, start: Tensor, groups: int, noise: Tensor, is_encoder: bool) -> None:
        super().__init__()
        self.is_encoder = is_encoder
        rows = start if is_encoder else start.unflatten(0, (groups, -1)).flatten(1, 2).mT  # [J, R, c]
        used = (rows != 0).to(start.dtype)
        mixed = (used @ used.mT) > 0  # channels that read a number in common
        self.register_buffer("start", start)
        self.register_buffer("size", noise.to(start.dtype).unsqueeze(1) * mixed)
        self.change = nn.ParameterList(torch.zeros_like(matrix) for matrix in self.size)

    def forward(self) -> Tensor:
        """The basis as it is now."""
        mix = self.size * torch.stack(list(self.change))
        if self.is_encoder:
            return self.start + mix @ self.start
        return self.start + self.start @ mix.repeat_interleave(len(self.start) // len(mix), 0)


def noise(side: SidePlan) -> Tensor:
    """Root mean square of what rounding does to each channel of a side, R numbers in standard deviations.

    A uniform quantiser's step / sqrt(12). Channels that are not rounded like this have little, but not none: they too
    are to move.
    """
    levels = [(t.step / math.sqrt(12) if t.bits < 16 else FAINT, t.width) for t in side.tiers]
    return torch.cat([torch.full((width,), level) for level, width in levels or [(UNCODED, side.width)]])


class SiteBases(nn.Module):
    """The bases of one site. In the layout `input`, the encoder of the keys serves the values."""

    def __init__(self, plan: SitePlan) -> None:
        super().__init__()
        self.site = plan
        self.key_encode, self.key_decode = _encoder(plan.key), _decoder(plan.key)
        self.value_encode = None if plan.is_shared else _encoder(plan.value)
        self.value_decode = _decoder(plan.value)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B,G,T,D] and values [B,G,T,E] as their latents give them back."""
        read = key if self.value_encode is not None else torch.cat([key, value], -1)
        latent = _rounded(ops.encode(read, self.key_encode()), self.site.key)
        keys = ops.decode(latent, self.key_decode())
        if self.value_encode is not None:
            latent = _rounded(ops.encode(value, self.value_encode()), self.site.value)
        return keys, ops.decode(latent, self.value_decode())

    @torch.no_grad()
    def plan(self) -> SitePlan:
        """The plan of the site with the bases as they are now."""
        encode = self.site.value.encode if self.value_encode is None else self.value_encode().cpu()
        key = replace(self.site.key, encode=self.key_encode().cpu(), decode=self.key_decode().cpu())
        value = replace(self.site.value, encode=encode, decode=self.value_decode().cpu())
        return replace(self.site, key=key, value=value)


def _encoder(side: SidePlan) -> Basis:
    return Basis(side.encode, side.groups, noise(side), is_encoder=True)


def _decoder(side: SidePlan) -> Basis:
    return Basis(side.decode, side.groups, noise(side), is_encoder=False)


def _rounded(latent: Tensor, side: SidePlan) -> Tensor:
    return ops.straight_through(latent, *ops.tier_arguments(side)) if side.tiers else latent


# --------------------------------------------------------------------------------------------------- the graph


class Student(nn.Module):
    """A captured language model whose attention reads latents; its parameters are the bases of the plan."""

    def __init__(self, captured: Captured, whole: LatentPlan, sites: Mapping[str, SitePlan]) -> None:
        super().__init__()
        self.captured, self.whole = captured, whole
        self.bases = nn.ModuleDict({node: SiteBases(plan) for node, plan in sites.items()})

    @staticmethod
    def of(captured: Captured, plan: LatentPlan) -> Student:
        """The student of a plan. Raises FhoptError when no site of the graph loses anything by the plan."""
        outcome, compress = passes.find(captured.program), Compress(plan, training=True)
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
        device = next(v.device for v in captured.program.values.values() if isinstance(v, Tensor))
        return Student(captured, plan, sites).to(device)

    def forward(self, ids: Tensor, exact: bool = False) -> Tensor:
        """Logits [B, T, V] for token ids [B, T]; exact: without the plan."""
        runner = _Runner(self.captured.program.module, {} if exact else self.bases, self.whole)
        output: Tensor = runner.run(*_arguments(self.captured, ids))[self.captured.result]
        return output

    def plan(self) -> LatentPlan:
        """The whole plan with the bases as they are now."""
        changed = [bases.plan() for bases in self.bases.values() if isinstance(bases, SiteBases)]
        by_name = {plan.site.name: plan for plan in changed}
        return replace(self.whole, sites=tuple(by_name.get(p.site.name, p) for p in self.whole.sites))


def _arguments(captured: Captured, ids: Tensor) -> list[Any]:
    """Values of all placeholders, the token ids in their place; no gradient reaches the model's own weights."""
    values: list[Any] = []
    for name, example in captured.program.values.items():
        is_ids = captured.inputs.get(name) == "input_ids"
        value = ids.to(example.device) if is_ids else example
        values.append(value.detach() if isinstance(value, Tensor) else value)
    return values


class _Runner(fx.Interpreter):
    """Runs the graph with the attention nodes that have bases reading latents, everything else as it is."""

    def __init__(self, module: fx.GraphModule, bases: Any, plan: LatentPlan) -> None:
        super().__init__(module)
        self.bases, self.far = bases, (plan.sinks, plan.recent)

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        if n.name not in self.bases:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return attend(self.bases[n.name], self.far, *args, **kwargs)


def attend(
    bases: SiteBases, far: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
    extra: Tensor | None = None, *, scale: float, is_causal: bool = False, softcap: float = 0.0, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention of q [B,H,S,D] on keys and values, the near ones exact and the others through latents: [B,H,S,E]."""
    coded_k, coded_v = bases(k, v)
    exact = bases.site.site.exact_tokens(*far)
    near_mask, far_mask = ops.split_mask(q, k, mask, is_causal, *exact)
    if softcap:
        options: dict[str, Any] = ops.latent_options(None, None) | dict(scale=scale, softcap=softcap)
        sides = ((coded_k, coded_v, far_mask), (k, v, near_mask))
        return ops.merge([ops.latent_attention_reference(q, x, None, y, None, m, **options) for x, y, m in sides])
    masks = [torch.atleast_2d(ops.additive(m, q.dtype)) for m in (far_mask, near_mask)]
    sides = ((coded_k, coded_v, masks[0]), (k, v, masks[1]))
    return torch.cat([_tile(part, start, sides, scale) for start, part in _tiles(q)], 2)


def _tiles(q: Tensor) -> list[tuple[int, Tensor]]:
    parts = q.split(QUERIES, 2)
    return list(zip(range(0, q.shape[2], QUERIES), parts, strict=True))


def _tile(q: Tensor, start: int, sides: tuple[tuple[Tensor, Tensor, Tensor], ...], scale: float) -> Tensor:
    """The rows q [B,H,n,D] from `start` on, over those keys of both sides that any of them sees."""
    keys, values, masks = [], [], []
    for k, v, mask in sides:
        rows = mask[..., start : start + q.shape[2], :]
        seen = (rows > -math.inf).flatten(0, -2).any(0).nonzero()[:, 0]
        keys.append(k.index_select(2, seen))
        values.append(v.index_select(2, seen))
        masks.append(rows.index_select(-1, seen))
    repeats = q.shape[1] // keys[0].shape[1]
    key, value = (torch.cat(x, 2).repeat_interleave(repeats, 1) for x in (keys, values))  # [B, H, t, D or E]
    return functional.scaled_dot_product_attention(q, key, value, torch.cat(masks, -1), scale=scale)


# --------------------------------------------------------------------------------------------------- training


def divergence(exact: Tensor, compressed: Tensor) -> Tensor:
    """Mean over tokens of KL(exact || compressed) in nats, from logits [..., V] of both; reckoned in float32."""
    p, q = (x.float().log_softmax(-1).flatten(0, -2) for x in (exact, compressed))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


def train(
    student: Student, ids: Tensor, options: HealOptions, saved: _Checkpoint, progress: Progress = silent
) -> list[float]:
    """One step of Muon for each row of ids [N, T]; the loss of each step that was taken. Raises FhoptError."""
    optimizer = torch.optim.Muon(student.parameters(), options.learning_rate, weight_decay=0.0, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_pace, steps=len(ids)))
    losses = []
    for step in range(saved.load(student, optimizer, schedule), len(ids)):
        losses.append(_step(student, ids[step : step + 1], optimizer))
        if not math.isfinite(losses[-1]):
            saved.remove()
            raise FhoptError(f"the loss became {losses[-1]}; expected a finite number. Lower the learning rate.")
        schedule.step()
        progress("heal", step + 1, len(ids))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(ids):
            saved.save(student, optimizer, schedule, step + 1)
    return losses


def _pace(step: int, steps: int) -> float:
    """Share of the learning rate: linear warming up, then down along a cosine (Loshchilov & Hutter, 1608.03983)."""
    return min(1.0, (step + 1) / (WARM_UP * steps + 1)) * (1 + math.cos(math.pi * step / steps)) / 2


def _step(student: Student, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step on ids [1, T]; the loss before it."""
    with torch.no_grad():
        exact = student(ids, exact=True)
    with torch.enable_grad():
        loss = divergence(exact, student(ids))
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    return float(loss.detach())


# --------------------------------------------------------------------------------------------------- checkpoints


def _key(loaded: LoadedModel, plan: LatentPlan, options: HealOptions, ids: Tensor) -> dict[str, Any]:
    """What an interrupted training must have in common with the one that goes on; JSON values only."""
    weights = dict(loaded.language_model().named_parameters())
    return {
        "model": loaded.name,
        "weights": fingerprint(weights, [p.site for p in plan.sites]),
        "dtype": str(next(iter(weights.values())).dtype),
        "plan": plan.digest(),
        "data": data.digest(ids),
        "learning_rate": options.learning_rate,
        "version": __version__,
    }


@dataclass(frozen=True)
class _Checkpoint:
    """The file of an interrupted training: bases, averages of Muon, schedule. Without a path nothing is kept."""

    path: Path | None
    key: Mapping[str, Any]

    def check(self) -> None:
        """Raise FhoptError when the file cannot be written, or is of another training."""
        if self.path is not None:
            check_writable(Path(self.path).parent)
            self._about()

    def load(self, student: Student, optimizer: Any, schedule: Any) -> int:
        """Put everything back where it was; how many steps had been taken. Raises FhoptError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        about = self._about()
        if about is None or self.path is None:
            return 0
        try:
            tensors = load_file(self.path)
            for name, parameter in student.named_parameters():
                parameter.data.copy_(tensors[name])
                optimizer.state[parameter] = {k: tensors[f"{name}.{k}"].to(parameter.device) for k in _AVERAGES}
            for group, kept in zip(optimizer.param_groups, about["groups"], strict=True):
                group.update(kept)
            schedule.load_state_dict(about["schedule"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise self._damaged(error) from error
        return int(about["steps"])

    def save(self, student: Student, optimizer: Any, schedule: Any, steps: int) -> None:
        """Keep the state after `steps` steps, whole or not at all. Raises FhoptError."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self.path is None:
            return
        tensors = {}
        for name, parameter in student.named_parameters():
            tensors[name] = parameter.detach().cpu()
            tensors |= {f"{name}.{k}": optimizer.state[parameter][k].cpu() for k in _AVERAGES}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        about = {"key": dict(self.key), "steps": steps, "groups": groups, "schedule": schedule.state_dict()}
        try:
            with appearing(Path(self.path)) as staging:
                save_file(tensors, staging, {"fhopt": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise FhoptError(f"cannot write {self.path}: {error}. Give another place for the checkpoint.") from error

    def remove(self) -> None:
        """Remove the file: the training is done."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                Path(self.path).unlink(missing_ok=True)

    def _about(self) -> dict[str, Any] | None:
        """What the file says of itself; None where there is none. Raises FhoptError when it is of another training."""
        from safetensors import SafetensorError, safe_open

        if self.path is None or not Path(self.path).exists():
            return None
        try:
            with safe_open(self.path, "pt") as opened:
                about: dict[str, Any] = json.loads(opened.metadata()["fhopt"])
            key = about["key"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise self._damaged(error) from error
        if key != dict(self.key):
            raise FhoptError(
                f"{self.path} is of another training (model, plan, text or options differ). Remove it, or give what it "
                "was made with."
            )
        return about

    def _damaged(self, error: Exception) -> FhoptError:
        return FhoptError(f"{self.path} is damaged ({error}). Remove it to heal from the start.")


_AVERAGES = ("momentum_buffer",)  # what Muon keeps of a parameter
