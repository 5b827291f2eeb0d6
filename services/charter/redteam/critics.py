"""Who criticises and revises: a critic server, or any model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from charter.constitution.model import Constitution, Phase
from charter.critic import service
from charter.critic.config import Writing
from charter.feedback import asking
from charter.feedback.records import Revised, Source
from charter.lm.base import Conversation, LanguageModel


class Critic(Protocol):
    """What a run needs of a critic; `charter.rpc.clients.CriticClient` is one."""

    async def revise(
        self,
        conversation: Conversation,
        answer: str,
        principle_ids: Sequence[str] = (),
        *,
        rounds: int = 0,
        seed: int | None = None,
    ) -> Revised:
        """Rounds of critique and revision, each by a principle drawn by weight."""
        ...

    async def close(self) -> None:
        """Lets go of what it holds; safe to repeat."""
        ...


class InProcessCritic:
    """A critic over a model of this process; the same draws and the same prompts as the server's."""

    def __init__(
        self, model: LanguageModel, constitution: Constitution, writing: Writing | None = None
    ) -> None:
        """Raises `ConstitutionError` when no principle serves the critique phase."""
        asking.checked_for(constitution, Phase.CRITIQUE)
        self._model = model
        self._constitution = constitution
        self._writing = writing or Writing()

    async def revise(
        self,
        conversation: Conversation,
        answer: str,
        principle_ids: Sequence[str] = (),
        *,
        rounds: int = 0,
        seed: int | None = None,
    ) -> Revised:
        """See `Critic`."""
        seed = asking.fresh_seed() if seed is None else seed
        pool = asking.chosen(self._constitution, Phase.CRITIQUE, principle_ids)
        steps = await service.revise(
            self._model,
            conversation,
            answer,
            asking.draw(pool, rounds or 4, asking.derived_seed(seed, "principles")),
            writing=self._writing,
            examples=self._constitution.critique_examples,
            seed=seed,
        )
        info = await self._model.info()
        return Revised(steps[-1].revision, steps, Source(self._constitution.digest, info.model))

    async def close(self) -> None:
        """Nothing: the model is its owner's to close."""
