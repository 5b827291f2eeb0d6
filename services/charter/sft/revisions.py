"""The revisions data set: read from Parquet or from the bus, and chosen from.

Nothing here judges an answer. A revision is preferred because the reviser changed something, which is all
that one knows about it without asking somebody.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charter.errors import ConfigError, RequestError
from charter.lm.base import ChatMessage, Conversation, Role

if TYPE_CHECKING:
    from charter.bus import Bus

TOPIC = "revisions"
_COLUMNS = ("revision_id", "prompt_id", "conversation", "draft", "rounds", "constitution_digest")


@dataclass(frozen=True, slots=True)
class Revision:
    """A draft and what the last round made of it."""

    revision_id: str
    prompt_id: str
    conversation: Conversation
    draft: str
    final: str
    constitution_digest: str = ""

    @property
    def changed(self) -> bool:
        """Whether the rounds left another answer than the draft."""
        return self.final.split() != self.draft.split()


def choose(revisions: Iterable[Revision], limit: int, *, keep_unchanged: bool, seed: int) -> list[Revision]:
    """At most `limit` revisions (0: all), shuffled; changed ones first, empty ones and copies never."""
    distinct = {
        (r.conversation, r.final): r
        for r in sorted(revisions, key=lambda r: r.revision_id, reverse=True)
        if r.final.strip()
    }
    pool = sorted(distinct.values(), key=lambda r: r.revision_id)
    rng = random.Random(f"{seed}/revisions")
    rng.shuffle(pool)
    pool.sort(key=lambda r: not r.changed)
    kept = [r for r in pool if r.changed or keep_unchanged]
    chosen = kept[: limit or None]
    rng.shuffle(chosen)
    return chosen


def read_parquet(paths: Sequence[Path]) -> Iterator[Revision]:
    """The revisions in Parquet files, or in all of a folder. Raises `ConfigError` naming the file."""
    from pyarrow import ArrowException, parquet

    for file in _files(paths):
        try:
            table = parquet.read_table(file, columns=list(_COLUMNS))
        except (ArrowException, OSError, KeyError) as error:
            raise ConfigError(
                f"{file} is not a Parquet file with the columns {', '.join(_COLUMNS)} ({error}); "
                "make one with `charter redteam`"
            ) from error
        yield from (from_row(row) for row in table.to_pylist())


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files or not all(f.is_file() for f in files):
            raise ConfigError(
                f"{path} holds no revisions; name a Parquet file of `charter redteam`, or its folder"
            )
        found += files
    return found


def from_row(row: Mapping[str, Any]) -> Revision:
    """A revision from a row of the data set."""
    rounds = row["rounds"] or []
    return Revision(
        revision_id=row["revision_id"],
        prompt_id=row["prompt_id"],
        conversation=tuple(ChatMessage(Role(m["role"]), m["content"]) for m in row["conversation"]),
        draft=row["draft"],
        final=rounds[-1]["revision"] if rounds else row["draft"],
        constitution_digest=row["constitution_digest"],
    )


def read_bus(bus: Bus) -> Iterator[Revision]:
    """All revisions that lie on the bus; what cannot be read is left out."""
    from charter.bus.messages import decode
    from charter.errors import MalformedMessage
    from charter.rpc import convert
    from charter.v1 import events_pb2

    for partition, bounds in sorted(bus.bounds(TOPIC).items()):
        offset = bounds.first
        while offset < bounds.end:
            records = bus.fetch(TOPIC, partition, offset, max_records=500)
            if not records:
                break
            for record in records:
                try:
                    event = decode(record, events_pb2.RevisionEvent)
                    conversation = convert.messages_from_proto(event.conversation)
                except (MalformedMessage, RequestError):
                    continue
                final = event.rounds[-1].revision if event.rounds else event.draft
                yield Revision(
                    revision_id=event.revision_id,
                    prompt_id=event.prompt_id,
                    conversation=conversation,
                    draft=event.draft,
                    final=final,
                    constitution_digest=event.constitution_digest,
                )
            offset = records[-1].offset + 1
