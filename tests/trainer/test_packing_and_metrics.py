"""Micro-batches by a token budget, and metrics over real tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charter.trainer.algorithm.metrics import effective_sample_size, explained_variance, staleness_histogram
from charter.trainer.algorithm.packing import bucket, pack, padding_waste

lengths_of_sequences = st.lists(st.integers(1, 200), min_size=1, max_size=80)


@settings(max_examples=80, deadline=None)
@given(lengths_of_sequences, st.integers(50, 1000), st.integers(1, 4))
def test_every_sequence_is_in_exactly_one_micro_batch_and_the_budget_holds(lengths, budget, multiple):
    for cut in (pack, bucket):
        parts = cut(lengths, budget, multiple)
        assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
        assert len(parts) % multiple == 0
    for part in pack(lengths, budget, multiple):
        assert sum(lengths[i] for i in part) <= max(budget, *lengths)
    for part in bucket(lengths, budget, multiple):
        assert not part or len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget


def test_packing_is_deterministic_and_balanced():
    lengths = [100, 90, 80, 30, 20, 10] * 5
    parts = pack(lengths, 500)
    assert parts == pack(lengths, 500)
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= 20


def test_a_sequence_longer_than_the_budget_is_kept():
    assert pack([5000, 10], 1000) == [[0], [1]]


def test_padding_waste_is_the_share_of_computed_tokens_that_are_not_real():
    assert padding_waste(75, 100) == 0.25
    assert padding_waste(100, 100) == 0.0


def test_explained_variance_of_perfect_useless_and_constant_predictions():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == pytest.approx(1.0)
    assert explained_variance(torch.full((3,), 2.0), returns) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(3)) == 0.0


def test_effective_sample_size_is_1_for_equal_weights_and_falls_to_one_sample():
    assert effective_sample_size(torch.full((8,), 0.3)) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)


def test_the_staleness_histogram_counts_trainer_steps_behind():
    assert staleness_histogram(7, [7, 7, 5, 6]) == {0: 2, 1: 1, 2: 1}
