"""What a score is made of beside the reward model."""

from __future__ import annotations

import pytest

from charter.errors import ConfigError
from charter.feedback.scores import Normalisation, ScoreRule, ended, normalisation, score


@pytest.mark.parametrize(
    ("ids", "kept", "finished"),
    [
        ([5, 6, 1, 7], (5, 6, 1), True),
        ([5, 2, 1], (5, 2), True),
        ([5, 6], (5, 6), False),
        ([1], (1,), False),
        ([1, 5, 1], (1,), False),
        ([], (), False),
    ],
)
def test_an_answer_ends_at_its_first_stop_token(ids, kept, finished) -> None:
    assert ended(ids, {1, 2}) == (kept, finished)


def test_reference_samples_get_mean_zero_and_deviation_one() -> None:
    raw = [1.0, 2.0, 4.0, 9.0]
    scale = normalisation(raw)
    scores = [scale(r) for r in raw]
    assert sum(scores) == pytest.approx(0)
    assert sum(s * s for s in scores) / 4 == pytest.approx(1)


def test_scores_are_clamped_and_unfinished_answers_pay_a_fixed_price() -> None:
    rule, scale = ScoreRule(clamp=3, unfinished=-5), Normalisation(1.0, 2.0)
    assert score(2.0, True, scale, rule) == 0.5
    assert score(100.0, True, scale, rule) == 3
    assert score(-100.0, True, scale, rule) == -3
    assert score(100.0, False, scale, rule) == -5


@pytest.mark.parametrize("raw", [[], [2.0, 2.0], [float("nan"), 1.0]])
def test_a_model_that_cannot_tell_the_samples_apart_is_refused(raw) -> None:
    with pytest.raises(ConfigError, match="reference samples"):
        normalisation(raw)
