"""Measures a candidate against the serving model, look by look, until the gate's verdict is clear."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from charter.lm.base import LanguageModel, Sampling
from charter.publisher import gate, suite
from charter.publisher.config import GateConfig
from charter.publisher.gate import Decision, Measurements, Pair, PromptClass, Reading, Verdict
from charter.publisher.suite import Answer, Crew, Examiner, HeldOut
from charter.registry import Registry
from charter.telemetry.logs import get_logger

log = get_logger(__name__)

CANDIDATE, SERVING, DIVERGENCE = "candidate", "serving", "divergence"


class Arena(Protocol):
    """Where models are measured, away from the users."""

    def model(self, checkpoint_id: str) -> contextlib.AbstractAsyncContextManager[LanguageModel]:
        """The model of a checkpoint, for the time of a block; blocks come one after another."""
        ...

    async def close(self) -> None:
        """Lets go of all models; safe to repeat."""
        ...


class LocalArena:
    """Loads checkpoints into this process; the last few stay, since a gate goes back and forth."""

    def __init__(self, registry: Registry, open_model: Callable[[str], LanguageModel], keep: int = 3) -> None:
        self._registry = registry
        self._open = open_model
        self._keep = keep
        self._models: dict[str, LanguageModel] = {}

    @contextlib.asynccontextmanager
    async def model(self, checkpoint_id: str) -> AsyncIterator[LanguageModel]:
        """See `Arena`."""
        model = self._models.pop(checkpoint_id, None)
        if model is None:
            while len(self._models) >= self._keep:
                await self._models.pop(next(iter(self._models))).close()
            folder = await asyncio.to_thread(self._registry.resolve, checkpoint_id)
            model = await asyncio.to_thread(self._open, f"local:{folder}")
        self._models[checkpoint_id] = model
        yield model

    async def close(self) -> None:
        """See `Arena`."""
        while self._models:
            await self._models.popitem()[1].close()


class ServerArena:
    """A policy server that nobody else uses; it is given one checkpoint after another."""

    def __init__(self, target: str) -> None:
        from charter.lm.policy_client import PolicyModel

        self._model = PolicyModel(target)

    @contextlib.asynccontextmanager
    async def model(self, checkpoint_id: str) -> AsyncIterator[LanguageModel]:
        """See `Arena`."""
        if (await self._model.info()).model.version != checkpoint_id:
            await self._model.reload(checkpoint_id)
        yield self._model

    async def close(self) -> None:
        """See `Arena`."""
        await self._model.close()


@dataclass(frozen=True, slots=True)
class Contest:
    """Who is measured against whom."""

    candidate: str
    serving: str
    reference: str
    """The frozen model whose log-probs say what is language, and where the divergence is measured from."""
    budgeted: bool
    """Whether the divergence has a budget: of checkpoints made by RL."""


class Measuring:
    """Runs contests. What the serving model answered is kept until another one serves."""

    def __init__(
        self,
        arena: Arena,
        prompts: Mapping[PromptClass, Sequence[HeldOut]],
        config: GateConfig,
        examiner: Callable[[], Examiner],
    ) -> None:
        """`examiner` is asked anew for every contest, since the constitution may have changed."""
        self._arena = arena
        self._prompts = prompts
        self._config = config
        self._examiner = examiner
        self._crew = Crew(config.concurrency)
        self._kept_for: tuple[str, str, Examiner] | None = None
        self._kept: dict[str, tuple[Answer, Reading]] = {}

    async def run(self, contest: Contest) -> Decision:
        """Looks until the verdict is clear. Raises `BackendUnavailable`, and what the models raise."""
        examiner = self._examiner()
        self._keep_for(contest, examiner)
        divergences = await self._divergences(contest) if contest.budgeted else []
        pairs: list[Pair] = []
        seen = 0
        for look in self._config.looks:
            pairs += await self._look(contest, examiner, seen, look)
            seen = look
            last = look == self._config.looks[-1] or all(len(p) <= look for p in self._prompts.values())
            decision = gate.decide(Measurements(pairs, divergences), self._config, last=last)
            log.info("gate looked", candidate=contest.candidate, prompts=len(pairs), verdict=decision.verdict)
            if decision.verdict is not Verdict.OPEN:
                break
        return decision

    def _keep_for(self, contest: Contest, examiner: Examiner) -> None:
        key = (contest.serving, contest.reference, examiner)
        if self._kept_for != key:
            self._kept_for, self._kept = key, {}

    async def _look(self, contest: Contest, examiner: Examiner, start: int, end: int) -> list[Pair]:
        prompts = [p for kind in self._prompts.values() for p in kind[start:end]]
        ours = await self._answered(contest.candidate, CANDIDATE, prompts)
        new = [p for p in prompts if p.id not in self._kept]
        theirs = await self._answered(contest.serving, SERVING, new) if new else []
        async with self._arena.model(contest.reference) as reference:
            scored = await suite.logprobs(reference, [*prompts, *new], _texts([*ours, *theirs]), self._crew)
        read = await examiner.readings([*prompts, *new], [*ours, *theirs], scored, self._crew)
        for prompt, answer, reading in zip(new, theirs, read[len(prompts) :], strict=True):
            self._kept[prompt.id] = answer, reading
        judged = [i for i, p in enumerate(prompts) if int(p.id.rpartition("-")[2]) < self._config.judged]
        wins = await examiner.preferences(
            [prompts[i] for i in judged],
            [ours[i] for i in judged],
            [self._kept[prompts[i].id][0] for i in judged],
            self._crew,
        )
        preferred = dict(zip(judged, wins, strict=True))
        return [Pair(p.kind, read[i], self._kept[p.id][1], preferred.get(i)) for i, p in enumerate(prompts)]

    async def _answered(self, checkpoint: str, role: str, prompts: Sequence[HeldOut]) -> list[Answer]:
        async with self._arena.model(checkpoint) as model:
            return await suite.answers(
                model, prompts, self._sampling(self._config.temperature), role, self._crew
            )

    async def _divergences(self, contest: Contest) -> list[float]:
        """log π/π_ref of answers drawn at temperature 1: their mean is the divergence (k1)."""
        share = -(-self._config.kl_samples // len(self._prompts))
        prompts = [p for kind in self._prompts.values() for p in kind[:share]]
        async with self._arena.model(contest.candidate) as model:
            drawn = await suite.answers(model, prompts, self._sampling(1.0), DIVERGENCE, self._crew)
            own = await suite.logprobs(model, prompts, _texts(drawn), self._crew)
        async with self._arena.model(contest.reference) as model:
            reference = await suite.logprobs(model, prompts, _texts(drawn), self._crew)
        return [a - b for (a, _), (b, _) in zip(own, reference, strict=True)]

    def _sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, max_tokens=self._config.max_tokens, seed=self._config.seed)


def _texts(given: Sequence[Answer]) -> list[str]:
    return [a.text for a in given]
