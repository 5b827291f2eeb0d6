"""The prompts that the circle asks: read once, then drawn for revisions, for first pairs, and for PPO."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry

from charter.bus import Bus
from charter.circle.config import CircleConfig
from charter.prompts.metrics import PromptMetrics
from charter.prompts.service import Source, SourcedPrompt
from charter.prompts.worker import PromptSource
from charter.redteam.prompts import RedTeamPrompt, collect

MEMBER = "prompts-0"
"""One source at a time: after a kill the next takes its place at once."""


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


def prompt_source(bus: Bus, supply: Supply, config: CircleConfig, state: Path) -> PromptSource:
    """What keeps the sampler's backlog filled while PPO runs; a later start of the circle goes on from it."""
    settings = replace(config.mixture, seed=config.seed, state=str(state / "prompts.json"))
    metrics = PromptMetrics.of(CollectorRegistry())
    return PromptSource(bus, settings, metrics, member=MEMBER, prompts=supply.sourced())
