"""Rotations of heads before quantization."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.methods.orthogonal_matrices import hadamard, random_rotation


@pytest.mark.parametrize("size", [1, 2, 64, 80, 96, 75, 128])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_hadamard_rotation_is_orthogonal(size: int, seed: int | None) -> None:
    matrix = hadamard(size, seed)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "block"), [(64, 64), (80, 16), (96, 32), (75, 1)])
def test_a_size_that_is_not_a_power_of_two_has_blocks_of_the_largest_that_divides_it(size: int, block: int) -> None:
    matrix = hadamard(size)
    assert int((matrix[0] != 0).sum()) == block
    torch.testing.assert_close(matrix.abs().amax(), torch.tensor(block**-0.5).double(), rtol=0, atol=1e-7)


def test_hadamard_by_hand() -> None:
    assert (hadamard(4) * 2).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


def test_a_seed_changes_only_signs_of_rows() -> None:
    signs = (hadamard(64, 3) / hadamard(64)).round()
    assert set(signs.unique().tolist()) == {-1, 1} and torch.equal(signs, signs[:, :1].expand(64, 64))


def test_a_random_rotation_is_orthogonal_and_reproducible() -> None:
    matrix = random_rotation(48)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(48).double(), rtol=0, atol=1e-12)
    random_rotation.cache_clear()
    assert torch.equal(random_rotation(48), matrix) and not torch.equal(random_rotation(48, 1), matrix)
