"""The sampler draws from the distribution whose log-probs it reports."""

import math

import pytest
import torch

from charter.lm.base import Sampling
from charter.lm.engine_sampler import Plan, draw, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -30.0])
DRAWS = 4000
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}
"""Quantiles at 0.999, by degrees of freedom."""


def draws(sampling, blocked=None, logits=LOGITS):
    batch = logits.expand(DRAWS, -1)
    plan = Plan.of([sampling] * DRAWS, len(logits), torch.device("cpu"))
    return draw(batch, plan, blocked, [uniforms(seed).random() for seed in range(DRAWS)])


def expected(temperature=1.0, top_k=0, top_p=1.0, blocked=()):
    """By the definition, in plain Python."""
    weights = {i: math.exp(v / temperature) for i, v in enumerate(LOGITS.tolist()) if i not in blocked}
    whole = sum(weights.values())
    ranked = sorted(weights, key=weights.get, reverse=True)[: top_k or None]
    mass, kept = 0.0, []
    for i in ranked:
        if mass >= top_p * sum(weights[r] for r in ranked):
            break
        kept.append(i)
        mass += weights[i]
    return {i: weights[i] / mass for i in kept}, math.log(mass / whole)


@pytest.mark.parametrize(
    ("options", "blocked"),
    [
        ({}, ()),
        ({"temperature": 0.7}, ()),
        ({"temperature": 3.0}, (0,)),
        ({"top_k": 3}, ()),
        ({"top_p": 0.8}, ()),
        ({"top_p": 0.9, "top_k": 3, "temperature": 2.0}, (1,)),
    ],
)
def test_frequencies_and_logprobs_are_those_of_the_definition(options, blocked):
    bias = torch.zeros(len(LOGITS))
    bias[list(blocked)] = -math.inf
    drawn = draws(Sampling(**options), bias)
    probabilities, kept = expected(blocked=blocked, **options)
    for token, logprob in zip(drawn.token_ids, drawn.logprobs, strict=True):
        assert logprob == pytest.approx(math.log(probabilities[token]), abs=1e-5)
    if "top_k" in options or "top_p" in options:
        assert drawn.kept_log_mass[0] == pytest.approx(kept, abs=1e-6)
    else:
        assert drawn.kept_log_mass is None
    common = {i: p for i, p in probabilities.items() if p * DRAWS >= 5}
    statistic = sum((drawn.token_ids.count(i) - p * DRAWS) ** 2 / (p * DRAWS) for i, p in common.items())
    assert statistic < CHI_SQUARE_999[max(1, len(common) - 1)]


def test_temperature_zero_takes_the_likeliest_and_reports_it_at_temperature_one():
    drawn = draws(Sampling(temperature=0, top_k=2, top_p=0.5))
    assert set(drawn.token_ids) == {0}
    assert drawn.logprobs[0] == pytest.approx(float(LOGITS.log_softmax(-1)[0]))


def test_rows_of_a_batch_keep_their_own_parameters():
    rows = [Sampling(), Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=0.01, temperature=2.0)]
    plan = Plan.of(rows, len(LOGITS), torch.device("cpu"))
    drawn = draw(LOGITS.expand(4, -1), plan, None, [0.99, 0.99, 0.99, 0.99])
    assert drawn.token_ids == [4, 0, 0, 0]
    assert drawn.logprobs[2:] == [0.0, 0.0]
    assert drawn.kept_log_mass[:2] == [0.0, 0.0]
    assert drawn.kept_log_mass[2] == pytest.approx(float(LOGITS.log_softmax(-1)[0]), abs=1e-6)


def test_a_flat_distribution_over_many_tokens_is_ranked_whole():
    logits = torch.zeros(1000)
    drawn = draws(Sampling(top_p=0.5), logits=logits)
    assert len(set(drawn.token_ids)) > 300
    assert drawn.logprobs[0] == pytest.approx(-math.log(500), abs=3e-3)  # 500 tokens, or 501 by rounding
    assert drawn.kept_log_mass[0] == pytest.approx(math.log(0.5), abs=3e-3)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    plan = Plan.of([Sampling()], 5, torch.device("cpu"))
    assert draw(logits, plan, None, [uniform]).token_ids == [1 if uniform == 0.0 else 3]


def test_alternatives_are_the_likeliest_of_the_same_distribution():
    plan = Plan.of([Sampling(top_logprobs=3), Sampling(top_k=2)], len(LOGITS), torch.device("cpu"))
    drawn = draw(LOGITS.expand(2, -1), plan, None, [0.5, 0.5])
    logp = LOGITS.log_softmax(-1)
    assert drawn.alternatives[0] == [(i, pytest.approx(float(logp[i]))) for i in range(3)]
    assert len(drawn.alternatives[1]) == 2
