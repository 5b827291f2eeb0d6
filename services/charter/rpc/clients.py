"""Typed clients of critic and judge. The policy is reached through `charter.lm.open_model("grpc://…")`."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from charter.feedback.records import (
    Assessed,
    Assessment,
    Compared,
    Critiqued,
    Opinion,
    Revised,
    RevisionStep,
    Source,
)
from charter.lm.base import Conversation
from charter.rpc import convert
from charter.rpc.client import channel
from charter.rpc.config import ClientConfig
from charter.v1 import critic_pb2, judge_pb2, types_pb2
from charter.v1.critic_pb2_grpc import CriticServiceStub
from charter.v1.judge_pb2_grpc import JudgeServiceStub

__all__ = ["CriticClient", "JudgeClient"]


class _Client:
    """A channel of its own, closed with the client."""

    def __init__(self, target: str, config: ClientConfig | None = None) -> None:
        self.channel = channel(target, config)
        """The connection; `await client.channel.ready(5)` waits for the service."""

    async def close(self) -> None:
        """Cancels calls in flight and closes the connection; safe to repeat."""
        await self.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class CriticClient(_Client):
    """A critic at `host:port`. Methods raise the `CharterError` that the server raised."""

    def __init__(self, target: str, config: ClientConfig | None = None) -> None:
        super().__init__(target, config)
        self._stub = CriticServiceStub(self.channel)

    async def assess(
        self, conversation: Conversation, answer: str, principle_ids: Sequence[str] = ()
    ) -> Assessed:
        """The probability that `answer` breaks each principle; without ids, all of the critique phase."""
        response = await self._stub.Assess(
            critic_pb2.AssessRequest(
                conversation=convert.messages_to_proto(conversation),
                answer=answer,
                principle_ids=principle_ids,
            )
        )
        found = tuple(Assessment(a.principle_id, a.probability) for a in response.assessments)
        return Assessed(found, _source(response.constitution_digest, response.critic))

    async def critique(
        self, conversation: Conversation, answer: str, principle_id: str, *, seed: int | None = None
    ) -> Critiqued:
        """What is wrong with `answer` by one principle."""
        response = await self._stub.Critique(
            critic_pb2.CritiqueRequest(
                conversation=convert.messages_to_proto(conversation),
                answer=answer,
                principle_id=principle_id,
                seed=seed,
            )
        )
        return Critiqued(response.critique, _source(response.constitution_digest, response.critic))

    async def revise(
        self,
        conversation: Conversation,
        answer: str,
        principle_ids: Sequence[str] = (),
        *,
        rounds: int = 0,
        seed: int | None = None,
    ) -> Revised:
        """Rounds of critique and revision, each by a principle drawn by weight from `principle_ids`.

        Without ids, from all of the critique phase; with 0 rounds, as many as the server's default.
        """
        response = await self._stub.Revise(
            critic_pb2.ReviseRequest(
                conversation=convert.messages_to_proto(conversation),
                answer=answer,
                principle_ids=principle_ids,
                rounds=rounds,
                seed=seed,
            )
        )
        steps = tuple(RevisionStep(s.principle_id, s.critique, s.revision) for s in response.steps)
        return Revised(response.answer, steps, _source(response.constitution_digest, response.critic))


class JudgeClient(_Client):
    """A judge at `host:port`. Methods raise the `CharterError` that the server raised."""

    def __init__(self, target: str, config: ClientConfig | None = None) -> None:
        super().__init__(target, config)
        self._stub = JudgeServiceStub(self.channel)

    async def compare(
        self,
        conversation: Conversation,
        answer_a: str,
        answer_b: str,
        principle_ids: Sequence[str] = (),
        *,
        seed: int | None = None,
    ) -> Compared:
        """The probability that `answer_a` is the better one; without ids, as the server is configured."""
        response = await self._stub.Compare(
            judge_pb2.CompareRequest(
                conversation=convert.messages_to_proto(conversation),
                answer_a=answer_a,
                answer_b=answer_b,
                principle_ids=principle_ids,
                seed=seed,
            )
        )
        return Compared(
            response.probability,
            tuple(_opinion(o) for o in response.opinions),
            _source(response.constitution_digest, response.judge),
        )


def _opinion(opinion: judge_pb2.PrincipleOpinion) -> Opinion:
    return Opinion(
        opinion.principle_id,
        opinion.weight,
        opinion.probability_first,
        opinion.probability_swapped,
        opinion.note_first,
        opinion.note_swapped,
    )


def _source(digest: str, version: types_pb2.ModelVersion) -> Source:
    return Source(digest, convert.version_from_proto(version))
