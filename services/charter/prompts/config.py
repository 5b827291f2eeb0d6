"""Where prompts come from, and in what proportion."""

from __future__ import annotations

from dataclasses import dataclass, field

from charter.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Weights:
    """How often each source is drawn from, relative to the others; an empty source gives its share away."""

    red_team: float = 0.5
    helpful: float = 0.4
    production: float = 0.1
    generated: float = 0.1

    def __post_init__(self) -> None:
        values = (self.red_team, self.helpful, self.production, self.generated)
        if min(values) < 0 or sum(values) <= 0:
            raise ConfigError(f"{self}: weights must be 0 or more, and at least one above 0")


@dataclass(frozen=True, slots=True)
class PromptsConfig:
    """How the prompt source works.

    A source of prompts is a file, a folder or `seed:COUNT:CLASS,…` (see `charter.redteam.prompts`).
    """

    red_team: tuple[str, ...] = ("seed:3000:harmful",)
    """Sources of prompts that try to get harmful answers; they are also the examples for new ones."""
    helpful: tuple[str, ...] = ("seed:3000:plain,lookalike",)
    """Sources of prompts that should simply be helped."""
    held_out: tuple[str, ...] = ("seed-heldout",)
    """Sources of prompts that figures are measured on, or `seed-heldout`; users' and invented prompts that
    resemble one are left out."""
    generator: str = ""
    """URI of the model that invents red-team prompts; empty: none are invented."""
    state: str = ".charter/prompts.json"
    """File of what was learned; a restarted source goes on from it."""
    production_kept: int = 5000
    """Users' prompts that are kept; the oldest go first."""
    generated_kept: int = 5000
    """Invented prompts that are kept; the oldest go first."""
    weights: Weights = field(default_factory=Weights)
    floor: float = 0.2
    """Weight of a prompt on which all answers agree; one on which they fully disagree has 1 + floor."""
    memory: float = 0.5
    """How much of the old interest stays when a new label comes in, 0 to 1."""
    backlog: int = 64
    """Prompts that may wait at the sampler before the source pauses."""
    batch: int = 16
    """Prompts published at once."""
    generate_every: int = 256
    """Prompts published between two attempts to invent new ones; 0 never does."""
    generate: int = 16
    """Prompts asked for in one attempt; near-duplicates among them are thrown away."""
    examples: int = 4
    """Red-team prompts shown for each."""
    max_tokens: int = 64
    """Most tokens of an invented prompt; one that is cut off is thrown away."""
    pause_s: float = 0.2
    """Pause when the backlog is full and nothing was learned."""
    similarity: float = 0.8
    """Jaccard similarity of word trigrams from which an invented prompt is a near-duplicate."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.memory < 1 and 0 < self.similarity <= 1 and self.floor > 0):
            raise ConfigError(f"{self}: memory in [0, 1), similarity in (0, 1], floor above 0")
        counts = (
            "backlog",
            "batch",
            "generate",
            "examples",
            "max_tokens",
            "production_kept",
            "generated_kept",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"prompts.{name} is {getattr(self, name)}; give at least 1")
        if self.pause_s <= 0 or self.generate_every < 0:
            raise ConfigError("prompts.pause_s must be above 0, and prompts.generate_every 0 or more")
