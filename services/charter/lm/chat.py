"""From a conversation to token ids, by the model's own chat template, with one rule of our own: what
people and models wrote can never become a special token.

The template is rendered with the contents as they are, except that literals of special tokens in them
are masked; the result is tokenised around the template's own special tokens, and everything between is
tokenised with special tokens switched off. For contents without such literals the ids are exactly those
of `tokenizer.apply_chat_template`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from charter.errors import RequestError
from charter.lm.base import ChatMessage, Conversation, Prompt, Role
from charter.lm.detokenise import Detokeniser, TokenBytes, WindowText, token_bytes

_SPEAKERS = {Role.SYSTEM: "System", Role.USER: "Human", Role.ASSISTANT: "Assistant"}


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    token_ids: tuple[int, ...]
    tail: str
    """The text after the last special token: a continuation may merge with it."""
    tail_ids: tuple[int, ...]


class ChatCodec:
    """Everything that a model's tokenizer does: conversations in, answers out. Safe to share by threads.

    `stop_ids` are the tokens that end an answer. `vocabulary_size` is the width of the model's logits,
    which may be larger than the tokenizer knows tokens.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], vocabulary_size: int) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.vocabulary_size = vocabulary_size
        self.control_ids = _control_ids(tokenizer) | self.stop_ids
        """Ids that no content may contain."""
        literals = sorted((_literal(tokenizer, i) for i in self.control_ids), key=len, reverse=True)
        self._control = re.compile("|".join(re.escape(t) for t in literals if t) or r"(?!)")
        self.blocked_ids = blocked_token_ids(tokenizer, self.stop_ids, vocabulary_size)
        """Ids that are never sampled inside an answer."""
        self.detokeniser: Detokeniser = _detokeniser(tokenizer, self.control_ids)
        self._with_special, self._plain = _encoders(tokenizer)
        self.continuation_ids = functools.lru_cache(maxsize=8192)(self._continuation_ids)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """The ids of the conversation up to where the answer begins; raises `RequestError` for a bad one."""
        if not prompt.messages:
            raise RequestError("the conversation is empty; it needs at least one message")
        contents = [*(m.content for m in prompt.messages), prompt.prefill]
        if any(self._control.search(c) for c in contents):
            return self._encode_masked(prompt, contents)
        rendered = self._render(prompt.messages) + prompt.prefill
        ids = self._with_special(rendered)
        last, count = _last_control(ids, self.control_ids)
        found = list(self._control.finditer(rendered))
        if count != len(found):  # the tokenizer's normaliser made a special token of something else
            return self._encode_masked(prompt, contents)
        tail = rendered[found[-1].end() :] if found else rendered
        return EncodedPrompt(tuple(ids), tail, tuple(ids[last + 1 :]))

    def _encode_masked(self, prompt: Prompt, contents: Sequence[str]) -> EncodedPrompt:
        """The careful way: contents with their special literals masked while the template renders."""
        nonce = _nonce(contents)
        masked: list[str] = []

        def mask(match: re.Match[str]) -> str:
            masked.append(match.group())
            return f"\ue000{nonce}.{len(masked) - 1}\ue001"

        safe = [self._control.sub(mask, c) for c in contents]
        messages = tuple(ChatMessage(m.role, c) for m, c in zip(prompt.messages, safe, strict=False))
        rendered = self._render(messages) + safe[-1]
        unmask = re.compile(f"\ue000{nonce}\\.(\\d+)\ue001")

        def plain_text(text: str) -> str:
            return unmask.sub(lambda m: masked[int(m.group(1))], text)

        ids: list[int] = []
        tail, at = "", 0
        for match in [*self._control.finditer(rendered), None]:
            tail = plain_text(rendered[at : match.start() if match else len(rendered)])
            tail_ids = self.plain_ids(tail)
            ids += tail_ids
            if match:
                ids.append(self._tokenizer.convert_tokens_to_ids(match.group()))
                at = match.end()
        return EncodedPrompt(tuple(ids), tail, tuple(tail_ids))

    def _render(self, messages: Conversation) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            return _plain_dialogue(messages)
        turns = [{"role": m.role.value, "content": m.content} for m in messages]
        try:
            return self._apply_template(turns)
        except Exception as first:
            if messages[0].role is not Role.SYSTEM or len(messages) < 2:
                raise RequestError(f"the model's chat template refuses this conversation: {first}") from first
            # Some templates have no system turn: its words open the first user turn instead.
            folded = f"{messages[0].content}\n\n{messages[1].content}"
            turns = [{"role": turns[1]["role"], "content": folded}, *turns[2:]]
            try:
                return self._apply_template(turns)
            except Exception as e:
                raise RequestError(f"the model's chat template refuses this conversation: {e}") from e

    def _apply_template(self, turns: list[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def plain_ids(self, text: str) -> list[int]:
        """The ids of text in which nothing is special, whatever it says."""
        if not text:
            return []
        ids: list[int] = self._plain(text)
        if not self.control_ids.intersection(ids):
            return ids
        # An added token that is not flagged special, or a normaliser that made one: letter by letter.
        letters = [i for c in text for i in self._plain(c)]
        return [i for i in letters if i not in self.control_ids]

    def _continuation_ids(self, tail: str, tail_ids: tuple[int, ...], text: str) -> tuple[int, ...]:
        """The ids of `text` right after a prompt that ends in `tail`.

        They are what the tokenizer makes of both together; where that would change the prompt's own last
        tokens, the continuation is tokenised alone, since the prompt's tokens are given.
        """
        joint = self.plain_ids(tail + text)
        if tuple(joint[: len(tail_ids)]) == tail_ids:
            return tuple(joint[len(tail_ids) :])
        return tuple(self.plain_ids(text))

    def token_text(self, token_id: int) -> str:
        """The text of one token for people to read; half a character is a replacement character."""
        if token_id in self.control_ids:
            return _literal(self._tokenizer, token_id)
        return self.detokeniser.text((token_id,))


def blocked_token_ids(tokenizer: Any, stop_ids: frozenset[int], vocabulary_size: int) -> tuple[int, ...]:
    """Ids that an answer never contains: special tokens other than those that end it, ids without a token.

    Sampling sets their probability to 0 and renormalises; whoever recomputes the log-probs of an answer
    (the trainer) does the same to get exactly the distribution that it was drawn from.
    """
    special = _control_ids(tokenizer) - stop_ids
    return tuple(sorted(special | set(range(len(tokenizer), vocabulary_size))))


def _control_ids(tokenizer: Any) -> frozenset[int]:
    """Special tokens, and added tokens that the chat template itself uses."""
    template = tokenizer.chat_template if isinstance(getattr(tokenizer, "chat_template", None), str) else ""
    added = tokenizer.added_tokens_decoder
    used = {i for i, t in added.items() if t.special or (len(t.content) > 1 and t.content in template)}
    return frozenset((used | set(tokenizer.all_special_ids)) - _unknown(tokenizer))


def _unknown(tokenizer: Any) -> set[int]:
    """The id of the unknown token, unless it also ends answers (as in GPT-2)."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    others = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return set() if unknown is None or unknown in others else {unknown}


def _literal(tokenizer: Any, token_id: int) -> str:
    if token_id in tokenizer.added_tokens_decoder:
        return str(tokenizer.added_tokens_decoder[token_id].content)
    return str(tokenizer.convert_ids_to_tokens(token_id) or "")


def _detokeniser(tokenizer: Any, silent: frozenset[int]) -> Detokeniser:
    table = token_bytes(tokenizer, silent)
    if table is not None and _agrees(tokenizer, table):
        return table

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return WindowText(decode)


def _agrees(tokenizer: Any, table: TokenBytes) -> bool:
    """Whether the table decodes a few texts as the tokenizer does."""
    for text in ("Hello, world: it's 3 o'clock.", " a  b\n\tc", "naïve 你好 🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if table.text(ids) != decoded:
            return False
    return True


def _encoders(tokenizer: Any) -> tuple[Any, Any]:
    """Two functions from text to ids: with special tokens recognised, and without."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        return (
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True),
        )
    # Copies of our own: switching a shared tokenizer to and fro would not be safe across threads.
    special, plain = (type(backend).from_str(backend.to_str()) for _ in range(2))
    for copy in (special, plain):
        copy.no_truncation()
        copy.no_padding()
    special.encode_special_tokens, plain.encode_special_tokens = False, True
    return (
        lambda text: special.encode(text, add_special_tokens=False).ids,
        lambda text: plain.encode(text, add_special_tokens=False).ids,
    )


def _plain_dialogue(messages: Conversation) -> str:
    """For models without a chat template: the transcript form of the Constitutional AI paper."""
    turns = "".join(f"\n\n{_SPEAKERS[m.role]}: {m.content}" for m in messages)
    return f"{turns.lstrip()}\n\nAssistant:"


def _last_control(ids: Sequence[int], control: frozenset[int]) -> tuple[int, int]:
    """Position of the last control token (-1: none), and how many there are."""
    positions = [at for at, i in enumerate(ids) if i in control]
    return (positions[-1] if positions else -1), len(positions)


def _nonce(contents: Sequence[str]) -> str:
    """A word that no content contains between our marks."""
    n = 0
    while any(f"\ue000{n}." in c for c in contents):
        n += 1
    return str(n)
