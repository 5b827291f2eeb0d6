"""Messages say their type and version, and readers of either age understand each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import Message

from charter.bus import Record
from charter.bus.messages import SCHEMA_VERSION, decode, encode
from charter.errors import MalformedMessage
from charter.v1 import events_pb2

RECORDED = Path(__file__).with_name("recorded")
EVENTS = json.loads((RECORDED / "first_release.json").read_text(encoding="utf-8"))
"""For each event its bytes and its meaning, as the first release wrote them: what lies in people's logs.
Never change them."""


def first_release() -> descriptor_pool.DescriptorPool:
    """The schemas of the first release, as a reader of that age has them."""
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString((RECORDED / "first_release.binpb").read_bytes())
    for file in files.file:
        pool.Add(file)
    return pool


def record(value: bytes | None, headers: dict[str, bytes]) -> Record:
    return Record("rollouts", 3, 17, b"p1", value, headers, 0)


def as_record(message: events_pb2.RolloutEvent) -> Record:
    outgoing = encode("rollouts", "p1", message)
    return record(outgoing.value, dict(outgoing.headers))


def test_a_message_comes_back_as_it_was() -> None:
    event = events_pb2.RolloutEvent(rollout_id="r1", prompt_id="p1", temperature=1.0)
    assert decode(as_record(event), events_pb2.RolloutEvent) == event


def test_the_headers_name_type_and_version() -> None:
    outgoing = encode("prompts", "p1", events_pb2.PromptEvent(prompt_id="p1"))
    assert outgoing.key == b"p1"
    assert dict(outgoing.headers) == {"charter-type": b"charter.v1.PromptEvent", "charter-schema": b"1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"headers": {}}, "charter-type says nothing"),
        ({"headers": {"charter-type": b"charter.v1.PromptEvent", "charter-schema": b"1"}}, "PromptEvent"),
        ({"headers": {"charter-type": b"charter.v1.RolloutEvent"}}, "schema version ''"),
        ({"headers": {"charter-type": b"charter.v1.RolloutEvent", "charter-schema": b"2"}}, "upgrade it"),
        ({"value": b"\xff\xff\xff"}, "3 bytes are not a charter.v1.RolloutEvent"),
        ({"value": None}, "no value"),
    ],
)
def test_what_cannot_be_understood_is_named_with_its_place(change: dict[str, object], words: str) -> None:
    good = as_record(events_pb2.RolloutEvent(rollout_id="r1"))
    with pytest.raises(MalformedMessage, match=words) as caught:
        decode(dataclasses.replace(good, **change), events_pb2.RolloutEvent)
    assert "rollouts/3 at 17" in str(caught.value)
    assert SCHEMA_VERSION == 1


@pytest.mark.parametrize("name", EVENTS)
def test_this_release_reads_what_the_first_release_wrote(name: str) -> None:
    recorded = EVENTS[name]
    headers = {"charter-type": name.encode(), "charter-schema": b"1"}
    message_class = getattr(events_pb2, name.rpartition(".")[2])
    event = decode(record(bytes.fromhex(recorded["bytes"]), headers), message_class)
    meaning = json_format.MessageToDict(event, preserving_proto_field_name=True)
    assert meaning == recorded["json"]


@pytest.mark.parametrize("name", EVENTS)
def test_a_reader_of_the_first_release_reads_what_this_release_writes(name: str) -> None:
    event = getattr(events_pb2, name.rpartition(".")[2])()
    json_format.ParseDict(EVENTS[name]["json"], event)
    old = old_class(name).FromString(event.SerializeToString())
    assert json_format.MessageToDict(old, preserving_proto_field_name=True) == EVENTS[name]["json"]


def old_class(name: str) -> type[Message]:
    """What a reader of the first release parses an event with."""
    return message_factory.GetMessageClass(first_release().FindMessageTypeByName(name))


def with_a_field_to_come(message: Message) -> int:
    """Adds field 900, three bytes, to a message and to all within it; says to how many."""
    changed = 1
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in value if field.is_repeated else [value]:
            changed += with_a_field_to_come(inner)
    message.MergeFromString(b"\xa2\x38\x03new")
    return changed


@pytest.mark.parametrize("name", EVENTS)
def test_a_field_of_a_release_to_come_is_passed_over_and_kept(name: str) -> None:
    to_come = getattr(events_pb2, name.rpartition(".")[2]).FromString(bytes.fromhex(EVENTS[name]["bytes"]))
    changed = with_a_field_to_come(to_come)
    value = to_come.SerializeToString()
    assert value.count(b"new") == changed
    for reader in (getattr(events_pb2, name.rpartition(".")[2]), old_class(name)):
        event = reader.FromString(value)
        meaning = json_format.MessageToDict(event, preserving_proto_field_name=True)
        assert meaning == EVENTS[name]["json"]
        assert event.SerializeToString().count(b"new") == changed


def test_no_field_or_value_of_the_first_release_changed_its_number_or_type() -> None:
    """What `buf breaking` checks on the wire, without needing buf."""
    files = descriptor_pb2.FileDescriptorSet.FromString((RECORDED / "first_release.binpb").read_bytes())
    checked = 0
    for file in files.file:
        for name, message in _all_of(file.package, file.message_type):
            now = {f.number: f for f in _proto_of(name).field}
            for field in message.field:
                assert field.number in now, f"{name}.{field.name} is gone"
                same = now[field.number]
                assert (same.name, same.type, same.label, same.type_name) == (
                    field.name,
                    field.type,
                    field.label,
                    field.type_name,
                )
                checked += 1
        for enum in file.enum_type:
            values = (
                descriptor_pool.Default().FindEnumTypeByName(f"{file.package}.{enum.name}").values_by_name
            )
            for value in enum.value:
                assert values[value.name].number == value.number
                checked += 1
    assert checked > 100


def _all_of(scope: str, messages: Iterable[descriptor_pb2.DescriptorProto]) -> Iterator[tuple[str, Any]]:
    """The messages by their full names, and those that are declared within them."""
    for message in messages:
        name = f"{scope}.{message.name}"
        yield name, message
        yield from _all_of(name, message.nested_type)


def _proto_of(name: str) -> descriptor_pb2.DescriptorProto:
    proto = descriptor_pb2.DescriptorProto()
    descriptor_pool.Default().FindMessageTypeByName(name).CopyToProto(proto)
    return proto
