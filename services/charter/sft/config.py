"""What `charter sft` learns from, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from charter.errors import ConfigError
from charter.finetune.config import TuningConfig


@dataclass(frozen=True, slots=True)
class OwnAnswers:
    """How the model's own helpful answers are sampled."""

    share: float = 1.0
    """Own answers for each revision; the paper mixes about as many."""
    temperature: float = 0.7
    """Below 1 the model's better habits are what is kept."""
    max_tokens: int = 128
    """An answer that is not finished by then is left out."""
    concurrency: int = 64
    """Prompts under way at once."""

    def __post_init__(self) -> None:
        if self.share < 0 or self.temperature < 0 or self.max_tokens < 1 or self.concurrency < 1:
            raise ConfigError(
                f"{self} cannot work: share and temperature must not be negative, the others at least 1"
            )


@dataclass(frozen=True, slots=True)
class SftConfig:
    """One run of SL-CAI."""

    max_revisions: int = 0
    """Revisions to learn from, those that changed the answer first; 0: all."""
    keep_unchanged: bool = True
    """Whether drafts that no critique changed may fill up the rest; they show what needs no change."""
    own: OwnAnswers = field(default_factory=OwnAnswers)
    """The model's own helpful answers."""
    max_length: int = 0
    """Tokens of prompt and answer; longer examples are left out. 0: the model's context."""
    tuning: TuningConfig = field(default_factory=TuningConfig)
    """The run itself."""

    def __post_init__(self) -> None:
        if self.max_revisions < 0 or self.max_length < 0:
            raise ConfigError("max_revisions and max_length must not be negative; 0 means no limit of ours")
