"""How much the circle learns from, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from charter.critic.config import Writing
from charter.errors import ConfigError
from charter.finetune.config import TuningConfig
from charter.judge.config import Judging
from charter.prompts.config import PromptsConfig, Weights
from charter.publisher.config import GateConfig
from charter.redteam.config import RedTeamConfig
from charter.reward.config import LearnerConfig, PromotionConfig, ScheduleConfig, WindowConfig
from charter.sampler.config import SamplerConfig
from charter.sft.config import OwnAnswers, SftConfig
from charter.trainer.config import PPOConfig, WatchConfig


@dataclass(frozen=True, slots=True)
class PromptSources:
    """What the policy is asked. Each is what `charter redteam --prompts` takes, or empty for none."""

    red_team: tuple[str, ...] = ("seed:4000:harmful",)
    """Prompts meant to bring out what is wrong."""
    helpful: tuple[str, ...] = ("seed:8000:plain,lookalike",)
    """Prompts that should be helped."""


def _ppo() -> PPOConfig:
    return PPOConfig(
        learning_rate=1e-4,
        value_learning_rate=5e-4,
        value_warmup_steps=3,
        epochs=2,
        micro_batch_tokens=4096,
        # Harm goes about as fast as at 0.05, and demos end nearer to SL-CAI: 0.4 to 1.0 nats an answer, not
        # 0.8 to 1.8, of which those above 1.3 had drifted to wrong reasons.
        beta=0.1,
    )


@dataclass(frozen=True, slots=True)
class CircleConfig:
    """Everything that the learning half can be told; the defaults suit the seed model on two cores."""

    revisions: int = 1000
    """Prompts whose answers are revised, red-team and helpful ones in proportion to `red_team_share`."""
    red_team_share: float = 0.5
    """Share of red-team prompts among those that are revised, and among those of the first pairs."""
    first_pairs: int = 960
    """Pairs of SL-CAI's answers that the first reward model learns from."""
    steps: int = 0
    """PPO steps of the lineage; 0: without end."""
    labels_per_step: int = 32
    """Labelled pairs of a PPO step."""
    checkpoint_every: int = 2
    """PPO steps between two candidates; the sampler's policy is never further behind than that and the
    staleness bound together."""
    keep: int = 20
    """Newest checkpoints of PPO, and newest that served, whose weights are kept; 0: all. Manifests stay."""
    concurrency: int = 64
    """Questions that are put to the engines at once."""
    niceness: int = 0
    """Added to the niceness of the processes that learn."""
    threads: int = 1
    """Torch's threads in each process."""
    seed: int = 0
    prompts: PromptSources = field(default_factory=PromptSources)
    mixture: PromptsConfig = field(
        default_factory=lambda: PromptsConfig(
            weights=Weights(red_team=0.5, helpful=0.5), backlog=64, batch=32
        )
    )
    """How prompts are drawn while PPO runs."""
    redteam: RedTeamConfig = field(
        default_factory=lambda: RedTeamConfig(rounds=1, max_tokens=96, concurrency=64)
    )
    writing: Writing = field(
        default_factory=lambda: Writing(temperature=1.0, critique_tokens=96, revision_tokens=96)
    )
    """How the circle's own critic writes. At 1 some revisions fail, which leaves something for PPO to do."""
    sft: SftConfig = field(
        default_factory=lambda: SftConfig(
            own=OwnAnswers(max_tokens=96), tuning=TuningConfig(learning_rate=4e-4)
        )
    )
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    judging: Judging = field(default_factory=Judging)
    reward_schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(first=960, every=256))
    """When the reward model is made and renewed; the first round waits for `first_pairs`."""
    reward_window: WindowConfig = field(default_factory=lambda: WindowConfig(newest=512, replay=384))
    reward_from_feedback: bool = True
    """The first reward model starts from the frozen model that gives feedback, which knows the principles,
    where its weights are on this machine; otherwise, and with False, from SL-CAI."""
    reward_tuning: TuningConfig = field(
        default_factory=lambda: TuningConfig(learning_rate=3e-4, epochs=3.0, batch_size=32)
    )
    reward_promotion: PromotionConfig = field(default_factory=PromotionConfig)
    reward_learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(threads=1, niceness=0))
    ppo: PPOConfig = field(default_factory=_ppo)
    watch: WatchConfig = field(default_factory=WatchConfig)
    gate: GateConfig = field(default_factory=lambda: GateConfig(concurrency=6))
    """Few questions in flight: the gate shares critic and judge with the labels that PPO waits for."""

    def __post_init__(self) -> None:
        if min(self.revisions, self.first_pairs, self.labels_per_step, self.checkpoint_every) < 1:
            raise ConfigError("revisions, first_pairs, labels_per_step, checkpoint_every must be at least 1")
        if not 0 <= self.red_team_share <= 1:
            raise ConfigError(f"red_team_share is {self.red_team_share}; give a share between 0 and 1")
        if min(self.steps, self.keep, self.niceness) < 0 or min(self.threads, self.concurrency) < 1:
            raise ConfigError("steps, keep, niceness must be 0 or more, threads, concurrency at least 1")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the circle works and with whom. Made by whoever starts it."""

    state: Path
    """Folder of everything that is kept."""
    bus: str
    """URI of the bus."""
    model: str
    """Folder of the weights that learning starts from."""
    feedback_model: str
    """URI of the frozen model of critic and judge."""
    constitution: str
    """Name or file."""
    policies: tuple[str, ...] = ()
    """host:port of the policy servers that serve users; empty: the circle starts one of its own."""

    @property
    def registry(self) -> Path:
        """Of the checkpoints."""
        return self.state / "checkpoints"
