"""Token layout of a batch: what a query attends to in which form, and the slots of tokens."""

from __future__ import annotations

import torch
from hand_plans import CODED, random_plan

from fhopt.plan.window import ResidualWindow
from fhopt.serving.batch import Batch, SequenceBlocks, means_from, split_queries


def test_queries_of_a_tile_attend_to_the_same_latents() -> None:
    window = ResidualWindow(3, 7, 5)
    for start in range(40):
        for stop in range(start + 1, 60):
            found = list(split_queries(window, start, stop))
            assert [p for tile in found for p in range(tile.start, tile.stop)] == list(range(start, stop))
            assert all(window.quantized_tokens(p) == t.quantized for t in found for p in range(t.start, t.stop))
            assert len({tile.quantized for tile in found}) == len(found)


def test_means_exist_before_the_first_latent_is_used() -> None:
    for tokens in (1, 8, 15, 16, 17, 1000):
        plan = random_plan("head", CODED, mean_tokens=tokens)
        assert plan.sinks < means_from(plan) <= plan.window.first_length
    assert means_from(random_plan("head", CODED)) == 0


def test_a_batch_has_the_slots_of_its_tokens() -> None:
    batch = Batch([0, 2, 2, 5], [10, 4, 3])
    assert [(s.index, s.begin, s.end, s.start, s.stop) for s in batch.sequences] == [(0, 0, 2, 8, 10), (2, 2, 5, 0, 3)]
    assert batch.owners.tolist() == [0, 0, 2, 2, 2] and batch.positions.tolist() == [8, 9, 0, 1, 2]
    assert batch.encoded(0) is None
    chosen = batch.encoded(5)
    assert chosen is not None and chosen.tolist() == [0, 1]
    assert batch.gaining_means(3) == [batch.sequences[1]] and batch.gaining_means(4) == []


def test_tokens_without_a_block_are_skipped_and_others_are_restored() -> None:
    batch = Batch([0, 3, 5], [6, 2])
    blocks = SequenceBlocks(batch, torch.tensor([[0, 3, 9], [2, 0, 0]]), 2)
    cache, rows = torch.zeros(10, 1, 2, 4, dtype=torch.uint8), torch.arange(1, 16).view(5, 3).to(torch.uint8)
    blocks.write_new(cache, rows)
    assert torch.equal(blocks.read(cache, 0, 3, 6)[:, :3], rows[:3]) and torch.equal(
        blocks.read(cache, 1, 0, 2)[:, :3], rows[3:]
    )
    assert not bool(cache[0].any()) and not bool(cache[..., 3].any())
