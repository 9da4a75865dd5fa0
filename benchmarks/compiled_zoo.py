"""Compile the test zoo with `backend="flashhead", options={"ratio": 1}`, and compare with eager and plain inductor.

    python benchmarks/compiled_zoo.py                  everything: benchmarks/results/compiled-zoo.json and .png
    python benchmarks/compiled_zoo.py --only gpt2      tasks whose label contains gpt2; writes nothing
    python benchmarks/compiled_zoo.py --quick          a sample (also QUICK=1)
    python benchmarks/compiled_zoo.py --traced         Dynamo and AOTAutograd unchanged, but no C++ is generated

A task is one use of one model, run twice where a second call could be compiled again:

    no_grad        the entry's call                          train          outputs, gradients of all parameters, a step
    dynamic cache  9 tokens, then 4 single ones              static cache   9 tokens, then 4 single ones
    lengths        four lengths, dynamic=True                growing        dynamic cache, dynamic=True
    batches        two batch sizes, dynamic=True             layers         each layer compiled separately
    long           4 tokens at a context of 300              checkpoints    train, activations computed again
    weights        the attention weights are outputs too     left padding   train, rows that attend to nothing
    bfloat16, autocast    train

Ends with 1 when numbers differ, when there are more graphs or breaks than with inductor, or when a graph was given up.
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import click
import torch
from recording import ROOT, Row, is_quick, record, screen
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

sys.path.insert(0, str(ROOT / "tests" / "support"))  # the zoo is the tests', and is not installed
from model_zoo import Case, Entry
from model_zoo.checking import entries
from model_zoo.huggingface import MODELS

import fhopt
from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

TOLERANCE = 1e-4  # float32, and sums in another order, through two layers and a softmax: the promise of the backend
ROUGH = 2.0**-5  # eight bits of mantissa, and an eighth of them lost on the way
SAMPLE = 7  # in a quick run, one task of this many
DYNAMIC = ("llama", "gpt2", "gemma3", "gpt_oss", "bloom", "mpt", "falcon", "deepseek_v3", "bert", "t5")
LONG = ("llama", "gpt2", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "falcon")
TRAINED = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "bert", "gpt_neox")  # these know activation checkpoints
LAYERED = ("llama", "gpt2", "gpt_oss", "deepseek_v3", "bloom", "bert", "t5")  # of a Python class, with other weights
HALF = ("llama", "gpt2", "gemma2", "gpt_oss", "bloom", "t5", "bert", "deepseek_v3", "vit")
ROUTED = ("gpt_oss",)  # in bfloat16 its choice of an expert turns on the last bit; under autocast it does not
BEHIND, NEW, PLACES = 300, 4, 320  # tokens in the cache of a long task, single ones after them, positions for all

METRICS: dict[str, tuple[str, Callable[[list[float]], float], str]] = {  # unit, over several tasks, form
    "max_error": ("relative", max, ".0e"),
    "max_gradient_error": ("relative", max, ".0e"),
    "graphs": ("", sum, ".0f"),
    "breaks": ("", sum, ".0f"),
    "sites": ("", sum, ".0f"),
    "seconds": ("s", sum, ".0f"),
}

COMPILERS: dict[str, dict[str, Any] | None] = {  # arguments of torch.compile
    "eager": None,
    "inductor": {},
    "flashhead": {"backend": "flashhead", "options": {"ratio": 1}},
}


@dataclass(frozen=True)
class Task:
    """What a model is asked to do. build: makes module and arguments anew. run: does it, and says what came out.

    by_layers: not the model is compiled, but each of its layers, so that they may share graphs. exact: makes the same
    in float32, where the task rounds to 16 bits.
    """

    entry: Entry
    mode: str
    build: Callable[[], Case]
    run: Callable[[Callable[..., Any], Case], Seen]
    dynamic: bool | None = None
    by_layers: bool = False
    tolerance: float = TOLERANCE
    exact: Callable[[], Case] | None = None

    @property
    def label(self) -> str:
        """`entry/mode`."""
        return f"{self.entry.label}/{self.mode.replace(' ', '_')}"


@dataclass
class Seen:
    """What came out. values: outputs, changed caches and buffers, in order; None: no gradient."""

    values: list[Any] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    given_up: list[str] = field(default_factory=list)  # warnings of graphs that passes could not read
    refusal: str = ""
    seconds: float = 0.0
    sites: int = 0  # attentions that our passes knew, over all graphs


@dataclass(frozen=True)
class Result:
    """One task by all compilers."""

    task: Task
    seen: Mapping[str, Seen]

    @property
    def excuse(self) -> str:
        """Why there is nothing to compare; "" where there is."""
        refusals = ((name, self.seen[name].refusal) for name in ("eager", "inductor"))
        return next((f"{name}: {refusal}" for name, refusal in refusals if refusal), "")

    def figure(self, metric: str, compiler: str) -> float:
        """One of the METRICS. Errors are relative to the largest number of the tensor, or to the largest gradient."""
        if metric == "max_error":
            return _largest(self.seen["eager"].values, self.seen[compiler].values)
        if metric == "max_gradient_error":
            return _largest(self.seen["eager"].gradients, self.seen[compiler].gradients, together=True)
        return float(getattr(self.seen[compiler], metric))

    def distance(self, metric: str, compiler: str) -> float:
        """How far from the same task in float32, by the norms of tensors, or of all gradients together.

        By norms, since rounding may send one token to another expert, and then its numbers are others.
        """
        exact, seen = self.seen["float32"], self.seen[compiler]
        if metric == "max_error":
            return max((_apart([x], [y]) for x, y in zip(exact.values, seen.values, strict=True)), default=0.0)
        return _apart(exact.gradients, seen.gradients)

    @property
    def failures(self) -> list[str]:
        """What is not as promised; nothing where inductor, or torch itself, cannot do the task."""
        ours, theirs = self.seen["flashhead"], self.seen["inductor"]
        if self.excuse:
            return []
        if ours.refusal:
            return [ours.refusal]
        failures = list(ours.given_up)
        for metric in ("max_error", "max_gradient_error"):
            if self.task.exact is not None:
                failures += self._rounds_more(metric)
                continue
            ours_is, theirs_is = self.figure(metric, "flashhead"), self.figure(metric, "inductor")
            allowed = self.task.tolerance
            if not ours_is <= max(allowed, 2 * theirs_is):
                failures.append(f"{metric} {ours_is:.1e}, inductor's {theirs_is:.1e}, expected at most {allowed:.0e}")
        for metric in ("graphs", "breaks"):
            if self.figure(metric, "flashhead") > self.figure(metric, "inductor"):
                failures.append(f"{getattr(ours, metric)} {metric}, inductor has {getattr(theirs, metric)}")
        return failures

    def _rounds_more(self, metric: str) -> list[str]:
        """In 16 bits, who rounds in another place than eager is not wrong: but not much further from float32."""
        ours_is, eager_is = self.distance(metric, "flashhead"), self.distance(metric, "eager")
        if ours_is <= max(self.task.tolerance, 1.5 * eager_is):
            return []
        return [f"{metric}: {ours_is:.1e} from float32, eager {eager_is:.1e}"]


# --------------------------------------------------------------------------------------------------- the tasks


def tasks() -> list[Task]:
    """All of them: the whole zoo as it is called there, and what its models of transformers are asked beyond that."""
    zoo = entries()
    found: list[Task] = []
    for entry in zoo:
        found.append(Task(entry, "no_grad", entry.build, _twice))
        found.append(Task(entry, "train", entry.build, _train))
        if entry.family != "huggingface":
            found.append(Task(entry, "batches", entry.build, _batches, dynamic=True))
    firsts = {(e.name, e.implementation): e for e in zoo if e.family == "huggingface" and e.step in FIRST_STEPS}
    steps = {(e.name, e.implementation, e.step) for e in zoo}
    for (name, chosen), entry in firsts.items():
        if (name, chosen, "decode") in steps:
            found.append(Task(entry, "dynamic cache", entry.build, partial(_generate, places=0)))
        if (name, chosen, "decode static") in steps:
            found.append(Task(entry, "static cache", entry.build, partial(_generate, places=16)))
        found.extend(_sampled(entry, (name, chosen, "decode") in steps))
    return found


FIRST_STEPS = ("forward", "prefill")


def _sampled(entry: Entry, decodes: bool) -> Iterator[Task]:
    """What only some models are asked."""
    build = entry.build
    if entry.implementation == "flex":
        return
    if entry.name in DYNAMIC:
        yield Task(entry, "lengths", build, _lengths, dynamic=True)
        if decodes:
            yield Task(entry, "growing", build, partial(_generate, places=0), dynamic=True)
    if entry.name in DYNAMIC and entry.step == "prefill":
        yield Task(entry, "left padding", partial(_left_padded, entry), _train)
    if entry.name in LONG:
        for places, mode in ((0, "long dynamic"), (PLACES, "long static")):
            yield Task(entry, mode, partial(_with_room, entry), partial(_generate, places=places, eagerly=True))
    if entry.name in LAYERED:
        yield Task(entry, "layers", build, _train, by_layers=True)
        if decodes:
            yield Task(entry, "layers decode", build, partial(_generate, places=0), by_layers=True)
    if entry.name in TRAINED:
        yield Task(entry, "checkpoints", partial(_checkpointing, entry), _train)
    if entry.name in HALF:
        rough: dict[str, Any] = dict(tolerance=ROUGH, exact=partial(_rounded_to_bfloat16, entry))
        if entry.name not in ROUTED:
            yield Task(entry, "bfloat16", partial(_in_bfloat16, entry), _train, **rough)
        yield Task(entry, "autocast", build, partial(_train, around=_autocast), **{**rough, "exact": build})
    if entry.implementation == "eager":
        yield Task(entry, "weights", partial(_asking_for_weights, entry), _twice)


def _with_room(entry: Entry) -> Case:
    """The entry's model with positions for 512 tokens, at a context of 300; its cache is filled by `_generate`."""
    model = next(m for m in MODELS if m.name == entry.name)
    places = "n_positions" if "n_positions" in model.options else "max_position_embeddings"
    inputs = lambda: {"input_ids": torch.randint(3, 97, (2, BEHIND))}  # noqa: E731
    roomy = replace(model, options={**model.options, places: 512}, inputs=inputs)
    return roomy.entry(entry.implementation, "prefill").build()


def _left_padded(entry: Entry) -> Case:
    """The second sequence begins late: its first rows see nothing at all, and are compared all the same."""
    case = entry.build()
    mask = torch.ones(case.kwargs["input_ids"].shape, dtype=torch.long)
    mask[1, :3] = 0
    return Case(case.module, case.args, {**case.kwargs, "attention_mask": mask})


def _checkpointing(entry: Entry) -> Case:
    case = entry.build()
    for part in case.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    module: Any = case.module.train()
    module.gradient_checkpointing_enable()
    return case


def _in_bfloat16(entry: Entry) -> Case:
    case = entry.build()
    kwargs = {k: v.bfloat16() if _is_float(v) else v for k, v in case.kwargs.items()}
    return Case(case.module.bfloat16(), case.args, kwargs)


def _rounded_to_bfloat16(entry: Entry) -> Case:
    """The same numbers in float32."""
    case = _in_bfloat16(entry)
    kwargs = {k: v.float() if _is_float(v) else v for k, v in case.kwargs.items()}
    return Case(case.module.float(), case.args, kwargs)


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _asking_for_weights(entry: Entry) -> Case:
    case = entry.build()
    return Case(case.module, case.args, {**case.kwargs, "output_attentions": True})


# --------------------------------------------------------------------------------------------------- running


def _twice(call: Callable[..., Any], case: Case) -> Seen:
    """Without gradients; a second time where no cache grows, which would be another task."""
    seen = Seen()
    with torch.no_grad():
        for _ in range(1 if _has_cache(case) else 2):
            seen.values += [_copied(x) for x in _leaves(call(*case.args, **case.kwargs))]
    return _with_changes(seen, case)


def _train(
    call: Callable[..., Any], case: Case, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Seen:
    """Outputs, and gradients of one random projection of them; then a step on the weights, and once more.

    Gradients are those of all parameters and of all floating arguments. Frozen models have none.
    """
    seen, parameters = Seen(), [p for p in case.module.parameters() if p.requires_grad]
    if not parameters:
        raise Skipped("frozen")
    for _ in range(2):
        args, kwargs, given = _tracked(case)
        with around():
            outputs = _leaves(call(*args, **kwargs))
        seen.values += [_copied(x) for x in outputs]
        ends = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        if not ends:
            raise Skipped("no output has a gradient")
        found = torch.autograd.grad(ends, [*parameters, *given], _directions(ends), allow_unused=True)
        seen.gradients += [None if g is None else g.clone() for g in found]
        if _has_cache(case) or any(b.requires_grad for b in case.module.buffers()):
            break  # what it keeps hangs on the graph of the first time
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.01)
    return _with_changes(seen, case)


class Skipped(Exception):
    """There is nothing to be done in this mode."""


def _tracked(case: Case) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """Arguments whose floating tensors ask for gradients, by way of a copy: a leaf may not be written to."""
    given: list[Tensor] = []

    def track_one(value: Any) -> Any:
        if not _is_float(value):
            return value
        given.append(value.detach().clone().requires_grad_())
        return given[-1].clone()

    return tuple(map(track_one, case.args)), {k: track_one(v) for k, v in case.kwargs.items()}, given


def _directions(outputs: Iterable[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def _lengths(call: Callable[..., Any], case: Case) -> Seen:
    """Token ids of four lengths, in batches of several sizes."""
    seen = Seen()
    with torch.no_grad():
        for batch, tokens in ((2, 9), (3, 12), (2, 15), (5, 7)):
            ids = {k: torch.randint(3, 97, (batch, tokens)) for k in case.kwargs if k.endswith("ids")}
            given = {**case.kwargs, **ids}
            if "attention_mask" in given:
                ends = tokens - torch.arange(batch) % 4
                given["attention_mask"] = (torch.arange(tokens) < ends[:, None]).long()
            seen.values += [_copied(x) for x in _leaves(call(**given))]
    return seen


def _batches(call: Callable[..., Any], case: Case) -> Seen:
    """The entry's call, then with one more of everything that there are as many of as of the first argument."""
    seen, size = Seen(), case.args[0].shape[0]

    def one_more(value: Any) -> Any:
        grows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        return torch.cat([value, value[:1]]) if grows else value

    with torch.no_grad():
        seen.values += [_copied(x) for x in _leaves(call(*case.args, **case.kwargs))]
        more = {name: one_more(value) for name, value in case.kwargs.items()}
        seen.values += [_copied(x) for x in _leaves(call(*map(one_more, case.args), **more))]
    return seen


def _generate(call: Callable[..., Any], case: Case, places: int, eagerly: bool = False) -> Seen:
    """Run the entry's tokens, then single ones, with a cache of `places` positions (0: a dynamic cache).

    eagerly: what comes first is not compiled, as transformers does it.
    """
    seen, cache = Seen(), _new_cache(case, places)
    names = inspect.signature(case.module.forward).parameters
    keyword = "cache" if "cache" in names else "past_key_values"
    given = {k: v for k, v in case.kwargs.items() if k != "use_cache"} | {keyword: cache}
    with torch.no_grad():
        outputs = (case.module if eagerly else call)(**given)
        seen.values += [_copied(outputs.logits)]
        if "decoder_input_ids" in given:
            given = {"encoder_outputs": (outputs.encoder_last_hidden_state,), keyword: cache}
        token = "decoder_input_ids" if "encoder_outputs" in given else "input_ids"
        for _ in range(NEW):
            step = {**given, token: torch.randint(3, 97, (2, 1))}
            seen.values += [_copied(call(**step).logits)]
    seen.values += [_copied(x) for x in _leaves(cache)]
    return seen


def _new_cache(case: Case, places: int) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    config: Any = case.module.config
    if "decoder_input_ids" in case.kwargs:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return StaticCache(config, max_cache_len=places) if places else DynamicCache(config=config)


def _with_changes(seen: Seen, case: Case) -> Seen:
    """Return what the call changed in arguments, caches and buffers."""
    left = [*_leaves(case.args), *_leaves(dict(case.kwargs)), *case.module.buffers()]
    seen.values += [_copied(x) for x in left]
    return seen


def _has_cache(case: Case) -> bool:
    return any("cache" in type(value).__name__.lower() for value in case.kwargs.values())


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _leaves(value: Any) -> list[Any]:
    """Tensors and numbers in anything: outputs of transformers, tuples, caches with their layers."""
    if isinstance(value, (Tensor, int, float)):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    if "cache" in type(value).__module__:
        return [leaf for part in vars(value).values() for leaf in _leaves(part)]
    return []


def check(task: Task) -> Result:
    """Do the task with every compiler; what goes wrong on the way is a `refusal`."""
    seen = {name: _see(task, options) for name, options in COMPILERS.items()}
    if task.exact is not None:
        seen["float32"] = _see(replace(task, build=task.exact, run=_train), None)
    return Result(task, seen)


def _see(task: Task, options: dict[str, Any] | None) -> Seen:
    torch._dynamo.reset()
    counters.clear()
    start, seen = time.perf_counter(), Seen()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            case = task.build()
            torch.manual_seed(0)
            compiled = _compiled(case.module, task, options)
            seen = task.run(compiled, case)
            seen.sites = _sites(compiled)
        except Exception as error:  # whatever torch says of a model that it cannot run or differentiate
            seen.refusal = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    seen.graphs = counters["stats"]["unique_graphs"]
    seen.breaks = sum(counters["graph_break"].values())
    seen.given_up = [str(w.message) for w in said if "fhopt" in str(w.message)]
    seen.seconds = time.perf_counter() - start
    return seen


def _compiled(module: nn.Module, task: Task, options: dict[str, Any] | None) -> Any:
    if options is None:
        return module
    if not task.by_layers:
        return torch.compile(module, dynamic=task.dynamic, **options)
    for stack in (part for part in module.modules() if isinstance(part, nn.ModuleList)):
        for layer in stack:
            layer.compile(dynamic=task.dynamic, **options)
        break  # those of an encoder, where there is one
    return module


def _sites(compiled: Any) -> int:
    try:
        graphs = fhopt.report(compiled).graphs
    except FhoptError:  # another compiler's
        return 0
    return sum(site.how != "left alone" for graph in graphs for site in graph.sites)


def traced() -> AbstractContextManager[Any]:
    """Make inductor, and backends that call it, stop after AOTAutograd and run its graphs unchanged."""
    from torch._dynamo.backends.debugging import aot_eager

    def compile_fx(module: Any, inputs: Any, **options: Any) -> Any:
        return aot_eager(module, inputs)

    return mock.patch("torch._inductor.compile_fx.compile_fx", compile_fx)


# --------------------------------------------------------------------------------------------------- comparing


def _largest(expected: Sequence[Any], found: Sequence[Any], together: bool = False) -> float:
    """The largest difference relative to the largest number of its tensor, or of all tensors `together`."""
    if len(expected) != len(found):
        return math.inf
    pairs = [_difference(*pair) for pair in zip(expected, found, strict=True)]
    if together:
        pairs = [(max((p[0] for p in pairs), default=0.0), max((p[1] for p in pairs), default=0.0))]
    return max((difference / max(size, 1e-30) if difference else 0.0 for difference, size in pairs), default=0.0)


def _apart(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """The norm of the difference of tensors of any floating types, relative to that of the expected ones."""
    pairs = [
        (x.double(), y.double())
        for x, y in zip(expected, found, strict=True)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()
    ]
    size = sum(float(x.square().sum()) for x, _ in pairs)
    return math.sqrt(sum(float((x - y).square().sum()) for x, y in pairs) / max(size, 1e-30))


def _difference(expected: Any, found: Any) -> tuple[float, float]:
    """(largest difference, largest expected number); infinite where they are no numbers of the same kind."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return (0.0 if type(expected) is type(found) and expected == found else math.inf), 1.0
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf, 1.0
    if expected.is_complex():
        return _difference(torch.view_as_real(expected), torch.view_as_real(found))
    expected, found = expected.double(), found.double()
    finite = expected.isfinite()
    if not torch.allclose(expected[~finite], found[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return math.inf, 1.0
    if not finite.any():
        return 0.0, 0.0
    apart = (expected - found)[finite].abs().nan_to_num(math.inf)
    return float(apart.max()), float(expected[finite].abs().max())


# --------------------------------------------------------------------------------------------------- the report


@click.command()
@click.option("--only", metavar="NAME", help="Only tasks whose label contains NAME; writes no files.")
@click.option("--quick", is_flag=True, help="A sample, of one task in seven.")
@click.option("--traced", "is_traced", is_flag=True, help="Generate no C++: both compilers stop after AOTAutograd.")
def main(only: str | None, quick: bool, is_traced: bool) -> None:
    """Compile every model of the zoo, and compare with eager and with plain inductor."""
    _be_quiet()
    chosen = [task for task in tasks() if only is None or only in task.label]
    if not chosen:
        raise click.BadParameter(f"no task has {only!r} in its label.", param_hint="--only")
    if quick or is_quick():
        chosen = chosen[::SAMPLE]
    with traced() if is_traced else nullcontext():
        results = list(_checked(chosen))
    if only is None:
        name = "compiled-zoo-traced" if is_traced else "compiled-zoo"
        record(name, rows(results), lambda figure: draw(figure, results), summary(results))
    else:
        screen().print(summary(results))
    failed = [result for result in results if result.failures]
    for result in failed:
        print(f"{result.task.label}: {'; '.join(result.failures)}")
    sys.exit(1 if failed else 0)


def _be_quiet() -> None:
    """One thread (the models are tiny), no network, and nothing of what torch and transformers say on the way."""
    import logging

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.getLogger("torch").setLevel(logging.CRITICAL)


def _checked(chosen: Sequence[Task]) -> Iterator[Result]:
    """Results as they come; compiled graphs are cyclic, and go only when they are collected."""
    for number, task in enumerate(track(chosen, "compiled", transient=True)):
        yield check(task)
        if number % 20 == 19:
            gc.collect()


def compared(results: Iterable[Result]) -> list[Result]:
    """Those in which there is something to compare."""
    return [result for result in results if not result.excuse]


def rows(results: Iterable[Result]) -> list[Row]:
    """The figures of each task that eager and inductor can do; the baseline is inductor's."""
    return [
        Row(result.task.label, "flashhead", metric, result.figure(metric, "flashhead"), unit,
            baseline=result.figure(metric, "inductor"))
        for result in compared(results)
        for metric, (unit, _, _) in METRICS.items()
        if metric != "max_gradient_error" or result.seen["eager"].gradients
    ]  # fmt: skip


def summary(results: Iterable[Result]) -> Table:
    """One line for each mode and family."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task.mode, result.task.entry.family), []).append(result)
    table = Table(title="The zoo, compiled (fhopt / inductor)", title_justify="left")
    for heading in ("task", "family"):
        table.add_column(heading)
    for heading in ("compared", "as promised", *METRICS):
        table.add_column(heading.replace("_", " "), justify="right")
    for (mode, family), members in groups.items():
        known = compared(members)
        figures = (_both(known, metric) for metric in METRICS)
        promised = sum(not result.failures for result in known)
        table.add_row(mode, family, f"{len(known)}/{len(members)}", str(promised), *figures)
    return table


def _both(results: Sequence[Result], metric: str) -> str:
    """Ours and inductor's, over all results."""
    _, over, form = METRICS[metric]
    figures = ([r.figure(metric, c) for r in results if not r.seen[c].refusal] for c in ("flashhead", "inductor"))
    return " / ".join(format(over(of), form) if of else "-" for of in figures)


def draw(figure: Figure, results: Iterable[Result]) -> None:
    """How far outputs and gradients are from eager's, ours and inductor's, sorted."""
    panels = figure.subplots(1, 2, sharey=True)
    known = [r for r in compared(results) if not r.seen["flashhead"].refusal]
    for panel, name in zip(panels, ("max_error", "max_gradient_error"), strict=True):
        for compiler in ("flashhead", "inductor"):
            errors = sorted(max(result.figure(name, compiler), 1e-9) for result in known)
            panel.plot(errors, label=compiler)
        panel.axhline(TOLERANCE, color="black", linestyle=":", label="allowed in float32")
        panel.set(yscale="log", xlabel="tasks, sorted", title=name.replace("_", " "))
        panel.legend()
    panels[0].set_ylabel("largest relative difference (0 is drawn as 1e-9)")
    figure.suptitle("The zoo, compiled: differences from eager")


if __name__ == "__main__":
    main()
