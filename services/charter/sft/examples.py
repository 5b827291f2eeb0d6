"""Revisions and own answers as one data set of token ids, in which only answers bear loss."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from charter.errors import RequestError
from charter.finetune.checkpoints import Vocabulary
from charter.finetune.tokens import Tokenised, tokenise
from charter.lm.base import Conversation


@dataclass(frozen=True, slots=True)
class Mixture:
    """The data set of one run."""

    examples: tuple[Tokenised, ...]
    revisions: int
    own: int
    too_long: int
    """Examples that were left out because the model could not read them whole."""


def mix(
    vocabulary: Vocabulary,
    revisions: Iterable[tuple[Conversation, str]],
    own: Iterable[tuple[Conversation, str]],
    max_length: int,
    seed: int,
) -> Mixture:
    """Tokenises both and shuffles them together."""
    limit = min(max_length or vocabulary.context_length, vocabulary.context_length)
    counts = {"revisions": 0, "own": 0}
    kept: list[Tokenised] = []
    too_long = 0
    for kind, pairs in (("revisions", revisions), ("own", own)):
        for conversation, answer in pairs:
            example = _tokenised(vocabulary, conversation, answer)
            if example is None or len(example) > limit:
                too_long += 1
            else:
                kept.append(example)
                counts[kind] += 1
    random.Random(f"{seed}/mix").shuffle(kept)
    return Mixture(tuple(kept), counts["revisions"], counts["own"], too_long)


def _tokenised(vocabulary: Vocabulary, conversation: Conversation, answer: str) -> Tokenised | None:
    try:
        return tokenise(vocabulary, conversation, answer)
    except RequestError:  # a conversation that this model's template cannot express
        return None
