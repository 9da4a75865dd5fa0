"""One soak run: a model, a plan, random cache operations, and the promises to check."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import fhopt
from benchmarks.recording import process_bytes
from benchmarks.soak.reference import ExactReference
from fhopt.cache.quantized_rows import GROWTH
from fhopt.cache.residual_window import spare_places
from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.calibration.data import of_batches
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import calibrate, plan_from_calibration
from fhopt.hf.apply import latent_cache
from fhopt.models.model_facts import cache_argument
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan

VOCABULARY, LONGEST = 97, 2048
TOKENS: dict[str, Any] = dict(bos_token_id=0, eos_token_id=None, pad_token_id=0)
MAX_APART, MAX_DRIFT, MAX_GROWTH = 1e-4, 2.0, 4 << 20  # logits; relative to the first quarter; bytes of the process


@dataclass(frozen=True)
class Variant:
    """A model, a plan and a cache type, and the number of tokens to generate."""

    name: str
    make: Callable[[], Any]
    tokens: int
    ratio: float
    layout: str = "auto"
    window_bits: int = 16
    places: int | None = None  # positions of a static cache
    dtype: torch.dtype = torch.float64


def stablelm() -> Any:
    """Build two layers, H=4, G=2, D=16, RoPE; its norms, unlike Llama's, do not round to float32."""
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = StableLmConfig(**sizes, vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.2, **TOKENS)
    return StableLmForCausalLM(config)


def gpt2() -> Any:
    """Build two layers, H=G=4, D=16."""
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
    """Return the model in the variant's dtype, and a plan whose bases have that dtype, too."""
    torch.manual_seed(0)
    model = variant.make().eval().requires_grad_(False)
    options = FitOptions(
        ratio=variant.ratio, layout=variant.layout, window_bits=variant.window_bits, sequences=6, rate_sequences=4,
        sinks=4, recent=32, block=16, tokens=LONGEST,
    )  # fmt: skip
    batches: list[dict[str, Any]] = [
        {"input_ids": torch.randint(VOCABULARY, (2, 128)), "use_cache": False} for _ in range(10)
    ]
    plan = plan_from_calibration(calibrate(of_batches(model, batches), options), options)

    def cast(side: SidePlan) -> SidePlan:
        return replace(side, encode=side.encode.to(variant.dtype))

    sites = tuple(replace(site, key=cast(site.key), value=cast(site.value)) for site in plan.sites)
    return model.to(variant.dtype), replace(plan, sites=sites)


@dataclass
class Course:
    """Measurements of a run."""

    tokens: list[int] = field(default_factory=list)  # generated so far, at each comparison
    apart: list[float] = field(default_factory=list)  # largest difference of logits
    over: list[float] = field(default_factory=list)  # stored bytes / bytes allowed by formula and spare capacity
    resident: list[int] = field(default_factory=list)  # bytes of the process at each quarter
    seconds: float = 0.0


def operations(rng: random.Random) -> Iterator[str]:
    """Yield operations on the caches endlessly."""
    odds = {
        "token": 900,
        "prefill": 25,
        "crop": 20,
        "deep crop": 3,
        "reorder": 20,
        "select": 8,
        "repeat": 8,
        "reset": 1,
    }
    while True:
        yield rng.choices(list(odds), list(odds.values()))[0]


def run(variant: Variant, tokens: int, seed: int = 0, made: tuple[Any, LatentPlan] | None = None) -> Course:
    """Generate `tokens` tokens and compare after every call. made: the result of `prepared` for the variant."""
    model, plan = made or prepared(variant)
    rng, course, name = random.Random(seed), Course(), cache_argument(model)
    torch.manual_seed(seed)
    batch, done, length, start = 2, 0, 0, time.perf_counter()
    fhopt.apply(model, plan)
    latent = latent_cache(model, max_cache_len=variant.places)
    plain = Cache(layers=[ExactReference(plan, site, variant.places is not None) for site in plan.sites])
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
        elif what == "prefill":
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
    logits: Tensor = model(ids, use_cache=True, **cache).logits
    return logits


def _over(cache: Any, plan: LatentPlan, batch: int) -> float:
    """Return stored bytes over allowed bytes, the largest of all layers; a static cache must not change."""
    size, shares = cache.layers[0].dtype.itemsize, []
    for layer, site in zip(cache.layers, plan.sites, strict=True):
        if isinstance(layer, StaticLatentLayer):  # and a slot in each part for discarded tokens
            first, window, rows = plan.sinks + 1, plan.window.capacity + 1, layer.capacity + 1
        else:
            first = min(layer.get_seq_length(), plan.sinks)
            window = layer.get_seq_length() - first - layer.quantized
            window += spare_places(layer.quantized, plan.block) if plan.window_bits == 8 else 0
            rows = layer.quantized + layer.quantized // GROWTH + plan.block
        opened = first * site.window_bytes(16, size) + window * site.window_bytes(plan.window_bits, size)
        shares.append(layer.nbytes / (batch * (opened + rows * site.token_bytes(size))))
    return max(shares)


def drift(course: Course) -> float:
    """Return the median difference in the last quarter of the run over that in the first."""
    quarter = max(1, len(course.apart) // 4)
    return statistics.median(course.apart[-quarter:]) / max(1e-16, statistics.median(course.apart[:quarter]))


def growth(course: Course) -> int:
    """Return the growth of the process in bytes from the first quarter on."""
    return course.resident[-1] - course.resident[0]


def broken(variant: Variant, course: Course, is_long: bool = True) -> list[str]:
    """Return the promises that a run has broken, in words. is_long: long enough for comparable quarters.

    In a lap, the growth of the process depends on the caches' contents at its end (some MB); laps are compared instead.
    """
    exact, drifted = variant.dtype == torch.float64, drift(course)
    promises = {
        f"logits differ by {max(course.apart):.1e}": exact and max(course.apart) > MAX_APART,
        f"the last quarter is {drifted:.1f} times as far off as the first": exact and is_long and drifted > MAX_DRIFT,
        f"{max(course.over):.3f} times the bytes that the formula allows": max(course.over) > 1,
        f"the process grew by {growth(course) / 2**20:.1f} MB": is_long and growth(course) > MAX_GROWTH,
    }
    return [words for words, is_so in promises.items() if is_so]
