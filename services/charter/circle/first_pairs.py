"""Pairs of SL-CAI's answers for the first reward model, labelled by the judge.

They go to the topic `preferences` with a header that addresses them to the reward model's group: the trainer
passes over them, since by the time that it begins they would be far staler than its bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from charter.bus import Bus, Outgoing
from charter.bus.base import REPLAY_GROUP_HEADER
from charter.bus.messages import encode
from charter.bus.topics import PREFERENCES
from charter.circle.config import CircleConfig
from charter.feedback.asking import derived_seed
from charter.judge.worker import pairs, preference
from charter.lm.base import LanguageModel, Prompt
from charter.redteam.prompts import RedTeamPrompt
from charter.reward.config import RewardConfig
from charter.rpc import convert
from charter.rpc.clients import JudgeClient
from charter.sampler import service
from charter.trainer.labels import GROUP as TRAINER
from charter.v1 import events_pb2

_CHUNK = 32


async def label(
    bus: Bus,
    policy: LanguageModel,
    judge: JudgeClient,
    prompts: Sequence[RedTeamPrompt],
    config: CircleConfig,
    report: Callable[[int, int], None],
) -> None:
    """Samples and judges a pair for each prompt; those that an earlier start published are left out."""
    done = sum(b.end - b.first for b in bus.bounds(PREFERENCES).values())
    gate = asyncio.Semaphore(config.concurrency)
    made: asyncio.Queue[Outgoing] = asyncio.Queue()

    async def one(prompt: RedTeamPrompt) -> None:
        async with gate:
            for message in await _labelled(policy, judge, prompt, config):
                made.put_nowait(message)

    async def publish() -> None:
        count, batch = done, []
        while count < len(prompts):
            batch.append(await made.get())
            count += 1
            if len(batch) == _CHUNK or count == len(prompts):
                await asyncio.to_thread(bus.publish, batch)
                report(count, len(prompts))
                batch = []

    async with asyncio.TaskGroup() as group:
        group.create_task(publish())
        for prompt in prompts[done:]:
            group.create_task(one(prompt))


async def _labelled(
    policy: LanguageModel, judge: JudgeClient, prompt: RedTeamPrompt, config: CircleConfig
) -> list[Outgoing]:
    event = events_pb2.PromptEvent(
        prompt_id=prompt.prompt_id,
        conversation=convert.messages_to_proto(prompt.conversation),
        source=events_pb2.PROMPT_SOURCE_RED_TEAM,
        created_unix_ms=int(time.time() * 1000),
    )
    name = f"first/{prompt.prompt_id}"
    sampling = config.sampler.sampling(derived_seed(config.seed, name))
    samples = await policy.generate(Prompt(prompt.conversation), sampling, 2)
    now = int(time.time() * 1000)
    rollout = service.rollout(
        event, name, samples, temperature=config.sampler.temperature, policy_step=0, now_ms=now
    )
    found = []
    for a, b in pairs(len(rollout.answers)):
        compared = await judge.compare(
            prompt.conversation,
            rollout.answers[a].text,
            rollout.answers[b].text,
            seed=derived_seed(config.seed, name, a, b),
        )
        message = encode(PREFERENCES, prompt.prompt_id, preference(rollout, (a, b), compared, now))
        headers = {**message.headers, REPLAY_GROUP_HEADER: RewardConfig().group.encode()}
        found.append(replace(message, headers=headers))
    return found


def pass_over(bus: Bus, member: str) -> None:
    """Moves the trainer's group behind the first pairs, so that the sampler is not paced by them.

    For the time before the trainer begins: it takes the member's place in the group.
    """
    ends = {p: b.end for p, b in bus.bounds(PREFERENCES).items() if b.end > b.first}
    last = [record for p, end in ends.items() for record in bus.fetch(PREFERENCES, p, end - 1, 1)]
    with bus.consumer(TRAINER, [PREFERENCES], member) as consumer:
        consumer.poll(1, 1.0)
        consumer.commit(last)
