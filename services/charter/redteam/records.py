"""One row of the data set: as a record, as an event of the topic `revisions`, and as a row of Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from charter.feedback.records import RevisionStep
from charter.lm.base import Conversation, ModelVersion
from charter.rpc.convert import messages_from_proto, messages_to_proto, version_from_proto, version_to_proto
from charter.v1 import events_pb2

TOPIC = "revisions"


@dataclass(frozen=True, slots=True)
class Revision:
    """A draft, every critique and revision of it, and what made them."""

    revision_id: str
    """`<run>/<prompt_id>`: names the row, and the run that made it."""
    prompt_id: str
    conversation: Conversation
    draft: str
    rounds: tuple[RevisionStep, ...]
    policy: ModelVersion
    critic: ModelVersion
    constitution_digest: str
    created_unix_ms: int

    def to_proto(self) -> events_pb2.RevisionEvent:
        """The event."""
        return events_pb2.RevisionEvent(
            revision_id=self.revision_id,
            prompt_id=self.prompt_id,
            conversation=messages_to_proto(self.conversation),
            draft=self.draft,
            rounds=[
                events_pb2.RevisionRound(
                    principle_id=step.principle_id, critique=step.critique, revision=step.revision
                )
                for step in self.rounds
            ],
            policy=version_to_proto(self.policy),
            critic=version_to_proto(self.critic),
            constitution_digest=self.constitution_digest,
            source=events_pb2.PROMPT_SOURCE_RED_TEAM,
            created_unix_ms=self.created_unix_ms,
        )

    @classmethod
    def from_proto(cls, event: events_pb2.RevisionEvent) -> Revision:
        """The record of an event; raises `RequestError` for one without a conversation."""
        return cls(
            revision_id=event.revision_id,
            prompt_id=event.prompt_id,
            conversation=messages_from_proto(event.conversation),
            draft=event.draft,
            rounds=tuple(RevisionStep(r.principle_id, r.critique, r.revision) for r in event.rounds),
            policy=version_from_proto(event.policy),
            critic=version_from_proto(event.critic),
            constitution_digest=event.constitution_digest,
            created_unix_ms=event.created_unix_ms,
        )


_MODEL = pa.struct([("version", pa.string()), ("digest", pa.string()), ("tokenizer_digest", pa.string())])
SCHEMA = pa.schema(
    [
        ("revision_id", pa.string()),
        ("prompt_id", pa.string()),
        ("conversation", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt", pa.string()),  # the last turn alone, for a quick look
        ("draft", pa.string()),
        (
            "rounds",
            pa.list_(
                pa.struct(
                    [("principle_id", pa.string()), ("critique", pa.string()), ("revision", pa.string())]
                )
            ),
        ),
        ("revision", pa.string()),  # after the last round
        ("policy", _MODEL),
        ("critic", _MODEL),
        ("constitution_digest", pa.string()),
        ("created_unix_ms", pa.int64()),
    ]
)


def table(rows: Sequence[Revision]) -> pa.Table:
    """The rows as a table of `SCHEMA`."""
    return pa.Table.from_pylist([_row(r) for r in rows], schema=SCHEMA)


def _row(revision: Revision) -> dict[str, Any]:
    return {
        "revision_id": revision.revision_id,
        "prompt_id": revision.prompt_id,
        "conversation": [{"role": m.role.value, "content": m.content} for m in revision.conversation],
        "prompt": revision.conversation[-1].content,
        "draft": revision.draft,
        "rounds": [
            {"principle_id": s.principle_id, "critique": s.critique, "revision": s.revision}
            for s in revision.rounds
        ],
        "revision": revision.rounds[-1].revision if revision.rounds else revision.draft,
        "policy": _model(revision.policy),
        "critic": _model(revision.critic),
        "constitution_digest": revision.constitution_digest,
        "created_unix_ms": revision.created_unix_ms,
    }


def _model(version: ModelVersion) -> dict[str, str]:
    return {
        "version": version.version,
        "digest": version.digest,
        "tokenizer_digest": version.tokenizer_digest,
    }
