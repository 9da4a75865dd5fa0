"""Check kernels and decode steps on a GPU, then measure them.

    python benchmarks/gpu.py            benchmarks/results/gpu.json, gpu.png, gpu.md
    python benchmarks/gpu.py --check    only the first part
    python benchmarks/gpu.py --tune     first time the configurations of each kernel and store the fastest
    python benchmarks/gpu.py --quick    few cases (also QUICK=1), to gpu-quick.*
    python benchmarks/gpu.py --dry      the same code on a CPU in tiny sizes, under Triton's interpreter: no figures

1. Every generated kernel is compared with a reference in float64 (attention), or byte for byte (encode, pack, unpack).
   The first that is wrong ends the run.
2. Attention of one new token: latents against every dense implementation that is installed. Calls are recorded in a
   CUDA graph and rotate over buffers that are together COLD times the L2 cache; a figure is the median over replays.
   Bytes are those of the keys and values, or of the quantized values and scales; a copy is measured in the same run.
   The baseline of a case is its fastest dense implementation.
3. Whole decode steps of models with the shapes of Llama-2-7B and Llama-3.1-8B, random weights and random tokens in the
   KV caches: transformers with a StaticCache against a LatentCache of the same number of tokens, both with CUDA graphs.
   Where not all layers fit into memory with the exact cache, two smaller numbers of layers are measured and the time is
   extrapolated, step(L) = step(n) + (L - n) (step(n) - step(m)) / (n - m); such a figure is called
   step_ms_scaled.

--dry differs in device, clock and sizes, and compiles dense implementations with Dynamo alone. It shows that this file
runs. Its output is marked, and stored only where --out says so.

Letters: B batch, H query heads, G kv heads, S queries, T tokens, D head size, J latent heads, R latent width, L layers.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and "--dry" in sys.argv and os.environ.get("TRITON_INTERPRET") != "1":
    # What Triton does with a kernel, and whether there is a GPU, is settled when the modules below are imported.
    _environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.execve(sys.executable, [sys.executable, *sys.argv], _environment)

import functools
import gc
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import recording
import torch
import torch.nn.functional as F
from decode import grouped_attention
from recording import Row, is_quick, record
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import reset_cudagraph_trees
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import fhopt
from fhopt.codegen.build import build_triton
from fhopt.codegen.gpu.tuning import Workload, random_call, row_bytes, tune
from fhopt.codegen.tiers import Tiers
from fhopt.hf.apply import latent_cache
from fhopt.models.model_facts import cache_argument
from fhopt.ops import algebra, latent_attention
from fhopt.ops import attention as ops_attention
from fhopt.ops import packing as ops_packing
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SidePlan, SitePlan, Tier

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

T = TypeVar("T")
Call = Callable[[], object]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
COLD = 4  # times the L2 cache that rotating buffers are together
LONG = 2 << 30  # bytes that a graph reads at least: starting it takes no part of its time then
REPLAYS, WARM = 20, 3
STEPS, ROUNDS = 10, 5  # of a model
SPARE = 128  # positions of static caches after their tokens
CHUNK = 1024  # tokens that are added to a cache at once
SHARE = 0.85  # of the free memory that is used
PAGE_TOKENS = 16
# Of float32, sums in another order and exponentials to 22 bits (TF32 would be 3e-4 off); else four roundings.
TOLERANCES = {torch.float32: 5e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
NEEDS = "benchmarks/gpu.py needs a GPU that torch can use (torch.cuda.is_available() is False); --dry runs without one."


# --------------------------------------------------------------------------------------------------- what is measured


def tiers(*pairs: tuple[int, int]) -> Tiers:
    """Return bit groups from (bits, width), with steps at which random values have a deviation of about 1."""
    return tuple((bits, width, 3.5 / 2**bits) for bits, width in pairs)


@dataclass(frozen=True)
class Latent:
    """How keys and values are stored: J latent heads, and the bit groups of both sides; none: unquantized."""

    heads: int
    key: Tiers = ()
    value: Tiers = ()


@dataclass(frozen=True)
class Shape:
    """H query heads and G kv heads of D channels, and the latents that may replace the keys and values."""

    heads: int
    kv_heads: int
    dim: int
    latents: tuple[Latent, ...]

    @property
    def name(self) -> str:
        """Return the name used in tables."""
        heads = f"MHA {self.heads}" if self.is_mha else f"GQA {self.heads}/{self.kv_heads}"
        return f"{heads}x{self.dim}"

    @property
    def is_mha(self) -> bool:
        """Every query head has keys of its own."""
        return self.heads == self.kv_heads

    def spec(self, latent: Latent, dtype: torch.dtype) -> KernelSpec:
        """What the kernel of a latent depends on."""
        key_width, value_width = (sum(w for _, w, _ in side) or self.dim for side in (latent.key, latent.value))
        return KernelSpec(latent.key, latent.value, key_width, value_width, _name(dtype), False)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of a token."""
        return 2 * self.kv_heads * self.dim * dtype.itemsize

    def latent_bytes(self, latent: Latent, dtype: torch.dtype) -> int:
        """Return bytes of the quantized values and scales of a token."""
        return latent.heads * row_bytes(self.spec(latent, dtype))

    def label(self, latent: Latent, dtype: torch.dtype) -> str:
        """Return the name of a latent in tables: how many times smaller it is."""
        ratio = self.dense_bytes(dtype) / self.latent_bytes(latent, dtype)
        return f"fhopt {ratio:.1f}x" if latent.key else "fhopt, uncoded"


FOUR = tiers((4, 128))
# Planes of whole words of 32 bytes or more, as plans for GPUs have them.
MHA_SIXTH = Latent(8, tiers((8, 32), (4, 128), (2, 256)), tiers((8, 32), (4, 96), (2, 256)))  # each for 4 kv heads
MHA_EIGHTH = Latent(8, *[tiers((8, 32), (4, 64), (2, 256))] * 2)
GQA_FIFTH = Latent(4, *[tiers((8, 32), (4, 64), (2, 128))] * 2)  # each for 2
GQA_EIGHTH = Latent(4, *[tiers((4, 64), (2, 128))] * 2)
MHA = Shape(32, 32, 128, (Latent(32), Latent(32, FOUR, FOUR), MHA_SIXTH, MHA_EIGHTH))
GQA = Shape(32, 8, 128, (Latent(8), Latent(8, FOUR, FOUR), GQA_FIFTH, GQA_EIGHTH))
WIDE_GQA = replace(GQA, heads=64)


@dataclass(frozen=True)
class Network:
    """A model by its shapes. `latents`: those of its attention that are measured."""

    name: str
    shape: Shape
    latents: tuple[Latent, ...]
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    batches: tuple[int, ...]

    def config(self, layers: int, tokens: int) -> Any:
        """For transformers: `layers` layers, positions for `tokens` tokens."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=layers, num_attention_heads=self.shape.heads,
            num_key_value_heads=self.shape.kv_heads, head_dim=self.shape.dim, max_position_embeddings=tokens,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    def depth(self, batch: int, tokens: int, numbers: float) -> int:
        """Layers of which weights and exact cache fit beside all else into memory for so many numbers."""
        heads, width = self.shape.heads + self.shape.kv_heads, self.shape.dim
        weights = self.hidden * (2 * heads * width + 3 * self.intermediate)
        place = 2 * batch * (tokens + SPARE) * width  # of keys and values, for each head
        rest = 2 * self.vocabulary * self.hidden + 2 * place * self.shape.heads
        return max(0, min(self.layers, int((numbers - rest) // (weights + place * self.shape.kv_heads))))


LLAMA_2_7B = Network("Llama-2-7B", MHA, (MHA_SIXTH, MHA_EIGHTH), 32, 4096, 11008, 32000, (8,))
LLAMA_31_8B = Network("Llama-3.1-8B", GQA, (GQA_FIFTH, GQA_EIGHTH), 32, 4096, 14336, 128256, (16,))


@dataclass(frozen=True)
class Sizes:
    """What a run measures. checked: tokens of the checks, whole pages of `page`."""

    shapes: tuple[Shape, ...] = (MHA, GQA, WIDE_GQA)
    batches: tuple[int, ...] = (1, 8, 32, 64)
    tokens: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    networks: tuple[Network, ...] = (LLAMA_2_7B, LLAMA_31_8B)
    step_tokens: tuple[int, ...] = (16384, 32768)
    tuned: tuple[int, int] = (8, 32768)  # batch and tokens that configurations are timed at
    checked: int = 1088
    page: int = 64
    check_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


QUICK = Sizes(batches=(8,), tokens=(32768,), networks=(replace(LLAMA_31_8B, layers=8),), step_tokens=(16384,))
TINY = Shape(4, 2, 16, (Latent(2), Latent(1, tiers((4, 16), (2, 8)), tiers((4, 16)))))
TINY_NETWORK = Network("tiny", TINY, TINY.latents[1:], 1, 32, 48, 64, (1,))
TINY_SIZES = Sizes((TINY,), (1,), (32, 2048), (TINY_NETWORK,), (40,), (1, 32), 48, 16, (torch.float32,))


# --------------------------------------------------------------------------------------------------- where


@dataclass(frozen=True)
class Machine:
    """Where and how time is taken; all that --dry changes but the sizes.

    dtype: of models. cold, long: bytes that rotating buffers have together, and that a measurement reads. free: bytes
    of memory that may be had. clock: milliseconds of one of some calls, gone round so many times. wait: until the
    device is done. tuner: clock of `tune`, None for its own. compiler: of dense ways. mark: before each case.
    """

    name: str
    device: str
    dtype: torch.dtype
    cold: int
    long: int
    free: Callable[[], int]
    clock: Callable[[Sequence[Call], int], float]
    wait: Call
    tuner: Callable[[Call], float] | None
    compiler: str
    mark: str = ""


def this_gpu() -> Machine:
    """The GPU of this machine. Without one: a line, and exit status 2."""
    if not torch.cuda.is_available():
        click.echo(NEEDS, err=True)
        sys.exit(2)
    cold = COLD * torch.cuda.get_device_properties(0).L2_cache_size
    wait, name = torch.cuda.synchronize, torch.cuda.get_device_name()
    return Machine(name, "cuda", torch.bfloat16, cold, LONG, gpu_free, graph_ms, wait, None, "inductor")


def dry_machine() -> Machine:
    """A CPU that is said to have so little memory that something is left out."""
    free, cold = 450_000, 2_000
    return Machine(
        "dry", "cpu", torch.float32, cold, 2 * cold, lambda: free, host_ms, lambda: None,
        lambda call: host_ms([call], 1), "eager", "dry, ",
    )  # fmt: skip


def gpu_free() -> int:
    """Bytes of the GPU's memory that nobody holds."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def graph_ms(calls: Sequence[Call], turns: int) -> float:
    """Milliseconds of one of the calls: of a CUDA graph of all of them, `turns` times, the median over replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles and plans, which cannot be recorded
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * turns:
            call()
    times = []
    for _ in range(WARM + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM:]) / (turns * len(calls))


def host_ms(calls: Sequence[Call], turns: int) -> float:
    """The same by the host's clock."""
    times = []
    for call in [*calls] * turns:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------- results


@dataclass
class Report:
    """Figures so far, kept in a file after every case, and what is to be said of them."""

    file: str
    mark: str
    rows: list[Row] = field(default_factory=list)
    notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # cases by implementation and what is said
    places: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # shape, batch and tokens of a case

    def case(self, shape: str, batch: int, tokens: int) -> str:
        """The name of a case."""
        name = f"{self.mark}{shape}, batch {batch}, {tokens:,} tokens"
        self.places[name] = shape, batch, tokens
        return name

    def add(self, rows: Sequence[Row]) -> None:
        """Take the rows of a case."""
        self.rows += rows
        recording.write(self.file, self.rows)

    def note(self, case: str, impl: str, what: str) -> None:
        """Say something of one implementation."""
        what = " ".join(what.split())[:200]
        self.notes.setdefault((impl, what), []).append(case)
        click.echo(f"{case}: {impl}: {what}", err=True)

    def leave_out(self, case: str, impl: str, error: Exception) -> None:
        """Say why something is not measured."""
        self.note(case, impl, f"left out, {error or type(error).__name__}")


# --------------------------------------------------------------------------------------------------- 1. checks


EVERY = tiers(*[(bits, 16) for bits in (3, 16, 5, 8, 4, 2, 1, 6)])
OTHER_SHAPE = Shape(4, 2, 24, ())
OTHER_LATENTS = ((Latent(1, EVERY, tiers((3, 24), (16, 8))), 0.0), (Latent(2, (), tiers((4, 32))), 4.0))  # and softcap


class Wrong(click.ClickException):
    """A kernel gives wrong numbers, or none."""

    def __init__(self, machine: Machine, what: str, found: str) -> None:
        super().__init__(
            f"{what} is wrong on {machine.name}: {found}. Nothing was measured. Do not use this kernel here, and "
            "report this line with the versions of torch and triton."
        )


def check(machine: Machine, sizes: Sizes) -> int:
    """Every kernel against its reference; how many calls were compared. Raises Wrong."""
    count = 0
    for what, compare in checks(machine, sizes):
        try:
            found = compare()
        except Exception as error:  # of Triton, CUDA or torch: they have no base in common
            raise Wrong(machine, what, f"it fails ({' '.join(str(error).split())[:300]})") from error
        if found:
            raise Wrong(machine, what, found)
        count += 1
    return count


def checks(machine: Machine, sizes: Sizes) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names of checks, and functions that say what is wrong.

    Every kernel that is measured, as it is measured; what a kernel can do besides on a few others, in every dtype: each
    feature is a compilation of its own.
    """
    for shape in sizes.shapes:
        for latent in shape.latents:
            yield from attention_checks(machine, sizes, shape, latent, machine.dtype, 0.0, (one_range, merged_ranges))
    for dtype in sizes.check_dtypes:
        for latent, softcap in OTHER_LATENTS:
            yield from attention_checks(machine, sizes, OTHER_SHAPE, latent, dtype, softcap, FEATURES)
    for what in (compare_pack, compare_unpack, compare_encode):
        yield what.__name__.removeprefix("compare_"), functools.partial(what, machine)


def attention_checks(
    machine: Machine, sizes: Sizes, shape: Shape, latent: Latent, dtype: torch.dtype, softcap: float,
    features: Sequence[Feature],
) -> Iterator[tuple[str, Callable[[], str]]]:  # fmt: skip
    """The checks of one kernel."""
    spec = replace(shape.spec(latent, dtype), softcap=softcap > 0)
    for feature in features:
        name = f"attention, {spec.name}, {shape.name}, {feature.__name__.replace('_', ' ')}"
        yield name, functools.partial(compare_attention, machine, sizes, shape, latent, spec, softcap, feature)


@dataclass(frozen=True)
class Question:
    """A call of the kernel: its arguments, its options, and the mask and sinks that say the same to the reference."""

    arguments: tuple[Any, ...]  # query, key, key_scale, value, value_scale, mask
    options: dict[str, Any]
    mask: Tensor | None = None
    sinks: Tensor | None = None


def one_range(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """All tokens in one program."""
    return Question(x, {"splits": 1})


def merged_ranges(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """Ranges of tokens, one of them empty, and the kernel that merges them."""
    return Question(x, {"splits": 5})


def a_mask(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """Some tokens are hidden, from one row all."""
    query, tokens = x[0], x[1].shape[2]
    mask = torch.rand(query.shape[0], 1, query.shape[2], tokens, device=query.device) > 0.4
    mask[0, 0, 0] = False
    return Question((*x[:5], mask), {}, mask)


def an_additive_mask(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """A number for every logit."""
    query, tokens = x[0], x[1].shape[2]
    bias = torch.randn(*query.shape[:3], tokens, device=query.device)
    return Question((*x[:5], bias), {}, bias)


def lengths(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """Sequences that end early, the second at once."""
    tokens = x[1].shape[2]
    ends = torch.tensor([tokens - 7, 0], device=x[0].device)
    return Question(x, {"lengths": ends}, torch.arange(tokens, device=x[0].device) < ends.view(2, 1, 1, 1))


def a_window(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """Causal, and a sliding window."""
    at, token = _positions(x)
    mask = (token <= at) & (at - token < 12)
    return Question(x, {"positions": at[:, 0, 0, 0], "causal": True, "window": 12}, mask)


def slopes(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """ALiBi."""
    at, token = _positions(x)
    each = 0.5 ** torch.arange(1, x[0].shape[1] + 1, device=x[0].device)
    return Question(x, {"positions": at[:, 0, 0, 0], "slopes": each}, each.view(1, -1, 1, 1) * (token - at))


def sinks(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """A further logit that gives nothing."""
    each = torch.randn(x[0].shape[1], device=x[0].device)
    return Question(x, {"sinks": each}, sinks=each)


def pages_of_a_pool(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """Pages that lie in any order among others; the rows of `x` in a pool."""
    query, page = x[0], sizes.page
    count = x[1].shape[2] // page
    table = torch.randperm(2 * count + 1, device=query.device)[: 2 * count].view(2, count).to(torch.int32)
    pooled = [part if part is None else _pooled(part, table, page) for part in x[1:5]]
    return Question((query, *pooled, None), {"table": table})


def chosen_pages(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """Check that each latent head reads its selected pages."""
    query, page = x[0], sizes.page
    units, count = math.lcm(x[1].shape[1], x[3].shape[1]), x[1].shape[2] // page
    pages = torch.rand(2, units, count, device=query.device).argsort(-1)[..., : count - 1].to(torch.int32)
    pages[:, :, -1] = -1
    seen = (torch.arange(count * page, device=query.device).view(-1, 1) // page == pages.unsqueeze(2)).any(-1)
    mask = seen.repeat_interleave(query.shape[1] // units, 1).unsqueeze(2)
    return Question(x, {"pages": pages, "page_tokens": page}, mask)


def chosen_short_pages(x: tuple[Any, ...], sizes: Sizes) -> Question:
    """Pages of less than a tile."""
    return chosen_pages(x, replace(sizes, page=8))


Feature = Callable[[tuple[Any, ...], Sizes], Question]
FEATURES: tuple[Feature, ...] = (
    one_range, merged_ranges, a_mask, an_additive_mask, lengths, a_window, slopes, sinks, pages_of_a_pool, chosen_pages,
    chosen_short_pages,
)  # fmt: skip


def _positions(x: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Where the queries stand [2,1,S,1], and the tokens [T]."""
    tokens, device = x[1].shape[2], x[0].device
    first = torch.tensor([tokens - 3, tokens // 2], device=device).view(2, 1, 1, 1)
    return first + torch.arange(x[0].shape[2], device=device).view(-1, 1), torch.arange(tokens, device=device)


def _pooled(x: Tensor, table: Tensor, page: int) -> Tensor:
    """x [B,J,T,...] -> [pages of the pool, J, page, ...], the pages of others filled with what spoils a result."""
    parts = x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
    pool = x.new_full((table.numel() + 1, *parts.shape[1:]), 255 if x.dtype == torch.uint8 else math.nan)
    pool[table.flatten().long()] = parts
    return pool


def compare_attention(
    machine: Machine, sizes: Sizes, shape: Shape, latent: Latent, spec: KernelSpec, softcap: float, feature: Feature
) -> str:
    """What is wrong with one call, in words; empty where nothing is."""
    torch.manual_seed(0)
    queries = 3 if feature in (a_window, a_mask) else 1
    workload = Workload(2, shape.heads, latent.heads, latent.heads, queries, sizes.checked)
    arguments = random_arguments(spec, workload, machine.device)
    question = feature(arguments, sizes)
    options: dict[str, Any] = {"scale": spec.key_width**-0.5, "softcap": softcap}
    output, lse = build_triton(spec)(*question.arguments, **(question.options | options))
    wanted, wanted_lse = expected(spec, arguments, question, options)
    tolerance = TOLERANCES[getattr(torch, spec.dtype)]
    seen = wanted_lse > -math.inf
    if not torch.equal(lse > -math.inf, seen) or bool(output[~seen].any()):
        return "rows that see nothing are not zero"
    lse, wanted_lse = lse[seen], wanted_lse[seen]
    apart = max(relative(output, wanted), min(relative(lse, wanted_lse), _most(lse, wanted_lse)))
    return "" if apart < tolerance else f"relative error {apart:.2g}, expected below {tolerance:.2g}"


def random_arguments(spec: KernelSpec, workload: Workload, device: str) -> tuple[Any, ...]:
    """Query, key, key_scale, value, value_scale and no mask; unlike those of `random_call` all of them numbers."""
    dtype, batch = getattr(torch, spec.dtype), workload.batch
    made: list[Any] = [torch.randn(batch, workload.heads, workload.queries, spec.key_width, dtype=dtype, device=device)]
    for side, width in ((spec.key_tiers, spec.key_width), (spec.value_tiers, spec.value_width)):
        z = torch.randn(batch, workload.key_heads, workload.tokens, width, device=device)
        made += ops_packing.pack_reference(z, *_columns(side)) if side else (z.to(dtype), None)
    return (*made, None)


def expected(
    spec: KernelSpec, arguments: tuple[Any, ...], question: Question, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    query, key, key_scale, value, value_scale, _ = arguments
    key, value = (x if x.dtype == torch.uint8 else x.double() for x in (key, value))
    options = options | algebra.group_options(_columns(spec.key_tiers), _columns(spec.value_tiers))
    output, lse = latent_attention.latent_attention_reference(
        query.double(), key, key_scale, value, value_scale, question.mask, **options
    )
    if question.sinks is None:
        return output, lse
    total = torch.logaddexp(lse, question.sinks.double().view(1, -1, 1))
    return output * torch.exp(lse - total).unsqueeze(-1), total


def _columns(side: Tiers) -> algebra.BitGroups:
    return algebra.BitGroups([b for b, _, _ in side], [w for _, w, _ in side], [s for _, _, s in side])


def relative(found: Tensor, wanted: Tensor) -> float:
    """Size of the difference against the size of what is wanted; infinite for numbers that are none."""
    apart = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
    return apart if math.isfinite(apart) else math.inf


def _most(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max()) if found.numel() else 0.0


def compare_pack(machine: Machine) -> str:
    """Check packing of integers, whose squares have exact sums: equal byte for byte."""
    from fhopt.codegen.gpu import packing

    z = torch.randint(-9, 10, (2, 3, 35, 128)).float()
    found = packing.pack(z.to(machine.device), *_columns(EVERY))
    return _unequal(found, ops_packing.pack_reference(z, *_columns(EVERY)))


def compare_unpack(machine: Machine) -> str:
    """Return random bytes as quantized values."""
    from fhopt.codegen.gpu import packing

    codes, scale = ops_packing.pack_reference(torch.randn(2, 3, 35, 128), *_columns(EVERY))
    found = packing.unpack(codes.to(machine.device), scale.to(machine.device), *_columns(EVERY))
    return _unequal([found], [ops_packing.unpack_reference(codes, scale, *_columns(EVERY))])


def compare_encode(machine: Machine) -> str:
    """New rows between others, from whole numbers and a basis of -1, 0 and 1: equal byte for byte."""
    from fhopt.codegen.gpu import encode_rows

    x, basis = torch.randint(-2, 3, (2, 4, 21, 16)).float(), torch.randint(-1, 2, (2, 128, 32)).float()
    size = sum(b * w for b, w in zip(*_columns(EVERY)[:2], strict=True)) // 8
    wanted = torch.full((2, 2, 40, size), 165, dtype=torch.uint8), torch.full((2, 2, 40), 7.0, dtype=torch.float16)
    found = [part.clone().to(machine.device) for part in wanted]
    encode_rows.encode(x.to(machine.device), basis.to(machine.device), *_columns(EVERY), *found, at=5)
    encode_rows.encode_reference(x, basis, *_columns(EVERY), *wanted, at=5)
    return _unequal(found, wanted)


def _unequal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    count = sum(int((a.cpu() != b).sum()) for a, b in zip(found, wanted, strict=True))
    return f"{count} numbers differ from the reference, expected none" if count else ""


# --------------------------------------------------------------------------------------------------- 2. attention


def copy_gb_s(machine: Machine) -> float:
    """Gigabytes a second that a copy reads and writes."""
    size = min(int(SHARE * machine.free()) // 4, max(machine.cold, machine.long // 2))
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    return 2 * size / machine.clock([functools.partial(target.copy_, source)], 1) / 1e6


def rotating(machine: Machine, size: int, make: Callable[[], T]) -> tuple[list[T], int]:
    """Buffers of `size` bytes that together leave the cache, and how many turns of them take long enough to be timed.

    Raises MemoryError, in words, where they do not fit.
    """
    count = max(1, math.ceil(machine.cold / size))
    needed, free = count * size, machine.free()
    if needed > SHARE * free:
        raise MemoryError(f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
    return [make() for _ in range(count)], math.ceil(machine.long / needed)


def dense_ways(shape: Shape, batch: int, tokens: int, machine: Machine) -> dict[str, Attend]:
    """Attention of q [B,H,1,D] to k, v [B,G,T,D] by all that is installed; functions are free to refuse."""
    found: dict[str, Attend] = {}
    backends = (
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH,
    )  # fmt: skip
    for backend in backends:
        name = f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}"
        found[name] = functools.partial(by_sdpa, backend, False)
        if not shape.is_mha:
            found[f"{name}, heads as queries"] = functools.partial(by_sdpa, backend, True)
    found["products and softmax"] = by_products
    compiled = torch.compile(flex_attention, dynamic=False, backend=machine.compiler)
    found["FlexAttention"] = functools.partial(compiled, enable_gqa=not shape.is_mha)
    if importlib.util.find_spec("flash_attn") is not None:
        found["flash-attn"] = by_flash_attn
    if importlib.util.find_spec("flashinfer") is not None:
        found["flashinfer"] = Flashinfer(shape, batch, tokens, machine)
    return found


def by_sdpa(backend: SDPBackend, grouped: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's own; grouped: query heads that share keys become queries of one head."""
    if grouped:
        query = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same written out, nothing repeated."""
    logits = ops_attention.grouped_scores(query * query.shape[-1] ** -0.5, key)
    return ops_attention.grouped_mix(torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype), value)


def by_flash_attn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The package flash-attn; what is random may be read in the order it likes, [B,T,G,D]."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found, unused-ignore]

    batch, groups, tokens, dim = key.shape
    turned = [x.view(batch, tokens, groups, dim) for x in (key, value)]
    return flash_attn_with_kvcache(query.transpose(1, 2), *turned)


class Flashinfer:
    """The package flashinfer, over pages of PAGE_TOKENS tokens in order; planned at the first call."""

    def __init__(self, shape: Shape, batch: int, tokens: int, machine: Machine) -> None:
        self.shape, self.batch, self.tokens, self.machine = shape, batch, tokens, machine
        self.wrapper: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As the other ways."""
        self.wrapper = self.wrapper or self.plan()
        pools = [x.view(-1, PAGE_TOKENS, self.shape.kv_heads, self.shape.dim) for x in (key, value)]
        return self.wrapper.run(query.squeeze(2), tuple(pools))

    def plan(self) -> Any:
        """What flashinfer wants to know before."""
        import flashinfer  # type: ignore[import-not-found, unused-ignore]

        count, whole = self.tokens // PAGE_TOKENS, functools.partial(torch.tensor, dtype=torch.int32)
        space = torch.zeros(128 << 20, dtype=torch.uint8, device=self.machine.device)
        shared = self.shape.heads // self.shape.kv_heads
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=shared >= 4)
        begins, pages, last = (
            whole(list(x)).to(self.machine.device)
            for x in (range(0, self.batch * count + 1, count), range(self.batch * count), [PAGE_TOKENS] * self.batch)
        )
        wrapper.plan(
            begins, pages, last, self.shape.heads, self.shape.kv_heads, self.shape.dim, PAGE_TOKENS,
            q_data_type=self.machine.dtype, kv_data_type=self.machine.dtype,
        )  # fmt: skip
        return wrapper


def measure_attention(machine: Machine, report: Report, shape: Shape, batch: int, tokens: int, copy: float) -> None:
    """All ways of one case."""
    case = report.case(shape.name, batch, tokens)
    dense = dense_times(machine, report, case, shape, batch, tokens)
    best = min(dense.values(), default=None)
    size = batch * tokens * shape.dense_bytes(machine.dtype)
    rows = [row for name, ms in dense.items() for row in figures(case, name, ms, size, copy)]
    for latent in shape.latents:
        name, size = shape.label(latent, machine.dtype), batch * tokens * shape.latent_bytes(latent, machine.dtype)
        try:
            ms = latent_ms(machine, shape, latent, batch, tokens)
        except (MemoryError, torch.OutOfMemoryError) as error:
            report.leave_out(case, name, error)
            continue
        rows += figures(case, name, ms, size, copy, best)
    report.add(rows)
    click.echo(line(case, rows), err=True)


def figures(case: str, impl: str, ms: float, size: int, copy: float, best: float | None = None) -> list[Row]:
    """Milliseconds, of ours against the fastest dense way, and gigabytes a second against a copy."""
    ratio = None if best is None else best / ms
    speed = size / ms / 1e6
    return [
        Row(case, impl, "time_ms", ms, "ms", baseline=best, ratio=ratio),
        Row(case, impl, "gb_s", speed, "GB/s", baseline=copy, ratio=speed / copy),
    ]


def dense_times(machine: Machine, report: Report, case: str, shape: Shape, batch: int, tokens: int) -> dict[str, float]:
    """Milliseconds of every dense way that runs."""
    query = torch.randn(batch, shape.heads, 1, shape.dim, dtype=machine.dtype, device=machine.device)

    def make() -> list[Tensor]:
        size = batch, shape.kv_heads, tokens, shape.dim
        return [torch.randn(size, dtype=machine.dtype, device=machine.device) for _ in range(2)]

    size = batch * tokens * shape.dense_bytes(machine.dtype)
    try:
        pairs, turns = rotating(machine, size, make)
    except (MemoryError, torch.OutOfMemoryError) as error:
        report.leave_out(case, "dense ways", error)
        return {}
    found = {}
    for name, attend in dense_ways(shape, batch, tokens, machine).items():
        try:
            with torch.no_grad():
                found[name] = machine.clock([functools.partial(attend, query, *pair) for pair in pairs], turns)
        except Exception as error:  # whatever a way that does not know this shape, device or size raises
            report.leave_out(case, name, error)
    torch._dynamo.reset()
    return found


def latent_ms(machine: Machine, shape: Shape, latent: Latent, batch: int, tokens: int) -> float:
    """Milliseconds of our kernels, in the configuration that they take by themselves."""
    spec = shape.spec(latent, machine.dtype)
    kernel, workload = build_triton(spec), Workload(batch, shape.heads, latent.heads, latent.heads, 1, tokens)

    def make() -> Call:
        arguments, options = random_call(spec, workload, machine.device)
        return functools.partial(kernel, *arguments, **options)

    return machine.clock(*rotating(machine, batch * tokens * shape.latent_bytes(latent, machine.dtype), make))


def tune_kernels(machine: Machine, sizes: Sizes) -> None:
    """Time the configurations of every kernel that is measured; what was found is kept in the file cache."""
    batch, tokens = sizes.tuned
    for shape in sizes.shapes:
        for latent in shape.latents:
            spec = shape.spec(latent, machine.dtype)
            workload = Workload(batch, shape.heads, latent.heads, latent.heads, 1, tokens)
            found = tune(spec, workload, device=machine.device, device_name=machine.name, timer=machine.tuner)
            click.echo(f"{machine.mark}{shape.name}, {spec.name}: {found.best}, of {len(found.times_ms)}", err=True)


# --------------------------------------------------------------------------------------------------- 3. models


def measure_steps(machine: Machine, report: Report, network: Network, batch: int, tokens: int) -> None:
    """Every contender of one model."""
    case = report.case(network.name, batch, tokens)
    fitting = network.depth(batch, tokens, SHARE * machine.free() / machine.dtype.itemsize)
    if fitting < min(2, network.layers):
        report.note(case, "all", f"left out, {fitting} layers fit beside their exact caches, expected 2 or more")
        return
    wanted = depths(fitting, network.layers)
    times = {depth: step_times(machine, report, network, depth, batch, tokens) for depth in wanted}
    report.add(step_rows(case, network.layers, times))
    click.echo(line(case, report.rows), err=True)


def depths(fitting: int, layers: int) -> tuple[int, ...]:
    """Numbers of layers to measure: all, or two to scale from."""
    return (layers,) if fitting == layers else (fitting, fitting // 2)


def step_rows(case: str, layers: int, times: dict[int, dict[str, float]]) -> list[Row]:
    """What was measured, and the step of all layers, against the faster exact contender."""
    metric, whole = "step_ms", dict(times.get(layers, {}))
    rows = []
    if not whole:
        (n, at_n), (m, at_m) = times.items()
        metric = "step_ms_scaled"
        whole = {name: scaled(layers, n, at_n[name], m, at_m[name]) for name in at_n}
        for depth, found in times.items():
            part = f"{case}, {depth} of {layers} layers"
            rows += [Row(part, name, "step_ms", ms, "ms") for name, ms in found.items()]
    best = min(ms for name, ms in whole.items() if not name.startswith("fhopt"))
    for name, ms in whole.items():
        rows.append(Row(case, name, metric, ms, "ms", baseline=best, ratio=best / ms))
    return rows


def scaled(layers: int, n: int, at_n: float, m: int, at_m: float) -> float:
    """The step of all layers from those of n and of m."""
    return at_n + (layers - n) * (at_n - at_m) / (n - m)


def step_times(
    machine: Machine, report: Report, network: Network, layers: int, batch: int, tokens: int
) -> dict[str, float]:
    """Milliseconds of a step of each contender, one after the other: two caches may not fit."""
    places = tokens + SPARE
    model = random_model(machine, network, layers, places)
    give = functools.partial(fill, machine, network, batch, tokens)
    time_step = functools.partial(step_ms, machine, report, model, batch)
    found, cache = {}, give(StaticCache(model.config, places))
    for attention in ("sdpa", "grouped"):
        model.set_attn_implementation(attention)
        compiled = torch.compile(model, backend=machine.compiler, mode="reduce-overhead")
        found[f"transformers, {attention}"] = time_step(compiled, cache, f"{network.name}, {attention}")
    model.set_attn_implementation("sdpa")
    for latent in network.latents:
        del cache
        label = network.shape.label(latent, machine.dtype)
        fhopt.apply(model, hand_plan(network, latent, layers))
        cache = give(latent_cache(model, max_cache_len=places))
        # What mode="reduce-overhead" stands for, which torch takes in place of options only. ratio 1: no second plan.
        compiled = torch.compile(model, backend="flashhead", options={"ratio": 1, "triton.cudagraphs": True})
        found[label] = time_step(compiled, cache, f"{network.name}, {label}")
        fhopt.unapply(model)
    return found


def step_ms(
    machine: Machine, report: Report, model: Any, batch: int, compiled: Callable[..., Any], cache: Any, what: str
) -> float:
    """Return milliseconds of a decode step; the median over rounds of STEPS."""
    token = torch.ones(batch, 1, dtype=torch.int64, device=machine.device)
    options = {cache_argument(model): cache, "use_cache": True}
    counters.clear()
    times = []
    with torch.no_grad():
        for turn in range(1 + ROUNDS):
            machine.wait()
            start = time.perf_counter()
            for _ in range(STEPS if turn else WARM):
                torch.compiler.cudagraph_mark_step_begin()
                compiled(token, **options)
            machine.wait()
            times.append(1e3 * (time.perf_counter() - start) / STEPS)
    if counters["inductor"]["cudagraph_skips"]:
        case = f"{machine.mark}{what}, {len(cache.layers)} layers"
        report.note(case, "CUDA graphs", "inductor recorded none of some part of the step")
    torch._dynamo.reset()
    reset_cudagraph_trees()  # they hold memory; torch 2.13 does it in the line above
    return statistics.median(times[1:])


def random_model(machine: Machine, network: Network, layers: int, places: int) -> Any:
    """The model with random weights."""
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(network.config(layers, places), dtype=machine.dtype).eval()


@torch.no_grad()
def fill(machine: Machine, network: Network, batch: int, tokens: int, cache: Any) -> Any:
    """Give a cache random tokens."""
    for start in range(0, tokens, CHUNK):
        size = batch, network.shape.kv_heads, min(CHUNK, tokens - start), network.shape.dim
        pair = [torch.randn(size, dtype=machine.dtype, device=machine.device) for _ in range(2)]
        for layer in range(len(cache.layers)):
            cache.update(*pair, layer)
    return cache


def hand_plan(network: Network, latent: Latent, layers: int) -> LatentPlan:
    """A plan with `latent` at every layer and random orthonormal bases, each layer its own: right in size alone."""
    shape = network.shape
    sites = []
    for layer in range(layers):
        site = AttentionSite(
            f"model.layers.{layer}.self_attn", {}, "self", heads=shape.heads, kv_heads=shape.kv_heads,
            key_dim=shape.dim, value_dim=shape.dim, scale=shape.dim**-0.5, rope=None, key_norm=False, mask="causal",
            softcap=0.0, cache="in-place", source="",
        )  # fmt: skip
        sides = [random_side(shape, latent.heads, side) for side in (latent.key, latent.value)]
        sites.append(SitePlan(site, "head" if latent.heads == shape.kv_heads else "freq", *sides))
    return LatentPlan(tuple(sites), sinks=4, recent=64, block=64)


def random_side(shape: Shape, heads: int, side: Tiers) -> SidePlan:
    """encode [J,R,n*D], decode [G,D,R]: the same orthonormal rows in each latent head of n = G/J kv heads."""
    width, shared = sum(w for _, w, _ in side), shape.kv_heads // heads
    basis = torch.linalg.qr(torch.randn(shared * shape.dim, width))[0]  # [n*D, R]
    decode = basis.unflatten(0, (shared, shape.dim)).repeat(heads, 1, 1)
    return SidePlan(basis.T.repeat(heads, 1, 1), decode, tuple(Tier(*tier) for tier in side))


# --------------------------------------------------------------------------------------------------- what is shown


def line(case: str, rows: Sequence[Row]) -> str:
    """What a case came to."""
    shown = [row for row in rows if row.case == case and row.unit == "ms"]
    words = [f"{row.impl} {row.value:.4g} ms" + (f" ({row.ratio:.2f}x)" if row.ratio else "") for row in shown]
    return f"{case}: " + ", ".join(words)


COLUMNS = ("case", "implementation", "ms", "times the fastest dense", "GB/s", "of a copy")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each case and implementation, COLUMNS."""
    speeds = {(row.case, row.impl): row for row in rows if row.metric == "gb_s"}
    found: list[tuple[str, ...]] = []
    for row in (row for row in rows if row.unit == "ms"):
        impl = row.impl + (" (scaled)" if row.metric == "step_ms_scaled" else "")
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        speed = speeds.get((row.case, row.impl))
        share = ("", "") if speed is None else (f"{speed.value:,.0f}", f"{speed.ratio or 0:.0%}")
        found.append((row.case, impl, f"{row.value:.4g}", ratio, *share))
    return found


def summary(report: Report) -> Table:
    """For a terminal."""
    out = Table(title=f"{report.file}: a decode step", title_justify="left")
    for index, name in enumerate(COLUMNS):
        out.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for row in cells(report.rows):
        out.add_row(*row)
    return out


def markdown(report: Report, machine: Machine, copy: float) -> str:
    """`gpu.md`."""
    known = ", ".join(f"{name} {version}" for name, version in recording.versions().items())
    lines = [
        f"# Decoding on {machine.name}",
        "",
        f"Made by `benchmarks/gpu.py`, commit {recording.commit()[:12]}, with {known}. A copy moves {copy:,.0f} GB/s. "
        "What is compared, and how: the docstring of that file.",
        "",
    ]
    table = [COLUMNS, ["---"] * len(COLUMNS), *cells(report.rows)]
    lines += [f"| {' | '.join(row)} |" for row in table]
    if report.notes:
        lines += ["", "## Notes", ""]
    for (impl, what), cases in report.notes.items():
        lines.append(f"- {impl}: {what} ({cases[0]}{f' and {len(cases) - 1} other cases' if len(cases) > 1 else ''})")
    return "\n".join(lines) + "\n"


def draw(figure: Figure, report: Report) -> None:
    """How many times faster than the fastest dense way, over tokens; a panel a shape, a line a latent and batch."""
    shown = [row for row in report.rows if row.metric == "time_ms" and row.ratio is not None]
    names = list(dict.fromkeys(report.places[row.case][0] for row in shown))
    panels = figure.subplots(1, max(1, len(names)), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=False):
        lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for row in shown:
            shape, batch, tokens = report.places[row.case]
            if shape == name and row.ratio is not None:
                lines.setdefault((row.impl, batch), []).append((tokens, row.ratio))
        for (impl, batch), points in lines.items():
            panel.plot(*zip(*points, strict=True), marker=".", label=f"{impl}, batch {batch}")
        panel.set_xscale("log", base=2)
        panel.set_title(report.mark + name, fontsize=9)
        panel.set_xlabel("tokens")
        panel.axhline(1, color="grey", linewidth=0.5)
        panel.legend(fontsize=6)
    panels[0].set_ylabel("times the fastest dense way")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Few cases; also QUICK=1.")
@click.option("--check", "only_check", is_flag=True, help="Check the kernels, measure nothing.")
@click.option("--tune", "tunes", is_flag=True, help="Time each kernel's configurations first; the fastest is kept.")
@click.option("--dry", is_flag=True, help="On a CPU, in tiny sizes, under Triton's interpreter. No figure counts.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results; with --dry, none unless given.")
def main(quick: bool, only_check: bool, tunes: bool, dry: bool, out: Path | None) -> None:
    """Check the generated kernels on a GPU, then measure them."""
    machine = dry_machine() if dry else this_gpu()
    quick = quick or is_quick()
    sizes = TINY_SIZES if dry else QUICK if quick else Sizes()
    if tunes:
        tune_kernels(machine, sizes)
    click.echo(f"{machine.mark}checked: {check(machine, sizes)} calls are right", err=True)
    if only_check:
        return
    report = Report("gpu-dry" if dry else "gpu-quick" if quick else "gpu", machine.mark)
    with tempfile.TemporaryDirectory() as folder:
        recording.RESULTS = out or (Path(folder) if dry else recording.RESULTS)
        measure(machine, sizes, report)


def measure(machine: Machine, sizes: Sizes, report: Report) -> None:
    """Everything, into the files of the report."""
    torch._dynamo.config.recompile_limit = 64  # all contenders share the code of one class
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    copy = copy_gb_s(machine)
    report.add([Row(f"{machine.mark}copy", "torch", "gb_s", copy, "GB/s")])
    for shape in sizes.shapes:
        for batch in sizes.batches:
            for tokens in sizes.tokens:
                measure_attention(machine, report, shape, batch, tokens, copy)
    for network in sizes.networks:
        for batch in network.batches:
            for tokens in sizes.step_tokens:
                measure_steps(machine, report, network, batch, tokens)
    (recording.RESULTS / f"{report.file}.md").write_text(markdown(report, machine, copy), encoding="utf-8")
    record(report.file, report.rows, lambda figure: draw(figure, report), summary(report))


if __name__ == "__main__":
    main()
