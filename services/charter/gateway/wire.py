"""Answers as OpenAI's clients read them: one JSON object, or server-sent events built by hand.

A stream writes thousands of events a second, so an event is a prepared beginning, the text as JSON, and a
prepared end.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from typing import Any

from charter.gateway.answers import Answer, Call, Choice, Delta
from charter.gateway.envelope import ApiError
from charter.lm.base import Token

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": charter is working on it\n\n"
"""A comment: clients skip it, and connections stay open."""
_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; OpenAI does the same."""
_WORDS = re.compile(r"(?<=\s)(?=\S)")

_dumps = json.dumps
"""For texts; with its defaults it uses the interpreter's ready-made encoder."""
_compact = json.JSONEncoder(separators=(",", ":")).encode


def completion(call: Call, answer: Answer, charter: dict[str, Any]) -> bytes:
    """The body of a response that is not a stream."""
    return _compact(
        {
            "id": f"chatcmpl-{call.request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": call.model,
            "system_fingerprint": answer.policy.version,
            "choices": [_choice(i, c, call.logprobs) for i, c in enumerate(answer.choices)],
            "usage": answer.usage,
            "charter": charter,
        }
    ).encode()


def _choice(index: int, choice: Choice, logprobs: bool) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.outcome.answer, "refusal": None},
        "logprobs": token_logprobs(choice.tokens) if logprobs and choice.tokens else None,
        "finish_reason": choice.finish_reason.value,
    }


def token_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a choice."""
    return {
        "content": [
            _entry(t.text, t.logprob) | {"top_logprobs": [_entry(a.text, a.logprob) for a in t.alternatives]}
            for t in tokens
        ],
        "refusal": None,
    }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": logprob if math.isfinite(logprob) else _LEAST_LOGPROB,
        "bytes": list(text.encode()),
    }


class EventWriter:
    """The events of one stream."""

    def __init__(self, call: Call) -> None:
        self._logprobs = call.logprobs
        self._include_usage = call.include_usage
        head = {
            "id": f"chatcmpl-{call.request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": call.model,
        }
        self._head = f"data: {_compact(head)[:-1]}"
        usage = ',"usage":null' if call.include_usage else ""
        self._end = f',"finish_reason":null}}]{usage}}}\n\n'
        self._begin = [f'{self._head},"choices":[{{"index":{i},"delta":{{"content":' for i in range(call.n)]
        self._n = call.n

    def start(self) -> bytes:
        """The first event of each choice, which names the role."""
        return "".join(
            f'{self._head},"choices":[{{"index":{i},"delta":{{"role":"assistant","content":"","refusal":null}}'
            f',"logprobs":null{self._end}'
            for i in range(self._n)
        ).encode()

    def deltas(self, deltas: Sequence[Delta]) -> bytes:
        """An event for each piece of text."""
        begin, end = self._begin, self._end
        if not self._logprobs:
            return "".join(
                [f'{begin[d.index]}{_dumps(d.text)}}},"logprobs":null{end}' for d in deltas]
            ).encode()
        return "".join(
            [
                f'{begin[d.index]}{_dumps(d.text)}}},"logprobs":'
                f"{_compact(token_logprobs(d.tokens)) if d.tokens else 'null'}{end}"
                for d in deltas
            ]
        ).encode()

    def finish(self, answer: Answer, charter: dict[str, Any]) -> bytes:
        """The last events: why each choice ended, the counts where asked for, the report, `[DONE]`."""
        events = []
        for i, choice in enumerate(answer.choices):
            last = i == len(answer.choices) - 1 and not self._include_usage
            usage = ',"usage":null' if self._include_usage else ""
            report = f',"charter":{_compact(charter)}' if last else ""
            events.append(
                f'{self._head},"choices":[{{"index":{i},"delta":{{}},"logprobs":null,"finish_reason":'
                f'"{choice.finish_reason.value}"}}]{usage}{report}}}\n\n'
            )
        if self._include_usage:
            events.append(
                f'{self._head},"choices":[],"usage":{_compact(answer.usage)},"charter":{_compact(charter)}}}\n\n'
            )
        return "".join(events).encode() + DONE


def failure_event(error: ApiError) -> bytes:
    """A failure after the stream began: its status has gone, so the envelope goes as an event."""
    return b"data: " + error.body() + b"\n\n"


def pieces(choice: Choice, index: int) -> list[Delta]:
    """A whole answer cut for a stream: by the policy's tokens, or by words where there are none."""
    if choice.tokens and "".join(t.text for t in choice.tokens) == choice.outcome.answer:
        return [Delta(index, t.text, (t,)) for t in choice.tokens]
    texts = [text for text in _WORDS.split(choice.outcome.answer) if text]
    return [Delta(index, text, choice.tokens if i == 0 else ()) for i, text in enumerate(texts)]
