"""Keeps the `prompts` topic topped up: learns from labels and users, invents, draws, publishes, saves.

What was learned and the places in the topics that it was learned from are saved as one file, in one rename.
So a restarted source takes no label twice; it may publish the last batch again, which only asks a prompt
once more. One source runs at a time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from charter.bus import Bus, Consumer, Outgoing, Record
from charter.bus.messages import decode, encode
from charter.bus.topics import CONVERSATIONS, PREFERENCES, PROMPTS
from charter.errors import BackendUnavailable, ConfigError, Fenced, MalformedMessage, Overloaded, RequestError
from charter.feedback.asking import concurrently, derived_seed
from charter.feedback.prompts import more_like
from charter.finetune.checkpoints import write_whole
from charter.lm.base import ChatMessage, Conversation, FinishReason, LanguageModel, Role, Sampling
from charter.prompts.config import PromptsConfig
from charter.prompts.heldout import HeldOut
from charter.prompts.metrics import PromptMetrics
from charter.prompts.service import Mixer, Source, SourcedPrompt, novel
from charter.redteam.prompts import collect
from charter.rpc import convert
from charter.telemetry.logs import get_logger
from charter.v1 import events_pb2

log = get_logger(__name__)

GROUP, SAMPLER_GROUP = "prompts", "sampler"
_FORMAT = 1
_SOURCES = {
    Source.RED_TEAM: events_pb2.PROMPT_SOURCE_RED_TEAM,
    Source.HELPFUL: events_pb2.PROMPT_SOURCE_HELPFUL,
    Source.PRODUCTION: events_pb2.PROMPT_SOURCE_PRODUCTION,
    Source.GENERATED: events_pb2.PROMPT_SOURCE_GENERATED,
}


class PromptSource:
    """The loop. `run` until `stop`; the generator is its owner's to close."""

    def __init__(
        self,
        bus: Bus,
        config: PromptsConfig,
        metrics: PromptMetrics,
        generator: LanguageModel | None = None,
        *,
        member: str | None = None,
        prompts: Iterable[SourcedPrompt] | None = None,
    ) -> None:
        """Reads the files and the saved state. Raises `ConfigError` where there is nothing to draw.

        `prompts` stand in for the files of the configuration where the caller has read them already.
        """
        self._bus = bus
        self._config = config
        self._metrics = metrics
        self._generator = generator
        self._member = member
        self._file = Path(config.state)
        self._held_out = HeldOut(config.held_out, config.similarity)
        self._mixer = Mixer(config)
        self._mixer.add(_of_files(config) if prompts is None else prompts)
        if not len(self._mixer):
            raise ConfigError(
                "prompts.red_team and prompts.helpful name no prompts; give at least one source"
            )
        self.published = 0
        """Prompts ever published."""
        self._generated_at = 0
        self._ends: dict[str, int] = {}
        self._restore()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """`run` returns after the batch in hand. Safe to repeat; from the loop's thread."""
        self._stopping.set()

    async def run(self) -> None:
        """Works until `stop`; waits while the log or the generator is away."""
        consumer: Consumer | None = None
        try:
            while not self._stopping.is_set():
                try:
                    if consumer is None:
                        consumer = await asyncio.to_thread(
                            self._bus.consumer, GROUP, [CONVERSATIONS, PREFERENCES], self._member
                        )
                    busy = await self.step(consumer)
                except (BackendUnavailable, Overloaded) as error:
                    log.warning("the prompt source waits", error=str(error))
                    busy = False
                if not busy:
                    await self._rest()
        finally:
            if consumer is not None:
                await asyncio.shield(asyncio.to_thread(consumer.close))

    async def step(self, consumer: Consumer) -> bool:
        """Learns from what is new, publishes what there is room for; whether anything happened."""
        records = await asyncio.to_thread(consumer.poll, 500, 0.0)
        for record in records:
            self._learn(record)
        room = self._config.backlog - await asyncio.to_thread(self._waiting)
        drawn = self._mixer.draw(min(room, self._config.batch)) if room > 0 else []
        every = self._config.generate_every
        if drawn and self._generator is not None and every and self.published - self._generated_at >= every:
            await self._invent(self._generator)
        if drawn:
            await asyncio.to_thread(self._bus.publish, [_message(p) for p in drawn])
            self.published += len(drawn)
            for prompt in drawn:
                self._metrics.published.labels(prompt.source).inc()
        if records or drawn:
            await asyncio.to_thread(self._save)
        if records:
            await self._commit(consumer, records)
        return bool(records or drawn)

    async def _commit(self, consumer: Consumer, records: Sequence[Record]) -> None:
        try:
            await asyncio.to_thread(consumer.commit, records)
        except Fenced:  # the saved state knows what was learned; the records come again and are skipped
            log.warning("the prompt source lost a partition and takes it again", group=GROUP)

    def _waiting(self) -> int:
        return sum(lag.records for lag in self._bus.lag(SAMPLER_GROUP, [PROMPTS]))

    def _learn(self, record: Record) -> None:
        place = f"{record.topic}/{record.partition}"
        if record.offset < self._ends.get(place, 0):
            return  # learned before a crash
        self._ends[place] = record.offset + 1
        try:
            if record.topic == PREFERENCES:
                label = decode(record, events_pb2.PreferenceEvent)
                self._mixer.on_labelled(label.prompt_id, label.probability_a)
            else:
                self._take(decode(record, events_pb2.ConversationEvent))
        except (MalformedMessage, RequestError) as error:
            # Those who must understand these messages bury them; a hint is not worth a second letter.
            log.warning("a message teaches nothing", where=place, offset=record.offset, error=str(error))

    def _take(self, event: events_pb2.ConversationEvent) -> None:
        conversation = convert.messages_from_proto(event.conversation)
        while conversation and conversation[-1].role is not Role.USER:
            conversation = conversation[:-1]
        if not conversation or conversation[-1].content in self._held_out:
            self._metrics.refused.labels(Source.PRODUCTION).inc()
            return
        self._mixer.add([SourcedPrompt(conversation, Source.PRODUCTION)])

    async def _invent(self, generator: LanguageModel) -> None:
        """New red-team prompts, few-shot, as the paper's authors made theirs (arXiv 2212.08073, 3.2)."""
        self._generated_at = self.published
        config = self._config
        shown = [[p.request for p in self._mixer.examples(config.examples)] for _ in range(config.generate)]
        if not all(shown):
            return
        seeds = [derived_seed(config.seed, "invent", self.published, i) for i in range(config.generate)]
        found = await concurrently(
            [
                generator.generate(more_like(texts), Sampling(1.0, max_tokens=config.max_tokens, seed=seed))
                for texts, seed in zip(shown, seeds, strict=True)
            ]
        )
        ended = [
            s.completions[0].text.strip()
            for s in found
            if s.completions[0].finish_reason is FinishReason.STOP
        ]
        known = self._mixer.requests(Source.RED_TEAM, Source.GENERATED)
        fresh = [t for t in novel(ended, known, config.similarity) if t not in self._held_out]
        added = self._mixer.add(SourcedPrompt(_asked(t), Source.GENERATED) for t in fresh)
        self._metrics.invented.inc(added)
        self._metrics.refused.labels(Source.GENERATED).inc(config.generate - added)
        log.info("prompts invented", asked=config.generate, new=added)

    async def _rest(self) -> None:
        try:
            async with asyncio.timeout(self._config.pause_s):
                await self._stopping.wait()
        except TimeoutError:
            return

    # State ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        record = {
            "format": _FORMAT,
            "published": self.published,
            "generated_at": self._generated_at,
            "ends": self._ends,
            "mixer": self._mixer.state(),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps(record, ensure_ascii=False))

    def _restore(self) -> None:
        try:
            record: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._file} cannot be read ({error}); restore it, or remove it to start the choice of "
                "prompts afresh"
            ) from error
        if record.get("format") != _FORMAT:
            raise ConfigError(f"{self._file} has format {record.get('format')}; this version reads {_FORMAT}")
        self.published = int(record["published"])
        self._generated_at = int(record["generated_at"])
        self._ends = {str(k): int(v) for k, v in record["ends"].items()}
        self._mixer.restore(record["mixer"])


def _of_files(config: PromptsConfig) -> Iterator[SourcedPrompt]:
    for source, names in ((Source.RED_TEAM, config.red_team), (Source.HELPFUL, config.helpful)):
        for prompt in collect(names).prompts if names else ():
            yield SourcedPrompt(prompt.conversation, source)


def _asked(text: str) -> Conversation:
    return (ChatMessage(Role.USER, text),)


def _message(prompt: SourcedPrompt) -> Outgoing:
    event = events_pb2.PromptEvent(
        prompt_id=prompt.id,
        conversation=convert.messages_to_proto(prompt.conversation),
        source=_SOURCES[prompt.source],
        created_unix_ms=time.time_ns() // 1_000_000,
    )
    return encode(PROMPTS, prompt.id, event)
