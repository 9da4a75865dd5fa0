"""Generate 200,000 tokens with latent caches through every operation of a cache, and compare with a plain reference.

    python benchmarks/soak.py                writes benchmarks/results/soak.json and soak.png; fails if a promise breaks
    python benchmarks/soak.py --quick        a twentieth of the tokens (also QUICK=1)
    python benchmarks/soak.py --minutes 60   the same mixed with generate(), over and over: endurance.json and .png

A small model samples tokens one by one, in batches, mixed with prefill of several tokens, crops (short ones and ones
deep into quantized blocks), reordered, repeated and selected sequences, and resets. After every call the logits of the
latent cache are compared with those of `Reference`, which keeps all keys and values as ordinary tensors and replaces a
token by its dequantized value when it is quantized. Models and latents are float64, so that no value is rounded to
another level by chance. One run is in float32, with the compiled kernels: there rounding may differ, the caches diverge
from then on, and only the memory is checked.

Promises: logits within 1e-4; no drift (the last quarter of a run is as close as the first); bytes never above the
formula and the spare capacity; constant memory of the process. With --minutes it is read after each lap through all
variants, with models kept from lap to lap: the run fails when the slope of a straight line through the laps after the
warm-up is above 1 MB an hour by more than two of its standard errors.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click
import torch
from recording import Row, is_quick, process_bytes, record
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

import fhopt
from fhopt.cache.quantized_rows import GROWTH
from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import measure_module, plan_for
from fhopt.hf.apply import latent_cache
from fhopt.models.model_facts import cache_argument
from fhopt.ops import algebra, packing
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

VOCABULARY, LONGEST = 97, 2048
TOKENS: dict[str, Any] = dict(bos_token_id=0, eos_token_id=None, pad_token_id=0)
MOST_APART, MOST_DRIFT, MOST_GROWTH = 1e-4, 2.0, 4 << 20  # logits; times the first quarter; bytes of the process
LAP, LEAST_LAPS, WARM = 1200, 8, 0.25  # tokens of a variant in a lap; laps at least; share of them that warms up
MOST_SLOPE = 1e6  # bytes an hour
GENERATED: tuple[dict[str, Any], ...] = (
    {"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False},
    {"do_sample": False, "prompt_lookup_num_tokens": 3}, {"do_sample": False, "cache_implementation": "static"},
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- the reference


class Reference(DynamicLayer):  # type: ignore[misc]
    """Keep keys and values of all tokens as attention should see them.

    A dynamic cache quantizes a token, as the residual window has stored it, together with its block. A static cache
    quantizes the original token, and also dequantizes what a crop finds outside of the window's ring buffer.
    """

    def __init__(self, plan: LatentPlan, site: SitePlan, static: bool) -> None:
        super().__init__()
        self.plan, self.site, self.static = plan, site, static
        self.sealed, self.rounded = 0, 0  # quantized tokens; tokens that a residual window of 8 bits has rounded
        self.codes: tuple[Tensor, Tensor] | None = None  # dequantized, of the original tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values, those of this call exact; then replace full blocks by dequantized ones."""
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = keys.clone(), values.clone()
        if self.static:
            new = self._coded(key_states, value_states)
            old = self.codes or tuple(x[:, :, :0] for x in new)
            self.codes = (torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2))
        plan, length = self.plan, self.keys.shape[2]
        ready = max(0, length - plan.sinks - plan.recent) // plan.block * plan.block
        if ready > self.sealed:
            self._seal(ready)
        if plan.window_bits == 8:
            self._round(slice(max(self.rounded, plan.sinks + self.sealed), length))
            self.rounded = length
        return keys, values

    def _seal(self, count: int) -> None:
        """Replace the first `count` tokens after the attention sinks by their dequantized values."""
        new = slice(self.plan.sinks + self.sealed, self.plan.sinks + count)
        held = self.keys[:, :, new], self.values[:, :, new]
        codes = tuple(x[:, :, new] for x in self.codes) if self.codes is not None else self._coded(*held)
        self.keys[:, :, new], self.values[:, :, new] = codes
        self.sealed = count

    def _round(self, part: slice) -> None:
        """Round some tokens as a residual window of 8 bits does."""
        for x in (self.keys, self.values):
            x[:, :, part] = packing.unround_rows(*packing.round_rows(x[:, :, part]), x.dtype)

    def _coded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize and dequantize tokens: encode, pack, unpack, decode, by the slow reference of each."""
        site = self.site
        if site.is_shared:
            latent = _through(torch.cat([keys, values], -1), site.key)
            return algebra.decode(latent, site.key.decode), algebra.decode(latent, site.value.decode)
        sides = ((keys, site.key), (values, site.value))
        coded = [algebra.decode(_through(x, side), side.decode) for x, side in sides]
        return coded[0], coded[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -`tokens_to_remove` tokens."""
        if not tokens_to_remove:
            return
        behind = self.keys.shape[2] - self.plan.sinks
        target = behind + tokens_to_remove
        if self.static and behind - self.plan.window.capacity > self.sealed:
            self._seal(min(behind - self.plan.window.capacity, max(target, self.sealed)))
        super().crop(tokens_to_remove)
        self.keys, self.values = self.keys.clone(), self.values.clone()
        if self.codes is not None:
            self.codes = (self.codes[0][:, :, :tokens_to_remove], self.codes[1][:, :, :tokens_to_remove])
        whole = target if self.static else target // self.plan.block * self.plan.block
        kept = max(0, min(self.sealed, whole))
        if self.plan.window_bits == 8:  # dequantized tokens are rounded in the window, as new ones are
            self._round(slice(self.plan.sinks + kept, self.plan.sinks + self.sealed))
        self.sealed, self.rounded = kept, min(self.rounded, self.keys.shape[2])

    def _each(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.keys is None:  # before the first tokens
            return
        self.keys, self.values = function(self.keys), function(self.values)
        if self.codes is not None:
            self.codes = (function(self.codes[0]), function(self.codes[1]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As any layer."""
        self._each(lambda x: x[beam_idx])

    def batch_select_indices(self, indices: Tensor) -> None:
        """As any layer."""
        self._each(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As any layer."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """As any layer."""
        super().reset()
        self.sealed, self.rounded, self.codes = 0, 0, None


def _through(x: Tensor, side: SidePlan) -> Tensor:
    latent = algebra.encode(x.to(side.encode.dtype), side.encode)
    if not side.tiers:
        return latent.to(x.dtype)
    bits, widths, steps = algebra.tier_arguments(side)
    codes, scale = packing.pack_reference(latent, bits, widths, steps)
    return packing.unpack_reference(codes, scale, bits, widths, steps).to(x.dtype)


# --------------------------------------------------------------------------------------------------- the variants


@dataclass(frozen=True)
class Variant:
    """A model, a plan and a kind of cache, and how many tokens it generates."""

    name: str
    make: Callable[[], Any]
    tokens: int
    ratio: float
    layout: str = "auto"
    window_bits: int = 16
    places: int | None = None  # positions of a static cache
    dtype: torch.dtype = torch.float64


def stablelm() -> Any:
    """Two layers, H=4, G=2, D=16, rotary positions; its norms, unlike Llama's, do not round to float32."""
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = StableLmConfig(**sizes, vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.2, **TOKENS)
    return StableLmForCausalLM(config)


def gpt2() -> Any:
    """Two layers, H=G=4, D=16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = dict(n_embd=64, n_layer=2, n_head=4, n_positions=2 * LONGEST)
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=VOCABULARY, initializer_range=0.2, **TOKENS))


VARIANTS = (
    Variant("full width", stablelm, 30_000, 1),
    Variant("4x", stablelm, 80_000, 4),
    Variant("4x, window of 8 bits", stablelm, 30_000, 4, window_bits=8),
    Variant("one latent, 4x", gpt2, 30_000, 4, layout="input"),
    Variant("4x, float32", stablelm, 30_000, 4, window_bits=8, dtype=torch.float32),
    Variant("static, 4x", stablelm, 30_000, 4, places=LONGEST + 64),
)


def prepared(variant: Variant) -> tuple[Any, LatentPlan]:
    """The model in the variant's dtype, and a plan with bases in it too."""
    torch.manual_seed(0)
    model = variant.make().eval().requires_grad_(False)
    options = FitOptions(
        ratio=variant.ratio, layout=variant.layout, window_bits=variant.window_bits, sequences=6, rate_sequences=4,
        sinks=4, recent=32, block=16, tokens=LONGEST,
    )  # fmt: skip
    batches: list[dict[str, Any]] = [
        {"input_ids": torch.randint(VOCABULARY, (2, 128)), "use_cache": False} for _ in range(10)
    ]
    plan = plan_for(measure_module(model, batches, options), options)

    def cast(side: SidePlan) -> SidePlan:
        return replace(side, encode=side.encode.to(variant.dtype))

    sites = tuple(replace(site, key=cast(site.key), value=cast(site.value)) for site in plan.sites)
    return model.to(variant.dtype), replace(plan, sites=sites)


# --------------------------------------------------------------------------------------------------- a run


@dataclass
class Course:
    """What happened in a run."""

    tokens: list[int] = field(default_factory=list)  # generated so far, at each comparison
    apart: list[float] = field(default_factory=list)  # largest difference of logits
    over: list[float] = field(default_factory=list)  # bytes held / bytes that the formula and the spare capacity allow
    resident: list[int] = field(default_factory=list)  # bytes of the process at each quarter
    seconds: float = 0.0


def operations(rng: random.Random) -> Iterator[str]:
    """Yield operations on the caches, without end."""
    odds = {"token": 900, "chunk": 25, "crop": 20, "deep crop": 3, "reorder": 20, "select": 8, "repeat": 8, "reset": 1}
    while True:
        yield rng.choices(list(odds), list(odds.values()))[0]


def run(variant: Variant, tokens: int, seed: int = 0, made: tuple[Any, LatentPlan] | None = None) -> Course:
    """Generate `tokens` tokens and compare at every step. made: what `prepared` gave for the variant before."""
    model, plan = made or prepared(variant)
    rng, course, name = random.Random(seed), Course(), cache_argument(model)
    torch.manual_seed(seed)
    batch, done, length, start = 2, 0, 0, time.perf_counter()
    fhopt.apply(model, plan)
    latent = latent_cache(model, max_cache_len=variant.places)
    plain = Cache(layers=[Reference(plan, site, variant.places is not None) for site in plan.sites])
    ids = torch.randint(VOCABULARY, (batch, 40))
    for what in operations(rng):
        if what == "reset" or (length > LONGEST - 64 and rng.random() < 0.2):
            _both(latent, plain, lambda c: c.reset())
            batch, length, ids = rng.randint(1, 4), 0, torch.randint(VOCABULARY, (1, 40))
            ids = ids.expand(batch, -1)
        elif (what.endswith("crop") or length > LONGEST - 64) and length:
            count = rng.randint(1, min(8, length)) if what == "crop" else rng.randint(1, length)
            _both(latent, plain, lambda c, count=count: c.crop(-count))  # type: ignore[misc]
            length -= count
        elif what in ("reorder", "select"):
            size = batch if what == "reorder" else rng.randint(1, batch)
            index = torch.tensor([rng.randrange(batch) for _ in range(size)])
            method = "reorder_cache" if what == "reorder" else "batch_select_indices"
            _both(latent, plain, lambda c, m=method, i=index: getattr(c, m)(i))  # type: ignore[misc]
            ids, batch = ids[index], size
        elif what == "repeat" and batch <= 2:
            _both(latent, plain, lambda c: c.batch_repeat_interleave(2))
            ids, batch = ids.repeat_interleave(2, 0), 2 * batch
        elif what == "chunk":
            ids = torch.randint(VOCABULARY, (batch, rng.randint(2, 40)))
        logits = [_logits(model, ids, {name: cache}) for cache in (latent, plain)]
        done, length = done + ids.numel(), length + ids.shape[1]
        course.tokens.append(done)
        course.apart.append(float((logits[0] - logits[1]).abs().max()))
        course.over.append(_over(latent, plan, batch))
        ids = torch.multinomial(logits[1][:, -1].softmax(-1), 1)
        if done >= tokens * (len(course.resident) + 1) / 4:
            course.resident.append(process_bytes())
        if done >= tokens:
            break
    course.seconds = time.perf_counter() - start
    return course


def _both(latent: Any, plain: Any, change: Callable[[Any], None]) -> None:
    change(latent)
    change(plain)


@torch.no_grad()
def _logits(model: Any, ids: Tensor, cache: dict[str, Any]) -> Tensor:
    found: Tensor = model(ids, use_cache=True, **cache).logits
    return found


def _over(cache: Any, plan: LatentPlan, batch: int) -> float:
    """Bytes held over the most that may be held, the largest of all layers; a static cache must not change at all."""
    size, shares = cache.layers[0].dtype.itemsize, []
    for layer, site in zip(cache.layers, plan.sites, strict=True):
        if isinstance(layer, StaticLatentLayer):  # and a place in each part for tokens that are not to be kept
            first, window, rows = plan.sinks + 1, plan.window.capacity + 1, layer.capacity + 1
        else:
            first = min(layer.get_seq_length(), plan.sinks)
            window = layer.get_seq_length() - first - layer.quantized
            rows = layer.quantized + layer.quantized // GROWTH + plan.block
        opened = first * site.window_bytes(16, size) + window * site.window_bytes(plan.window_bits, size)
        shares.append(layer.nbytes / (batch * (opened + rows * site.token_bytes(size))))
    return max(shares)


def drift(course: Course) -> float:
    """Median difference in the last quarter of the run over that in the first."""
    quarter = max(1, len(course.apart) // 4)
    return statistics.median(course.apart[-quarter:]) / max(1e-16, statistics.median(course.apart[:quarter]))


def growth(course: Course) -> int:
    """Bytes that the process gained from the first quarter on."""
    return course.resident[-1] - course.resident[0]


def broken(variant: Variant, course: Course, is_long: bool = True) -> list[str]:
    """The promises that a run has broken, in words. is_long: long enough for its quarters to be alike.

    In a lap, what the process gains is what the caches happen to hold at its end (some MB); laps are compared instead.
    """
    exact, drifted = variant.dtype == torch.float64, drift(course)
    told = {
        f"logits differ by {max(course.apart):.1e}": exact and max(course.apart) > MOST_APART,
        f"the last quarter is {drifted:.1f} times as far off as the first": exact and is_long and drifted > MOST_DRIFT,
        f"{max(course.over):.3f} times the bytes that the formula allows": max(course.over) > 1,
        f"the process grew by {growth(course) / 2**20:.1f} MB": is_long and growth(course) > MOST_GROWTH,
    }
    return [words for words, is_so in told.items() if is_so]


# --------------------------------------------------------------------------------------------------- over and over


@dataclass(frozen=True)
class Lap:
    """After one lap: minutes and tokens since the beginning, bytes of the process, promises that were broken."""

    minutes: float
    tokens: int
    resident: int
    broken: tuple[str, ...]


def laps(minutes: float) -> Iterator[Lap]:
    """Laps through all variants, until the time is over and there are enough to tell a slope."""
    made = {variant.name: prepared(variant) for variant in VARIANTS}
    start, tokens, count = time.perf_counter(), 0, 0
    while count < LEAST_LAPS or time.perf_counter() - start < 60 * minutes:
        told: list[str] = []
        for variant in VARIANTS:
            course = run(variant, LAP, seed=count, made=made[variant.name])
            told += [f"{variant.name}: {words}" for words in broken(variant, course, is_long=False)]
            tokens += course.tokens[-1] + generate(made[variant.name][0], seed=count)
        count += 1
        yield Lap((time.perf_counter() - start) / 60, tokens, process_bytes(), tuple(told))


def generate(model: Any, seed: int) -> int:
    """Generate tokens in every mode of `generate`, and return how many."""
    torch.manual_seed(seed)
    tokens = 0
    for way in GENERATED:
        batch = 1 if "prompt_lookup_num_tokens" in way else 2
        ids = torch.randint(VOCABULARY, (batch, 60))
        tokens += model.generate(ids, max_new_tokens=40, min_new_tokens=40, **way).numel() - ids.numel()
    return tokens


def slope(course: list[Lap]) -> tuple[float, float]:
    """Bytes an hour that the process gains, and the standard error: least squares over the laps behind the warm-up."""
    kept = course[int(WARM * len(course)) :]
    hours, sizes = [lap.minutes / 60 for lap in kept], [float(lap.resident) for lap in kept]
    spread = sum((x - statistics.fmean(hours)) ** 2 for x in hours)
    line = statistics.linear_regression(hours, sizes)
    rest = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(hours, sizes, strict=True))
    return line.slope, math.sqrt(rest / (len(kept) - 2) / spread)


def endured(course: list[Lap]) -> list[str]:
    """The promises that were broken in some lap, and the one about memory, in words."""
    gained, error = slope(course)
    told = [f"lap {number}: {words}" for number, lap in enumerate(course) for words in lap.broken]
    if gained - 2 * error > MOST_SLOPE:
        told.append(f"the process grows by {gained / 1e6:.2f} MB an hour (standard error {error / 1e6:.2f})")
    return told


def endure(minutes: float) -> list[str]:
    """Run laps, print the memory after each, write the figures down; what was broken."""
    course: list[Lap] = []
    for lap in laps(minutes):
        course.append(lap)
        click.echo(f"{lap.minutes:6.1f} min {lap.tokens:9,} tokens {lap.resident / 1e6:8.2f} MB")
    gained, error = slope(course)
    click.echo(f"slope: {gained / 1e6:+.3f} MB an hour, standard error {error / 1e6:.3f}")
    figures = (
        ("minutes", course[-1].minutes, "min"),
        ("tokens", course[-1].tokens, ""),
        ("resident_first", course[0].resident, "bytes"),
        ("resident_last", course[-1].resident, "bytes"),
        ("slope", gained, "bytes/h"),
        ("slope_error", error, "bytes/h"),
    )
    rows = [Row("mixed generation", "fhopt", metric, float(value), unit) for metric, value, unit in figures]
    record("endurance", rows, lambda figure: draw_memory(figure, course))
    return endured(course)


def draw_memory(figure: Figure, course: list[Lap]) -> None:
    """Bytes of the process over time."""
    panel = figure.subplots()
    panel.plot([lap.minutes for lap in course], [lap.resident / 1e6 for lap in course], marker=".", linewidth=0.8)
    panel.set(xlabel="minutes", ylabel="MB of the process", title="mixed generation, repeated")
    panel.set_ylim(0, 1.2 * max(lap.resident for lap in course) / 1e6)


# --------------------------------------------------------------------------------------------------- the command


def rows_of(name: str, course: Course) -> list[Row]:
    """The figures of one run."""
    figures = (
        ("tokens", course.tokens[-1], ""),
        ("largest_logit_difference", max(course.apart), ""),
        ("last_quarter_over_first", drift(course), "x"),
        ("bytes_over_allowed", max(course.over), "x"),
        ("process_growth", growth(course), "bytes"),
        ("tokens_per_second", course.tokens[-1] / course.seconds, "1/s"),
    )
    return [Row(name, "fhopt", metric, float(value), unit) for metric, value, unit in figures]


def draw(figure: Figure, courses: dict[str, Course]) -> None:
    """Differences of logits, and bytes against what is allowed, over the tokens of each run."""
    above, below = figure.subplots(2, 1, sharex=True)
    for name, course in courses.items():
        stride = max(1, len(course.tokens) // 400)
        cut = range(0, len(course.tokens) - stride + 1, stride)
        at = [course.tokens[i] for i in cut]
        above.plot(at, [max(course.apart[i : i + stride]) for i in cut], label=name, linewidth=0.8)
        below.plot(at, [max(course.over[i : i + stride]) for i in cut], linewidth=0.8)
    above.axhline(MOST_APART, color="black", linestyle=":", linewidth=0.8)
    above.set(yscale="log", ylabel="largest difference of logits", title="latent caches against a plain reference")
    above.legend(fontsize="small", ncols=3)
    below.axhline(1, color="black", linestyle=":", linewidth=0.8)
    below.set(xlabel="tokens generated", ylabel="bytes held / bytes allowed", ylim=(0, 1.1))


@click.command()
@click.option("--quick", is_flag=True, help="A twentieth of the tokens.")
@click.option("--minutes", type=float, help="Repeat for so long, and monitor the memory of the process.")
def main(quick: bool, minutes: float | None) -> None:
    """Run every variant; exit status 1 when a promise is broken."""
    torch.set_num_threads(1)
    if minutes is not None:
        told = endure(minutes)
        click.echo("; ".join(told) or "every promise holds")
        sys.exit(bool(told))
    share = 20 if quick or is_quick() else 1
    courses: dict[str, Course] = {}
    failed = False
    for variant in VARIANTS:
        course = courses[variant.name] = run(variant, variant.tokens // share)
        failed |= bool(told := broken(variant, course))
        click.echo(f"{variant.name}: {'; '.join(told) or 'every promise holds'}")
    rows = [row for name, course in courses.items() for row in rows_of(name, course)]
    record("soak", rows, lambda figure: draw(figure, courses))
    sys.exit(failed)


if __name__ == "__main__":
    main()
