"""Conversations and answers as token ids, exactly as the policy reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass

from charter.finetune.checkpoints import Vocabulary
from charter.lm.base import Conversation, Prompt

IGNORED = -100
"""Label of a token that bears no loss (PyTorch's and TRL's convention)."""


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A prompt and an answer to it."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """The answer's text and the token that ends it."""

    @property
    def input_ids(self) -> list[int]:
        """Both, one after the other."""
        return [*self.prompt_ids, *self.answer_ids]

    @property
    def labels(self) -> list[int]:
        """The answer's tokens; the prompt's bear no loss."""
        return [IGNORED] * len(self.prompt_ids) + [*self.answer_ids]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def tokenise(vocabulary: Vocabulary, conversation: Conversation, answer: str) -> Tokenised:
    """The ids of a whole answer to a conversation. Raises `RequestError` where the template refuses it."""
    codec = vocabulary.codec
    prompt = codec.encode(Prompt(conversation))
    ids = codec.continuation_ids(prompt.tail, prompt.tail_ids, answer)
    return Tokenised(prompt.token_ids, (*ids, vocabulary.end_id))
