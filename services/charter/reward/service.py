"""The life of the reward model: labels come in, rounds begin when due, better models come into force.

One event loop uses it. Everything that takes long runs in threads or in the learner's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from charter.errors import BackendUnavailable, CharterError, CheckpointError
from charter.finetune.checkpoints import Vocabulary, load_vocabulary
from charter.reward import network
from charter.reward.config import RewardConfig
from charter.reward.labels import LabelStore
from charter.reward.learner import Learner, LearnerDiedError, Tell
from charter.reward.metrics import RewardMetrics
from charter.reward.pairs import Pair
from charter.reward.promotion import decide
from charter.reward.rounds import RECORD, Job
from charter.reward.scorer import Scorer, open_scorer
from charter.reward.store import ModelStore, State
from charter.reward.window import is_heldout, next_round
from charter.telemetry.logs import get_logger

log = get_logger(__name__)


class Phase(StrEnum):
    """What the service is about."""

    COLLECTING = "collecting"
    TRAINING = "training"
    EVALUATING = "evaluating"
    IN_FORCE = "in_force"
    """The last round's model came into force."""
    KEPT_OLD = "kept_old"
    """The last round's model did not."""


@dataclass(frozen=True, slots=True)
class News:
    """A moment of a round."""

    phase: Phase
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    heldout_accuracy: float = 0.0
    calibration_error: float = 0.0
    message: str = ""


class Trains(Protocol):
    """What does rounds; see `Learner`, which does them in a process of its own."""

    def arm(self) -> None:
        """Forgets earlier calls of `stop`; before a round."""
        ...

    def train(self, job: Job, target: Path, tell: Tell) -> bool:
        """Does a round; False when `stop` ended it. Raises `LearnerDiedError` if it may be tried again."""
        ...

    def stop(self) -> None:
        """Ends the round under way."""
        ...

    def close(self) -> None:
        """Releases what is held."""
        ...


class RewardModel:
    """The reward model in force and its learning. Made by `open_reward_model`."""

    def __init__(
        self,
        config: RewardConfig,
        vocabulary: Vocabulary,
        init: Path,
        models: ModelStore,
        labels: LabelStore,
        metrics: RewardMetrics,
        learner: Trains,
    ) -> None:
        self.vocabulary = vocabulary
        self._config = config
        self._init = init
        self._models = models
        self._labels = labels
        self._metrics = metrics
        self._learner = learner
        self._scorer: Scorer | None = None
        self._news = News(Phase.COLLECTING)
        self._followers: set[asyncio.Queue[News | None]] = set()
        self._wake = asyncio.Event()
        self._training = False
        self._asked = False
        self._task: asyncio.Task[None] | None = None

    # What others ask --------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """After the last round."""
        return self._models.state

    @property
    def news(self) -> News:
        """The latest."""
        return self._news

    @property
    def training(self) -> bool:
        """Whether a round is under way."""
        return self._training

    @property
    def current(self) -> Scorer | None:
        """The model in force, if there is one."""
        return self._scorer

    def scorer(self) -> Scorer:
        """The model in force. Raises `BackendUnavailable` before there is one."""
        if self._scorer is None:
            raise BackendUnavailable(
                f"no reward model is in force yet: {self._shortage() or 'its first round is under way'}; "
                "scores can be had when the first round has ended"
            )
        return self._scorer

    def add(self, pair: Pair) -> bool:
        """Stores a label, and begins a round if one is due; from any thread. Says whether it was new."""
        heldout = is_heldout(pair.prompt_id, self._config.window.heldout_share)
        return self._labels.add(pair, heldout)

    def labels_arrived(self) -> None:
        """Looks whether a round is due; called by the loop that stores labels."""
        self._wake.set()

    def labels_seen(self) -> int:
        """How many labels are stored."""
        return self._labels.count()

    # Learning ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Loads the model in force and goes on with a round that was cut off."""
        folder = self._models.model
        if folder is not None:
            self._scorer = await asyncio.to_thread(
                open_scorer, folder, self._config.rule, self._config.batch_tokens
            )
        self._metrics.observe(self.state)
        self._show_labels()
        self._task = asyncio.create_task(self._live())

    async def close(self) -> None:
        """Ends a round under way; it is done again after the next start. Safe to repeat."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.to_thread(self._learner.close)
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for follower in self._followers:
            follower.put_nowait(None)
        await asyncio.to_thread(self._labels.close)

    async def train(self) -> AsyncGenerator[News]:
        """Begins a round on the labels so far, or follows the one under way; automatic rounds go on."""
        if self.state.paused:
            self._models.change(paused=False)
        if not self._training:
            shortage = self._shortage()
            if shortage:
                yield News(Phase.COLLECTING, message=shortage)
                return
            self._asked = True
        with self._following() as news:
            self._wake.set()
            while (item := await news.get()) is not None:
                yield item

    async def follow(self) -> AsyncGenerator[News]:
        """The round under way until it ends; the latest news alone when there is none."""
        if not self._training:
            yield self._news
            return
        with self._following() as news:
            yield self._news
            while (item := await news.get()) is not None:
                yield item

    async def stop(self) -> bool:
        """Ends the round under way and begins no further one by itself; says whether there was one."""
        was_training = self._training
        self._models.change(paused=True)
        self._asked = False
        if was_training:
            await asyncio.to_thread(self._learner.stop)
        return was_training

    @contextlib.contextmanager
    def _following(self) -> Iterator[asyncio.Queue[News | None]]:
        news: asyncio.Queue[News | None] = asyncio.Queue()
        self._followers.add(news)
        try:
            yield news
        finally:
            self._followers.discard(news)

    async def _live(self) -> None:
        while True:
            try:
                job = self._models.job or await asyncio.to_thread(self._due)
                if job is not None:
                    await self._round(job)
                    continue
                await self._wake.wait()
                self._wake.clear()
            except Exception as error:  # the disk, most often: the model in force stays, labels still come
                log.exception("the round cannot be kept; it is tried again", error=str(error))
                self._end(News(Phase.KEPT_OLD, message=str(error)))
                await asyncio.sleep(self._config.learner.patience_s)

    def _due(self) -> Job | None:
        """The job of the next round, written down."""
        self._show_labels()
        labels, state = self._labels.count(), self.state
        asked, self._asked = self._asked, False
        upto: int | None = labels
        if not asked:
            heldout = self._labels.count(heldout=True)
            upto = None if state.paused else next_round(state.trained, labels, heldout, self._config.schedule)
        if upto is None or self._too_few(upto):
            return None
        folder = self._models.model
        job = Job(state.round + 1, upto, str(folder or self._init), folder is not None)
        self._models.begin(job)
        return job

    async def _round(self, job: Job) -> None:
        self._training = True
        self._tell(News(Phase.TRAINING, message=f"round {job.number} on {job.upto} labels"))
        log.info("reward round begins", round=job.number, labels=job.upto, base=job.base)
        try:
            if not await self._learned(job):
                self._models.drop(job)
                self._metrics.rounds.labels("stopped").inc()
                self._end(News(Phase.COLLECTING, message=f"round {job.number} was stopped"))
                return
            await self._settle(job)
        except CheckpointError:
            raise
        except CharterError as error:
            log.error("reward round failed", round=job.number, error=str(error))
            self._models.give_up(job, str(error))
            self._metrics.rounds.labels("failed").inc()
            self._end(News(Phase.KEPT_OLD, message=str(error)))
        finally:
            self._training = False

    async def _learned(self, job: Job) -> bool:
        """Has the round done; False when it was stopped. A learner that dies is started again, some times."""
        loop = asyncio.get_running_loop()

        def tell(phase: str, step: int, steps: int, loss: float) -> None:
            loop.call_soon_threadsafe(self._tell, News(Phase(phase), step, steps, loss))

        self._learner.arm()
        for attempt in range(1, self._config.learner.attempts + 1):
            if self._models.findings(job) is not None:
                return True
            try:
                return await asyncio.to_thread(self._learner.train, job, self._models.target(job), tell)
            except LearnerDiedError as error:
                log.error("the learner died", round=job.number, attempt=attempt, error=str(error))
                if attempt == self._config.learner.attempts:
                    raise
        raise AssertionError

    async def _settle(self, job: Job) -> None:
        found = self._models.findings(job)
        if found is None:
            raise CheckpointError(f"{self._models.target(job)} is gone; the round is done again")
        before = found.in_force.quality if found.in_force else None
        verdict = decide(found.candidate.quality, before, found.error, self._config.promotion)
        scorer: Scorer | None = None
        if verdict.promoted:  # it has to load before anything says that it is in force
            made = self._models.candidate(job)
            scorer = await asyncio.to_thread(open_scorer, made, self._config.rule, self._config.batch_tokens)
        await asyncio.to_thread(self._models.settle, found, verdict)
        if scorer is not None:
            scorer.rename(self.state.in_force)
            self._scorer = scorer
        phase = Phase.IN_FORCE if verdict.promoted else Phase.KEPT_OLD
        self._metrics.rounds.labels(phase.value).inc()
        self._metrics.observe(self.state)
        quality = found.candidate.quality
        log.info("reward round ended", round=job.number, outcome=phase.value, reason=verdict.reason)
        self._end(
            News(
                phase,
                heldout_accuracy=quality.accuracy,
                calibration_error=quality.calibration_error,
                message=verdict.reason,
            )
        )

    def _tell(self, news: News) -> None:
        self._news = news
        for follower in self._followers:
            follower.put_nowait(news)

    def _end(self, news: News) -> None:
        """The last news of a round."""
        self._training = False
        self._tell(news)
        for follower in self._followers:
            follower.put_nowait(None)

    def _shortage(self) -> str:
        """What is missing for a round, empty when nothing is."""
        return self._too_few(self._labels.count())

    def _too_few(self, upto: int) -> str:
        schedule = self._config.schedule
        heldout = self._labels.heldout_among(upto)
        if heldout >= schedule.min_heldout and upto > heldout:
            return ""
        return (
            f"{upto} labels so far, {heldout} of them held out; a round needs {schedule.min_heldout} "
            f"held-out ones (about {round(schedule.min_heldout / self._config.window.heldout_share)} labels)"
        )

    def _show_labels(self) -> None:
        for split, heldout in (("training", False), ("heldout", True)):
            self._metrics.labels.labels(split).set(self._labels.count(heldout))


def open_reward_model(
    config: RewardConfig, metrics: RewardMetrics, learner: Trains | None = None
) -> RewardModel:
    """Reads the folder and the tokenizer. Takes seconds; raises `CheckpointError`."""
    models = ModelStore(config.folder, config.registry)
    init = _init_folder(config.init)
    vocabulary = load_vocabulary(models.model or init)
    known = models.state.tokenizer_digest
    if known and known != vocabulary.digest:
        raise CheckpointError(
            f"{config.folder} holds labels of the tokenizer {known[:12]}, and {vocabulary.folder} has "
            f"{vocabulary.digest[:12]}; name another folder for the labels of another model family"
        )
    if not known:
        models.change(tokenizer_digest=vocabulary.digest)
    if models.model is None and (init / RECORD).is_file() and network.is_reward_model(init):
        models.adopt(init)
    labels = LabelStore(config.folder / "labels.db")
    return RewardModel(config, vocabulary, init, models, labels, metrics, learner or Learner(config))


def _init_folder(init: str) -> Path:
    from charter.lm.checkpoint import checkpoint_folder

    if init == "seed":
        from charter.seedmodel import WEIGHTS

        return WEIGHTS
    return checkpoint_folder(init.removeprefix("local:"))
