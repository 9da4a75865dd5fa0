"""Balanced k-means: clusters of at most equal size.

    assign   every row to the nearest of its 32 nearest centroids with free capacity, the nearest rows first
    move     every centroid to the mean of its rows

With equal sizes every probe loads the same number of bytes, and the rows of a cluster are contiguous in memory. The
optimal assignment is a minimum-cost flow (Bradley, Bennett & Demiriz 2000), which takes hours for the 49,152 rows of a
small vocabulary; the greedy one takes seconds, and `Clusters.spread` measures its cost in distance.

Dimensions: N rows, W their width, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.errors import FhoptError

NEAREST = 32  # centroids tried per row before any with free capacity
CHUNK = 4096  # rows whose distances are computed at once
SAMPLE = 96  # rows per cluster from which centroids are computed


@dataclass(frozen=True)
class Clusters:
    """A clustering of rows.

    labels: int64 [N]. centroids: float32 [K, W], means of the rows. spread: mean squared distance of a row to its
    centroid, relative to that to the mean of all rows (1: clusters explain nothing).
    """

    labels: Tensor
    centroids: Tensor
    spread: float


def balanced_kmeans(
    rows: Tensor,
    count: int,
    capacity: int,
    iterations: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Clusters:
    """Cluster rows [N, W] (float32) into `count` clusters of at most `capacity` rows.

    Centroids are computed from a sample of 96 rows per cluster; all rows are assigned to them at the end. progress is
    called with (steps done, total steps). Raises FhoptError if the clusters cannot hold the rows.
    """
    total = rows.shape[0]
    if not 1 <= count <= total or count * capacity < total:
        raise FhoptError(
            f"{count} clusters of {capacity} cannot hold {total} rows; expected 1 to {total} clusters with "
            "room for all. Choose more clusters, or drop --clusters."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    sample = rows[order[: SAMPLE * count]]
    room = max(1, math.ceil(len(sample) / count))
    centroids = sample[:count].clone()
    for step in range(iterations):
        centroids = _means(sample, _assign(sample, centroids, room), centroids)
        if progress is not None:
            progress(step + 1, iterations + 1)
    labels = _assign(rows, centroids, capacity)
    centroids = _means(rows, labels, centroids)
    if progress is not None:
        progress(iterations + 1, iterations + 1)
    return Clusters(labels, centroids, _spread(rows, labels, centroids))


def _assign(rows: Tensor, centroids: Tensor, capacity: int) -> Tensor:
    """Assign rows to centroids: labels [N], at most `capacity` of each."""
    values, indices = _nearest(rows, centroids)
    labels = torch.full((rows.shape[0],), -1)
    room = torch.full((centroids.shape[0],), capacity)
    while True:
        unassigned = (labels < 0).nonzero().flatten()
        free = (room > 0)[indices[unassigned]]  # [unassigned, NEAREST]
        has_choice = free.any(1)
        if not bool(has_choice.any()):
            break
        unassigned, column = unassigned[has_choice], free[has_choice].to(torch.int8).argmax(1, keepdim=True)
        nearest = indices[unassigned].gather(1, column).flatten()
        _accept(unassigned, nearest, values[unassigned].gather(1, column).flatten(), labels, room)
    left = (labels < 0).nonzero().flatten()  # rows whose nearest clusters are all full
    labels[left] = torch.repeat_interleave(torch.arange(len(room)), room)[: len(left)]
    return labels


def _accept(rows: Tensor, nearest: Tensor, values: Tensor, labels: Tensor, room: Tensor) -> None:
    """Assign to every cluster the closest of the rows that it is nearest to, up to its capacity."""
    order = values.argsort(descending=True)
    order = order[nearest[order].argsort(stable=True)]
    clusters = nearest[order]
    begins = torch.searchsorted(clusters, torch.arange(len(room)))
    taken = torch.arange(len(order)) - begins[clusters] < room[clusters]
    labels[rows[order[taken]]] = clusters[taken]
    room -= torch.bincount(clusters[taken], minlength=len(room))


def _nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest centroids of each row: (x.m - |m|^2/2, larger if closer; index), both [N, 32]."""
    norms = centroids.square().sum(1) / 2
    count = min(NEAREST, centroids.shape[0])
    parts = [(part @ centroids.T - norms).topk(count, dim=1) for part in rows.split(CHUNK)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _means(rows: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """Compute the means of the rows of each cluster [K, W]; a cluster without rows keeps its centroid."""
    sizes = torch.bincount(labels, minlength=before.shape[0]).unsqueeze(1)
    sums = torch.zeros_like(before).index_add_(0, labels, rows)
    return torch.where(sizes > 0, sums / sizes.clamp_min(1), before)


def _spread(rows: Tensor, labels: Tensor, centroids: Tensor) -> float:
    mean = rows.mean(0)
    within = sum(
        float((part - centroids[label]).square().sum())
        for part, label in zip(rows.split(CHUNK), labels.split(CHUNK), strict=True)
    )
    around = sum(float((part - mean).square().sum()) for part in rows.split(CHUNK))
    return within / around if around > 0 else 0.0
