"""From candidates to what serves: the publisher at work inside the circle, and news of what it decided."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry

from charter.bus import Bus
from charter.circle.config import CircleConfig, Places
from charter.circle.news import Kind, News, Tell
from charter.circle.servers import Servers
from charter.lm import open_model
from charter.lm.policy_client import PolicyModel
from charter.publisher.config import PublisherConfig
from charter.publisher.metrics import PublisherMetrics
from charter.publisher.worker import Publisher
from charter.registry import Change, Facts, Manifest, Registry, Status
from charter.registry import Kind as CheckpointKind

_LOOK_S = 0.5
_OPEN = (Status.CANDIDATE, Status.PROMOTING)


def register_seed(registry: Registry, places: Places) -> Manifest:
    """The weights that learning starts from, as the registry's first checkpoint; in force if none is."""
    folder = Path(places.model)
    manifest = registry.write(
        Facts(CheckpointKind.SEED, note="what learning starts from"),
        lambda into: _copied(folder, into),
    )
    if registry.serving() is None:
        registry.set_status(manifest.id, Status.SERVING, "the first model")
    return manifest


def _copied(source: Path, into: Path) -> None:
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model") and file.is_file():
            shutil.copyfile(file, into / file.name)


class Publishing:
    """Runs the publisher while entered."""

    def __init__(
        self, config: CircleConfig, places: Places, where: Servers, bus: Bus, registry: Registry, tell: Tell
    ) -> None:
        settings = PublisherConfig(
            registry=str(places.registry),
            bus=places.bus,
            policies=where.serving,
            learners=(where.sampled,),
            critic=where.critic,
            judge=where.judge,
            constitution=places.constitution,
            gate=config.gate,
            keep=config.keep,
        )
        self._publisher = Publisher.open(
            settings,
            bus,
            PublisherMetrics.of(CollectorRegistry()),
            lambda uri: open_model(uri, threads=config.threads),
        )
        self._sampled = PolicyModel(where.sampled)
        self._registry = registry
        self._tell = tell
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._publisher.run()),
            asyncio.create_task(self._tell_changes(len(self._registry.history()))),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._publisher.stop()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        await self._publisher.close()
        await self._sampled.close()

    @property
    def running(self) -> asyncio.Task[None]:
        """The publisher at work; it ends by itself only when it fails."""
        return self._tasks[0]

    async def sampled_is(self, checkpoint: str) -> None:
        """Makes sure that the sampled policy has this checkpoint's weights."""
        if (await self._sampled.info()).model.version != checkpoint:
            await self._sampled.reload(checkpoint)

    async def settled(self, checkpoint: str) -> Change | None:
        """Waits until the gate has decided on a checkpoint."""
        while True:
            change = await asyncio.to_thread(self._registry.status, checkpoint)
            if change is None or change.status not in _OPEN:
                return change
            if self.running.done():
                self.running.result()
            await asyncio.sleep(_LOOK_S)

    async def _tell_changes(self, seen: int) -> None:
        while True:
            history = await asyncio.to_thread(self._registry.history)
            for change in history[seen:]:
                if change.family == "policy":
                    self._tell(News(Kind.GATE, self._values(change)))
            seen = len(history)
            await asyncio.sleep(_LOOK_S)

    def _values(self, change: Change) -> dict[str, object]:
        return {
            "checkpoint": change.checkpoint_id,
            "step": self._registry.get(change.checkpoint_id).facts.step,
            "status": change.status.value,
            "reason": change.reason,
            "measurements": dict(change.measurements),
        }
