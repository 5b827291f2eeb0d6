"""Pairs of SL-CAI's answers for the first reward model, labelled by the judge.

Answers of one policy to a prompt are much alike, and a reward model that never saw a harmless request refused
may well score a refusal highly: nothing but comparisons fixes its scores. So in every third pair one answer
begins with the first words of the policy's answer to *another* prompt, which makes it a refusal where the
policy would help, and help where it would refuse. The judge labels these pairs like all others.

They go to the topic `preferences` with a header that addresses them to the reward model's group: the trainer
passes over them, since by the time that it begins they would be far staler than its bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from charter.bus import Bus, Outgoing, Record
from charter.bus.base import REPLAY_GROUP_HEADER, Bounds
from charter.bus.messages import encode
from charter.bus.topics import PREFERENCES
from charter.circle.config import CircleConfig
from charter.feedback.asking import derived_seed
from charter.judge.worker import preference
from charter.lm.base import FinishReason, LanguageModel, Prompt, Sampling
from charter.redteam.prompts import RedTeamPrompt
from charter.reward.config import RewardConfig
from charter.rpc import convert
from charter.rpc.clients import JudgeClient
from charter.sampler import service
from charter.trainer.labels import GROUP as TRAINER
from charter.v1 import events_pb2, types_pb2

_CHUNK = 32
_READ = 500
_JOIN_S = 60.0
"""How long a group may take to give the trainer its partitions."""
_EVERY = 3
"""One pair in so many has an answer with another's opening."""
_OPENING_WORDS = 4


async def label(
    bus: Bus,
    policy: LanguageModel,
    judge: JudgeClient,
    prompts: Sequence[RedTeamPrompt],
    config: CircleConfig,
    report: Callable[[int, int], None],
) -> None:
    """Samples and judges a pair for each prompt; those that an earlier start published are left out.

    They are published in the prompts' order, so that their count tells which they are, also after a kill.
    """
    done = await asyncio.to_thread(_published, bus)
    gate = asyncio.Semaphore(config.concurrency)

    async def one(number: int) -> Outgoing:
        prompt, neighbour = prompts[number], prompts[(number + 1) % len(prompts)]
        async with gate:
            other = neighbour if number % _EVERY == _EVERY - 1 else None
            return await _labelled(policy, judge, prompt, other, config)

    async with asyncio.TaskGroup() as group:
        made = [group.create_task(one(number)) for number in range(done, len(prompts))]
        for start in range(0, len(made), _CHUNK):
            batch = [await task for task in made[start : start + _CHUNK]]
            await asyncio.to_thread(bus.publish, batch)
            report(done + start + len(batch), len(prompts))


def _published(bus: Bus) -> int:
    """Records of the topic. Offsets do not tell: on a broker the marker of each transaction takes one."""
    count = 0
    for partition, bounds in bus.bounds(PREFERENCES).items():
        offset = bounds.first
        while offset < bounds.end:
            found = bus.fetch(PREFERENCES, partition, offset, _READ)
            if not found:  # markers alone are left
                break
            count += len(found)
            offset = found[-1].offset + 1
    return count


async def _labelled(
    policy: LanguageModel,
    judge: JudgeClient,
    prompt: RedTeamPrompt,
    other: RedTeamPrompt | None,
    config: CircleConfig,
) -> Outgoing:
    name = f"first/{prompt.prompt_id}"
    rollout = await _rollout(policy, prompt, name, config)
    if other is not None and rollout.answers[0].finish_reason == types_pb2.FINISH_REASON_STOP:
        opened = await _with_opening_of(
            policy, prompt, other, config.sampler.sampling(derived_seed(config.seed, name, 1))
        )
        if opened:
            # Its log-probs would be of no use, and its tokens are known by its text.
            rollout.prompt_token_ids.clear()
            rollout.answers[1].CopyFrom(types_pb2.Completion(text=opened))
    compared = await judge.compare(
        prompt.conversation,
        rollout.answers[0].text,
        rollout.answers[1].text,
        seed=derived_seed(config.seed, name),
    )
    now = int(time.time() * 1000)
    message = encode(PREFERENCES, prompt.prompt_id, preference(rollout, (0, 1), compared, now))
    return replace(message, headers={**message.headers, REPLAY_GROUP_HEADER: RewardConfig().group.encode()})


async def _rollout(
    policy: LanguageModel, prompt: RedTeamPrompt, name: str, config: CircleConfig
) -> events_pb2.RolloutEvent:
    now = int(time.time() * 1000)
    event = events_pb2.PromptEvent(
        prompt_id=prompt.prompt_id,
        conversation=convert.messages_to_proto(prompt.conversation),
        created_unix_ms=now,
    )
    sampling = config.sampler.sampling(derived_seed(config.seed, name))
    samples = await policy.generate(Prompt(prompt.conversation), sampling, 2)
    return service.rollout(
        event, name, samples, temperature=config.sampler.temperature, policy_step=0, now_ms=now
    )


async def _with_opening_of(
    policy: LanguageModel, prompt: RedTeamPrompt, other: RedTeamPrompt, sampling: Sampling
) -> str:
    """An answer to `prompt` that begins as the one to `other` does; empty where it comes to no end."""
    donor = (await policy.generate(Prompt(other.conversation), sampling)).completions[0]
    opening = " ".join(donor.text.split()[:_OPENING_WORDS])
    rest = (await policy.generate(Prompt(prompt.conversation, prefill=opening), sampling)).completions[0]
    return opening + rest.text if rest.finish_reason is FinishReason.STOP else ""


def pass_over(bus: Bus, member: str) -> None:
    """Moves the trainer's group behind the first pairs, so that the sampler is not paced by them.

    For the time before the trainer begins: it takes the member's place in the group. Raises `Fenced` where
    another process holds it.
    """
    last = [record for p, bounds in bus.bounds(PREFERENCES).items() for record in _last(bus, p, bounds)]
    with bus.consumer(TRAINER, [PREFERENCES], member) as consumer:
        give_up = time.monotonic() + _JOIN_S
        consumer.poll(1, 1.0)
        while not {record.source for record in last} <= consumer.assignment() and time.monotonic() < give_up:
            consumer.poll(1, 1.0)
        consumer.commit(last)


def _last(bus: Bus, partition: int, bounds: Bounds) -> list[Record]:
    """The last record of a partition, if it has one: behind it there may be markers."""
    back = 1
    while True:
        start = max(bounds.first, bounds.end - back)
        found = bus.fetch(PREFERENCES, partition, start, back)
        if found or start == bounds.first:
            return found[-1:]
        back *= 2
