"""A bandit with a KL price has a known optimum, π_ref·exp(r/β)/Z; the losses must find it."""

import torch

from charter.trainer.algorithm.advantages import gae
from charter.trainer.algorithm.losses import policy_loss, staleness_weights
from charter.trainer.algorithm.rewards import token_rewards
from charter.trainer.algorithm.whitening import whiten

ARMS, BETA = 6, 0.5


def _learn(lag: int, steps: int = 500, batch: int = 2048) -> float:
    """Total-variation distance to the optimum after PPO with rollouts `lag` versions old."""
    generator = torch.Generator().manual_seed(11)
    reward = torch.randn(ARMS, generator=generator, dtype=torch.float64)
    ref = torch.log_softmax(torch.randn(ARMS, generator=generator, dtype=torch.float64), 0)
    optimum = torch.softmax(ref + reward / BETA, 0)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    versions = [ref] * (lag + 1)
    average = torch.zeros_like(ref)
    for step in range(steps):
        behaviour = versions[-1 - lag]
        arms = torch.multinomial(behaviour.exp(), batch, replacement=True, generator=generator)
        prox = torch.log_softmax(logits.detach(), 0)
        acts = torch.ones(batch, dtype=torch.bool)
        lengths = torch.ones(batch, dtype=torch.long)
        rewards = token_rewards(prox[arms], ref[arms], acts, reward[arms], lengths, beta=BETA)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), lengths)
        weights = staleness_weights(prox[arms], behaviour[arms], cap=5.0)
        baseline = (weights * advantages).sum() / weights.sum()
        advantages = whiten(advantages - baseline, acts) if lag == 0 else advantages - baseline
        for _ in range(2):
            current = torch.log_softmax(logits, 0)
            out = policy_loss(current[arms], prox[arms], weights, advantages, clip=0.2, normaliser=batch)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        schedule.step()
        versions = [*versions[1:], torch.log_softmax(logits.detach(), 0)]
        if step >= steps // 2:
            average += torch.softmax(logits.detach(), 0)
    found = average / average.sum()
    return float(0.5 * (found - optimum).abs().sum())


def test_on_policy_ppo_converges_to_the_closed_form(record_property):
    distance = _learn(lag=0)
    record_property("total_variation_distance", distance)
    assert distance < 0.01, distance


def test_decoupled_ppo_converges_to_the_closed_form_from_rollouts_four_versions_old(record_property):
    distance = _learn(lag=4)
    record_property("total_variation_distance", distance)
    assert distance < 0.01, distance
