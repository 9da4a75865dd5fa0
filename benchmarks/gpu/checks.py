"""Comparison of every generated GPU kernel with its reference, before any measurement."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.gpu.cases import HeadShape, LatentStorage, RunSizes, tiers
from benchmarks.gpu.timing import TimedDevice
from fhopt.codegen.build import build_triton
from fhopt.codegen.gpu.launch import Span
from fhopt.codegen.gpu.tuning import Workload
from fhopt.codegen.tiers import Tiers
from fhopt.ops import algebra, latent_attention
from fhopt.ops import packing as ops_packing
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.window import ResidualWindow

# For float32, another summation order and exponentials to 22 bits (TF32 would be 3e-4 off); else four roundings.
TOLERANCES = {torch.float32: 5e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
EVERY = tiers(*[(bits, 16) for bits in (3, 16, 5, 8, 4, 2, 1, 6)])
OTHER_SHAPE = HeadShape(4, 2, 24, ())
OTHER_LATENTS = (
    (LatentStorage(1, EVERY, tiers((3, 24), (16, 8))), 0.0),
    (LatentStorage(2, (), tiers((4, 32))), 4.0),
)  # and softcap


class WrongKernel(click.ClickException):
    """A kernel gives wrong values, or fails."""

    def __init__(self, machine: TimedDevice, what: str, actual: str) -> None:
        super().__init__(
            f"{what} is wrong on {machine.name}: {actual}. Nothing was measured. Do not use this kernel here, and "
            "report this line with the versions of torch and triton."
        )


def check(machine: TimedDevice, sizes: RunSizes) -> int:
    """Compare every kernel with its reference; return how many calls were compared. Raises Wrong."""
    count = 0
    for what, compare in checks(machine, sizes):
        try:
            actual = compare()
        except Exception as error:  # Triton's, CUDA's and torch's errors have no common base class
            raise WrongKernel(machine, what, f"it fails ({' '.join(str(error).split())[:300]})") from error
        if actual:
            raise WrongKernel(machine, what, actual)
        count += 1
    return count


def checks(machine: TimedDevice, sizes: RunSizes) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield names of checks, and functions that return a description of the error.

    Every measured kernel is checked as it is measured; other kernel features only on a few, in every dtype: each
    feature is a separate compilation.
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
    machine: TimedDevice, sizes: RunSizes, shape: HeadShape, latent: LatentStorage, dtype: torch.dtype, softcap: float,
    features: Sequence[Feature],
) -> Iterator[tuple[str, Callable[[], str]]]:  # fmt: skip
    """Yield the checks of one kernel."""
    spec = replace(shape.spec(latent, dtype), softcap=softcap > 0)
    for feature in features:
        name = f"attention, {spec.name}, {shape.name}, {feature.__name__.replace('_', ' ')}"
        yield name, functools.partial(compare_attention, machine, sizes, shape, latent, spec, softcap, feature)


@dataclass(frozen=True)
class Question:
    """A call of the kernel: arguments and options, and the mask that the reference takes instead."""

    arguments: tuple[Any, ...]  # query, key, key_scale, value, value_scale, mask
    options: dict[str, Any]
    mask: Tensor | None = None


def one_range(x: tuple[Any, ...], sizes: RunSizes) -> Question:
    """Process all tokens in one program."""
    return Question(x, {"splits": 1})


def merged_ranges(x: tuple[Any, ...], sizes: RunSizes) -> Question:
    """Process ranges of tokens, one of them empty, and merge them."""
    return Question(x, {"splits": 5})


def a_mask(x: tuple[Any, ...], sizes: RunSizes) -> Question:
    """Mask some tokens, and all tokens of one row."""
    query, tokens = x[0], x[1].shape[2]
    mask = torch.rand(query.shape[0], 1, query.shape[2], tokens, device=query.device) > 0.4
    mask[0, 0, 0] = False
    return Question((*x[:5], mask), {}, mask)


def an_additive_mask(x: tuple[Any, ...], sizes: RunSizes) -> Question:
    """Add a bias to every logit."""
    query, tokens = x[0], x[1].shape[2]
    bias = torch.randn(*query.shape[:3], tokens, device=query.device)
    return Question((*x[:5], bias), {}, bias)


def lengths(x: tuple[Any, ...], sizes: RunSizes) -> Question:
    """End sequences early, the second one at length 0."""
    tokens = x[1].shape[2]
    ends = torch.tensor([tokens - 7, 0], device=x[0].device)
    return Question(x, {"lengths": ends}, torch.arange(tokens, device=x[0].device) < ends.view(2, 1, 1, 1))


def pages_of_a_pool(x: tuple[Any, ...], sizes: RunSizes) -> Question:
    """Load the quantized tokens of `x`, between attention sinks and recent window, from pages of a pool."""
    query, page = x[0], sizes.page
    count = x[1].shape[2] // page
    table = torch.randperm(2 * count + 1, device=query.device)[: 2 * count].view(2, count).to(torch.int32)
    pooled = [part if part is None else _pooled(part, table, page) for part in x[1:5]]
    window, tokens = ResidualWindow(3, 5, 8), torch.arange(count * page, device=query.device)
    ends = torch.tensor([count * page, count * page // 2], device=query.device)
    last = window.sinks + window.quantized_tokens(ends - 1)
    seen = (tokens >= window.sinks) & (tokens < last.view(2, 1, 1, 1))
    return Question((query, *pooled, None), {"lengths": ends, "span": Span(Span.QUANTIZED, window, table)}, seen)


def chosen_pages(x: tuple[Any, ...], sizes: RunSizes) -> Question:
    """Select different pages for each latent head."""
    query, page = x[0], sizes.page
    units, count = math.lcm(x[1].shape[1], x[3].shape[1]), x[1].shape[2] // page
    pages = torch.rand(2, units, count, device=query.device).argsort(-1)[..., : count - 1].to(torch.int32)
    pages[:, :, -1] = -1
    seen = (torch.arange(count * page, device=query.device).view(-1, 1) // page == pages.unsqueeze(2)).any(-1)
    mask = seen.repeat_interleave(query.shape[1] // units, 1).unsqueeze(2)
    return Question(x, {"pages": pages, "page_tokens": page}, mask)


def chosen_short_pages(x: tuple[Any, ...], sizes: RunSizes) -> Question:
    """Select pages smaller than a tile."""
    return chosen_pages(x, replace(sizes, page=8))


Feature = Callable[[tuple[Any, ...], RunSizes], Question]
FEATURES: tuple[Feature, ...] = (
    one_range, merged_ranges, a_mask, an_additive_mask, lengths, pages_of_a_pool, chosen_pages, chosen_short_pages,
)  # fmt: skip


def _pooled(x: Tensor, table: Tensor, page: int) -> Tensor:
    """Convert x [B,J,T,...] to a pool [pages, J, page, ...] whose other pages would corrupt a result."""
    parts = x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
    pool = x.new_full((table.numel() + 1, *parts.shape[1:]), 255 if x.dtype == torch.uint8 else math.nan)
    pool[table.flatten().long()] = parts
    return pool


def compare_attention(
    machine: TimedDevice,
    sizes: RunSizes,
    shape: HeadShape,
    latent: LatentStorage,
    spec: KernelSpec,
    softcap: float,
    feature: Feature,
) -> str:
    """Return a description of the error of one call; "" if it is correct."""
    torch.manual_seed(0)
    queries = 3 if feature is a_mask else 1
    workload = Workload(2, shape.heads, latent.heads, latent.heads, queries, sizes.checked)
    arguments = random_arguments(spec, workload, machine.device)
    question = feature(arguments, sizes)
    options: dict[str, Any] = {"scale": spec.key_width**-0.5, "softcap": softcap}
    output, lse = build_triton(spec)(*question.arguments, **(question.options | options))
    reference, reference_lse = expected(spec, arguments, question, options)
    tolerance = TOLERANCES[getattr(torch, spec.dtype)]
    seen = reference_lse > -math.inf
    if not torch.equal(lse > -math.inf, seen) or bool(output[~seen].any()):
        return "rows that see nothing are not zero"
    lse, reference_lse = lse[seen], reference_lse[seen]
    apart = max(relative(output, reference), min(relative(lse, reference_lse), _most(lse, reference_lse)))
    return "" if apart < tolerance else f"relative error {apart:.2g}, expected below {tolerance:.2g}"


def random_arguments(spec: KernelSpec, workload: Workload, device: str) -> tuple[Any, ...]:
    """Return query, key, key_scale, value, value_scale and no mask; unlike in `random_call`, all are finite."""
    dtype, batch = getattr(torch, spec.dtype), workload.batch
    made: list[Any] = [torch.randn(batch, workload.heads, workload.queries, spec.key_width, dtype=dtype, device=device)]
    for side, width in ((spec.key_tiers, spec.key_width), (spec.value_tiers, spec.value_width)):
        z = torch.randn(batch, workload.key_heads, workload.tokens, width, device=device)
        made += ops_packing.pack_reference(z, *_columns(side)) if side else (z.to(dtype), None)
    return (*made, None)


def expected(
    spec: KernelSpec, arguments: tuple[Any, ...], question: Question, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Compute the reference in float64."""
    query, key, key_scale, value, value_scale, _ = arguments
    key, value = (x if x.dtype == torch.uint8 else x.double() for x in (key, value))
    options = options | algebra.group_options(_columns(spec.key_tiers), _columns(spec.value_tiers))
    return latent_attention.latent_attention_reference(
        query.double(), key, key_scale, value, value_scale, question.mask, **options
    )


def _columns(side: Tiers) -> algebra.BitGroups:
    return algebra.BitGroups([b for b, _, _ in side], [w for _, w, _ in side], [s for _, _, s in side])


def relative(actual: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference relative to that of the expected tensor; infinite if it is not finite."""
    apart = float((actual.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))
    return apart if math.isfinite(apart) else math.inf


def _most(actual: Tensor, reference: Tensor) -> float:
    return float((actual.double() - reference.double()).abs().max()) if actual.numel() else 0.0


def compare_pack(machine: TimedDevice) -> str:
    """Check packing of integers, whose squares have exact sums: byte-identical."""
    from fhopt.codegen.gpu import packing

    z = torch.randint(-9, 10, (2, 3, 35, 128)).float()
    actual = packing.pack_triton(z.to(machine.device), *_columns(EVERY))
    return _unequal(actual, ops_packing.pack_reference(z, *_columns(EVERY)))


def compare_unpack(machine: TimedDevice) -> str:
    """Check unpacking of random latents: identical values."""
    from fhopt.codegen.gpu import packing

    codes, scale = ops_packing.pack_reference(torch.randn(2, 3, 35, 128), *_columns(EVERY))
    actual = packing.unpack_triton(codes.to(machine.device), scale.to(machine.device), *_columns(EVERY))
    return _unequal([actual], [ops_packing.unpack_reference(codes, scale, *_columns(EVERY))])


def compare_encode(machine: TimedDevice) -> str:
    """Check rows encoded between others, from integers and a basis of -1, 0 and 1: byte-identical."""
    from fhopt.codegen.gpu import encode_rows

    x, basis = torch.randint(-2, 3, (2, 4, 21, 16)).float(), torch.randint(-1, 2, (2, 128, 32)).float()
    size = sum(b * w for b, w in zip(*_columns(EVERY)[:2], strict=True)) // 8
    reference = torch.full((2, 2, 40, size), 165, dtype=torch.uint8), torch.full((2, 2, 40), 7.0, dtype=torch.float16)
    actual = [part.clone().to(machine.device) for part in reference]
    encode_rows.encode_triton(x.to(machine.device), basis.to(machine.device), *_columns(EVERY), *actual, at=5)
    encode_rows.encode_reference(x, basis, *_columns(EVERY), *reference, at=5)
    return _unequal(actual, reference)


def _unequal(actual: Sequence[Tensor], reference: Sequence[Tensor]) -> str:
    count = sum(int((a.cpu() != b).sum()) for a, b in zip(actual, reference, strict=True))
    return f"{count} numbers differ from the reference, expected none" if count else ""
