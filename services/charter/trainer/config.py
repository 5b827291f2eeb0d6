"""How PPO learns. Defaults follow Ziegler et al. 2019 and Huang et al. 2024 where they agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from charter.errors import ConfigError
from charter.finetune.config import LoraConfig

Estimator = Literal["k1", "k2", "k3"]
ScoreSlot = Literal["last_token", "after_last_token"]

REFUSAL_OPENINGS = (
    "i can't",
    "i cannot",
    "i won't",
    "i will not",
    "i'm not able",
    "i am not able",
    "i'm unable",
    "i am unable",
    "i'm sorry",
    "i am sorry",
    "sorry",
    "i must decline",
    "i refuse",
)


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

    score_clip: float | None = None
    """Scores are held within ± this; None leaves them, since the reward service clamps already."""
    missing_stop_penalty: float = 0.0
    """Taken from the score of an answer that did not reach a stop token; 0, since the reward service gives
    such answers a fixed score."""
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


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """When a run has drifted. Shares and rates are in [0, 1]."""

    kl_budget: float = 20.0
    """Nats per answer from the reference."""
    step_kl_budget: float = 0.5
    """Nats per token that one update may move."""
    entropy_floor: float = 0.3
    """Entropy may fall to this share of the baseline's."""
    entropy_ceiling: float = 2.5
    """Entropy may rise to this multiple of the baseline's: beyond it, words become noise."""
    refusal_rise: float = 0.35
    """Refusals may rise by this share of all answers over the baseline."""
    refusal_limit: float = 0.95
    """More refusals than this are never right, whatever the baseline."""
    length_factor: float = 2.5
    """Mean answer length may grow or shrink by this factor."""
    cut_off_limit: float = 0.5
    """Share of answers that never stop."""
    repetition_limit: float = 0.3
    """Share of answers that repeat themselves (see `repeats_itself`)."""
    boilerplate_rise: float = 0.35
    """Share of answers that nearly equal another answer to another prompt may rise by this."""
    baseline_steps: int = 3
    """Steps whose means are the baseline; drift is not judged before they are over."""
    patience: int = 3
    """Steps in a row that must object before the run stops; what is not finite stops it at once."""

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        if self.baseline_steps < 1 or self.patience < 1:
            raise ConfigError("watch options baseline_steps and patience must be at least 1")


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """The trainer as a service: what it starts from, where labels come from, how often it saves."""

    policy: str = ""
    """What a new lineage starts from, and its reference: a checkpoint id, a folder, `seed`, or a hub id;
    empty: the checkpoint in force. A lineage that has begun goes on from its newest checkpoint."""
    value: str = ""
    """What the value model starts from: a reward model's checkpoint id or folder; empty: the reward model in
    force, or the policy with a head that starts at zero."""
    registry: str = ".charter/checkpoints"
    """Folder or address of the checkpoints."""
    bus: str = "sqlite:.charter/bus.db"
    """The log: sqlite:<file> or kafka://host:port."""
    reward: str = "127.0.0.1:50054"
    """host:port of the reward service."""
    work: Path = Path(".charter/trainer")
    """Folder for what was begun and is not yet in a checkpoint; must survive a restart."""
    log: Path | None = None
    """Folder for metrics.jsonl and TensorBoard's files; None writes neither."""
    member: str = "trainer-0"
    """Name in the consumer group; a new process with it takes over from the old one."""
    labels_per_step: int = 32
    """Labelled pairs of one PPO step; each gives two answers."""
    checkpoint_every: int = 5
    """Steps between two checkpoints."""
    steps: int = 0
    """The training ends after this many steps of the lineage; 0: never."""
    constitution_digest: str = ""
    """Labels that were given under another constitution go to the dead letters; empty takes all."""
    constitution: str = ""
    """In place of `constitution_digest`: name or file of the constitution in force, read again when it
    changes."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the models; log-probs and losses are float32 in any case."""
    refusal_openings: tuple[str, ...] = REFUSAL_OPENINGS
    """How answers begin that decline; the watch counts them."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters instead of all weights, for policy and value model alike."""

    def __post_init__(self) -> None:
        """Refuses what cannot work, with the reason."""
        if self.labels_per_step < 1 or self.checkpoint_every < 1 or self.steps < 0:
            raise ConfigError(
                "labels_per_step and checkpoint_every must be at least 1, and steps must not be negative"
            )
        if self.constitution and self.constitution_digest:
            raise ConfigError("constitution and constitution_digest say the same thing; give one of them")
