"""Clusters of equal size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fhopt.errors import FhoptError
from fhopt.lm_head.clustering import balanced_kmeans


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 120), st.integers(1, 12), st.integers(0, 20), st.integers(0, 99))
def test_no_cluster_has_more_rows_than_allowed(rows: int, count: int, spare: int, seed: int) -> None:
    torch.manual_seed(seed)
    count = min(count, rows)
    capacity = -(-rows // count) + spare
    found = balanced_kmeans(torch.randn(rows, 5).round(), count, capacity, iterations=3)
    sizes = torch.bincount(found.labels, minlength=count)
    assert found.labels.shape == (rows,) and int(found.labels.min()) >= 0
    assert len(sizes) == count and int(sizes.max()) <= capacity


def test_blobs_of_equal_size_are_found() -> None:
    torch.manual_seed(0)
    centres = 20 * torch.randn(6, 8)
    truth = torch.arange(6).repeat_interleave(40)
    best = min(
        (balanced_kmeans(centres[truth] + torch.randn(240, 8), 6, 40, seed=s) for s in range(8)), key=lambda c: c.spread
    )
    for blob in range(6):
        assert len(best.labels[truth == blob].unique()) == 1
    assert best.spread < 0.05
    torch.testing.assert_close(best.centroids[best.labels[0]], centres[0], rtol=0, atol=0.8)


def test_centroids_are_the_means_of_their_rows() -> None:
    rows = torch.randn(100, 3)
    found = balanced_kmeans(rows, 7, 16)
    for cluster in found.labels.unique():
        torch.testing.assert_close(found.centroids[cluster], rows[found.labels == cluster].mean(0))
    around = (rows - rows.mean(0)).square().sum()
    within = (rows - found.centroids[found.labels]).square().sum()
    assert found.spread == pytest.approx(float(within / around), rel=1e-5)


def test_clusters_explain_more_than_chance() -> None:
    rows = torch.randn(400, 4)
    found = balanced_kmeans(rows, 20, 20)
    labels = torch.arange(400) % 20
    means = torch.stack([rows[labels == k].mean(0) for k in range(20)])
    chance = float((rows - means[labels]).square().sum() / (rows - rows.mean(0)).square().sum())
    assert found.spread < 0.5 * chance


def test_the_same_seed_gives_the_same_clusters_and_progress_is_reported() -> None:
    rows, steps = torch.randn(90, 4), list[tuple[int, int]]()
    first = balanced_kmeans(rows, 6, 16, 4, seed=3, progress=lambda done, total: steps.append((done, total)))
    assert torch.equal(first.labels, balanced_kmeans(rows, 6, 16, 4, seed=3).labels)
    assert steps == [(i, 5) for i in range(1, 6)]


def test_equal_rows_fill_clusters_one_after_the_other() -> None:
    found = balanced_kmeans(torch.ones(50, 4), 5, 10)
    assert torch.bincount(found.labels).tolist() == [10] * 5 and found.spread == 0.0


@pytest.mark.parametrize(("count", "capacity"), [(0, 100), (11, 1), (4, 2)])
def test_clusters_with_too_few_places_are_refused(count: int, capacity: int) -> None:
    with pytest.raises(FhoptError, match="cannot hold 10 rows"):
        balanced_kmeans(torch.randn(10, 2), count, capacity)
