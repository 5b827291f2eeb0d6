"""Asks the reward service for scores."""

from __future__ import annotations

from collections.abc import Sequence

from charter.rpc import channel
from charter.v1 import reward_pb2
from charter.v1.reward_pb2_grpc import RewardServiceStub

_BATCH = 256


class RewardClient:
    """A reward service at `host:port`."""

    def __init__(self, target: str) -> None:
        self._channel = channel(target)
        self._stub = RewardServiceStub(self._channel)

    async def score(
        self, answers: Sequence[tuple[Sequence[int], Sequence[int]]], tokenizer_digest: str
    ) -> tuple[list[float], str]:
        """See `Rewards.score`. Raises what the service raised, `BackendUnavailable` when it is away."""
        while True:
            scores: list[float] = []
            digests: list[str] = []
            for start in range(0, len(answers), _BATCH):
                response = await self._stub.Score(
                    reward_pb2.RewardServiceScoreRequest(
                        answers=[
                            reward_pb2.ScoredAnswer(prompt_token_ids=prompt, answer_token_ids=answer)
                            for prompt, answer in answers[start : start + _BATCH]
                        ],
                        tokenizer_digest=tokenizer_digest,
                    )
                )
                scores += response.scores
                digests.append(response.model.digest)
            if len(set(digests)) == 1:  # a model that was renewed in the middle scores all of them again
                return scores, digests[0]

    async def close(self) -> None:
        """Closes the connection; safe to repeat."""
        await self._channel.close()
