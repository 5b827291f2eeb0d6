"""How PPO learns. Defaults follow Ziegler et al. 2019 and Huang et al. 2024 where they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from charter.errors import ConfigError
from charter.trainer.algorithm.kl import Estimator

ScoreSlot = Literal["last_token", "after_last_token"]


@dataclass(frozen=True, slots=True)
class PPOConfig:
    """One PPO step: its losses, its optimizer, its micro-batches."""

    learning_rate: float = 1e-5
    """Of the policy. 1e-6 to 1e-5 at billions of parameters; 1e-4 for the seed model."""
    value_learning_rate: float | None = None
    """Of the value model; None: the policy's."""
    warmup_steps: int = 0
    """Steps over which both rates rise linearly from zero."""
    value_warmup_steps: int = 0
    """First steps in which only the value model learns."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-5
    max_grad_norm: float | None = 1.0
    """Of each model's gradient; None does not clip."""

    epochs: int = 4
    """Passes over the rollouts of a step, each in a fresh order."""
    mini_batches: int = 1
    """Optimizer steps in an epoch."""
    micro_batch_tokens: int = 2048
    """Tokens in one forward and backward pass. It changes speed and memory, never the result."""

    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    """Of the ratio."""
    value_clip: float | None = 0.2
    """How far a value may move in one step; None does not clip."""
    value_coefficient: float = 0.1
    """Weight of the value loss. It matters only through Adam's eps and the clipping of the gradient, since
    the two models share no parameter."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy in the objective."""
    staleness_weight_cap: float = 2.0
    """Truncation of π_proximal/π_behaviour."""

    beta: float = 0.05
    """Price of one nat from the reference at the start."""
    kl_target: float | None = None
    """Nats per answer that the price steers towards; None keeps the price fixed."""
    kl_horizon: float = 10_000.0
    """Answers over which the price corrects an error."""
    kl_estimator: Estimator = "k1"
    """Of the divergence in the rewards."""

    score_clip: float | None = 4.0
    """Scores are held within ± this; None leaves them."""
    missing_stop_penalty: float = 8.0
    """Taken from the score of an answer that did not reach a stop token."""
    whiten_rewards: bool = False
    """Scale the token rewards to variance 1 (their mean stays)."""
    unbiased_variance: bool = True
    """Whitening divides by n − 1 (as TRL) rather than by n (as OpenAI)."""
    score_slot: ScoreSlot = "last_token"
    """Where the score arrives. `after_last_token` is TRL's convention: answers shorter than the longest of
    the batch get one more value, after their last token, and the score there."""

    gradient_checkpointing: bool = False
    """Trades a second forward pass for memory; worth it for models of billions of parameters."""
    seed: int = 0
    """Orders the mini-batches."""

    def __post_init__(self) -> None:
        """Refuses what cannot work, with the reason."""
        positive = ("learning_rate", "epochs", "mini_batches", "micro_batch_tokens", "staleness_weight_cap")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"PPO option {name} is {getattr(self, name)!r}; it must be positive")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"PPO option {name} is {getattr(self, name)!r}; it must lie in [0, 1]")
        if not 0.0 < self.clip < 1.0:
            raise ConfigError(f"PPO option clip is {self.clip!r}; it must lie between 0 and 1")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ConfigError(f"PPO option kl_estimator is {self.kl_estimator!r}; use k1, k2 or k3")
        if self.score_slot not in ("last_token", "after_last_token"):
            raise ConfigError(
                f"PPO option score_slot is {self.score_slot!r}; use last_token or after_last_token"
            )
        if self.beta < 0 or (self.kl_target is not None and self.kl_target <= 0):
            raise ConfigError("PPO options beta and kl_target must not be negative, and the target not zero")

    def rate(self, step: int, *, value: bool) -> float:
        """The learning rate of a model at a step, counted from 0."""
        full = self.learning_rate if not value else (self.value_learning_rate or self.learning_rate)
        return full * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else full
