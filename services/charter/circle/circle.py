"""The circle itself: which phase is due follows from what lies on the disk; a start goes on where it was."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from charter.bus import Bus, open_bus
from charter.bus.metrics import BusMetrics
from charter.bus.worker import WorkerOptions
from charter.circle import first_pairs, learning, servers
from charter.circle.config import CircleConfig, Places
from charter.circle.news import Kind, News, Phase, Tell
from charter.circle.partner import Partner
from charter.circle.prompts import Supply, prompt_source
from charter.circle.queues import watch_engines, watch_queues
from charter.circle.serving import Publishing, register_seed
from charter.lm.policy_client import PolicyModel
from charter.redteam.pipeline import Run
from charter.redteam.prompts import RedTeamPrompt
from charter.redteam.store import RunFolder
from charter.registry import Kind as CheckpointKind
from charter.registry import Manifest, Registry, Status
from charter.rpc.clients import CriticClient, JudgeClient
from charter.telemetry.logs import get_logger

log = get_logger(__name__)
T = TypeVar("T")

MEMBER, SAMPLER, JUDGE = "trainer-0", "sampler-0", "judge-0"
"""Members of their groups; with names, so that a circle that was killed takes its places back at once."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a bounded circle came to."""

    seed: str
    supervised: str
    last: str
    """The newest checkpoint that PPO wrote."""
    serving: str
    """The checkpoint that the gate left in force."""
    step: int


class Circle:
    """All of it in this process and its partner. `run` once; cancelling stops cleanly."""

    def __init__(self, config: CircleConfig, places: Places, tell: Tell, partner: Partner) -> None:
        """The partner stays its owner's to close."""
        self._config = config
        self._places = places
        self._tell = tell
        self._partner = partner
        self.registry = Registry(places.registry)

    async def run(self) -> Finished:
        """Goes through the phases that are not done yet; with `steps` 0, until it is cancelled.

        Raises `TrainingStopped` when PPO drifts; the last good checkpoint stays in force.
        """
        config, places = self._config, self._places
        self._phase(Phase.STARTING)
        places.state.mkdir(parents=True, exist_ok=True)
        supply = Supply(config)
        async with contextlib.AsyncExitStack() as stack:
            bus = stack.enter_context(open_bus(places.bus))
            seed = await asyncio.to_thread(register_seed, self.registry, places)
            where = await servers.start(config, places, stack)
            publishing = await stack.enter_async_context(
                Publishing(config, places, where, bus, self.registry, self._tell)
            )
            tuned = self._supervised() or await self._supervise(supply, bus, where, seed.id)
            await publishing.sampled_is(tuned.id)
            step = await self._reinforce(supply, bus, where, publishing, tuned.id)
            if config.steps:
                last = self._newest() or tuned
                await publishing.settled(last.id)
                serving = self.registry.serving()
                self._phase(Phase.DONE)
                return Finished(seed.id, tuned.id, last.id, serving.id if serving else "", step)
        raise AssertionError("without a number of steps it ends by being cancelled")

    def _phase(self, phase: Phase) -> None:
        log.info("phase", phase=phase.value)
        self._tell(News(Kind.PHASE, {"phase": phase}))

    def _progress(self, what: str, done: int, total: int, remark: str = "") -> None:
        self._tell(News(Kind.PROGRESS, {"what": what, "done": done, "total": total, "remark": remark}))

    # SL-CAI

    def _supervised(self) -> Manifest | None:
        return self._last_of(CheckpointKind.SFT)

    def _newest(self) -> Manifest | None:
        return self._last_of(CheckpointKind.RL)

    def _last_of(self, kind: CheckpointKind) -> Manifest | None:
        found = [m for m in self.registry.list() if m.facts.kind is kind]
        gone = {m.id for m in found if (c := self.registry.status(m.id)) and c.status is Status.ROLLED_BACK}
        found = [m for m in found if m.id not in gone]
        return max(found, key=lambda m: (m.facts.step, m.created_unix_ms)) if found else None

    async def _supervise(self, supply: Supply, bus: Bus, where: servers.Servers, seed: str) -> Manifest:
        config = self._config
        self._phase(Phase.REVISING)
        folder = self._places.state / "revisions"
        await self._revise(supply.part(0, config.revisions), bus, where, folder)
        self._phase(Phase.SUPERVISED)
        helpful = [p.conversation for p in supply.helpful(config.revisions, config.revisions)]
        made: learning.Supervised = await self._partner.call(
            learning.sl_cai,
            config,
            self._places,
            seed,
            folder / "data",
            helpful,
            f"grpc://{where.sampled}",
            told=lambda n: self._progress(n["what"], n["done"], n["total"], n["remark"]),
        )
        log.info("sl-cai", checkpoint=made.checkpoint, changed=made.changed, loss=round(made.loss, 4))
        return self.registry.get(made.checkpoint)

    async def _revise(
        self, prompts: list[RedTeamPrompt], bus: Bus, where: servers.Servers, folder: Path
    ) -> None:
        config = replace(self._config.redteam, seed=self._config.seed, concurrency=self._config.concurrency)
        policy, critic = PolicyModel(where.sampled), CriticClient(where.critic)
        try:
            with RunFolder(folder, bus, config) as store:
                watcher = _Watcher(self._progress, len(prompts))
                watcher.on_finished(sum(p.prompt_id in store.done for p in prompts))
                run = Run(policy, critic, store, watcher, config)
                try:
                    await run.work(prompts)
                except asyncio.CancelledError:
                    run.stop()
                    raise
        finally:
            await policy.close()
            await critic.close()

    # RLAIF

    async def _reinforce(
        self, supply: Supply, bus: Bus, where: servers.Servers, publishing: Publishing, policy: str
    ) -> int:
        config = self._config
        rounds = _Rounds()
        if self._newest() is None and self.registry.serving("reward") is None:
            self._phase(Phase.COMPARING)
        elif self._newest() is None:  # killed before the first step: only the trainer may move on from here
            await asyncio.to_thread(first_pairs.pass_over, bus, MEMBER)

        def told(news: dict[str, Any]) -> None:
            if "metrics" in news:
                self._tell(News(Kind.STEP, news["metrics"], news["at"]))
            elif "reward" in news:
                self._tell(News(Kind.REWARD, news))
                rounds.on(news)
            elif "training" in news:
                rounds.training.set()
                self._phase(Phase.REINFORCING)

        learner = asyncio.create_task(
            self._partner.call(learning.reinforce, config, self._places, policy, told=told)
        )
        around = asyncio.create_task(self._feed(supply, bus, where, publishing, rounds))
        try:
            helpers = (around, publishing.running)
            await asyncio.wait({learner, *helpers}, return_when=asyncio.FIRST_COMPLETED)
            for helper in helpers:
                if helper.done():
                    helper.result()
            return int(await learner)
        finally:
            await _ended(around)
            await _ended(learner)

    async def _label(
        self, supply: Supply, bus: Bus, policy: PolicyModel, judge: JudgeClient, rounds: _Rounds
    ) -> None:
        """The first pairs, and more of them while the reward model that they make is of no use."""
        count = self._config.first_pairs
        while not rounds.ready.is_set():
            prompts = supply.part(self._config.revisions, count)
            await first_pairs.label(
                bus, policy, judge, prompts, self._config, lambda d, t: self._progress("pairs", d, t)
            )
            await asyncio.to_thread(first_pairs.pass_over, bus, MEMBER)
            await rounds.ended.wait()
            rounds.ended.clear()  # set again by the round after this, if it comes to one
            count += self._config.reward_schedule.every

    async def _feed(
        self,
        supply: Supply,
        bus: Bus,
        where: servers.Servers,
        publishing: Publishing,
        rounds: _Rounds,
    ) -> None:
        """Labels for the first reward model, then prompts, rollouts and labels for PPO until cancelled."""
        from charter.judge import worker as judging
        from charter.sampler import worker as sampling

        config = self._config
        policy, judge = PolicyModel(where.sampled), JudgeClient(where.judge)
        workers: list[Any] = []
        metrics = BusMetrics.of(CollectorRegistry())
        try:
            if self._newest() is None and self.registry.serving("reward") is None:
                await self._label(supply, bus, policy, judge, rounds)
            await rounds.training.wait()
            newest = self._newest()
            if newest is not None:
                await publishing.sampled_is(newest.id)
            settings = replace(config.sampler, batch_size=config.labels_per_step, seed=config.seed)
            options = WorkerOptions(max_records=config.labels_per_step, poll_timeout_s=0.2, drain_s=5.0)
            workers = [
                sampling.worker(
                    bus,
                    policy,
                    settings,
                    member=SAMPLER,
                    options=replace(options, room_interval_s=0.1),
                    metrics=metrics,
                ),
                judging.worker(bus, judge, member=JUDGE, options=options, metrics=metrics),
            ]
            source = await asyncio.to_thread(prompt_source, bus, supply, config, self._places.state)
            async with asyncio.TaskGroup() as group:
                group.create_task(source.run())
                group.create_task(watch_queues(bus, self._tell))
                group.create_task(watch_engines(where.busy, self._tell))
                for worker in workers:
                    group.create_task(worker.run())
        finally:
            for worker in workers:
                worker.stop()
            self._tell(News(Kind.BUS, metrics.spent()))
            await policy.close()
            await judge.close()


class _Rounds:
    """How the first rounds of the reward model end."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        """There is a reward model in force."""
        self.training = asyncio.Event()
        """PPO has begun."""
        self.ended = asyncio.Event()
        """A round has ended: with `ready`, or without a model in force."""
        self._state = ""

    def on(self, news: dict[str, Any]) -> None:
        """What the reward service said of itself."""
        if news["model"] or (news["reward"] == "kept_old" and self._state != "kept_old"):
            self.ended.set()
        if news["model"]:
            self.ready.set()
        self._state = news["reward"]


async def _ended(task: asyncio.Task[T]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


class _Watcher:
    """Tells how the revisions go."""

    def __init__(self, progress: Any, total: int) -> None:
        self._progress, self._total, self._count = progress, total, 0

    def on_finished(self, count: int) -> None:
        """See `charter.redteam.pipeline.Watcher`."""
        self._count += count
        self._progress("revisions", self._count, self._total)

    def on_failed(self, prompt: RedTeamPrompt, reason: str) -> None:
        """See `charter.redteam.pipeline.Watcher`."""
        log.warning("no revision", prompt=prompt.prompt_id, reason=reason)

    def on_waiting(self, reason: str) -> None:
        """See `charter.redteam.pipeline.Watcher`."""
        if reason:
            log.warning("waiting", reason=reason)


async def until_cancelled(work: Awaitable[T]) -> T | None:
    """The result, or None when it was cancelled."""
    try:
        return await work
    except asyncio.CancelledError:
        return None
