"""The losses: identities at step 0, gradients on both sides of the clip, splitting, staleness weights."""

import pytest
import torch

from charter.trainer.algorithm.losses import policy_loss, staleness_weights, value_loss


def _random(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_at_step_0_the_ratio_is_1_nothing_is_clipped_and_the_gradient_is_the_policy_gradient():
    logp, advantages, _, _ = _random(20)
    current = logp.clone().requires_grad_()
    out = policy_loss(current, logp, torch.ones(20), advantages, clip=0.2, normaliser=20)
    assert torch.equal(out.ratio, torch.ones(20, dtype=torch.float64))
    assert not out.clipped.any()
    out.loss.backward()
    torch.testing.assert_close(current.grad, -advantages / 20)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.1, 0.5])
def test_gradcheck_of_the_policy_loss_on_both_sides_of_the_clip(shift):
    logp, advantages, weights, noise = _random(12)
    current = (logp + shift + 0.01 * noise).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, logp, weights.abs(), advantages, clip=0.2, normaliser=12).loss, (current,)
    )


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.1, 0.5])
def test_gradcheck_of_the_value_loss_on_both_sides_of_the_clip(shift):
    old, returns, _, noise = _random(12)
    values = (old + shift + 0.01 * noise).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, old, returns, clip=0.2, normaliser=12).loss, (values,)
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient_flows"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)],
)
def test_the_clip_stops_only_moves_that_have_gone_far_enough(ratio, advantage, gradient_flows):
    current = torch.tensor([ratio]).log().requires_grad_()
    out = policy_loss(
        current, torch.zeros(1), torch.ones(1), torch.tensor([advantage]), clip=0.2, normaliser=1
    )
    out.loss.backward()
    assert bool(current.grad.abs() > 0) is gradient_flows
    assert bool(out.clipped) is not gradient_flows


def test_hand_values():
    out = policy_loss(
        torch.tensor([2.0, 0.5]).log(),
        torch.zeros(2),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1.0, -1.0]),
        clip=0.2,
        normaliser=2,
    )
    # max(−2, −1.2) = −1.2; 2·max(0.5, 0.8) = 1.6
    torch.testing.assert_close(out.loss, torch.tensor((-1.2 + 1.6) / 2))
    value = value_loss(
        torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 3.0]), clip=0.2, normaliser=2
    )
    # ½·(max(1, 1.8²) + 9)/2
    torch.testing.assert_close(value.loss, torch.tensor(0.5 * (1.8**2 + 9.0) / 2))
    assert value.clipped.tolist() == [True, False]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_sum_over_micro_batches_is_the_loss_of_the_whole(parts):
    logp, advantages, weights, noise = _random(21)
    columns = (logp + 0.3 * noise, logp, weights, advantages)
    whole = policy_loss(*columns, clip=0.2, normaliser=21).loss
    split = sum(
        policy_loss(*(x[part] for x in columns), clip=0.2, normaliser=21).loss
        for part in torch.arange(21).chunk(parts)
    )
    torch.testing.assert_close(split, whole)


def test_with_behaviour_equal_to_proximal_decoupled_ppo_is_plain_ppo_exactly():
    logp, advantages, _, noise = _random(30)
    weights = staleness_weights(logp, logp, cap=2.0)
    assert torch.equal(weights, torch.ones_like(weights))
    current = logp + 0.3 * noise
    ratio = torch.exp(current - logp)
    plain = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    out = policy_loss(current, logp, weights, advantages, clip=0.2, normaliser=30)
    torch.testing.assert_close(out.loss, plain, rtol=0, atol=1e-15)


def test_staleness_weights_are_truncated_and_unbiased_below_the_cap():
    prox = torch.log(torch.tensor([0.5, 0.9]))
    behaviour = torch.log(torch.tensor([0.25, 0.1]))
    torch.testing.assert_close(staleness_weights(prox, behaviour, cap=4.0), torch.tensor([2.0, 4.0]))


def test_kept_mass_makes_the_ratio_of_truncated_sampling_unbiased():
    """Top-p sampling keeps part of the mass: without it the mean weight is the mass, with it 1."""
    full = torch.log_softmax(torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64), 0)
    kept = full[:2].exp().sum().log()
    drawn_from = full[:2] - kept  # the distribution that was sampled
    biased = (drawn_from.exp() * staleness_weights(full[:2], drawn_from, 10.0)).sum()
    unbiased = (drawn_from.exp() * staleness_weights(full[:2], drawn_from + kept, 10.0)).sum()
    assert float(biased) == pytest.approx(float(kept.exp()))
    assert float(unbiased) == pytest.approx(1.0)
