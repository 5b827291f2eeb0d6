"""What became of a checkpoint: a history beside the checkpoints, of which nothing is ever changed.

Each change is a small file of its own with a name that sorts by time. So a change is there whole or not at
all, two writers never overwrite each other, and object stores, which cannot append, serve as well as disks.
"""

from __future__ import annotations

import enum
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from charter.errors import CheckpointError
from charter.registry.manifest import checked_id

POLICY, REWARD = "policy", "reward"
"""The two families of checkpoints; in each, one serves."""


class Status(enum.StrEnum):
    """What became of a checkpoint."""

    CANDIDATE = "candidate"
    """Written, and not yet measured by the gate."""
    SUPERSEDED = "superseded"
    """Never measured, because a newer candidate came first. It is kept, and can be promoted by hand."""
    PROMOTING = "promoting"
    """The gate let it pass; the servers are being told. After a crash the publisher finishes it."""
    SERVING = "serving"
    """In force. Of those that are said to serve, the last one does; the others are `RETIRED`."""
    RETIRED = "retired"
    """Was in force until another took its place. Never written; it follows from the history."""
    REJECTED = "rejected"
    """The gate, or a person, kept it out; the reason says why."""
    ROLLED_BACK = "rolled_back"
    """Was in force and was taken out; the reason says why."""


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the history."""

    checkpoint_id: str
    status: Status
    reason: str
    at_unix_ms: int
    family: str = POLICY
    """A reward model in force does not retire a policy."""
    measurements: Mapping[str, Any] = field(default_factory=dict)
    """What the decision rested on."""

    def to_json(self) -> bytes:
        """The content of its file."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Change:
        """Reads it. Raises `CheckpointError` when it is not one."""
        try:
            record = json.loads(text)
            return cls(
                checked_id(record["checkpoint_id"]),
                Status(record["status"]),
                str(record["reason"]),
                int(record["at_unix_ms"]),
                str(record["family"]),
                dict(record["measurements"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{where} is no entry of a status history ({error}); remove the file to go on without it"
            ) from error


def entry_name(newest: str) -> str:
    """A name for the next entry that sorts behind `newest`, even if the clock was set back."""
    last = int(newest.partition("-")[0]) if newest else 0
    return f"{max(time.time_ns(), last + 1):020d}-{secrets.token_hex(3)}.json"


def current(history: Sequence[Change], checkpoint_id: str) -> Change | None:
    """The last entry about a checkpoint, with `RETIRED` where another serves now."""
    last = next((c for c in reversed(history) if c.checkpoint_id == checkpoint_id), None)
    if last is None or last.status is not Status.SERVING:
        return last
    takeovers = (c for c in reversed(history) if c.status is Status.SERVING and c.family == last.family)
    successor = next(takeovers)
    if successor.checkpoint_id == checkpoint_id:
        return last
    reason = f"{successor.checkpoint_id} took its place"
    return Change(checkpoint_id, Status.RETIRED, reason, successor.at_unix_ms, last.family)


def serving(history: Sequence[Change], family: str) -> str | None:
    """The id that is in force: the last that was said to serve, unless it was taken out since."""
    taken_out: set[str] = set()
    for change in reversed(history):
        if change.family != family:
            continue
        if change.status is Status.SERVING:
            return None if change.checkpoint_id in taken_out else change.checkpoint_id
        if change.status in (Status.ROLLED_BACK, Status.REJECTED):
            taken_out.add(change.checkpoint_id)
    return None
