"""How answers are sampled for learning."""

from __future__ import annotations

from dataclasses import dataclass

from charter.errors import ConfigError
from charter.lm.base import Sampling


@dataclass(frozen=True, slots=True)
class SamplerConfig:
    """What the sampler asks of the policy."""

    answers: int = 2
    """Answers to each prompt; the judge compares them two by two."""
    temperature: float = 1.0
    """Divides the logits. Answers are drawn from the whole distribution: truncation would bias the ratio."""
    max_tokens: int = 96
    """An answer that reaches this is cut off, and costs the missing-stop penalty."""
    max_staleness: int = 2
    """Trainer versions that a rollout may be behind when it is trained on; 0 is synchronous."""
    batch_size: int = 32
    """Rollouts that one trainer version consumes; must be the trainer's."""
    samplers: int = 1
    """Samplers at work at once; each leaves room for a batch of every other."""
    seed: int = 0
    """Answers follow from it, the rollout's id and the weights."""

    def __post_init__(self) -> None:
        if self.answers < 2 or self.answers % 2:
            raise ConfigError(
                f"answers is {self.answers}; give an even number, since the judge compares pairs"
            )
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; learning needs answers drawn at random")
        if min(self.max_tokens, self.batch_size, self.samplers) < 1 or self.max_staleness < 0:
            raise ConfigError(
                f"{self} cannot work: max_tokens, batch_size and samplers must be at least 1, max_staleness 0"
            )

    def sampling(self, seed: int) -> Sampling:
        """Top-k off, top-p 1."""
        return Sampling(self.temperature, max_tokens=self.max_tokens, seed=seed)
