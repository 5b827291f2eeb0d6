"""Labels in, checkpoints out: the trainer's part of the circle.

A step is: take the next labels, have their answers scored, write the plan down, learn, move the group's
position (samplers are paced by it). What counts is the position in the newest checkpoint: after a crash the
steps behind it are repeated by their plans, so each label is learned from once in the lineage that survives.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from charter.bus import Bus, Consumer, Outgoing
from charter.bus.worker import Backoff
from charter.errors import BackendError, BackendUnavailable, Fenced, Overloaded, TrainingStopped
from charter.registry import Manifest, Status
from charter.registry.events import announcement
from charter.telemetry.logs import get_logger
from charter.trainer.algorithm.metrics import UpdateMetrics
from charter.trainer.labels import GROUP, PREFERENCES, Label, Take, take, take_again
from charter.trainer.plan import Plan, Plans
from charter.trainer.service import Trainer

_log = get_logger(__name__)
_T = TypeVar("_T")
_IDLE_S = 0.25
_REJOIN_S = 60.0
"""How long a trainer tries to get its partitions back; longer than a session."""


class Rewards(Protocol):
    """Scores answers; `charter.trainer.rewards.RewardClient` asks the reward service."""

    async def score(
        self, answers: Sequence[tuple[Sequence[int], Sequence[int]]], tokenizer_digest: str
    ) -> tuple[list[float], str]:
        """Scores of prompts and answers, and the reward model's digest."""
        ...


class TrainerWorker:
    """Reads labels and teaches, until it is stopped, has done its steps, or the run goes wrong."""

    def __init__(
        self,
        bus: Bus,
        trainer: Trainer,
        rewards: Rewards,
        *,
        report: Callable[[UpdateMetrics], None] | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self._bus = bus
        self._trainer = trainer
        self._rewards = rewards
        self._config = trainer.config
        self._plans = Plans(self._config.work / "plans")
        self._log = _MetricsLog(self._config.log)
        self._report = report
        self._backoff = backoff or Backoff()
        self._stopping = asyncio.Event()
        self._torch = ThreadPoolExecutor(1, "trainer")
        self._last: UpdateMetrics | None = None
        self._unfit = 0

    def stop(self) -> None:
        """Finishes the step in hand, saves, and lets `run` return; from the event loop's thread."""
        self._stopping.set()

    async def run(self) -> None:
        """Raises `TrainingStopped` when the run drifts, `Fenced` when another trainer took over."""
        consumer = await self._patiently(
            lambda: self._bus.consumer(GROUP, [PREFERENCES], self._config.member)
        )
        try:
            await self._announce_resumed(consumer)
            while not self._stopping.is_set() and not self._done():
                taken = await self._next()
                if taken is not None:
                    await self._step(consumer, *taken)
            if self._trainer.has_unsaved:
                await self._save(consumer)
        finally:
            await asyncio.shield(asyncio.to_thread(consumer.close))
            await self._in_torch(self._trainer.finish)
            self._torch.shutdown()
            self._log.close()

    def _done(self) -> bool:
        return bool(self._config.steps) and self._trainer.step >= self._config.steps

    # A step

    async def _next(self) -> tuple[Take, Plan] | None:
        """What the next step learns from: as planned before, or the next labels of the log."""
        trainer = self._trainer
        limits = trainer.limits
        plan = await asyncio.to_thread(self._plans.find, trainer.parent, trainer.step)
        if plan is not None:
            places, positions = plan.places, trainer.positions
            then = replace(limits, constitution_digest=plan.constitution)
            again = await self._patiently(lambda: take_again(self._bus, places, positions, then))
            return again, plan
        taken = await self._patiently(
            lambda: take(self._bus, trainer.positions, self._config.labels_per_step, limits)
        )
        if len(taken.labels) < self._config.labels_per_step:
            self._tell_unfit(taken)
            await self._sleep(_IDLE_S)
            return None
        self._unfit = 0
        if trainer.limits != limits:  # another constitution meanwhile: look at the labels again
            return None
        scored = await self._scored(taken.labels, limits.tokenizer_digest)
        if scored is None:
            return None
        scores, digest = scored
        plan = Plan(
            trainer.parent,
            trainer.step,
            tuple((r.partition, r.offset) for r in taken.records),
            {str(p): o for p, o in taken.positions.items()},
            tuple(scores),
            digest,
            limits.constitution_digest,
        )
        await asyncio.to_thread(self._plans.write, plan)
        return taken, plan

    def _tell_unfit(self, taken: Take) -> None:
        """Labels that cannot teach are buried with the next step; while none is in sight, this says why."""
        if len(taken.buried) > 2 * self._unfit:
            self._unfit = len(taken.buried)
            _log.warning(
                "labels on the log cannot teach; training waits for others",
                unfit=self._unfit,
                fit=len(taken.labels),
                wanted=self._config.labels_per_step,
                error=taken.buried[-1].error,
            )

    async def _scored(
        self, labels: Sequence[Label], tokenizer_digest: str
    ) -> tuple[list[tuple[float, float]], str] | None:
        """Waits for a reward model that has disappeared; None when stopped meanwhile."""
        answers = [(r.prompt_ids, r.answer_ids) for label in labels for r in label.rollouts]
        failures = 0
        while not self._stopping.is_set():
            try:
                scores, digest = await self._rewards.score(answers, tokenizer_digest)
            except (BackendUnavailable, Overloaded) as error:
                failures += 1
                _log.warning("the reward model is away; training waits", failures=failures, error=str(error))
                await self._sleep(self._backoff.delay(failures))
                continue
            if len(scores) != len(answers):
                raise BackendError(f"the reward service gave {len(scores)} scores for {len(answers)} answers")
            self._check(labels, scores, digest)
            return list(zip(scores[::2], scores[1::2], strict=True)), digest
        return None

    def _check(self, labels: Sequence[Label], scores: Sequence[float], digest: str) -> None:
        """Before the plan is written: a plan with such a score would stop every run after this one, too."""
        broken = [i for i, score in enumerate(scores) if not math.isfinite(score)]
        if broken:
            label = labels[broken[0] // 2].event.preference_id
            raise TrainingStopped(
                f"training stopped itself at step {self._trainer.step}: the reward model {digest[:12]} gave "
                f"{len(broken)} of {len(scores)} answers a score that is no number ({scores[broken[0]]} for "
                f"label {label!r}); start the reward service again from a good model, then the training. "
                "Nothing was learned from these labels, and the last good checkpoint stays in force"
            )

    async def _step(self, consumer: Consumer, taken: Take, plan: Plan) -> None:
        trainer = self._trainer
        metrics = await self._in_torch(lambda: trainer.learn(taken, plan.scores, plan.reward_digest))
        self._last = metrics
        self._log.write(metrics)
        if self._report:
            self._report(metrics)
        await self._move(consumer, taken)
        if trainer.step % self._config.checkpoint_every == 0 or self._done():
            await self._save(consumer)

    async def _move(self, consumer: Consumer, taken: Take, publish: Sequence[Outgoing] = ()) -> None:
        """The group's position, and the burials, as one act. Raises `Fenced` when another trainer reads on.

        A trainer that was stopped, cut off or still joining finds its place in the group taken; polling takes
        it back where nobody else holds it. Its step counts in any case: by the checkpoint, not by the group.
        """

        def commit() -> None:
            consumer.poll(1, 0.0)  # a sign of life; what to read is decided by `take`
            consumer.commit(taken.records, publish, taken.buried)

        for letter in taken.buried:
            _log.error("a label goes to the dead letters", error=letter.error)
        give_up: float | None = None
        while True:
            try:
                return await self._patiently(commit)
            except Fenced as error:
                give_up = give_up or time.monotonic() + _REJOIN_S
                if time.monotonic() >= give_up:
                    raise
                _log.warning("the position cannot be moved yet", group=GROUP, reason=str(error))
            await self._patiently(lambda: consumer.poll(1, 1.0))

    # Checkpoints

    async def _save(self, consumer: Consumer) -> Manifest:
        last = self._last
        training = {"training": last.as_dict() if last else {}}
        training["training"].pop("seconds", None)  # the same learning gives the same manifest
        manifest = await self._in_torch(lambda: self._trainer.checkpoint(training))
        await self._announce(manifest, consumer)
        await asyncio.to_thread(self._plans.forget_before, self._trainer.step)
        _log.info("checkpoint written", checkpoint=manifest.id, step=manifest.facts.step)
        return manifest

    async def _announce(self, manifest: Manifest, consumer: Consumer) -> None:
        registry = self._trainer.registry
        change = registry.status(manifest.id)
        if change is not None and change.status is Status.CANDIDATE:
            message = announcement(manifest, registry.root, change)
            await self._patiently(lambda: self._bus.publish([message]))

    async def _announce_resumed(self, consumer: Consumer) -> None:
        """A crash may have come between writing a checkpoint and telling about it; telling twice is safe."""
        manifest = self._trainer.resumed_from
        await self._patiently(lambda: consumer.poll(1, 1.0))
        if manifest is None:
            return
        registry = self._trainer.registry
        if registry.status(manifest.id) is None:
            registry.set_status(manifest.id, Status.CANDIDATE, "written by the trainer")
        await self._announce(manifest, consumer)

    # Waiting

    async def _in_torch(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._torch, call)

    async def _patiently(self, call: Callable[[], _T]) -> _T:
        failures = 0
        while True:
            try:
                return await asyncio.to_thread(call)
            except BackendUnavailable as error:
                failures += 1
                _log.warning("the log is unavailable", group=GROUP, failures=failures, error=str(error))
                await asyncio.sleep(self._backoff.delay(failures))

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return


class _MetricsLog:
    """metrics.jsonl, and TensorBoard's files where that is installed. A repeated step is a new line.

    A disk that refuses costs lines and a warning, never the run: what counts is in the checkpoints.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lines: Any = None
        self._board: Any = None
        self._warned = False
        if folder is None:
            return
        with self._spared():
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = (folder / "metrics.jsonl").open("ab", buffering=0)
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder))

    def write(self, metrics: UpdateMetrics) -> None:
        """One step."""
        record = metrics.as_dict()
        if self._lines:
            with self._spared():
                self._lines.write(f"{json.dumps(record)}\n".encode())
        if self._board:
            with self._spared():
                for name, value in record.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(f"ppo/{name}", value, metrics.step)

    def close(self) -> None:
        """Closes both."""
        for stream in (self._lines, self._board):
            if stream:
                with self._spared():
                    stream.close()

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                _log.warning(
                    "metrics cannot be written; training goes on without them",
                    folder=str(self._folder),
                    error=error.strerror or str(error),
                    remedy="make room on the disk",
                )
            self._warned = True
