"""How a red-team run works."""

from __future__ import annotations

from dataclasses import dataclass

from charter.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RedTeamConfig:
    """What makes one row of the data set, and how fast."""

    rounds: int = 4
    """Rounds of critique and revision for each prompt; the paper used four."""
    temperature: float = 1.0
    """Of the drafts. At 1 the model says what it would learn from."""
    max_tokens: int = 256
    """Most tokens of a draft."""
    seed: int = 0
    """The same seed, prompts, models and constitution give the same rows."""
    concurrency: int = 32
    """Prompts worked on at once, so that the engine batches; changes no row."""
    rows_per_part: int = 1000
    """Rows of a Parquet file; a part is also written when the run ends or stops."""
    give_up_s: float = 600.0
    """Without a single finished prompt for this long, because a server or the log is away, the run stops."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.max_tokens, self.concurrency, self.rows_per_part) < 1:
            raise ConfigError(
                f"{self} cannot work: rounds, max_tokens, concurrency and rows_per_part must be at least 1"
            )
        if self.temperature < 0 or self.give_up_s <= 0 or not 0 <= self.seed < 1 << 62:
            raise ConfigError(
                f"{self} cannot work: temperature and seed must be 0 or more, give_up_s above 0"
            )
