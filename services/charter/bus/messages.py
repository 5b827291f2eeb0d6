"""Protobuf on the log: every message says its type and schema version in its headers.

Within one schema version fields are only ever added, so readers of either age understand each other. The
version is raised only by a change that an older reader would misread; it then refuses the message by name
instead of guessing.
"""

from __future__ import annotations

import time
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from charter.bus.base import DeadLetter, Outgoing, Record
from charter.bus.topics import DEAD_LETTERS
from charter.errors import MalformedMessage
from charter.v1 import events_pb2

TYPE_HEADER = "charter-type"
VERSION_HEADER = "charter-schema"
SCHEMA_VERSION = 1

MessageT = TypeVar("MessageT", bound=Message)


def encode(topic: str, key: str | bytes, message: Message) -> Outgoing:
    """A protobuf message, ready to publish."""
    return Outgoing(
        topic=topic,
        key=key.encode() if isinstance(key, str) else key,
        value=message.SerializeToString(),
        headers={
            TYPE_HEADER: message.DESCRIPTOR.full_name.encode(),
            VERSION_HEADER: str(SCHEMA_VERSION).encode(),
        },
    )


def decode(record: Record, message_class: type[MessageT]) -> MessageT:
    """The protobuf message in a record. Raises `MalformedMessage`, which sends it to the dead letters."""
    where = f"{record.topic}/{record.partition} at {record.offset}"
    wanted = message_class.DESCRIPTOR.full_name
    found = record.headers.get(TYPE_HEADER, b"").decode(errors="replace")
    if found != wanted:
        raise MalformedMessage(
            f"{where}: header {TYPE_HEADER} says {found or 'nothing'}, and a reader of {wanted} took it; "
            "publish to this topic with charter.bus.messages.encode"
        )
    version = record.headers.get(VERSION_HEADER, b"")
    if not version.isdigit() or not 1 <= int(version) <= SCHEMA_VERSION:
        raise MalformedMessage(
            f"{where}: schema version {version.decode(errors='replace')!r}, and this reader knows 1 to "
            f"{SCHEMA_VERSION}; upgrade it, then run `charter dead-letters replay`"
        )
    if record.value is None:
        raise MalformedMessage(f"{where}: no value, where a {wanted} was expected")
    try:
        return message_class.FromString(record.value)
    except DecodeError as error:
        raise MalformedMessage(f"{where}: {len(record.value)} bytes are not a {wanted}: {error}") from error


def dead_letter_key(group: str, record: Record) -> bytes:
    """Names a dead letter: the same failure of the same record has the same key."""
    return f"{group}/{record.topic}/{record.partition}/{record.offset}".encode()


def encode_dead_letter(group: str, letter: DeadLetter) -> Outgoing:
    """The message on the dead-letter topic: the record as it was, where it lay, and why it failed."""
    record = letter.record
    event = events_pb2.DeadLetterEvent(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=record.value or b"",
        headers=dict(record.headers),
        group=group,
        error=letter.error,
        attempts=letter.attempts,
        created_unix_ms=int(time.time() * 1000),
    )
    return encode(DEAD_LETTERS, dead_letter_key(group, record), event)
