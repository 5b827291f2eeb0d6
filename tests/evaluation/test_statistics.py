"""Intervals, ranking quality, calibration: against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter.evaluation.statistics import Share, auc, calibration_error, share

truths = st.lists(st.booleans(), min_size=1, max_size=40)


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998, table I, method 3 (score without continuity correction).
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ):
        assert Share(hits, count).interval == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_interval_holds_the_share_and_stays_within_0_and_1(hits, extra):
    found = Share(hits, hits + extra)
    low, high = found.interval
    assert 0 <= low <= found.value <= high <= 1


def test_a_share_of_nothing_knows_nothing():
    assert share([]).interval == (0.0, 1.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_ranked_rightly(cases):
    positives = [s for s, t in cases if t]
    negatives = [s for s, t in cases if not t]
    found = auc([s for s, _ in cases], [t for _, t in cases])
    if not positives or not negatives:
        assert math.isnan(found)
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert found == pytest.approx(wins / (len(positives) * len(negatives)))


def test_calibration_error_by_hand():
    assert calibration_error([0.95, 0.95, 0.05, 0.05], [1, 0, 0, 0]) == pytest.approx((0.9 + 0.1) / 4)
    assert calibration_error([0.3] * 10, [1] * 3 + [0] * 7) == pytest.approx(0.0)


@given(truths)
def test_certain_and_right_is_calibrated(cases):
    assert calibration_error([float(t) for t in cases], [float(t) for t in cases]) == 0
