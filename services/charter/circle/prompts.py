"""The prompts that the circle asks: read once, then drawn for revisions, for first pairs, and for PPO."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from charter.bus import Bus
from charter.bus.messages import decode, encode
from charter.bus.topics import PREFERENCES, PROMPTS
from charter.circle.config import CircleConfig
from charter.errors import BackendUnavailable, MalformedMessage
from charter.prompts.service import Mixer, Source, SourcedPrompt
from charter.redteam.prompts import RedTeamPrompt, collect
from charter.rpc import convert
from charter.sampler.worker import GROUP as SAMPLER
from charter.v1 import events_pb2

_EVENT_SOURCE = {
    Source.RED_TEAM: events_pb2.PROMPT_SOURCE_RED_TEAM,
    Source.HELPFUL: events_pb2.PROMPT_SOURCE_HELPFUL,
    Source.PRODUCTION: events_pb2.PROMPT_SOURCE_PRODUCTION,
    Source.GENERATED: events_pb2.PROMPT_SOURCE_GENERATED,
}
_IDLE_S = 0.2
_BATCH = 500


class Supply:
    """Red-team and helpful prompts, shuffled by the seed and read off without repetition."""

    def __init__(self, config: CircleConfig) -> None:
        """Reads the sources. Raises `ConfigError`."""
        self._red_team = _read(config.prompts.red_team, config.seed)
        self._helpful = _read(config.prompts.helpful, config.seed)
        self._share = config.red_team_share if self._helpful else 1.0

    def part(self, start: int, count: int) -> list[RedTeamPrompt]:
        """`count` prompts from `start` on, the two kinds mixed evenly; wraps around at the end."""
        return [self._at(number) for number in range(start, start + count)]

    def _at(self, number: int) -> RedTeamPrompt:
        """The prompt of this number: always the same one."""
        before, now = int(number * self._share), int((number + 1) * self._share)
        if now > before:
            return self._red_team[before % len(self._red_team)]
        return self._helpful[(number - before) % len(self._helpful)]

    def helpful(self, start: int, count: int) -> list[RedTeamPrompt]:
        """`count` helpful prompts from `start` on."""
        return _slice(self._helpful, start, start + count)

    def sourced(self) -> Iterable[SourcedPrompt]:
        """All, for the mixer."""
        for source, prompts in ((Source.RED_TEAM, self._red_team), (Source.HELPFUL, self._helpful)):
            for prompt in prompts:
                yield SourcedPrompt(prompt.conversation, source)


def _read(sources: Sequence[str], seed: int) -> list[RedTeamPrompt]:
    prompts = list(collect(sources).prompts) if sources else []
    random.Random(seed).shuffle(prompts)
    return prompts


def _slice(prompts: Sequence[RedTeamPrompt], start: int, end: int) -> list[RedTeamPrompt]:
    return [prompts[i % len(prompts)] for i in range(start, end)] if prompts else []


def event(prompt: SourcedPrompt) -> events_pb2.PromptEvent:
    """The message of topic `prompts`."""
    return events_pb2.PromptEvent(
        prompt_id=prompt.id,
        conversation=convert.messages_to_proto(prompt.conversation),
        source=_EVENT_SOURCE[prompt.source],
        created_unix_ms=int(time.time() * 1000),
    )


class Feed:
    """Keeps the sampler's backlog filled, and learns from labels which prompts still teach."""

    def __init__(self, bus: Bus, supply: Supply, config: CircleConfig) -> None:
        self._bus = bus
        self._config = config.mixture
        # Another start of the same circle goes on with other draws.
        begun = sum(b.end for b in bus.bounds(PROMPTS).values())
        self._mixer = Mixer(replace(config.mixture, seed=config.seed * 1_000_003 + begun))
        self._mixer.add(supply.sourced())
        self._seen = {p: b.end for p, b in bus.bounds(PREFERENCES).items()}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                filled = await asyncio.to_thread(self._fill)
            except BackendUnavailable:
                filled = False
            if not filled:
                await asyncio.sleep(_IDLE_S)

    def _fill(self) -> bool:
        waiting = sum(lag.records for lag in self._bus.lag(SAMPLER, [PROMPTS]))
        if waiting >= self._config.backlog:
            return False
        self._read_labels()
        drawn = self._mixer.draw(self._config.batch)
        self._bus.publish([encode(PROMPTS, p.id, event(p)) for p in drawn])
        return True

    def _read_labels(self) -> None:
        for partition, bounds in self._bus.bounds(PREFERENCES).items():
            start = self._seen.get(partition, bounds.first)
            records = self._bus.fetch(PREFERENCES, partition, start, _BATCH) if start < bounds.end else []
            for record in records:
                try:
                    label = decode(record, events_pb2.PreferenceEvent)
                except MalformedMessage:
                    continue
                self._mixer.on_labelled(label.prompt_id, label.probability_a)
                self._seen[partition] = record.offset + 1
