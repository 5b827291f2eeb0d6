"""Rollouts in, preferences out: the judge's part of the circle.

Each rollout of k answers gives k // 2 disjoint pairs, so that no answer is learned from twice. A label is
named after its rollout and pair, and the judge's seed derives from that name: a batch that is judged again
after a crash gives the same labels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from charter.bus import Bus, Outgoing, Record
from charter.bus.messages import decode, encode
from charter.bus.metrics import BusMetrics
from charter.bus.worker import Worker, WorkerOptions
from charter.errors import MalformedMessage
from charter.feedback import asking
from charter.feedback.records import Compared
from charter.rpc import convert
from charter.rpc.clients import JudgeClient
from charter.v1 import events_pb2

GROUP = "judge"
ROLLOUTS, PREFERENCES = "rollouts", "preferences"


def pairs(answers: int) -> list[tuple[int, int]]:
    """Indices of the pairs that are judged: disjoint, in order; an odd answer is left over."""
    return [(i, i + 1) for i in range(0, answers - 1, 2)]


def preference(
    rollout: events_pb2.RolloutEvent, pair: tuple[int, int], compared: Compared, now_ms: int
) -> events_pb2.PreferenceEvent:
    """The label of one pair, with all that a learner must know about its origin."""
    a, b = pair
    return events_pb2.PreferenceEvent(
        preference_id=f"{rollout.rollout_id}/{a}-{b}",
        rollout_id=rollout.rollout_id,
        prompt_id=rollout.prompt_id,
        conversation=rollout.conversation,
        prompt_token_ids=rollout.prompt_token_ids,
        answer_a=rollout.answers[a],
        answer_b=rollout.answers[b],
        probability_a=compared.probability,
        opinions=[
            events_pb2.PreferenceOpinion(
                principle_id=o.principle_id,
                weight=o.weight,
                probability_first=o.probability_first,
                probability_swapped=o.probability_swapped,
            )
            for o in compared.opinions
        ],
        constitution_digest=compared.source.constitution_digest,
        judge=convert.version_to_proto(compared.source.model),
        policy=rollout.policy,
        temperature=rollout.temperature,
        source=rollout.source,
        created_unix_ms=now_ms,
        policy_step=rollout.policy_step,
        prompt_created_unix_ms=rollout.prompt_created_unix_ms,
    )


class Labeller:
    """Asks the judge about every pair of a rollout."""

    def __init__(self, judge: JudgeClient) -> None:
        self._judge = judge

    async def __call__(self, record: Record) -> Sequence[Outgoing]:
        """The preferences of one rollout. Raises `MalformedMessage` where there is no pair to judge."""
        rollout = decode(record, events_pb2.RolloutEvent)
        if len(rollout.answers) < 2:
            raise MalformedMessage(
                f"rollout {rollout.rollout_id} has {len(rollout.answers)} answers, and a label needs two; "
                "let the sampler ask for at least 2"
            )
        asked = [self._label(rollout, pair) for pair in pairs(len(rollout.answers))]
        labels = await asking.concurrently(asked)
        return [encode(PREFERENCES, rollout.prompt_id, label) for label in labels]

    async def _label(
        self, rollout: events_pb2.RolloutEvent, pair: tuple[int, int]
    ) -> events_pb2.PreferenceEvent:
        a, b = pair
        compared = await self._judge.compare(
            convert.messages_from_proto(rollout.conversation),
            rollout.answers[a].text,
            rollout.answers[b].text,
            seed=asking.derived_seed(0, rollout.rollout_id, a, b),
        )
        return preference(rollout, pair, compared, int(time.time() * 1000))


def worker(
    bus: Bus,
    judge: JudgeClient,
    *,
    member: str | None = None,
    options: WorkerOptions | None = None,
    metrics: BusMetrics | None = None,
) -> Worker:
    """The loop that labels rollouts; `run` it, and `stop` it from a signal handler."""
    return Worker(bus, GROUP, [ROLLOUTS], Labeller(judge), member=member, options=options, metrics=metrics)
