"""Checkpoints on the bus."""

from tests.registry.conftest import filler

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.registry import Facts, Kind, Status
from charter.registry.events import Steps, announcement
from charter.v1 import events_pb2


def test_a_change_of_status_is_announced_with_where_the_checkpoint_lies(registry, tmp_path):
    written = registry.write(Facts(Kind.RL, parent="sft-000000-abc", step=4), filler(1.0))
    change = registry.set_status(written.id, Status.REJECTED, "more harmful")
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as bus:
        bus.publish([announcement(written, registry.root, change)])
        [record] = bus.fetch("checkpoints", 0, 0)
    event = decode(record, events_pb2.CheckpointEvent)
    assert event.uri == f"{registry.root}/{written.id}"
    assert (event.step, event.status, event.reason) == (4, "rejected", "more harmful")
    assert event.parent_id == "sft-000000-abc"


def test_steps_follow_the_topic_and_an_unknown_version_has_none(registry, tmp_path):
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as bus:
        steps = Steps(bus)
        assert steps.of("local seed") == 0
        for step in (3, 9):
            written = registry.write(Facts(Kind.RL, step=step), filler(step))
            change = registry.set_status(written.id, Status.CANDIDATE)
            bus.publish([announcement(written, registry.root, change)])
            assert steps.of(written.id) == step, "a version is known as soon as it is announced"
        assert steps.of("local seed") == 0
