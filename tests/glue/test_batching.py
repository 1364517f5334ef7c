"""Batch order is a function of (seed, epoch) alone, batches are of equal size, and padding is bounded."""

import random
from collections import Counter

import pytest
import torch
from naming import naming

from increlora.glue.batching import collate, epoch_batches, evaluation_batches, padding_share
from increlora.glue.tasks import Split


def sentence_lengths(count, mean, spread, longest, seed=0):
    """Log-normal lengths, as those of sentences are."""
    generator = random.Random(seed)
    return [max(4, min(longest, round(generator.lognormvariate(mean, spread)))) for _ in range(count)]


RTE_LIKE = sentence_lengths(2490, 4.1, 0.55, 290)
MRPC_LIKE = sentence_lengths(3668, 3.95, 0.27, 110)


def test_order_is_a_function_of_seed_and_epoch():
    batches = epoch_batches(RTE_LIKE, 32, 41, 3)
    torch.manual_seed(99)
    torch.rand(5)
    assert epoch_batches(RTE_LIKE, 32, 41, 3) == batches
    assert epoch_batches(tuple(RTE_LIKE), 32, 41, 3) == batches
    assert epoch_batches(RTE_LIKE, 32, 41, 4) != batches
    assert epoch_batches(RTE_LIKE, 32, 42, 3) != batches


def test_order_is_pinned():
    """A change of these numbers changes every run: seeds would no longer mean what they meant."""
    assert epoch_batches([5, 1, 4, 2, 3, 9, 7], 2, 41, 0, pool=2) == [[6, 5], [4, 2], [4, 0], [1, 3]]


def test_equal_sizes_and_every_example():
    for count in [1, 5, 31, 32, 33, 63, 64, 1600, 1601, 3668]:
        with naming(count):
            lengths = sentence_lengths(count, 3, 0.4, 60)
            batches = epoch_batches(lengths, 32, 1, 0)
            assert len(batches) == -(-count // 32)
            assert {len(batch) for batch in batches} == {32}
            seen = Counter(i for batch in batches for i in batch)
            assert set(seen) == set(range(count))
            if count >= 32:
                assert sum(seen.values()) - count == sum(times - 1 for times in seen.values()) < 32
                assert max(seen.values()) <= 2


def test_the_filling_comes_from_the_epochs_start_and_changes_with_it():
    counts = [Counter(i for batch in epoch_batches([3] * 40, 32, 1, epoch) for i in batch) for epoch in range(3)]
    filled = [{i for i, times in count.items() if times > 1} for count in counts]
    assert all(len(twice) == 24 for twice in filled)
    assert filled[0] != filled[1] != filled[2]


def test_lengths_are_mixed_over_the_epoch():
    """Batches are shuffled: no drift from short to long."""
    means = [sum(RTE_LIKE[i] for i in batch) / 32 for batch in epoch_batches(RTE_LIKE, 32, 41, 0)]
    half = len(means) // 2
    assert 0.7 < (sum(means[:half]) / half) / (sum(means[half:]) / (len(means) - half)) < 1.4


def test_padding_is_bounded():
    for name, lengths in (("like RTE", RTE_LIKE), ("like MRPC", MRPC_LIKE)):
        with naming(name):
            for seed in (41, 42):
                shares = [padding_share(lengths, epoch_batches(lengths, 32, seed, epoch)) for epoch in range(3)]
                assert max(shares) <= 0.06, seed
            assert padding_share(lengths, evaluation_batches(lengths, 64)) <= 0.06


def test_padding_share_by_hand():
    assert padding_share([2, 4, 3, 3], [[0, 1], [2, 3]]) == pytest.approx(2 / 12)


def test_evaluation_sees_each_example_once():
    batches = evaluation_batches(RTE_LIKE, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(RTE_LIKE)))
    assert [len(batch) for batch in batches] == [64] * 38 + [58]
    assert max(RTE_LIKE[i] for i in batches[0]) <= min(RTE_LIKE[i] for i in batches[-1])


def test_collate_pads_to_the_longest_of_the_batch():
    split = Split("train", [[1, 7, 2], [1, 2], [1, 8, 9, 5, 2]], [[0, 0, 1], [0, 0], [0, 0, 1, 1, 1]], [1, 0, 1])
    batch = collate(split, [1, 0], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [1, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_of_scores_and_without_token_types():
    batch = collate(Split("dev", [[1, 2]], None, [3.8]), [0], pad_id=0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].dtype == torch.float32
