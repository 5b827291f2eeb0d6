"""Assessing, criticising and revising an answer by a constitution, with any language model.

The supervised phase of Constitutional AI (arXiv 2212.08073, section 3.1): each round draws a principle,
asks the model what is wrong with the answer by it, and asks for a better one.
"""

from __future__ import annotations

from collections.abc import Sequence

from charter.constitution.model import CritiqueExample, Principle
from charter.critic.config import Writing
from charter.feedback import asking, prompts
from charter.feedback.records import Assessment, RevisionStep
from charter.lm.base import Conversation, LanguageModel


async def assess(
    model: LanguageModel, conversation: Conversation, answer: str, principles: Sequence[Principle]
) -> tuple[Assessment, ...]:
    """The probability that `answer` breaks each of the principles, all asked at once."""
    probabilities = await asking.concurrently(
        [
            asking.probability(model, prompts.assess(conversation, answer, p), prompts.YES, prompts.NO)
            for p in principles
        ]
    )
    return tuple(Assessment(p.id, value) for p, value in zip(principles, probabilities, strict=True))


async def critique(
    model: LanguageModel,
    conversation: Conversation,
    answer: str,
    principle: Principle,
    *,
    writing: Writing,
    examples: Sequence[CritiqueExample],
    seed: int,
) -> str:
    """What is wrong with `answer` by the principle."""
    prompt = prompts.critique(conversation, answer, principle, examples[: writing.examples])
    return await asking.write(model, prompt, writing.critique(asking.derived_seed(seed, "critique")))


async def revise(
    model: LanguageModel,
    conversation: Conversation,
    answer: str,
    principles: Sequence[Principle],
    *,
    writing: Writing,
    examples: Sequence[CritiqueExample],
    seed: int,
) -> tuple[RevisionStep, ...]:
    """One round of critique and revision for each of `principles`, in order; every step is returned.

    A round in which the model writes nothing leaves the answer as it was.
    """
    steps: list[RevisionStep] = []
    for number, principle in enumerate(principles):
        step = await _round(
            model,
            conversation,
            answer,
            principle,
            writing=writing,
            examples=examples,
            seed=asking.derived_seed(seed, number),
        )
        answer = step.revision
        steps.append(step)
    return tuple(steps)


async def _round(
    model: LanguageModel,
    conversation: Conversation,
    answer: str,
    principle: Principle,
    *,
    writing: Writing,
    examples: Sequence[CritiqueExample],
    seed: int,
) -> RevisionStep:
    said = await critique(
        model, conversation, answer, principle, writing=writing, examples=examples, seed=seed
    )
    prompt = prompts.revise(conversation, answer, said, principle, examples[: writing.examples])
    revision = await asking.write(model, prompt, writing.revision(asking.derived_seed(seed, "revision")))
    return RevisionStep(principle.id, said, revision or answer)
