"""Puts a checkpoint in force: the policy servers are told, and the registry's history says so.

The intention is written first (`PROMOTING`), the fact last (`SERVING`). Whoever finds an intention without a
fact, after a crash or from `charter promote`, carries it out again from the start; every step is safe to
repeat. If a server refuses the checkpoint, those that took it are given the old one back, and the candidate
is rejected with the server's reason.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from charter.bus import Bus
from charter.errors import BackendUnavailable, CheckpointError
from charter.lm.base import ModelInfo, ModelVersion
from charter.registry import Change, Facts, Kind, Manifest, Registry, Status
from charter.registry.events import announcement
from charter.telemetry.logs import get_logger

log = get_logger(__name__)

ROLLS_BACK = "rolls_back"
"""In a promotion's measurements: the checkpoint that it takes out of force."""


class Policy(Protocol):
    """A policy server; `charter.lm.policy_client.PolicyModel` is one."""

    async def info(self) -> ModelInfo:
        """What it serves."""
        ...

    async def reload(self, source: str) -> tuple[ModelVersion, ModelVersion]:
        """Makes it serve another checkpoint; raises `CheckpointError` when it will not."""
        ...


class Promoter:
    """Carries out promotions. One at a time; several processes do no harm, the last one holds."""

    def __init__(self, registry: Registry, policies: Sequence[Policy], bus: Bus | None) -> None:
        """Without a bus nothing is announced, and the registry alone knows."""
        self._registry = registry
        self._policies = tuple(policies)
        self._bus = bus
        self._turn = asyncio.Lock()

    async def promote(self, checkpoint_id: str, reason: str, measurements: Mapping[str, Any]) -> Change:
        """Intends a promotion and carries it out. Returns what became of it: serving, or rejected."""
        async with self._turn:
            intention = await self.note(checkpoint_id, Status.PROMOTING, reason, measurements)
            return await self._finish(intention)

    async def recover(self) -> None:
        """Carries out what was intended and not done, in order. Raises `BackendUnavailable`."""
        async with self._turn:
            last = {c.checkpoint_id: c for c in await asyncio.to_thread(self._registry.history)}
            for change in sorted(last.values(), key=lambda c: c.at_unix_ms):
                if change.status is Status.PROMOTING:
                    await self._finish(change)

    async def _finish(self, intention: Change) -> Change:
        name, before = intention.checkpoint_id, await asyncio.to_thread(self._registry.serving)
        try:
            await asyncio.to_thread(self._registry.resolve, name)
            await self._tell(name)
        except CheckpointError as error:
            if before is not None and before.id != name:
                await self._tell(before.id)
            return await self.note(name, Status.REJECTED, f"it cannot be served: {error}")
        taken_out = str(intention.measurements.get(ROLLS_BACK, ""))
        if taken_out and taken_out != name:
            await self.note(taken_out, Status.ROLLED_BACK, intention.reason)
        change = await self.note(name, Status.SERVING, intention.reason, intention.measurements)
        if before is not None and before.id not in (name, taken_out):
            await self.announce(before.id)  # retired
        log.info("checkpoint in force", checkpoint=name, reason=intention.reason)
        return change

    async def converge(self) -> int:
        """Tells policy servers that serve something else, since they restarted, say; how many there were."""
        async with self._turn:
            serving = await asyncio.to_thread(self._registry.serving)
            return await self._tell(serving.id) if serving is not None else 0

    async def note(
        self,
        checkpoint_id: str,
        status: Status,
        reason: str,
        measurements: Mapping[str, Any] | None = None,
    ) -> Change:
        """Writes a status and announces it."""
        change = await asyncio.to_thread(
            self._registry.set_status, checkpoint_id, status, reason, measurements
        )
        await self.announce(checkpoint_id)
        return change

    async def announce(self, checkpoint_id: str) -> None:
        """Tells the bus the last status; safe to repeat, since the topic keeps the newest of each."""
        change = self._registry.status(checkpoint_id)
        if self._bus is not None and change is not None:
            message = announcement(self._registry.get(checkpoint_id), self._registry.root, change)
            await asyncio.to_thread(self._bus.publish, [message])

    async def _tell(self, checkpoint_id: str) -> int:
        """Makes every server serve it; how many did not. One that is away keeps it from no other."""
        told, away = 0, None
        for policy in self._policies:
            try:
                if (await policy.info()).model.version != checkpoint_id:
                    await policy.reload(checkpoint_id)
                    told += 1
            except BackendUnavailable as error:
                away = error
        if away is not None:
            raise away
        return told


def register_initial(registry: Registry, source: str) -> Manifest:
    """Registers the model that serves at first, and says that it does, unless some checkpoint serves.

    `source` is `seed`, a folder or a hub id. Safe to repeat: the id derives from the content.
    """
    serving = registry.serving()
    if serving is not None:
        return serving
    from charter.lm.checkpoint import TOKENIZER_FILES, checkpoint_folder

    folder = checkpoint_folder(source)
    wanted = {*TOKENIZER_FILES, "config.json", "generation_config.json", "model.safetensors.index.json"}

    def copy(target: Path) -> None:
        for path in sorted(folder.iterdir()):
            if path.is_file() and (path.suffix == ".safetensors" or path.name in wanted):
                shutil.copyfile(path, target / path.name)

    manifest = registry.write(Facts(Kind.SEED, note=f"registered from {folder.name}"), copy)
    registry.set_status(manifest.id, Status.SERVING, "the first model")
    return manifest
