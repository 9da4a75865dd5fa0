"""Fitting of a retrieval head: find the head, collect hidden states, choose basis, bits and clusters, quantize.

    hidden states of calibration text -> their second moments, and a sample
    moments of hidden states and rows -> the basis                                    fhopt/lm_head/quantize.py
    sample, rows                      -> how many coordinates get 8 bits, for the fewest loaded bytes
    rows in the basis                 -> clusters of equal size                       fhopt/lm_head/clustering.py
    sample                            -> how many clusters to probe if no certificate is required

Dimensions: M hidden states, C their width, R width of the basis, V vocabulary, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.codegen.cpu.lm_head import BLOCK, WIDEST
from fhopt.errors import FhoptError, Miss
from fhopt.lm_head.clustering import Clusters, balanced_kmeans
from fhopt.lm_head.head import Head, head_fingerprint
from fhopt.lm_head.options import HeadOptions
from fhopt.lm_head.quantize import QUANTUM, Balance, HeadBasis, balance, quantize_rows, quantize_weight, with_bit_groups
from fhopt.models.capture import Captured
from fhopt.models.loaded_model import LoadedModel
from fhopt.passes.graph.evaluate import Evaluator
from fhopt.passes.prepare.functionalize import Functionalize
from fhopt.passes.recognize.find_lm_head import FindHead, HeadSite
from fhopt.passes.recognize.node_roles import Roles
from fhopt.texts import tokens

CHUNK = 4096  # rows of the weight whose moments are summed at once
SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # shares of 8-bit coordinates that `auto` tries
SPREADS = (0.0, 0.05, 0.1, 0.15)  # share of a cluster's radius that is added to its score
TRIED_ROWS, TRIED_STATES = 4096, 64  # rows and hidden states for choosing bits
STRAY = 32.0  # cost of a byte of an exact row relative to a quantized one: on other texts bounds exclude fewer rows
RECALL = 0.999  # share of the sample whose best row must be in a probed cluster
ROOM = 1.5  # factor on the clusters for that recall: hidden states of other texts spread wider
Progress = Callable[[str, int, int], None]


def find_head(captured: Captured) -> HeadSite:
    """Find the head of a captured graph's main output. Raises FhoptError with the reason if there is none."""
    program, stage = captured.program, FindHead()
    if captured.result < 0:
        raise FhoptError(
            "no head was found: this graph does not compute the model's main output; expected logits from "
            "one matmul of hidden states with a parameter. Use another model."
        )
    Functionalize().run(program)
    output = next(n for n in program.graph.nodes if n.op == "output")
    node = output.args[0][captured.result]
    if node not in stage.candidates(program):
        raise FhoptError(
            "no head was found: the model's main output is not a matrix of logits; expected one matmul of "
            "hidden states with a parameter. Use another model."
        )
    try:
        return stage.match(node, program, Roles(program), Evaluator(program))
    except Miss as miss:
        raise FhoptError(
            f"no head was found: {miss.reason}; expected logits from one matmul of hidden states with a "
            "parameter. Use another model."
        ) from miss


def fit_head(loaded: LoadedModel, options: HeadOptions | None = None, progress: Progress | None = None) -> Head:
    """Fit the retrieval head of a causal language model to its hidden states on text.

    Raises FhoptError if no head is recognized, or the texts are too short.
    """
    options = options or HeadOptions()
    options.check()
    module = loaded.language_model()
    ids = tokens.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=options.context)
    captured, site = site_and_graph(loaded, options.context)
    hidden = hidden_states(captured, site, ids, progress)
    parameters = dict(module.named_parameters())
    weight, bias = parameters[site.weight], parameters[site.bias] if site.bias else None
    about = {
        "model": loaded.name,
        "texts": list(options.texts),
        "positions": len(hidden),
        "ids": tokens.tokens_digest(ids),
    }
    return fit_weight(site, weight.detach(), None if bias is None else bias.detach(), hidden, options, progress, about)


def site_and_graph(loaded: LoadedModel, context: int) -> tuple[Captured, HeadSite]:
    """Capture the model's graph on `context` tokens, and find the head in it. Raises FhoptError."""
    captured = loaded.capture(context)
    return captured, find_head(captured)


def hidden_states(captured: Captured, site: HeadSite, ids: Tensor, progress: Progress | None = None) -> Tensor:
    """Run a captured graph on ids [n, T] and return the inputs of its head: float32 [n * T, C]."""
    runner, rows = _Recorder(captured.program.module, site.hidden), []
    for number, sequence in enumerate(ids):
        batch = {"input_ids": sequence.unsqueeze(0)}
        values = [batch.get(captured.inputs.get(n, ""), v) for n, v in captured.program.values.items()]
        with torch.no_grad():
            runner.run(*values)
        rows.append(runner.value.flatten(0, -2).float())
        if progress is not None:
            progress("states", number + 1, len(ids))
    return torch.cat(rows)


class _Recorder(fx.Interpreter):
    """Interpreter that records the value of one node."""

    def __init__(self, module: fx.GraphModule, name: str) -> None:
        super().__init__(module)
        self.name = name
        self.value: Tensor

    def run_node(self, n: fx.Node) -> Any:
        """Run the node, and record its value if it is the requested one."""
        value = super().run_node(n)
        if n.name == self.name:
            self.value = value.detach().clone()
        return value


def fit_weight(
    site: HeadSite,
    weight: Tensor,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    options: HeadOptions | None = None,
    progress: Progress | None = None,
    about: dict[str, Any] | None = None,
) -> Head:
    """Fit the head of weight [V, C] and bias [V] to hidden states [M, C]; None: to hidden states of any direction.

    Raises FhoptError for weights that are not finite or too wide.
    """
    options = options or HeadOptions()
    options.check()
    report = progress or (lambda stage, done, total: None)
    _check_weight(weight, bias)
    vocabulary, width = weight.shape
    centre = weight.double().mean(0).float()
    report("basis", 0, 1)
    balanced = balance(_moment(hidden), _row_moment(weight, centre))
    sample = _sample(hidden, width, options.seed)
    lead, survivors = _choose_lead(balanced, weight, bias, centre, sample, options)
    basis = with_bit_groups(balanced, width, lead, options.seed)
    report("basis", 1, 1)
    rows = torch.cat([basis.rows(part.double() - centre.double()).float() for part in weight.split(CHUNK)])
    count = options.clusters or max(1, round(vocabulary / 64))
    count = min(count, vocabulary)
    capacity = math.ceil(vocabulary / count / BLOCK) * BLOCK
    clusters = balanced_kmeans(
        rows, count, capacity, options.iterations, options.seed, lambda done, total: report("clusters", done, total)
    )
    del rows
    report("quantize", 0, 1)
    codes = quantize_weight(weight, basis, centre, clusters)
    report("quantize", 1, 1)
    probes, spread, recall = _choose_probes(weight, bias, basis, clusters, codes.radii, hidden)
    metadata = {
        "gain": balanced.gain, "expected_rows": survivors, "cluster_spread": clusters.spread, "probe_recall": recall,
        "seed": options.seed, "bits": options.bits,
    }  # fmt: skip
    dtype = str(weight.dtype).removeprefix("torch.")
    return Head(site, codes, dtype, head_fingerprint(weight, bias), probes, spread, metadata | (about or {}))


def site_for(weight: Tensor, bias: str = "") -> HeadSite:
    """Build a site for a weight [V, C] without a graph."""
    vocabulary, width = weight.shape
    return HeadSite("weight", bias, "", vocabulary, width, False, 1.0, 0.0, "", "", "", "")


def _check_weight(weight: Tensor, bias: Tensor | None) -> None:
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise FhoptError(
            f"the head is {weight.dtype}; expected float32, bfloat16 or float16. Load the model in one of these dtypes."
        )
    tensors = [weight] if bias is None else [weight, bias]
    if not all(bool(part.isfinite().all()) for x in tensors for part in x.split(CHUNK)):
        raise FhoptError("the head's weight has non-finite values. Load an undamaged checkpoint.")
    if weight.shape[1] > WIDEST:
        raise FhoptError(
            f"hidden size {weight.shape[1]} is too large for a retrieval head; expected at most {WIDEST}. Use the "
            "dense head."
        )


# --------------------------------------------------------------------------------------------------- moments


def _moment(hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else hidden.double().T @ hidden.double() / len(hidden)


def _row_moment(weight: Tensor, centre: Tensor) -> Tensor:
    parts = (part.double() - centre.double() for part in weight.split(CHUNK))
    return sum((p.T @ p for p in parts), torch.zeros(len(centre), len(centre), dtype=torch.float64)) / len(weight)


def _sample(hidden: Tensor | None, width: int, seed: int) -> Tensor:
    """Sample hidden states [64, C] for choosing bits: from the collected ones, or random directions."""
    generator = torch.Generator().manual_seed(seed + 0x48454144)  # differs from that of a random weight
    if hidden is None:
        return torch.randn(TRIED_STATES, width, generator=generator)
    return hidden[torch.randperm(len(hidden), generator=generator)[:TRIED_STATES]].float()


# --------------------------------------------------------------------------------------------------- bits


def _choose_lead(
    balanced: Balance, weight: Tensor, bias: Tensor | None, centre: Tensor, sample: Tensor, options: HeadOptions
) -> tuple[int, float]:
    """Choose how many coordinates get 8 bits, for the fewest loaded bytes; also return the expected exact rows."""
    width = weight.shape[1]
    rank = math.ceil(width / QUANTUM) * QUANTUM
    shares = {"4": (0,), "8": (1,), "auto": SHARES}[options.bits]
    leads = sorted({round(rank * share / QUANTUM) * QUANTUM for share in shares})
    top = torch.cat([_logits(sample, part, None) for part in weight.split(CHUNK)], 1)
    best = (top if bias is None else top + bias.float()).amax(1)
    generator = torch.Generator().manual_seed(options.seed)
    picked = torch.randperm(len(weight), generator=generator)[:TRIED_ROWS]
    tried = weight[picked]
    costs: dict[int, tuple[float, float]] = {}
    for lead in leads:
        basis = with_bit_groups(balanced, width, lead, options.seed)
        upper = _upper(basis, tried.double() - centre.double(), sample) + (sample @ centre).unsqueeze(1)
        upper = upper if bias is None else upper + bias[picked].float()
        survivors = float((upper >= best.unsqueeze(1)).sum(1).double().mean()) * len(weight) / len(tried)
        quantized_bytes = len(weight) * (lead + (rank - lead) / 2)
        costs[lead] = (quantized_bytes + STRAY * survivors * width * weight.element_size(), survivors)
    lead = min(costs, key=lambda n: costs[n][0])
    return lead, costs[lead][1]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def _upper(basis: HeadBasis, rows: Tensor, sample: Tensor) -> Tensor:
    """Compute upper bounds [M, n] of h.w for centered rows [n, C], without the rounding error of h."""
    coordinates, hidden = basis.rows(rows), basis.hidden(sample)
    out = hidden @ coordinates.float().T
    for part, bits in ((slice(basis.lead), 8), (slice(basis.lead, None), 4)):
        if coordinates[:, part].shape[1]:
            error = quantize_rows(coordinates[:, part], bits).error.float()
            out = out + hidden[:, part].norm(dim=1, keepdim=True) * error
    return out


# --------------------------------------------------------------------------------------------------- probes


def _choose_probes(
    weight: Tensor, bias: Tensor | None, basis: HeadBasis, clusters: Clusters, radii: Tensor, hidden: Tensor | None
) -> tuple[int, float, float]:
    """Choose (probes, spread, recall) such that probed clusters contain the best row of RECALL of the hidden states."""
    count = len(radii)
    if hidden is None:
        return count, 0.0, 1.0
    states = hidden[:: max(1, len(hidden) // 2048)].float()
    best = torch.cat([_best(part, weight, bias) for part in states.split(256)])
    rotated = basis.hidden(states)
    scores = rotated @ clusters.centroids.T
    reach = rotated.norm(dim=1, keepdim=True) * radii
    choices = []
    for spread in SPREADS:
        ranked = scores + spread * reach
        rank = (ranked > ranked.gather(1, clusters.labels[best].unsqueeze(1))).sum(1) + 1  # [M]
        probes = min(count, math.ceil(ROOM * int(rank.sort().values[math.ceil(RECALL * len(rank)) - 1])))
        choices.append((probes, spread, float((rank <= probes).double().mean())))
    return min(choices)


def _best(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.cat(
        [
            _logits(hidden, w, None if bias is None else bias[i * CHUNK : i * CHUNK + len(w)])
            for i, w in enumerate(weight.split(CHUNK))
        ],
        1,
    ).argmax(1)


__all__ = ["HeadOptions", "find_head", "fit_head", "fit_weight", "hidden_states", "site_and_graph", "site_for"]
