"""The held-out prompts, and what frozen models and plain rules say of the answers to them.

Nothing here knows the truth about a prompt or an answer: a prompt's class is the list that it is from, an
answer's faults are the critic's and the judge's opinions, and whether it is language at all is told by the
reference model's log-probs, its repetitions and its end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from charter.constitution.model import Constitution, Phase
from charter.errors import BackendUnavailable, ConfigError, RequestError
from charter.feedback import asking
from charter.feedback.records import Assessed
from charter.lm.base import ChatMessage, Conversation, FinishReason, LanguageModel, Prompt, Role, Sampling
from charter.publisher.config import GateConfig, Limits, SuiteConfig
from charter.publisher.gate import PromptClass, Reading
from charter.rpc.clients import CriticClient, JudgeClient

T = TypeVar("T")

SEED_HELDOUT = "seed-heldout"
HELPFULNESS, HONESTY = "helpfulness", "honesty"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One prompt of the suite."""

    id: str
    conversation: Conversation
    kind: PromptClass


def load(config: SuiteConfig, count: int) -> Mapping[PromptClass, tuple[HeldOut, ...]]:
    """Up to `count` prompts of each class, in an order that the seed chooses. Raises `ConfigError`."""
    sources = {
        PromptClass.HARMFUL: config.harmful,
        PromptClass.LOOKALIKE: config.lookalike,
        PromptClass.PLAIN: config.plain,
    }
    found = {kind: _read(source, kind, config.seed, count) for kind, source in sources.items() if source}
    if PromptClass.HARMFUL not in found or PromptClass.PLAIN not in found:
        raise ConfigError("the gate's suite needs suite.harmful and suite.plain; give a file to each")
    return found


def _read(source: str, kind: PromptClass, seed: int, count: int) -> tuple[HeldOut, ...]:
    if source == SEED_HELDOUT:
        from charter.seedmodel.world import RequestClass, Split, sample

        requests = sample(seed, RequestClass(kind.value), Split.HELDOUT, count)
        conversations: list[Conversation] = [(ChatMessage(Role.USER, r.text),) for r in requests]
    else:
        from charter.redteam.prompts import collect

        conversations = [p.conversation for p in collect([source]).prompts]
        random.Random(seed).shuffle(conversations)
    return tuple(HeldOut(f"{kind}-{i}", c, kind) for i, c in enumerate(conversations[:count]))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered."""

    text: str
    tokens: int
    finished: bool


class Crew:
    """Keeps a bounded number of questions in flight."""

    def __init__(self, concurrency: int) -> None:
        self._gate = asyncio.Semaphore(concurrency)

    async def all(self, jobs: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
        """Results in the order of the jobs; the first failure cancels the rest."""

        async def one(job: Callable[[], Awaitable[T]]) -> T:
            async with self._gate:
                return await job()

        return await asking.concurrently([one(job) for job in jobs])


async def answers(
    model: LanguageModel, prompts: Sequence[HeldOut], sampling: Sampling, role: str, crew: Crew
) -> list[Answer]:
    """One answer to each prompt; `role` makes the draws of two models independent."""

    async def one(prompt: HeldOut) -> Answer:
        seed = asking.derived_seed(sampling.seed or 0, role, sampling.temperature, prompt.id)
        seeded = Sampling(sampling.temperature, max_tokens=sampling.max_tokens, seed=seed)
        completion = (await model.generate(Prompt(prompt.conversation), seeded)).completions[0]
        finished = completion.finish_reason is FinishReason.STOP
        return Answer(completion.text, completion.completion_tokens, finished)

    return await crew.all([lambda p=p: one(p) for p in prompts])  # type: ignore[misc]


async def logprobs(
    model: LanguageModel, prompts: Sequence[HeldOut], texts: Sequence[str], crew: Crew
) -> list[tuple[float, int]]:
    """Of each text after its prompt: log-prob in nats at temperature 1, and tokens; (0, 0) if empty."""

    async def one(prompt: HeldOut, text: str) -> tuple[float, int]:
        if not text:
            return 0.0, 0
        [scored] = await model.score(Prompt(prompt.conversation), [text])
        return scored.total, len(scored.token_ids)

    pairs = zip(prompts, texts, strict=True)
    return await crew.all([lambda p=p, t=t: one(p, t) for p, t in pairs])  # type: ignore[misc]


def malformed(answer: Answer, logprob: float, tokens: int, limits: Limits) -> bool:
    """Whether an answer is no language: empty, without an end, unlikely, or turning in circles.

    `logprob` and `tokens` are the reference's of the whole answer.
    """
    if not answer.text.strip() or not answer.finished or "\ufffd" in answer.text:
        return True
    if not logprob / max(tokens, 1) >= limits.worst_logprob:
        return True
    return repetition(answer.text) > limits.repetition


def repetition(text: str) -> float:
    """Share of word trigrams that repeat an earlier one; 0 for fewer than four words."""
    words = text.split()
    trigrams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(trigrams)) / len(trigrams) if len(trigrams) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Principles:
    """Which principles the gate asks about, by what they are about."""

    harm: frozenset[str]
    quality: frozenset[str]
    helpfulness: frozenset[str]

    @classmethod
    def of(cls, constitution: Constitution) -> Principles:
        """By category: all that is neither helpfulness nor honesty is about harm. Raises `ConfigError`."""
        serving = constitution.serving(Phase.CRITIQUE)
        helpfulness = frozenset(p.id for p in serving if p.category == HELPFULNESS)
        quality = helpfulness | {p.id for p in serving if p.category == HONESTY}
        harm = frozenset(p.id for p in serving) - quality
        if not harm or not helpfulness:
            raise ConfigError(
                f"constitution {constitution.name} has {len(harm)} principles against harm and "
                f"{len(helpfulness)} of the category {HELPFULNESS} in its critique phase; the gate "
                "needs both, or it would promote a model that refuses everything"
            )
        return cls(harm, frozenset(quality), helpfulness)


class Examiner:
    """Asks the frozen critic and judge. They must read the same constitution as the gate."""

    def __init__(
        self, critic: CriticClient, judge: JudgeClient, constitution: Constitution, config: GateConfig
    ) -> None:
        self._critic = critic
        self._judge = judge
        self._constitution = constitution
        self._principles = Principles.of(constitution)
        self._config = config

    async def readings(
        self,
        prompts: Sequence[HeldOut],
        given: Sequence[Answer],
        reference: Sequence[tuple[float, int]],
        crew: Crew,
    ) -> list[Reading]:
        """What there is to say of each answer; `reference` has its log-prob and tokens."""

        async def one(prompt: HeldOut, answer: Answer, scored: tuple[float, int]) -> Reading:
            bad = malformed(answer, *scored, self._config.limits)
            try:
                assessed = await self._critic.assess(prompt.conversation, answer.text)
            except RequestError:  # too long for the critic, say: nothing that could be served
                return Reading(0.0, 1.0, 0.0, True, answer.tokens)
            self._check(assessed)
            found = {a.principle_id: a.probability for a in assessed.assessments}

            def worst(ids: frozenset[str]) -> float:
                return max((found.get(i, 0.0) for i in ids), default=0.0)

            p = self._principles
            return Reading(worst(p.harm), worst(p.quality), worst(p.helpfulness), bad, answer.tokens)

        rows = zip(prompts, given, reference, strict=True)
        return await crew.all([lambda r=r: one(*r) for r in rows])  # type: ignore[misc]

    async def preferences(
        self, prompts: Sequence[HeldOut], ours: Sequence[Answer], theirs: Sequence[Answer], crew: Crew
    ) -> list[float]:
        """The judge's unclamped probability that ours is the better answer; one half where they are equal."""

        async def one(prompt: HeldOut, a: str, b: str) -> float:
            if a == b:
                return 0.5
            seed = asking.derived_seed(self._config.seed, "gate", prompt.id)
            try:
                compared = await self._judge.compare(prompt.conversation, a, b, seed=seed)
            except RequestError:
                return 0.5
            total = sum(o.weight for o in compared.opinions)
            return sum(o.weight * o.probability for o in compared.opinions) / total

        rows = zip(prompts, ours, theirs, strict=True)
        return await crew.all([lambda p=p, a=a, b=b: one(p, a.text, b.text) for p, a, b in rows])  # type: ignore[misc]

    def _check(self, assessed: Assessed) -> None:
        if assessed.source.constitution_digest != self._constitution.digest:
            raise BackendUnavailable(
                f"the critic reads constitution {assessed.source.constitution_digest[:12]}, the gate "
                f"{self._constitution.digest[:12]}; give both the same file, then the gate goes on by itself"
            )
