"""How weights are tuned: the options of a training run that are the same for every objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from charter.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), merged into the weights when the run ends."""

    rank: int = 0
    """Rank of the adapters; 0 tunes all weights."""
    alpha: float = 0.0
    """Scale of the adapters; 0: twice the rank."""
    dropout: float = 0.0
    """Dropout inside the adapters."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get adapters."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(f"lora needs rank >= 0, alpha >= 0 and 0 <= dropout < 1, not {self}")


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """One training run. The defaults suit the seed model on a CPU; a 7B model wants a rate near 1e-5."""

    learning_rate: float = 4e-4
    """Peak rate of AdamW."""
    epochs: float = 2.0
    """Passes over the examples."""
    batch_size: int = 32
    """Examples of one optimizer step, over all devices."""
    micro_batch_size: int = 0
    """Examples of one forward pass on one device; 0: the whole batch. It changes memory, not the result."""
    warmup_share: float = 0.05
    """Share of the steps in which the rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """How the rate falls afterwards."""
    weight_decay: float = 0.0
    """Of AdamW."""
    betas: tuple[float, ...] = (0.9, 0.98)
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; bfloat16 on accelerators."""
    activation_checkpointing: bool = False
    """Trades a second forward pass for memory."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters instead of all weights."""
    seed: int = 0
    """Order of the examples, and the weights of new heads and adapters."""
    log_every: int = 10
    """Steps between two entries in TensorBoard."""
    save_every: int = 0
    """Steps between two saves from which a killed run goes on; 0: it starts again."""

    def __post_init__(self) -> None:
        positive = ("learning_rate", "epochs", "batch_size", "max_grad_norm", "log_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a number above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas is {self.betas}; give two numbers from 0 to below 1")
        if not 0 <= self.warmup_share <= 1:
            raise ConfigError(f"warmup_share is {self.warmup_share}; give a share between 0 and 1")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
