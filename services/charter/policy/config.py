"""What the policy server serves, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from charter.errors import ConfigError
from charter.lm.base import Sampling
from charter.rpc import ServerConfig


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How to sample where a request does not say. `Status` reports these."""

    temperature: float = 0.7
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keeps the smallest set of tokens with at least this mass; 1 keeps all."""
    top_k: int = 0
    """Keeps this many tokens; 0 keeps all."""
    max_tokens: int = 256
    """Tokens of an answer."""

    def sampling(self) -> Sampling:
        """The same, as the record of the model interface."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_tokens)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Configuration of a policy server."""

    model: str = "local:seed"
    """URI of the model that is served first (see `charter.lm.open_model`)."""
    registry: str = ""
    """Folder of checkpoints, each in a folder named by its id; empty: `Reload` takes folders only."""
    folders_allowed: bool = True
    """Whether `Reload` takes any folder that this process may read, besides ids of the registry."""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """How to sample where a request does not say."""
    max_samples: int = 64
    """Most answers that one `Sample` may ask for."""
    max_continuations: int = 256
    """Most continuations that one `Score` may ask for."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Where and how it listens."""

    def __post_init__(self) -> None:
        for name in ("max_samples", "max_continuations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
