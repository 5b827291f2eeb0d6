"""What the gateway asks of a critic, and the client that asks a real one over gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from charter import rpc
from charter.errors import BackendError
from charter.lm.base import Conversation
from charter.rpc.convert import messages_to_proto
from charter.v1 import critic_pb2, critic_pb2_grpc


@dataclass(frozen=True, slots=True)
class Assessed:
    """How likely an answer breaks each principle of a constitution."""

    probabilities: Mapping[str, float]
    constitution_digest: str
    critic_version: str


class Critic(Protocol):
    """Reads answers against the constitution. Methods raise `BackendError` when it cannot."""

    async def assess(self, conversation: Conversation, answer: str) -> Assessed:
        """Assesses by all principles that serve the critique phase."""
        ...

    async def revise(
        self, conversation: Conversation, answer: str, principle_id: str, seed: int | None
    ) -> str:
        """One round of critique and revision by this principle; the better answer."""
        ...

    async def ready(self, within_seconds: float) -> None:
        """Returns when the critic can be reached; raises `BackendUnavailable` otherwise."""
        ...

    async def close(self) -> None:
        """Closes the connection; safe to repeat."""
        ...


class GrpcCritic:
    """A `charter.v1.CriticService` at host:port."""

    def __init__(self, target: str) -> None:
        self._channel = rpc.channel(target)
        self._stub = critic_pb2_grpc.CriticServiceStub(self._channel)

    async def assess(self, conversation: Conversation, answer: str) -> Assessed:
        """See `Critic.assess`."""
        response = await self._stub.Assess(
            critic_pb2.AssessRequest(conversation=messages_to_proto(conversation), answer=answer)
        )
        if not response.assessments:
            raise BackendError(
                f"the critic at {self._channel.target} assessed by no principle at all; "
                "its constitution needs at least one that serves the critique phase"
            )
        return Assessed(
            {a.principle_id: a.probability for a in response.assessments},
            response.constitution_digest,
            response.critic.version,
        )

    async def revise(
        self, conversation: Conversation, answer: str, principle_id: str, seed: int | None
    ) -> str:
        """See `Critic.revise`."""
        response = await self._stub.Revise(
            critic_pb2.ReviseRequest(
                conversation=messages_to_proto(conversation),
                answer=answer,
                principle_ids=[principle_id],
                rounds=1,
                seed=seed,
            )
        )
        return str(response.answer)

    async def ready(self, within_seconds: float) -> None:
        """See `Critic.ready`."""
        await self._channel.ready(within_seconds)

    async def close(self) -> None:
        """See `Critic.close`."""
        await self._channel.close()
