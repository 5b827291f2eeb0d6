"""The publisher at work: candidates in, promotions out, and policy servers kept at what is in force.

Three tasks. The *gate* takes candidates off the `checkpoints` topic. The *follower* gives every candidate
to the servers that only sample for learning, at once and ungated. The *keeper* finishes what a crash left
half done or a person asked for, and tells servers that restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from charter.bus import Bus, Outgoing, Record
from charter.bus.messages import decode
from charter.bus.metrics import BusMetrics
from charter.bus.topics import CHECKPOINTS
from charter.bus.worker import Worker, WorkerOptions
from charter.constitution import load as load_constitution
from charter.errors import BackendUnavailable, CheckpointError, MalformedMessage
from charter.lm.base import LanguageModel
from charter.publisher import suite
from charter.publisher.config import PublisherConfig
from charter.publisher.gate import Verdict
from charter.publisher.measuring import Arena, Contest, LocalArena, Measuring, ServerArena
from charter.publisher.metrics import PublisherMetrics
from charter.publisher.promotion import Policy, Promoter, register_initial
from charter.publisher.suite import Examiner
from charter.registry import Kind, Manifest, Registry, Status
from charter.rpc.clients import CriticClient, JudgeClient
from charter.telemetry.logs import get_logger
from charter.v1 import events_pb2

log = get_logger(__name__)

GATE_GROUP, FOLLOWER_GROUP = "publisher", "publisher-learners"


class Gatekeeper:
    """Decides on candidates, one after another. Deciding again on a decided one only repeats the news."""

    def __init__(
        self, registry: Registry, promoter: Promoter, measuring: Measuring, metrics: PublisherMetrics
    ) -> None:
        self._registry = registry
        self._promoter = promoter
        self._measuring = measuring
        self._metrics = metrics

    async def __call__(self, record: Record) -> Sequence[Outgoing]:
        """Works on one event of the topic; all but candidates are other people's news.

        Raises `MalformedMessage` for a checkpoint that the registry does not know, and `BackendUnavailable`
        while the registry cannot be written: the candidate then waits, and what serves goes on.
        """
        event = decode(record, events_pb2.CheckpointEvent)
        if event.status != Status.CANDIDATE:
            return ()
        try:
            await asyncio.to_thread(self._registry.get, event.checkpoint_id)
        except CheckpointError as error:
            raise MalformedMessage(f"a candidate that cannot be measured: {error}") from error
        try:
            await self.consider(event.checkpoint_id)
        except CheckpointError as error:
            raise BackendUnavailable(str(error)) from error
        return ()

    async def consider(self, checkpoint_id: str) -> None:
        """Measures a candidate and promotes or rejects it."""
        manifest = await asyncio.to_thread(self._registry.get, checkpoint_id)
        change = self._registry.status(checkpoint_id)
        if manifest.facts.kind is Kind.REWARD:
            return
        if change is None or change.status is not Status.CANDIDATE:
            await self._promoter.announce(checkpoint_id)
            return
        newer = await asyncio.to_thread(self._newer, manifest)
        if newer is not None:
            reason = f"{newer.id} came before it was measured"
            await self._promoter.note(checkpoint_id, Status.SUPERSEDED, reason)
            self._metrics.decisions.labels("superseded").inc()
            return
        await self._measure(manifest)

    async def _measure(self, manifest: Manifest) -> None:
        serving = self._registry.serving()
        if serving is None:
            raise BackendUnavailable(
                f"no checkpoint of {self._registry.root} serves, so {manifest.id} has nothing to be compared "
                "with; `charter promote ID` puts one in force"
            )
        try:
            await asyncio.to_thread(self._registry.resolve, manifest.id)
            with self._metrics.seconds.time():
                decision = await self._measuring.run(self._contest(manifest, serving))
        except CheckpointError as error:  # of the candidate's own: it never serves, and the worker goes on
            await self._promoter.note(manifest.id, Status.REJECTED, f"it cannot be loaded: {error}")
            self._metrics.decisions.labels("rejected").inc()
            return
        for criterion in decision.criteria:
            self._metrics.measured.labels(criterion.name, "candidate").set(criterion.candidate)
            self._metrics.measured.labels(criterion.name, "serving").set(criterion.serving)
        passed = decision.verdict is Verdict.PASS
        self._metrics.decisions.labels("promoted" if passed else "rejected").inc()
        if passed:
            await self._promoter.promote(manifest.id, decision.reason, decision.as_record())
        else:
            log.warning("candidate rejected", checkpoint=manifest.id, reason=decision.reason)
            await self._promoter.note(manifest.id, Status.REJECTED, decision.reason, decision.as_record())

    def _newer(self, manifest: Manifest) -> Manifest | None:
        """A later candidate of the same kind that waits, too."""
        for other in reversed(self._registry.list()):
            later = (other.facts.step, other.created_unix_ms) > (
                manifest.facts.step,
                manifest.created_unix_ms,
            )
            if other.facts.kind is manifest.facts.kind and later:
                change = self._registry.status(other.id)
                if change is not None and change.status is Status.CANDIDATE:
                    return other
        return None

    def _contest(self, manifest: Manifest, serving: Manifest) -> Contest:
        """The reference is the nearest ancestor that was not made by RL: what PPO's own KL is taken from."""
        ancestors = self._registry.lineage(manifest.id)[1:]
        reference = next((m for m in ancestors if m.facts.kind is not Kind.RL), serving)
        return Contest(manifest.id, serving.id, reference.id, manifest.facts.kind is Kind.RL)


class Follower:
    """Gives every candidate to the policies that only sample for learning."""

    def __init__(self, registry: Registry, learners: Sequence[Policy]) -> None:
        self._learners = learners
        made = (m for m in reversed(registry.list()) if m.facts.kind is not Kind.REWARD)
        self._newest = next((m.id for m in made), "")

    async def __call__(self, record: Record) -> Sequence[Outgoing]:
        """Works on one event of the topic."""
        event = decode(record, events_pb2.CheckpointEvent)
        if event.status == Status.CANDIDATE and not event.checkpoint_id.startswith(f"{Kind.REWARD}-"):
            self._newest = event.checkpoint_id
            await self.converge()
        return ()

    async def converge(self) -> int:
        """Tells the learners that sample with something else than the newest; how many there were."""
        newest, told = self._newest, 0
        for learner in self._learners if newest else ():
            try:
                if (await learner.info()).model.version != newest:
                    await learner.reload(newest)
                    told += 1
            except CheckpointError as error:
                log.error("a learner keeps its weights", checkpoint=newest, error=str(error))
        return told


class Publisher:
    """All of it. `run` until `stop`; `close` afterwards."""

    def __init__(
        self,
        config: PublisherConfig,
        bus: Bus,
        registry: Registry,
        metrics: PublisherMetrics,
        *,
        policies: Sequence[Policy],
        learners: Sequence[Policy],
        arena: Arena,
        critic: CriticClient,
        judge: JudgeClient,
        bus_metrics: BusMetrics | None = None,
    ) -> None:
        self._config = config
        self._registry = registry
        self._metrics = metrics
        self._arena = arena
        self._closing = [*policies, *learners, critic, judge]
        self.promoter = Promoter(registry, policies, bus)
        examiners: dict[str, Examiner] = {}

        def examiner() -> Examiner:
            constitution = load_constitution(config.constitution)
            if constitution.digest not in examiners:
                examiners.clear()
                examiners[constitution.digest] = Examiner(critic, judge, constitution, config.gate)
            return examiners[constitution.digest]

        examiner()  # a constitution that cannot work is said at the start
        prompts = suite.load(config.suite, config.gate.looks[-1])
        measuring = Measuring(arena, prompts, config.gate, examiner)
        self.gatekeeper = Gatekeeper(registry, self.promoter, measuring, metrics)
        self._follower = Follower(registry, learners)
        groups: dict[str, Gatekeeper | Follower] = {GATE_GROUP: self.gatekeeper}
        if learners:
            groups[FOLLOWER_GROUP] = self._follower
        one = WorkerOptions(max_records=1)
        self._workers = [
            Worker(bus, group, [CHECKPOINTS], handler, member=config.member, options=one, metrics=bus_metrics)
            for group, handler in groups.items()
        ]
        self._stopping = asyncio.Event()

    @classmethod
    def open(
        cls,
        config: PublisherConfig,
        bus: Bus,
        metrics: PublisherMetrics,
        open_model: Callable[[str], LanguageModel],
        bus_metrics: BusMetrics | None = None,
    ) -> Publisher:
        """With clients as the configuration says; connections open when they are first used."""
        from charter.lm.policy_client import PolicyModel

        registry = Registry(config.registry)
        if config.initial:
            register_initial(registry, config.initial)
        return cls(
            config,
            bus,
            registry,
            metrics,
            policies=[PolicyModel(target) for target in config.policies],
            learners=[PolicyModel(target) for target in config.learners],
            arena=ServerArena(config.arena) if config.arena else LocalArena(registry, open_model),
            critic=CriticClient(config.critic),
            judge=JudgeClient(config.judge),
            bus_metrics=bus_metrics,
        )

    async def run(self) -> None:
        """Works until `stop`. Raises what says that it is set up wrongly."""
        tasks = [asyncio.create_task(w.run()) for w in self._workers]
        tasks.append(asyncio.create_task(self._keep()))
        try:
            await asyncio.gather(*tasks)
        finally:
            self.stop()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """Takes nothing new; `run` returns when what is in hand is done. Safe to repeat."""
        self._stopping.set()
        for worker in self._workers:
            worker.stop()

    async def close(self) -> None:
        """Closes models and connections; safe to repeat."""
        await self._arena.close()
        for client in self._closing:
            close = getattr(client, "close", None)
            if close is not None:
                await close()

    async def _keep(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._config.keep:
                    await asyncio.to_thread(self._registry.prune, self._config.keep)
                await self.promoter.recover()
                self._metrics.told.inc(await self.promoter.converge())
                self._metrics.told.inc(await self._follower.converge())
            except BackendUnavailable as error:
                log.warning("a policy server is away", error=str(error))
            except CheckpointError as error:
                log.error("what is in force cannot be served", error=str(error))
            try:
                async with asyncio.timeout(self._config.converge_s):
                    await self._stopping.wait()
            except TimeoutError:
                continue
