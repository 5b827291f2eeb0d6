"""What an update reports, over real tokens only: padding never dilutes a mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from torch import Tensor


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(R − V)/Var(R): 1 is perfect, 0 no better than the mean; NaN-free when returns are constant."""
    variance = returns.var(correction=0)
    if float(variance) == 0.0:
        return 0.0
    return float(1.0 - (returns - values).var(correction=0) / variance)


def effective_sample_size(weights: Tensor) -> float:
    """(Σw)²/(n·Σw²): the share of the actions that the importance weights leave effective, in (0, 1]."""
    return float(weights.sum().square() / (len(weights) * weights.square().sum()))


def staleness_histogram(trainer_step: int, policy_steps: Iterable[int]) -> dict[int, int]:
    """How many answers were made by a policy so many trainer steps old."""
    return dict(sorted(Counter(trainer_step - s for s in policy_steps).items()))


@dataclass(frozen=True, slots=True)
class UpdateMetrics:
    """One PPO step in numbers. Divergences are in nats; `per_answer` sums over the tokens of an answer."""

    step: int
    answers: int
    actions: int
    """Tokens that the policy drew and is taught on."""
    real_tokens: int
    """Prompts and answers that went through the model in one epoch."""
    padding_waste: float
    """Share of the computed tokens that were padding."""
    score_mean: float
    """Of the reward model, before shaping."""
    score_std: float
    shaped_score_mean: float
    """After clipping and the penalty for answers that were cut off."""
    cut_off_share: float
    """Answers that did not reach a stop token."""
    answer_length_mean: float
    beta: float
    kl_k1: float
    """From the reference, per action, at the start of the update."""
    kl_k3: float
    kl_per_answer: float
    """From the reference, k1, summed over each answer; what the KL controller steers by."""
    entropy: float
    """Of the policy, per action, at the start of the update; exact over the vocabulary."""
    policy_loss: float
    """Mean over the update's optimizer steps."""
    value_loss: float
    clip_fraction: float
    """Share of actions whose gradient the clip took, over all epochs."""
    value_clip_fraction: float
    ratio_mean: float
    ratio_max: float
    """Largest over all epochs."""
    update_kl_k3: float
    """From the proximal policy, per action, over the last epoch: how far this update went."""
    advantage_mean: float
    """Before whitening."""
    advantage_std: float
    return_mean: float
    value_mean: float
    explained_variance: float
    staleness_mean: float
    staleness_histogram: dict[int, int]
    """Trainer steps behind → answers."""
    effective_sample_size: float
    """Of the staleness weights; 1 for fresh rollouts."""
    weight_truncated: float
    """Share of actions whose staleness weight reached its cap."""
    behaviour_kl_k3: float
    """Between the policy that behaved and the proximal one, per action."""
    policy_grad_norm: float
    """Mean over optimizer steps, before clipping."""
    value_grad_norm: float
    optimizer_steps: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the parts: prepare, epochs."""

    def as_dict(self) -> dict[str, float | int | dict[int, int] | dict[str, float]]:
        """For JSON and TensorBoard."""
        return asdict(self)
