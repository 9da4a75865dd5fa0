"""Evaluation of a retrieval head on held-out text: certificates, agreement, bytes and time versus the dense head.

Dimensions: M hidden states, C their width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.codegen.cpu import lm_head as cpu_lm_head
from fhopt.codegen.cpu.skinny_linear import MAX_ROWS
from fhopt.errors import FhoptError
from fhopt.lm_head.fitting import Progress, hidden_states, site_and_graph
from fhopt.lm_head.head import Head
from fhopt.lm_head.module import RetrievalHead, dense
from fhopt.models.loaded_model import LoadedModel
from fhopt.texts import tokens

TIMED = 30  # timed calls with one hidden state each, interleaved with the dense head
SWEPT = 1 << 24  # float32 elements summed before each call, to evict weights from the CPU caches


@dataclass(frozen=True)
class HeadMetrics:
    """Metrics of a retrieval head.

    positions: hidden states. agreement_percent: with the arg-max of torch's dense head. certified_percent: hidden
    states with a certificate; the dense head computes the others. probed_agreement_percent: agreement when only the
    fitted number of clusters is loaded. exact_rows: rows of the weight loaded exactly, mean over positions.
    bytes_per_row, time_ms and those of the dense head: for one hidden state at a time.
    """

    positions: int
    agreement_percent: float
    certified_percent: float
    probed_agreement_percent: float
    exact_rows: float
    bytes_per_row: float
    dense_bytes_per_row: int
    time_ms: float
    dense_time_ms: float
    threads: int


@torch.no_grad()
def measure_head(
    loaded: LoadedModel,
    head: Head,
    texts: Sequence[str],
    positions: int,
    context: int,
    progress: Progress | None = None,
) -> HeadMetrics:
    """Measure the head on at least `positions` hidden states of `loaded` over the second halves of the texts.

    Raises FhoptError if the texts are too short, or no kernel can be compiled.
    """
    if cpu_lm_head.LIBRARY.load() is None:
        raise FhoptError("no C++ compiler was found, so the head would stay dense. Install g++ (or clang++).")
    count = max(1, -(-positions // context))
    ids = tokens.held_out_ids(loaded.tokenizer, texts, count=count, length=context)
    captured, site = site_and_graph(loaded, context)
    parameters = dict(loaded.language_model().named_parameters())
    weight, bias = parameters[site.weight], parameters[site.bias] if site.bias else None
    hidden = hidden_states(captured, site, ids, progress).to(weight.dtype)
    certain, probed = RetrievalHead(head, weight, bias), RetrievalHead(head, weight, bias, probes=-1)
    expected = _ids(hidden, lambda x: torch.nn.functional.linear(x, weight, bias))
    agreement = [float((_ids(hidden, module) == expected).double().mean()) for module in (certain, probed)]
    report = certain.report()
    searched = max(report.rows - report.dense_rows, 1)
    ours, theirs = _times(hidden, lambda x: certain(x).argmax(-1), lambda x: dense(x, weight, bias).argmax(-1))
    return HeadMetrics(
        len(hidden), 100 * agreement[0], 100 * report.certified, 100 * agreement[1], report.exact_rows / searched,
        report.bytes_per_row, report.dense_bytes_per_row, ours, theirs, torch.get_num_threads(),
    )  # fmt: skip


def _ids(hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the arg-max of each position, a few at a time."""
    return torch.cat([logits(part).argmax(-1) for part in hidden.split(MAX_ROWS)])


def _times(hidden: Tensor, *functions: Callable[[Tensor], Tensor]) -> tuple[float, ...]:
    """Measure the milliseconds of each function on one hidden state, medians of interleaved calls."""
    swept, seconds = torch.zeros(SWEPT), [list[float]() for _ in functions]
    for turn in range(TIMED + 2):
        x = hidden[turn % len(hidden)].unsqueeze(0)
        for run, times in zip(functions, seconds, strict=True):
            swept.sum()
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)
    return tuple(1e3 * statistics.median(times[2:]) for times in seconds)
