"""How the judge asks, and how sure its labels may be."""

from __future__ import annotations

from dataclasses import dataclass, field

from charter.errors import ConfigError
from charter.lm.base import Sampling
from charter.rpc import ServerConfig


@dataclass(frozen=True, slots=True)
class Notes:
    """The short note (chain of thought) that the judge writes before it answers."""

    count: int = 1
    """Notes for each order, whose probabilities are averaged; 0: the judge answers at once."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token. Several notes need more than 0 to differ."""
    max_tokens: int = 96
    """Most tokens of a note; one that is cut off is used as far as it goes."""

    def __post_init__(self) -> None:
        if self.count < 0 or self.max_tokens < 1 or self.temperature < 0:
            raise ConfigError(
                f"{self} cannot work: count and temperature must be 0 or more, max_tokens at least 1"
            )
        if self.count > 1 and self.temperature == 0:
            raise ConfigError(
                f"{self.count} notes at temperature 0 are one note {self.count} times; "
                "raise notes.temperature (the paper sampled at 1), or set notes.count to 1"
            )

    def sampling(self, stop: str, seed: int) -> Sampling:
        """How to sample a note that ends before `stop`."""
        return Sampling(self.temperature, max_tokens=self.max_tokens, stop=(stop,), seed=seed)


@dataclass(frozen=True, slots=True)
class Judging:
    """How a pair is compared."""

    principles: int = 1
    """Principles drawn for a pair, by weight and without repetition; 0 asks all and averages by weight."""
    notes: Notes = field(default_factory=Notes)
    """What the judge writes before it answers."""
    examples: int = 4
    """Most worked comparisons of the constitution shown before the question; 0 shows none."""
    lowest: float = 0.4
    """Labels below are raised to this. With chain of thought a judge is far too sure of itself, and the
    paper (arXiv 2212.08073, 4.1) clamped to 0.4-0.6; 0 and 1 leave labels as they are."""
    highest: float = 0.6
    """Labels above are lowered to this."""

    def __post_init__(self) -> None:
        if self.principles < 0 or self.examples < 0:
            raise ConfigError(f"principles is {self.principles} and examples {self.examples}; give 0 or more")
        if not 0 <= self.lowest <= 0.5 <= self.highest <= 1:
            raise ConfigError(
                f"labels cannot be clamped to {self.lowest} … {self.highest}; "
                "lowest must be within 0 and 0.5, highest within 0.5 and 1"
            )


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """Configuration of a judge server."""

    model: str = "local:seed"
    """URI of the model that gives feedback (see `charter.lm.open_model`); frozen, and not the policy."""
    constitution: str = "seed"
    """A path to a constitution, or a bare name."""
    watch_s: float = 2.0
    """How often the constitution's file is looked at for changes; SIGHUP reads it at once."""
    judging: Judging = field(default_factory=Judging)
    """How a pair is compared."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Where and how it listens."""

    def __post_init__(self) -> None:
        if self.watch_s <= 0:
            raise ConfigError(f"watch_s is {self.watch_s}; give seconds above 0")
