"""Spellings of the parts of attention as Python text, shared by tests that run them and tests that print them.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size. The last line of a spelling is an
expression; the lines before it are statements. `functions` makes callables of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

NAMES: dict[str, Any] = {"torch": torch, "F": F}  # names that a spelling may use besides its arguments

# Keys or values x [B, G, T, D] for all query heads, n = H / G -> [B, H, T, D].
REPEATED = {
    "interleave": "x.repeat_interleave(n, 1)",
    "expand": "x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2)",
    "stack": "torch.stack([x] * n, 2).flatten(1, 2)",
    "index": "x[:, torch.arange(x.shape[1] * n) // n]",
}

# q [B, H, S, D], k [B, H, T, D], times a scale -> [B, H, S, T].
PRODUCTS = {
    "matmul": "(q @ k.transpose(-1, -2)) * by",
    "divided": "torch.matmul(q, k.mT) / (1 / by)",
    "einsum": 'torch.einsum("bhsd,bhtd->bhst", q, k).mul(by)',
    "keys first": "(k @ q.mT).transpose(2, 3) * by",
    "bmm": "torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2]) * by",
    "baddbmm": "torch.baddbmm(\n"
    "    q.new_zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=by\n"
    ").unflatten(0, q.shape[:2])",
    "summed": "(q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) * by",
}

# Scores s [B, H, S, T] and a bool mask, true for keys that a query attends to -> scores.
FILLED = {
    "masked_fill": 's.masked_fill(~mask, float("-inf"))',
    "where": "torch.where(mask, s, torch.finfo(torch.float32).min)",
    "added": "s + torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)",
    "subtracted": "s - (~mask).to(s.dtype) * 1e9",
}

# Scores s [B, H, S, T] -> weights.
WEIGHED = {
    "softmax": "s.softmax(-1)",
    "in float32": "F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype)",
    "less the largest": "(s - s.amax(-1, keepdim=True)).softmax(3)",
    "by hand": "e = (s - s.amax(-1, keepdim=True)).exp()\ne / e.sum(-1, keepdim=True)",
}

# Weights p [B, H, S, T] and values v [B, H, T, D] -> [B, H, S, D].
MIXED = {
    "matmul": "p @ v",
    "einsum": 'torch.einsum("bhst,bhtd->bhsd", p, v)',
    "bmm": "torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).unflatten(0, p.shape[:2])",
    "values first": "(v.mT @ p.mT).mT",
    "summed": "(p.unsqueeze(-1) * v.unsqueeze(2)).sum(3)",
}

# Concatenate heads: o [B, H, S, D] -> [B, S, H * D].
JOINED = {
    "reshape": "o.transpose(1, 2).reshape(o.shape[0], o.shape[2], -1)",
    "permute": "o.permute(0, 2, 1, 3).contiguous().flatten(2)",
    "concatenate": "torch.cat(o.unbind(1), -1)",
}


def functions(table: Mapping[str, str], arguments: str) -> dict[str, Callable[..., Any]]:
    """Make a function of each spelling; arguments: comma-separated names."""
    return {name: function(text, arguments) for name, text in table.items()}


def function(text: str, arguments: str) -> Callable[..., Any]:
    """Make a function of one spelling."""
    lines, result = statements(text)
    body = "".join(f"    {line}\n" for line in (*lines, f"return {result}"))
    names = dict(NAMES)
    exec(compile(f"def spelled({arguments}):\n{body}", __file__, "exec"), names)
    made: Callable[..., Any] = names["spelled"]
    return made


def statements(text: str) -> tuple[list[str], str]:
    """Split a spelling into its statements and its last expression, which may span lines."""
    lines = text.split("\n")
    start = len(lines) - 1
    while lines[start].startswith((" ", ")")):
        start -= 1
    return lines[:start], "\n    ".join(lines[start:])
