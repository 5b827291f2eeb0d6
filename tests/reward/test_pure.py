"""The pure parts: which labels a round sees, when rounds begin, what is measured, who comes into force."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from charter.errors import ConfigError
from charter.reward.config import PromotionConfig, ScheduleConfig, WindowConfig
from charter.reward.measure import Quality, difference_error, drift, quality
from charter.reward.promotion import decide
from charter.reward.window import choose, is_heldout, next_round

WINDOW = WindowConfig(newest=4, replay=3, heldout=3, reference=2)


def test_a_prompt_is_held_out_for_good_and_about_the_share_of_them_are() -> None:
    held = [is_heldout(f"prompt-{i}", 0.1) for i in range(5000)]
    assert 0.08 < sum(held) / 5000 < 0.12
    assert held == [is_heldout(f"prompt-{i}", 0.1) for i in range(5000)]
    wider = [is_heldout(f"prompt-{i}", 0.3) for i in range(5000)]
    assert all(b for a, b in zip(held, wider, strict=True) if a)


def test_a_round_sees_the_newest_labels_and_a_replay_of_older_ones() -> None:
    chosen = choose(range(1, 21), [30, 31, 32, 33, 34], WINDOW, seed=1, number=2)
    assert chosen.newest == (17, 18, 19, 20)
    assert len(chosen.replay) == 3
    assert set(chosen.replay) <= set(range(1, 17))
    assert chosen.heldout == (32, 33, 34)
    assert chosen.reference == (30, 31)


def test_the_replay_is_drawn_anew_in_each_round_and_the_same_for_the_same_round() -> None:
    drawn = [choose(range(1000), [], WINDOW, seed=1, number=n).replay for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_early_rounds_take_what_there_is() -> None:
    chosen = choose([1, 2], [3], WINDOW, seed=1, number=1)
    assert (chosen.newest, chosen.replay, chosen.heldout) == ((1, 2), (), (3,))


@pytest.mark.parametrize(
    ("trained", "labels", "heldout", "catch_up", "upto"),
    [
        (0, 99, 50, False, None),
        (0, 100, 4, False, None),
        (0, 100, 5, False, 100),
        (0, 149, 5, False, 140),
        (0, 149, 5, True, 100),
        (100, 119, 9, False, None),
        (100, 120, 9, False, 120),
        (100, 185, 9, False, 180),
        (100, 185, 9, True, 120),
    ],
)
def test_rounds_begin_at_fixed_numbers_of_labels(trained, labels, heldout, catch_up, upto) -> None:
    schedule = ScheduleConfig(first=100, every=20, min_heldout=5, catch_up=catch_up)
    assert next_round(trained, labels, heldout, schedule) == upto


def test_accuracy_weighs_labels_by_their_confidence() -> None:
    found = quality([1.0, -1.0, 2.0, 5.0], [0.9, 0.6, 0.3, 0.5])
    assert found.accuracy == pytest.approx(0.8 / (0.8 + 0.2 + 0.4))
    assert quality([0.0], [0.9]).accuracy == 0.5
    assert quality([1.0], [0.5]).accuracy == 0.5


def test_loss_is_zero_for_exactly_the_label_and_the_cross_entropy_otherwise() -> None:
    assert quality([math.log(0.7 / 0.3)], [0.7]).loss == pytest.approx(0, abs=1e-12)
    assert quality([0.0], [1.0]).loss == pytest.approx(math.log(2))
    assert quality([-800.0, 900.0], [1.0, 0.0]).loss == pytest.approx(850)


def test_calibration_takes_each_pair_both_ways_round() -> None:
    sure = quality([100.0] * 10, [0.8] * 10)
    assert sure.calibration_error == pytest.approx(0.2)
    right = quality([math.log(0.8 / 0.2)] * 10, [0.8] * 10)
    assert right.calibration_error == pytest.approx(0, abs=1e-12)
    assert quality([100.0], [0.8]).calibration_error == pytest.approx(
        quality([-100.0], [0.2]).calibration_error
    )


def test_the_error_of_a_difference_counts_only_labels_that_tell_two_models_apart() -> None:
    labels = [0.6] * 100
    good, half = [1.0] * 100, [1.0, -1.0] * 50
    assert difference_error(good, good, labels) == 0
    # Bernoulli, p = 1/2, n = 100: sqrt(p (1 - p) / (n - 1))
    assert difference_error(good, half, labels) == pytest.approx(0.5 / math.sqrt(99))
    assert difference_error(half, good, labels) == pytest.approx(0.5 / math.sqrt(99))
    undecided = ([*good, 1.0], [*half, -1.0], [*labels, 0.5])
    assert difference_error(*undecided) == difference_error(good, half, labels)
    assert difference_error([1.0], [-1.0], [0.6]) == math.inf


def test_the_error_of_a_difference_is_what_repeated_samples_show() -> None:
    dice = random.Random(3)

    def sample(n: int = 130) -> tuple[list[float], list[float], list[float]]:
        first = [dice.choice((1.0, 1.0, 1.0, -1.0)) for _ in range(n)]
        second = [-m if dice.random() < 0.15 else m for m in first]
        return first, second, [dice.uniform(0.55, 0.9) for _ in range(n)]

    samples = [sample() for _ in range(2000)]
    gains = [quality(a, p).accuracy - quality(b, p).accuracy for a, b, p in samples]
    told = [difference_error(*one) for one in samples]
    assert statistics.fmean(told) == pytest.approx(statistics.stdev(gains), rel=0.08)


def test_drift_is_wassersteins_distance() -> None:
    assert drift([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]) == 0
    assert drift([1.5, 2.5], [1.0, 2.0]) == pytest.approx(0.5)
    assert drift([0.0], [0.0, 1.0]) == pytest.approx(0.5)
    assert drift([0.0, 0.0, 1.0], [0.0, 1.0]) == pytest.approx(1 / 6)
    assert drift([], [1.0]) == 0


def _quality(accuracy: float, loss: float = 0.1) -> Quality:
    return Quality(accuracy, loss, 0.0, 200)


CONFIG = PromotionConfig(margin=0.01, min_accuracy=0.55)


@pytest.mark.parametrize(
    ("candidate", "in_force", "promoted"),
    [
        (_quality(0.80), None, True),
        (_quality(0.54), None, False),
        (_quality(math.nan), None, False),
        (_quality(0.80, 0.9), _quality(0.78, 0.1), True),
        (_quality(0.76, 0.1), _quality(0.78, 0.9), False),
        (_quality(0.775, 0.1), _quality(0.78, 0.2), True),
        (_quality(0.785, 0.3), _quality(0.78, 0.2), False),
        (_quality(0.54), _quality(0.30), False),
    ],
)
def test_a_worse_model_never_comes_into_force(candidate, in_force, promoted) -> None:
    verdict = decide(candidate, in_force, 0.0, CONFIG)
    assert verdict.promoted is promoted
    assert f"{candidate.accuracy:.3f}" in verdict.reason


def test_a_difference_within_its_error_is_a_tie_which_the_loss_decides() -> None:
    before = _quality(0.78, 0.2)
    for accuracy, loss, error, promoted in [
        (0.76, 0.1, 0.03, True),
        (0.76, 0.1, 0.015, False),
        (0.80, 0.3, 0.03, False),
        (0.80, 0.3, 0.015, True),
        (0.76, math.nan, math.inf, False),
    ]:
        assert decide(_quality(accuracy, loss), before, error, CONFIG).promoted is promoted


def test_small_losses_cannot_add_up_over_many_rounds() -> None:
    in_force = _quality(0.80, 0.10)
    for _ in range(20):
        candidate = _quality(in_force.accuracy - 0.009, in_force.loss + 0.001)
        if decide(candidate, in_force, 0.0, CONFIG).promoted:
            in_force = candidate
    assert in_force.accuracy == 0.80


@pytest.mark.parametrize("wrong", [{"newest": 0}, {"replay": -1}, {"heldout_share": 1.0}, {"reference": 1}])
def test_a_window_that_cannot_work_is_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        WindowConfig(**wrong)
