"""Takes a draft through the guard: asks the critic, lets `guard.decide` decide, until it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass

from charter.errors import BackendError, RequestError
from charter.feedback.records import Assessed
from charter.gateway.guard import (
    Accept,
    Attempt,
    GuardMode,
    GuardRules,
    Refuse,
    Verdict,
    decide,
    in_doubt,
)
from charter.gateway.principles import Principles
from charter.gateway.refusal import refusal
from charter.lm.base import Conversation
from charter.rpc.clients import CriticClient
from charter.telemetry.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Involved:
    """A principle that put an attempt in doubt, or that a revision was asked for."""

    id: str
    before: float
    """Probability that the draft breaks it."""
    after: float | None
    """Probability that the answer given breaks it; None for a refusal, which no model wrote."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the guard made of a draft."""

    verdict: Verdict
    answer: str
    replaced: bool = False
    """Whether the answer is not the draft: a revision or the refusal took its place."""
    rounds: int = 0
    principles: tuple[Involved, ...] = ()
    constitution_digest: str = ""
    critic_version: str = ""
    assess_seconds: float = 0.0
    revise_seconds: float = 0.0


class Gate:
    """The guard at work, for any number of drafts at once."""

    def __init__(self, critic: CriticClient, principles: Principles, rules: GuardRules) -> None:
        self.critic = critic
        self.principles = principles
        self._rules = rules

    async def observe(self, conversation: Conversation, answer: str) -> Outcome:
        """Assesses an answer that is given whatever comes out."""
        started = time.perf_counter()
        assessed = await _assess(self.critic, conversation, answer)
        probabilities = _probabilities(assessed)
        known = self.principles.by_digest(assessed.source.constitution_digest)
        doubtful = in_doubt(self._rules, known, Attempt(answer, probabilities))
        return Outcome(
            Verdict.FLAGGED if doubtful else Verdict.PASSED,
            answer,
            principles=tuple(Involved(i, p := probabilities[i], p) for i in doubtful),
            constitution_digest=assessed.source.constitution_digest,
            critic_version=assessed.source.model.version,
            assess_seconds=time.perf_counter() - started,
        )

    async def hold(
        self, conversation: Conversation, draft: str, mode: GuardMode, seed: int | None
    ) -> Outcome:
        """Gives back only what passed: the draft, a revision, or the refusal."""
        course = _Course(self, conversation, mode, self._rules)
        return await course.run(draft, seed)


class _Course:
    """One draft's way through the gate."""

    def __init__(self, gate: Gate, conversation: Conversation, mode: GuardMode, rules: GuardRules) -> None:
        self._gate = gate
        self._conversation = conversation
        self._mode = mode
        self._rules = rules
        self._attempts: list[Attempt] = []
        self._digest = ""
        self._critic_version = ""
        self._first: dict[str, float] = {}
        self._seen: dict[str, None] = {}
        self._assess_seconds = 0.0
        self._revise_seconds = 0.0

    async def run(self, draft: str, seed: int | None) -> Outcome:
        await self._assess(draft, "")
        self._first = dict(self._attempts[0].probabilities)
        rounds, stuck = 0, False
        while True:
            principles = self._gate.principles.by_digest(self._digest)
            for attempt in self._attempts:
                self._seen.update(dict.fromkeys(in_doubt(self._rules, principles, attempt)))
            spent = self._rules.max_rounds if stuck else rounds
            step = decide(self._mode, self._rules, principles, self._attempts, spent)
            chosen = self._attempts[step.attempt]
            if isinstance(step, Accept):
                verdict = Verdict.REVISED if chosen.revised_by else Verdict.PASSED
                if in_doubt(self._rules, principles, chosen):
                    verdict = Verdict.FLAGGED
                return self._outcome(verdict, chosen.answer, rounds, chosen)
            self._seen[step.principle_id] = None
            if isinstance(step, Refuse):
                answer = refusal(principles.get(step.principle_id), self._gate.principles.language)
                return self._outcome(Verdict.REFUSED, answer, rounds, None)
            try:
                revision = await self._revise(chosen.answer, step.principle_id, seed, rounds)
                rounds += 1
                await self._assess(revision, step.principle_id)
            except RequestError as error:
                # Too long for the critic, or by a principle that it has just lost: what there is decides.
                log.warning("no further round", reason=str(error))
                stuck = True

    async def _revise(self, answer: str, principle_id: str, seed: int | None, rounds: int) -> str:
        started = time.perf_counter()
        revised = await self._gate.critic.revise(
            self._conversation,
            answer,
            [principle_id],
            rounds=1,
            seed=None if seed is None else seed + rounds,
        )
        self._revise_seconds += time.perf_counter() - started
        return revised.answer

    async def _assess(self, answer: str, revised_by: str) -> None:
        started = time.perf_counter()
        assessed = await _assess(self._gate.critic, self._conversation, answer)
        self._assess_seconds += time.perf_counter() - started
        if assessed.source.constitution_digest != self._digest:
            # What an older constitution allowed is not accepted under the new one.
            self._attempts.clear()
            self._digest = assessed.source.constitution_digest
        self._critic_version = assessed.source.model.version
        self._attempts.append(Attempt(answer, _probabilities(assessed), revised_by))

    def _outcome(self, verdict: Verdict, answer: str, rounds: int, accepted: Attempt | None) -> Outcome:
        after = accepted.probabilities if accepted else {}
        involved = tuple(Involved(i, self._first.get(i, 0.0), after.get(i)) for i in self._seen)
        return Outcome(
            verdict,
            answer,
            accepted is None or bool(accepted.revised_by),
            rounds,
            involved,
            self._digest,
            self._critic_version,
            self._assess_seconds,
            self._revise_seconds,
        )


async def _assess(critic: CriticClient, conversation: Conversation, answer: str) -> Assessed:
    assessed = await critic.assess(conversation, answer)
    if not assessed.assessments:
        # No opinion is no approval.
        raise BackendError("the critic assessed by no principle; its constitution needs some for critique")
    return assessed


def _probabilities(assessed: Assessed) -> dict[str, float]:
    return {a.principle_id: a.probability for a in assessed.assessments}
