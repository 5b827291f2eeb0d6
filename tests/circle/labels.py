"""Labels as the judge's worker publishes them, for tests that only count them."""

from __future__ import annotations

from dataclasses import replace

from charter.bus import Outgoing
from charter.bus.messages import encode
from charter.v1 import events_pb2


def label(number: int, **headers: bytes) -> Outgoing:
    """One of two answers to a prompt of its own."""
    event = events_pb2.PreferenceEvent(preference_id=f"label-{number}", prompt_id=f"prompt-{number}")
    event.prompt_token_ids.extend([1, 2])
    for answer in (event.answer_a, event.answer_b):
        answer.token_ids.extend([3, 4])
        answer.logprobs.extend([-1.0, -1.0])
    message = encode("preferences", event.prompt_id, event)
    return replace(message, headers={**message.headers, **headers})
