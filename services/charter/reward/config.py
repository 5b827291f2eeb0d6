"""What the reward service serves, and how its model learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from charter.errors import ConfigError
from charter.feedback.scores import ScoreRule
from charter.finetune.config import TuningConfig
from charter.rpc import ServerConfig


@dataclass(frozen=True, slots=True)
class WindowConfig:
    """Which labels a round sees."""

    newest: int = 4096
    """The newest labels of training prompts: what the policy says now."""
    replay: int = 1024
    """Older ones, drawn anew in each round, so that what was learned stays."""
    heldout: int = 1024
    """The newest labels of held-out prompts, on which models are measured and compared."""
    heldout_share: float = 0.1
    """Share of the prompts that no model is ever trained on, by a hash of the prompt's id."""
    reference: int = 128
    """The first held-out labels, whose answers set the mean and deviation of scores and the zero of drift."""

    def __post_init__(self) -> None:
        if self.newest < 1 or self.replay < 0 or self.heldout < 1 or self.reference < 2:
            raise ConfigError(f"{self} cannot work: newest and heldout at least 1, replay 0, reference 2")
        if not 0 < self.heldout_share < 1:
            raise ConfigError(f"heldout_share is {self.heldout_share}; give a share above 0 and below 1")


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """When rounds begin."""

    first: int = 512
    """Labels before the first round."""
    every: int = 1024
    """New labels before each further one."""
    min_heldout: int = 32
    """Held-out labels before the first round; fewer measure nothing."""
    renewal_epochs: float = 1.0
    """Passes over its labels of a round that goes on from a model in force; of one that begins anew,
    `tuning.epochs`. Fresh labels are worth the more the sooner they count."""
    catch_up: bool = False
    """After labels came faster than rounds: train every round that was missed, so that the same log always
    gives the same models, or (False) go on with the newest labels at once."""

    def __post_init__(self) -> None:
        if self.first < 2 or self.every < 1 or self.min_heldout < 2:
            raise ConfigError(f"{self} cannot work: first and min_heldout at least 2, every at least 1")
        if not self.renewal_epochs > 0:
            raise ConfigError(f"renewal_epochs is {self.renewal_epochs}; give a number above 0")


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """Pairs that nobody labelled: an answer that was preferred against a spoilt copy of it.

    They use no knowledge of the world, only that an answer fits its own prompt better than another's, and
    that it is better whole than shuffled. The judge's own pairs seldom show this, so a reward model is blind
    there, and the policy drifts to where it is blind. Each share is of the training labels; 0: none of it.
    """

    mismatched: float = 0.15
    """The loser is the answer to another prompt, the most similar of a few."""
    candidates: int = 8
    """Answers to other prompts among which one is looked for, for these two."""
    grafted: float = 0.4
    """One passage of the loser comes from another answer of the same form: a reason that fits elsewhere, say.
    Without it a model may like a passage wherever it stands, because good answers often hold it."""
    replaced: float = 0.1
    """A few words of the loser come from another answer."""
    swapped: float = 0.05
    """Two parts of the loser changed places."""
    repeated: float = 0.05
    """A part of the loser is there twice, in place of another."""
    dropped: float = 0.0
    """A part of the loser is missing. Off: what is missing may be a flourish."""
    confident: float = 0.5
    """Only the preferred answers of this share of the labels are used, those that the judge was surest of."""
    target: float = 0.9
    """Probability that the whole answer is better; below 1, as a spoilt copy may still be good. Nearer to the
    clamp of labels a model agrees better with the judge, and guards worse against what it never judged."""

    def __post_init__(self) -> None:
        shares = (self.mismatched, self.grafted, self.replaced, self.swapped, self.repeated, self.dropped)
        if min(shares) < 0 or not 0 < self.confident <= 1 or self.candidates < 1:
            raise ConfigError(
                f"{self} cannot work: shares 0 or more, confident above 0, candidates at least 1"
            )
        if not 0.5 < self.target <= 1:
            raise ConfigError(f"augment.target is {self.target}; give a probability above 0.5")


@dataclass(frozen=True, slots=True)
class PromotionConfig:
    """When a round's model comes into force. See `charter.reward.promotion`."""

    margin: float = 0.01
    """Held-out accuracies closer than this are a tie, which the held-out loss decides."""
    errors: float = 1.0
    """And so are those closer than so many standard errors of their difference."""
    min_accuracy: float = 0.55
    """A model below this is not used at all."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 0.5 or not 0 <= self.min_accuracy <= 1 or self.errors < 0:
            raise ConfigError(
                f"{self} cannot work: margin from 0 to 0.5, min_accuracy a share, errors 0 or more"
            )


@dataclass(frozen=True, slots=True)
class LearnerConfig:
    """The process that trains."""

    threads: int = 0
    """Threads of torch; 0: as many as it likes."""
    niceness: int = 5
    """Added to the process's niceness, so that scoring goes first."""
    attempts: int = 3
    """Times that a round is begun before it is given up."""
    patience_s: float = 30.0
    """After a full disk, how long until a round is tried again."""


def _tuning() -> TuningConfig:
    return TuningConfig(learning_rate=3e-4, epochs=1.0, batch_size=32)


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Configuration of a reward server."""

    init: str = "seed"
    """Checkpoint that the first round starts from: the SL-CAI checkpoint, or the judge's; `seed`, a folder or
    a hub id. A folder of a reward model that this service wrote is in force at once."""
    folder: Path = Path(".charter/reward")
    """Labels and rounds."""
    registry: str = ""
    """Registry of checkpoints that models in force are written to; empty: `models` in the folder."""
    bus: str = ""
    """URI of the bus whose topic `preferences` is read; empty: nothing is learned."""
    group: str = "reward"
    """Consumer group of that topic."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """When rounds begin."""
    window: WindowConfig = field(default_factory=WindowConfig)
    """Which labels a round sees."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Pairs that nobody labelled."""
    tuning: TuningConfig = field(default_factory=_tuning)
    """The training of a round."""
    promotion: PromotionConfig = field(default_factory=PromotionConfig)
    """When a round's model comes into force."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The process that trains."""
    rule: ScoreRule = field(default_factory=ScoreRule)
    """What of a score is not left to the model."""
    batch_tokens: int = 8192
    """Tokens that are scored at once, padding included."""
    max_answers: int = 4096
    """Most answers of one `Score`."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Where and how it listens."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_answers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
