"""Files in which people preferred one of two transcripts, as events of the topic `preferences`.

JSON lines, also gzipped, with `chosen` and `rejected`: transcripts (turns that begin with "Human:" and
"Assistant:" after an empty line, as the paper's authors published theirs), or lists of messages with `role`
and `content`, with or without a `prompt` before them. Both must be the same conversation up to the last
answer.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charter.errors import ConfigError
from charter.lm.base import ChatMessage, Conversation, Role
from charter.rpc import convert
from charter.v1 import events_pb2, types_pb2

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
    "Human": Role.USER, "Assistant": Role.ASSISTANT,
    "user": Role.USER, "human": Role.USER, "assistant": Role.ASSISTANT, "system": Role.SYSTEM,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HumanPair:
    """Two answers to a conversation, the better one first."""

    conversation: Conversation
    chosen: str
    rejected: str

    def to_proto(self, certainty: float, created_unix_ms: int) -> events_pb2.PreferenceEvent:
        """The event; its ids come from the content, so that a file imported twice counts once.

        Which answer is A is drawn by the content, too: nothing can learn that the first one wins.
        """
        texts = [f"{m.role.value}\0{m.content}" for m in self.conversation]
        prompt = _digest(*texts)
        identity = _digest(*texts, self.chosen, self.rejected)
        chosen_first = int(identity, 16) % 2 == 0
        answers = (self.chosen, self.rejected) if chosen_first else (self.rejected, self.chosen)
        return events_pb2.PreferenceEvent(
            preference_id=f"human-{identity}",
            prompt_id=f"prompt-{prompt}",
            conversation=convert.messages_to_proto(self.conversation),
            answer_a=types_pb2.Completion(text=answers[0]),
            answer_b=types_pb2.Completion(text=answers[1]),
            probability_a=certainty if chosen_first else 1.0 - certainty,
            human=True,
            created_unix_ms=created_unix_ms,
        )


def _digest(*texts: str) -> str:
    joined = "\0\0".join(texts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(joined).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Unusable:
    """A line that holds no pair, and why."""

    line: int
    reason: str


def read(path: Path) -> Iterator[HumanPair | Unusable]:
    """Every line of a file, in order. Raises `ConfigError` when the file cannot be read."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield parse(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Unusable(number, str(error))


def _lines(path: Path) -> Iterable[str]:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); name a file of JSON lines, plain or .gz"
        ) from error


def parse(record: Any) -> HumanPair:
    """A pair from a record. Raises `ValueError` with what is odd about it."""
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise ValueError('has no "chosen" and "rejected"')
    before = _turns(record["prompt"]) if record.get("prompt") else ()
    chosen, rejected = (
        (*before, *_turns(record[key], answer=bool(before))) for key in ("chosen", "rejected")
    )
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) < 2 or turns[-1].role is not Role.ASSISTANT or turns[-2].role is not Role.USER:
            raise ValueError(f'"{name}" does not end with a question of the user and an answer')
        if not turns[-1].content.strip():
            raise ValueError(f'"{name}" ends with an empty answer')
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the two differ before their last answer")
    if chosen[-1] == rejected[-1]:
        raise ValueError("the two answers are the same")
    return HumanPair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _turns(value: Any, *, answer: bool = False) -> Conversation:
    if isinstance(value, str):
        return _transcript(value, answer)
    if not isinstance(value, list):
        raise ValueError("a conversation is neither a text nor a list of messages")
    turns = []
    for message in value:
        fields = message if isinstance(message, dict) else {}
        role, content = _ROLES.get(str(fields.get("role"))), fields.get("content")
        if role is None or not isinstance(content, str):
            raise ValueError('a message has no known "role", or no "content"')
        turns.append(ChatMessage(role, content))
    return tuple(turns)


def _transcript(text: str, answer: bool) -> Conversation:
    if not text.startswith("\n\n"):
        text = "\n\n" + text.lstrip("\n")
    pieces = _TURN.split(text)
    if len(pieces) == 1:
        return (ChatMessage(Role.ASSISTANT if answer else Role.USER, text.strip()),)
    if pieces[0].strip():
        raise ValueError('begins with something other than "Human:"')
    return tuple(
        ChatMessage(_ROLES[label], body.strip())
        for label, body in zip(pieces[1::2], pieces[2::2], strict=True)
    )
