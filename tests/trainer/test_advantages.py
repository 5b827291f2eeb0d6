"""Advantages, token rewards and whitening against hand values and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charter.trainer.algorithm.advantages import gae
from charter.trainer.algorithm.rewards import last_slots, shape_scores, token_rewards
from charter.trainer.algorithm.whitening import whiten


def test_lambda_0_gives_one_step_errors():
    advantages, returns = gae(
        torch.tensor([0.0, 0.0, 5.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3]), lam=0.0
    )
    assert advantages.tolist() == [1.0, 1.0, 2.0]
    assert returns.tolist() == [2.0, 3.0, 5.0]


def test_lambda_1_gives_return_minus_value():
    advantages, returns = gae(
        torch.tensor([0.0, 0.0, 5.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3]), lam=1.0
    )
    assert advantages.tolist() == [4.0, 3.0, 2.0]
    assert returns.tolist() == [5.0, 5.0, 5.0]


answers = st.lists(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=9), min_size=1, max_size=6
)


def _gae_by_sums(rewards, values, gamma, lam):
    """The definition, eq. 16: A_t = Σ_l (γλ)^l δ_{t+l}."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]


@settings(max_examples=60, deadline=None)
@given(answers, st.floats(0, 1), st.floats(0, 1))
def test_the_recursion_agrees_with_the_definition_and_answers_do_not_touch(batch, gamma, lam):
    rewards = torch.tensor([r for a in batch for r, _ in a], dtype=torch.float64)
    values = torch.tensor([v for a in batch for _, v in a], dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.tensor([len(a) for a in batch]), gamma=gamma, lam=lam)
    expected = [x for a in batch for x in _gae_by_sums([r for r, _ in a], [v for _, v in a], gamma, lam)]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, advantages + values)


def test_the_score_arrives_once_at_the_last_slot_and_the_kl_price_at_every_action():
    logp = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    ref = torch.tensor([-1.5, -2.0, -1.0, -9.0])
    acts = torch.tensor([True, True, True, False])
    rewards = token_rewards(logp, ref, acts, torch.tensor([7.0, 4.0]), torch.tensor([2, 2]), beta=0.1)
    # The last slot is no action (TRL's place after the last token): score and no price.
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 7.0, 0.2, 4.0]))
    assert last_slots(torch.tensor([2, 2])).tolist() == [1, 3]


def test_an_answer_without_a_stop_token_pays_a_fixed_penalty_after_clipping():
    shaped = shape_scores(
        torch.tensor([9.0, 9.0, -1.0]), torch.tensor([True, False, False]), clip=4.0, missing_stop_penalty=8.0
    )
    assert shaped.tolist() == [4.0, -4.0, -9.0]


def test_whitening_uses_real_tokens_only_and_the_variance_that_was_asked_for():
    values = torch.tensor([1.0, 2.0, 3.0, 1e9])
    acts = torch.tensor([True, True, True, False])
    unbiased = whiten(values, acts)
    torch.testing.assert_close(unbiased, torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    biased = whiten(values, acts, unbiased=False)
    torch.testing.assert_close(biased[2], torch.tensor(math.sqrt(1.5)))
    kept_mean = whiten(values, acts, shift_mean=False)
    torch.testing.assert_close(kept_mean, torch.tensor([1.0, 2.0, 3.0, 0.0]))


def test_a_single_action_has_no_variance_and_stays_finite():
    assert whiten(torch.tensor([3.0]), torch.tensor([True])).tolist() == [0.0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=3, max_size=30), st.lists(st.booleans(), min_size=30, max_size=30)
)
def test_what_lies_outside_the_actions_never_matters(values, flags):
    acts = torch.tensor([True, True, *flags[2 : len(values)]])
    x = torch.tensor(values, dtype=torch.float64)
    noise = torch.where(acts, x, torch.full_like(x, 1e6))
    assert torch.equal(whiten(x, acts), whiten(noise, acts))


def test_gae_refuses_nothing_and_keeps_order_for_answers_of_very_different_lengths():
    lengths = torch.tensor([1, 50, 2])
    rewards = torch.arange(53, dtype=torch.float64)
    values = torch.zeros(53, dtype=torch.float64)
    _, returns = gae(rewards, values, lengths, lam=1.0)
    assert returns[0] == 0.0
    assert returns[1] == pytest.approx(sum(range(1, 51)))
    assert returns[-1] == 52.0
