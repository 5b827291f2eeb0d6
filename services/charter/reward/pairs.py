"""A labelled pair: two answers to a prompt as token ids, and the probability that the first is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from charter.errors import RequestError
from charter.finetune.checkpoints import Vocabulary
from charter.finetune.tokens import tokenise
from charter.lm.base import Conversation, Role
from charter.rpc import convert
from charter.v1 import events_pb2


@dataclass(frozen=True, slots=True)
class Pair:
    """One label."""

    preference_id: str
    prompt_id: str
    prompt_ids: tuple[int, ...]
    answer_a: tuple[int, ...]
    """Up to and with the stop token, where there is one."""
    answer_b: tuple[int, ...]
    probability: float
    """That A is better."""
    human: bool = False
    constitution_digest: str = ""
    judge_digest: str = ""
    principles: tuple[str, ...] = ()
    """Ids of the principles that had a say."""

    @property
    def confidence(self) -> float:
        """How far the label is from undecided, 0 to 1."""
        return abs(2.0 * self.probability - 1.0)

    @property
    def preferred(self) -> tuple[int, ...]:
        """The answer that the label leans to."""
        return self.answer_a if self.probability >= 0.5 else self.answer_b


class TooLongError(RequestError):
    """A pair that the model cannot read whole."""


def from_proto(event: events_pb2.PreferenceEvent, vocabulary: Vocabulary) -> Pair:
    """The pair of an event; human ones, which have no token ids, are tokenised by the chat template.

    Raises `RequestError` for an event that cannot be learned from, `TooLongError` for one that does not fit.
    """
    where = f"preference {event.preference_id!r}"
    if not event.preference_id or not event.prompt_id:
        raise RequestError(
            f"{where} has no preference_id or no prompt_id; whoever publishes labels must set both"
        )
    if not 0.0 <= event.probability_a <= 1.0:
        raise RequestError(f"{where} has the probability {event.probability_a}; it must lie between 0 and 1")
    if event.human or not event.prompt_token_ids:
        prompt, answers = _tokenised(event, vocabulary, where)
    else:
        prompt, answers = _as_sampled(event, vocabulary, where)
    longest = len(prompt) + max(len(a) for a in answers)
    if longest > vocabulary.context_length:
        raise TooLongError(
            f"{where} has {longest} tokens; the reward model reads {vocabulary.context_length}; left out"
        )
    return Pair(
        event.preference_id,
        event.prompt_id,
        prompt,
        *answers,
        float(event.probability_a),
        bool(event.human),
        event.constitution_digest,
        event.judge.digest,
        tuple(o.principle_id for o in event.opinions),
    )


_Ids = tuple[int, ...]


def _as_sampled(
    event: events_pb2.PreferenceEvent, vocabulary: Vocabulary, where: str
) -> tuple[_Ids, tuple[_Ids, _Ids]]:
    told = event.policy.tokenizer_digest
    if told and told != vocabulary.digest:
        raise RequestError(
            f"{where} was sampled with the tokenizer {told[:12]}, and the reward model has "
            f"{vocabulary.digest[:12]}; use a reward model of the policy's family"
        )
    prompt = tuple(event.prompt_token_ids)
    answers = (tuple(event.answer_a.token_ids), tuple(event.answer_b.token_ids))
    limit = vocabulary.codec.vocabulary_size
    if not all(0 <= i < limit for ids in (prompt, *answers) for i in ids):
        raise RequestError(
            f"{where} has token ids beyond the vocabulary of {limit}; it is of another tokenizer"
        )
    if not all(answers):
        raise RequestError(f"{where} has an answer without a single token; the sampler must store them")
    return prompt, answers


def _tokenised(
    event: events_pb2.PreferenceEvent, vocabulary: Vocabulary, where: str
) -> tuple[_Ids, tuple[_Ids, _Ids]]:
    """People's transcripts are often longer than a small context: the earliest turns go first."""
    conversation = convert.messages_from_proto(event.conversation)
    texts = (event.answer_a.text, event.answer_b.text)
    if not all(text.strip() for text in texts):
        raise RequestError(f"{where} has an empty answer; leave such pairs out of the file")
    while True:
        first, second = (tokenise(vocabulary, conversation, text) for text in texts)
        if max(len(first), len(second)) <= vocabulary.context_length or len(conversation) < 3:
            return first.prompt_ids, (first.answer_ids, second.answer_ids)
        conversation = _without_first_exchange(conversation)


def _without_first_exchange(conversation: Conversation) -> Conversation:
    kept = conversation[1:]
    while len(kept) > 1 and kept[0].role is not Role.USER:
        kept = kept[1:]
    return kept


def read_whole(pair: Pair) -> tuple[Sequence[int], Sequence[int]]:
    """What the model reads for A and for B."""
    return (*pair.prompt_ids, *pair.answer_a), (*pair.prompt_ids, *pair.answer_b)
