"""Prompts in, rollouts out: the sampler's part of the circle. It drops nothing; it waits."""

from __future__ import annotations

import time
from collections.abc import Sequence

from charter.bus import Bus, Outgoing, Record
from charter.bus.messages import decode, encode
from charter.bus.metrics import BusMetrics
from charter.bus.worker import Worker, WorkerOptions
from charter.feedback.asking import derived_seed
from charter.lm.base import LanguageModel, Prompt
from charter.registry.events import Steps
from charter.rpc import convert
from charter.sampler import service
from charter.sampler.config import SamplerConfig
from charter.sampler.pacing import Pacer
from charter.v1 import events_pb2

GROUP = "sampler"
PROMPTS, ROLLOUTS = "prompts", "rollouts"


class Sampler:
    """Asks the policy for k answers to a prompt."""

    def __init__(self, policy: LanguageModel, steps: Steps, config: SamplerConfig) -> None:
        self._policy = policy
        self._steps = steps
        self._config = config

    async def __call__(self, record: Record) -> Sequence[Outgoing]:
        """The rollout of one prompt."""
        prompt = decode(record, events_pb2.PromptEvent)
        name = service.rollout_id(prompt, record.offset)
        conversation = convert.messages_from_proto(prompt.conversation)
        sampling = self._config.sampling(derived_seed(self._config.seed, name))
        samples = await self._policy.generate(Prompt(conversation), sampling, self._config.answers)
        event = service.rollout(
            prompt,
            name,
            samples,
            temperature=self._config.temperature,
            policy_step=self._steps.of(samples.model.version),
            now_ms=int(time.time() * 1000),
        )
        return [encode(ROLLOUTS, prompt.prompt_id, event)]


def worker(
    bus: Bus,
    policy: LanguageModel,
    config: SamplerConfig,
    *,
    member: str | None = None,
    options: WorkerOptions | None = None,
    metrics: BusMetrics | None = None,
) -> Worker:
    """The loop that samples rollouts; `run` it, and `stop` it from a signal handler."""
    options = options or WorkerOptions()
    pacer = Pacer(bus, config, options.max_records)
    return Worker(
        bus,
        GROUP,
        [PROMPTS],
        Sampler(policy, Steps(bus), config),
        member=member,
        options=options,
        metrics=metrics,
        room=pacer.has_room,
    )
