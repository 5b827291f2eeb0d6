"""What the critic works by."""

from __future__ import annotations

from dataclasses import dataclass, field

from charter.errors import ConfigError
from charter.lm.base import Sampling
from charter.rpc import ServerConfig


@dataclass(frozen=True, slots=True)
class Writing:
    """How critiques and revisions are sampled."""

    temperature: float = 0.7
    """Divides the logits; 0 takes the likeliest token, and every round then says the same."""
    critique_tokens: int = 192
    """Most tokens of a critique."""
    revision_tokens: int = 512
    """Most tokens of a revision; also bounds what a revised answer can be."""
    examples: int = 4
    """Most worked examples of the constitution shown before the question; 0 shows none."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.critique_tokens < 1 or self.revision_tokens < 1 or self.examples < 0:
            raise ConfigError(
                f"{self} cannot work: temperature and examples must be 0 or more, token counts at least 1"
            )

    def critique(self, seed: int) -> Sampling:
        """How to sample a critique."""
        return Sampling(self.temperature, max_tokens=self.critique_tokens, seed=seed)

    def revision(self, seed: int) -> Sampling:
        """How to sample a revision."""
        return Sampling(self.temperature, max_tokens=self.revision_tokens, seed=seed)


@dataclass(frozen=True, slots=True)
class CriticConfig:
    """Configuration of a critic server."""

    model: str = "local:seed"
    """URI of the model that gives feedback (see `charter.lm.open_model`); frozen, and not the policy."""
    constitution: str = "seed"
    """A path to a constitution, or a bare name."""
    watch_s: float = 2.0
    """How often the constitution's file is looked at for changes; SIGHUP reads it at once."""
    rounds: int = 4
    """Rounds of critique and revision where a request does not say; the paper used four."""
    max_rounds: int = 16
    """Most rounds that a request may ask for."""
    writing: Writing = field(default_factory=Writing)
    """How critiques and revisions are sampled."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Where and how it listens."""

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.max_rounds:
            raise ConfigError(f"rounds is {self.rounds}; give 1 to max_rounds ({self.max_rounds})")
        if self.watch_s <= 0:
            raise ConfigError(f"watch_s is {self.watch_s}; give seconds above 0")
