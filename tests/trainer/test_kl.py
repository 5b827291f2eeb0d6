"""Estimates of the divergence against its exact value, and the controllers that act on it."""

import pytest
import torch

from charter.trainer.algorithm.controller import AdaptiveKL, FixedKL
from charter.trainer.algorithm.kl import exact_kl, kl_estimate


def _two_distributions():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits, -1)


def test_expectations_of_k1_and_k3_are_the_exact_divergence():
    logp, logq = _two_distributions()
    exact = exact_kl(logp, logq)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((logp.exp() * kl_estimate(logp, logq, estimator)).sum(), exact)
    assert (kl_estimate(logp, logq, "k3") >= 0).all()
    assert (kl_estimate(logp, logq, "k1") < 0).any()


def test_sample_means_of_k1_and_k3_match_the_exact_divergence_and_k3_varies_less():
    logp, logq = _two_distributions()
    logq = 0.9 * logp + 0.1 * logq
    logq = torch.log_softmax(logq, -1)
    n = 200_000
    drawn = torch.multinomial(logp.exp(), n, replacement=True, generator=torch.Generator().manual_seed(1))
    exact = float(exact_kl(logp, logq))
    variances = {}
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(logp[drawn], logq[drawn], estimator)
        error = float(estimates.std()) / n**0.5
        assert float(estimates.mean()) == pytest.approx(exact, abs=4 * error)
        variances[estimator] = float(estimates.var())
    assert variances["k3"] < variances["k1"]


def test_equal_policies_have_no_divergence_by_any_estimator():
    logp = torch.randn(9)
    for estimator in ("k1", "k2", "k3"):
        assert torch.equal(kl_estimate(logp, logp, estimator), torch.zeros(9))
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(logp, logp, "k4")


def test_the_adaptive_controller_follows_the_papers_formula_and_clips_its_error():
    controller = AdaptiveKL(beta=0.2, target=6.0, horizon=10_000)
    assert controller.updated(6.0, 64).beta == 0.2
    assert controller.updated(6.6, 100).beta == pytest.approx(0.2 * (1 + 0.1 * 100 / 10_000))
    assert controller.updated(60.0, 100).beta == pytest.approx(0.2 * (1 + 0.2 * 100 / 10_000))
    assert controller.updated(0.0, 100).beta == pytest.approx(0.2 * (1 - 0.2 * 100 / 10_000))


def test_the_adaptive_controller_brings_a_simulated_divergence_to_its_target():
    """A world where the divergence is 1/β nats: the fixed point is β = 1/target."""
    controller = AdaptiveKL(beta=1.0, target=6.0, horizon=1_000)
    for _ in range(400):
        controller = controller.updated(1.0 / controller.beta, 64)
    assert 1.0 / controller.beta == pytest.approx(6.0, rel=0.01)


def test_the_fixed_controller_does_not_move():
    assert FixedKL(0.05).updated(100.0, 64) == FixedKL(0.05)
