"""What every log promises. These tests run on the embedded log and, under `make test-kafka`, on a broker."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import pytest
from tests.bus.conftest import Log

from charter.bus import (
    Bus,
    Cleanup,
    Consumer,
    ConsumerOptions,
    DeadLetter,
    Outgoing,
    Partition,
    Record,
    TopicSpec,
)
from charter.bus.base import end_positions
from charter.bus.dead_letters import buried, replay
from charter.errors import BusError, Fenced

PATIENCE_S = 60.0


def texts(topic: str, values: Iterable[str], key: str = "k") -> list[Outgoing]:
    return [Outgoing(topic, key.encode(), value.encode()) for value in values]


def values(records: Iterable[Record]) -> list[str]:
    return [(record.value or b"").decode() for record in records]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s until {what}"
        time.sleep(0.02)


def take(consumer: Consumer, count: int) -> list[Record]:
    """Polls until there are `count` records."""
    records: list[Record] = []
    until(
        lambda: len(records.extend(consumer.poll(count - len(records), 0.2)) or records) >= count, "records"
    )  # type: ignore[func-returns-value]
    return records


def everything(bus: Bus, topic: str) -> list[Record]:
    """What the topic holds, in order within each partition.

    On a broker a transaction is seen a moment after its commit: waits until nothing new comes to light.
    """
    before = None
    while before != (before := bus.bounds(topic)):
        time.sleep(0.1)
    records: list[Record] = []
    for partition, bounds in bus.bounds(topic).items():
        offset = bounds.first
        while found := bus.fetch(topic, partition, offset, 500, timeout=0.5 if offset < bounds.end else 0.0):
            records += found
            offset = found[-1].offset + 1
    return records


# Publishing and reading


def test_a_partition_keeps_the_order_of_publication(log: Log, bus: Bus) -> None:
    topic = log.topic()
    bus.publish(texts(topic, ["1", "2"]))
    bus.publish(texts(topic, ["3"]))
    with bus.consumer(log.group(), [topic]) as consumer:
        records = take(consumer, 3)
    assert values(records) == ["1", "2", "3"]
    assert [r.offset for r in records] == sorted(r.offset for r in records)


def test_a_record_comes_out_as_it_went_in(log: Log, bus: Bus) -> None:
    topic = log.topic()
    before_ms = int(time.time() * 1000)
    (position,) = bus.publish([Outgoing(topic, b"\x00key", b"\xffvalue", {"type": b"t", "empty": b""})])
    (record,) = bus.fetch(topic, 0, position.offset, timeout=10)
    assert record.position == position
    assert (record.key, record.value) == (b"\x00key", b"\xffvalue")
    assert dict(record.headers) == {"type": b"t", "empty": b""}
    assert before_ms <= record.timestamp_ms <= int(time.time() * 1000)


def test_messages_of_one_key_share_a_partition_and_keys_spread(log: Log, bus: Bus) -> None:
    topic = log.topic(partitions=4)
    keys = [f"prompt-{i}" for i in range(40)]
    first = bus.publish([Outgoing(topic, key.encode(), b"1") for key in keys])
    second = bus.publish([Outgoing(topic, key.encode(), b"2") for key in keys])
    assert [p.partition for p in first] == [p.partition for p in second]
    assert {p.partition for p in first} == {0, 1, 2, 3}


def test_the_partition_of_a_key_is_the_one_that_every_kafka_client_computes(log: Log, bus: Bus) -> None:
    # Values from org.apache.kafka.common.utils.UtilsTest.testMurmur2, made positive, modulo 1000.
    known = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    topic = log.topic(partitions=7)
    positions = bus.publish([Outgoing(topic, key, b"") for key in known])
    assert [p.partition for p in positions] == [(hash_ & 0x7FFFFFFF) % 7 for hash_ in known.values()]


def test_a_message_over_the_limit_is_refused_and_takes_its_companions_along(log: Log, bus: Bus) -> None:
    topic = log.topic(max_message_bytes=2000)
    with pytest.raises(BusError, match="over the 2000 of topic"):
        bus.publish([Outgoing(topic, b"k", b"small"), Outgoing(topic, b"k", b"x" * 3000)])
    bus.publish(texts(topic, ["after"]))
    assert values(everything(bus, topic)) == ["after"]


def test_a_message_of_nearly_16_mib_passes(log: Log, bus: Bus) -> None:
    topic = log.topic()
    large = random.Random(1).randbytes(16 * 1024 * 1024 - 4096)
    bus.publish([Outgoing(topic, b"k", large)])
    with bus.consumer(log.group(), [topic]) as consumer:
        (record,) = take(consumer, 1)
    assert record.value == large


def test_an_unknown_topic_is_named_in_the_error(log: Log, bus: Bus) -> None:
    with pytest.raises(BusError, match=r"'no-such-topic'.*charter topics apply"):
        bus.publish(texts("no-such-topic", ["x"]))
    with pytest.raises(BusError, match=r"'no-such-topic'.*charter topics apply"):
        bus.consumer(log.group(), ["no-such-topic"])


# Groups


def test_members_share_the_partitions_and_each_record_goes_to_one(log: Log, bus: Bus) -> None:
    topic, group = log.topic(partitions=4), log.group()
    with bus.consumer(group, [topic]) as one, log.open().consumer(group, [topic]) as two:
        until(
            lambda: (
                one.poll(1, 0.1) == two.poll(1, 0.1) == []
                and len(one.assignment()) == len(two.assignment()) == 2
            ),
            "each member owns two partitions",
        )
        assert one.assignment().isdisjoint(two.assignment())
        bus.publish([Outgoing(topic, f"k{i}".encode(), str(i).encode()) for i in range(40)])
        seen: list[str] = []
        until(
            lambda: len(seen.extend(values(one.poll(9, 0.1) + two.poll(9, 0.1))) or seen) >= 40,
            "all are read",
        )  # type: ignore[func-returns-value]
    assert sorted(seen, key=int) == [str(i) for i in range(40)]


def test_groups_do_not_disturb_each_other(log: Log, bus: Bus) -> None:
    topic = log.topic()
    bus.publish(texts(topic, ["1", "2"]))
    for group in (log.group(), log.group()):
        with bus.consumer(group, [topic]) as consumer:
            records = take(consumer, 2)
            consumer.commit(records)
        assert values(records) == ["1", "2"]


def test_a_group_goes_on_where_it_committed(log: Log, bus: Bus) -> None:
    topic, group = log.topic(), log.group()
    bus.publish(texts(topic, ["1", "2", "3"]))
    with bus.consumer(group, [topic]) as consumer:
        consumer.commit(take(consumer, 2))
    with bus.consumer(group, [topic]) as consumer:
        assert values(take(consumer, 1)) == ["3"]


def test_what_is_not_committed_comes_again(log: Log, bus: Bus) -> None:
    topic, group = log.topic(), log.group()
    bus.publish(texts(topic, ["1", "2"]))
    with bus.consumer(group, [topic]) as consumer:
        take(consumer, 2)
    with bus.consumer(group, [topic]) as consumer:
        assert values(take(consumer, 2)) == ["1", "2"]
        consumer.rewind()
        assert values(take(consumer, 2)) == ["1", "2"]


def test_a_member_that_leaves_hands_over_at_once(log: Log, bus: Bus) -> None:
    topic, group = log.topic(partitions=2), log.group()
    one = bus.consumer(group, [topic])
    two = log.open().consumer(group, [topic])
    until(lambda: one.poll(1, 0.05) + two.poll(1, 0.05) == [] and two.assignment(), "two has a share")
    one.close()
    bus.publish([Outgoing(topic, f"k{i}".encode(), b"x") for i in range(20)])
    assert len(take(two, 20)) == 20


def test_a_dead_process_loses_its_partitions_to_the_living(log: Log, bus: Bus) -> None:
    topic, target, group = log.topic(partitions=2), log.topic(), log.group()
    command = log.child("work", group, "the-dead", topic, target, log.quick.session_timeout_s)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        bus.publish(texts(topic, ["before"]))
        until(lambda: len(everything(bus, target)) == 2, "the child has worked")
        process.kill()
    bus.publish([Outgoing(topic, f"k{i}".encode(), b"x") for i in range(20)])
    with bus.consumer(group, [topic], options=log.quick) as survivor:
        assert len(take(survivor, 20)) == 20


def test_a_new_process_takes_its_own_name_back_and_fences_the_old_one(log: Log, bus: Bus) -> None:
    topic, target, group = log.topic(), log.topic(), log.group()
    bus.publish(texts(topic, ["1"]))
    old = bus.consumer(group, [topic], member="worker-0")
    stale = take(old, 1)
    new = log.open().consumer(group, [topic], member="worker-0")
    fresh = take(new, 1)
    with pytest.raises(Fenced):
        old.commit(stale, publish=texts(target, ["from the old one"]))
    new.commit(fresh, publish=texts(target, ["from the new one"]))
    assert values(everything(bus, target)) == ["from the new one"]
    with pytest.raises(Fenced, match="worker-0"):
        until(lambda: old.poll(1, 0.1), "the old one notices")


def test_a_process_that_was_stopped_cannot_commit_what_went_to_another(log: Log, bus: Bus) -> None:
    topic, target, group = log.topic(), log.topic(), log.group()
    bus.publish(texts(topic, ["1"]))
    command = log.child("hold", group, "zombie", topic, target, log.quick.session_timeout_s)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as zombie:
        assert zombie.stdout is not None
        assert zombie.stdout.readline() == "taken\n"
        log.stop(zombie)
        try:
            with bus.consumer(group, [topic], member="heir", options=log.quick) as heir:
                heir.commit(take(heir, 1), publish=texts(target, ["from the heir"]))
                zombie.send_signal(signal.SIGCONT)
                assert zombie.communicate("commit\n", timeout=PATIENCE_S)[0] == "fenced\n"
        finally:
            zombie.kill()  # a stopped one would be waited for
    assert values(everything(bus, target)) == ["from the heir"]


def test_work_longer_than_the_session_keeps_its_partition(log: Log, bus: Bus) -> None:
    topic, group = log.topic(), log.group()
    bus.publish(texts(topic, ["1"]))
    slow = bus.consumer(group, [topic], options=log.quick)
    records = take(slow, 1)
    other = log.open().consumer(group, [topic], options=log.quick)
    deadline = time.monotonic() + 2 * log.quick.session_timeout_s
    while time.monotonic() < deadline:
        assert other.poll(1, 0.2) == []
    slow.commit(records)
    assert bus.positions(group) == {Partition(topic, 0): records[0].offset + 1}


# Publishing and committing as one act


def test_results_and_position_move_together(log: Log, bus: Bus) -> None:
    topic, target, group = log.topic(), log.topic(partitions=3), log.group()
    bus.publish(texts(topic, ["1", "2"]))
    with bus.consumer(group, [topic]) as consumer:
        records = take(consumer, 2)
        consumer.commit(records, publish=[Outgoing(target, v.encode(), v.encode()) for v in ("a", "b", "c")])
    assert sorted(values(everything(bus, target))) == ["a", "b", "c"]
    assert bus.positions(group) == {Partition(topic, 0): records[-1].offset + 1}


def test_a_commit_that_fails_publishes_nothing_and_moves_nothing(log: Log, bus: Bus) -> None:
    topic, target, group = log.topic(), log.topic(), log.group()
    bus.publish(texts(topic, ["1"]))
    with bus.consumer(group, [topic]) as consumer:
        records = take(consumer, 1)
        with pytest.raises(BusError):
            consumer.commit(records, publish=[*texts(target, ["a"]), *texts("no-such-topic", ["b"])])
        assert everything(bus, target) == []
        assert bus.positions(group) == {}
        consumer.commit(records, publish=texts(target, ["a"]))
    assert values(everything(bus, target)) == ["a"]


def test_a_part_of_the_records_can_be_committed(log: Log, bus: Bus) -> None:
    topic, group = log.topic(), log.group()
    bus.publish(texts(topic, ["1", "2", "3"]))
    with bus.consumer(group, [topic]) as consumer:
        consumer.commit(take(consumer, 3)[:1])
        consumer.rewind()
        assert values(take(consumer, 2)) == ["2", "3"]


def test_the_owner_may_commit_records_that_it_read_by_itself(log: Log, bus: Bus) -> None:
    """A trainer goes by the position in its checkpoint, and reads ahead of what `poll` gave it."""
    topic, group = log.topic(partitions=2), log.group()
    bus.publish([Outgoing(topic, str(i).encode(), str(i).encode()) for i in range(10)])
    records = everything(bus, topic)
    with bus.consumer(group, [topic]) as consumer:
        until(lambda: consumer.poll(1, 0.2) or consumer.assignment(), "the partitions are owned")
        consumer.commit(records)
        bus.publish(texts(topic, ["new"]))
        assert values(take(consumer, 1)) == ["new"]
        with log.open().consumer(log.group(), [topic]) as stranger, pytest.raises(Fenced):
            stranger.commit(records)
    assert bus.positions(group) == end_positions(records)


# Dead letters


def test_a_dead_letter_carries_origin_error_and_attempts_and_moves_the_position(log: Log, bus: Bus) -> None:
    topic, target, group = log.topic(), log.topic(), log.group()
    bus.publish([Outgoing(topic, b"k", b"bad", {"h": b"1"}), Outgoing(topic, b"k", b"good")])
    with bus.consumer(group, [topic]) as consumer:
        bad, good = take(consumer, 2)
        consumer.commit(
            [bad, good],
            publish=texts(target, ["good result"]),
            dead_letters=[DeadLetter(bad, "unreadable", 3)],
        )
    # A broker shows what was committed to readers a moment after it has said that it is committed.
    until(lambda: buried(bus, lambda letter: letter.group == group), "the letter to be seen")
    (letter,) = buried(bus, lambda letter: letter.group == group)
    assert (letter.topic, letter.partition, letter.offset) == bad.position
    assert (letter.key, letter.value, dict(letter.headers)) == (b"k", b"bad", {"h": b"1"})
    assert (letter.error, letter.attempts) == ("unreadable", 3)
    assert bus.positions(group) == {Partition(topic, 0): good.offset + 1}
    until(lambda: everything(bus, target), "the result to be seen")
    assert values(everything(bus, target)) == ["good result"]


def test_a_replayed_dead_letter_comes_once_and_only_to_the_group_that_failed(log: Log, bus: Bus) -> None:
    topic, failing, other = log.topic(), log.group(), log.group()
    bus.publish(texts(topic, ["x"]))
    with bus.consumer(failing, [topic]) as consumer, bus.consumer(other, [topic]) as bystander:
        consumer.dead_letter(take(consumer, 1)[0], "failed", 1)
        bystander.commit(take(bystander, 1))
        assert len(replay(bus, lambda letter: letter.group == failing)) == 1
        assert replay(bus, lambda letter: letter.group == failing) == []
        assert values(take(consumer, 1)) == ["x"]
        bus.publish(texts(topic, ["y"]))
        assert values(take(consumer, 1)) == ["y"]
        assert values(take(bystander, 1)) == ["y"]


# Positions, retention, topics


def test_reading_can_start_at_any_position(log: Log, bus: Bus) -> None:
    topic, group = log.topic(), log.group()
    positions = bus.publish(texts(topic, [str(i) for i in range(6)]))
    assert values(bus.fetch(topic, 0, positions[4].offset, timeout=10)) == ["4", "5"]
    with bus.consumer(group, [topic]) as consumer:
        consumer.commit(take(consumer, 6))
        consumer.seek(topic, 0, positions[2].offset)
        assert values(take(consumer, 4)) == ["2", "3", "4", "5"]


def test_a_group_can_start_behind_the_newest(log: Log, bus: Bus) -> None:
    topic, group = log.topic(), log.group()
    bus.publish(texts(topic, ["old"]))
    with bus.consumer(group, [topic], options=ConsumerOptions(from_end=True)) as consumer:
        until(lambda: not consumer.poll(1, 0.1) and consumer.assignment(), "the partition is assigned")
        bus.publish(texts(topic, ["new"]))
        assert values(take(consumer, 1)) == ["new"]


def test_retention_removes_old_records_and_never_gives_an_offset_out_twice(log: Log, bus: Bus) -> None:
    topic, group = log.topic(retention_ms=1000), log.group()
    (old,) = bus.publish(texts(topic, ["old"]))
    until(lambda: bus.bounds(topic)[0].first > old.offset, "the old record is gone")
    (new,) = bus.publish(texts(topic, ["new"]))
    assert new.offset > old.offset
    assert bus.fetch(topic, 0, old.offset, timeout=5)[0].offset >= bus.bounds(topic)[0].first
    with bus.consumer(group, [topic]) as consumer:
        assert values(take(consumer, 1)) == ["new"]


def test_lag_counts_what_is_not_committed(log: Log, bus: Bus) -> None:
    """Records, not offsets: who waits for three labels must not count a broker's own marks."""
    topic, group = log.topic(), log.group()
    before_ms = int(time.time() * 1000)
    for value in ("1", "2", "3"):
        bus.publish(texts(topic, [value]))
    assert len(everything(bus, topic)) == 3
    (lag,) = bus.lag(group, [topic])
    assert lag.records == 3
    assert lag.oldest_ms is not None
    assert before_ms <= lag.oldest_ms <= time.time() * 1000
    with bus.consumer(group, [topic]) as consumer:
        consumer.commit(take(consumer, 2))
        (lag,) = bus.lag(group, [topic])
        assert lag.records == 1
        consumer.commit(take(consumer, 1))
    (lag,) = bus.lag(group, [topic])
    assert (lag.records, lag.oldest_ms) == (0, None)


def test_applying_topics_twice_changes_nothing_and_partitions_are_only_added(log: Log, bus: Bus) -> None:
    name = log.topic(partitions=2)
    wanted = TopicSpec(name, 3, retention_ms=60_000)
    assert {change.action for change in bus.plan_topics([wanted])} == {"add partitions", "configure"}
    bus.apply_topics([wanted])
    assert bus.plan_topics([wanted]) == []
    assert bus.topics()[name].partitions == len(bus.bounds(name)) == 3
    assert [change.action for change in bus.apply_topics([TopicSpec(name, 1, retention_ms=60_000)])] == [
        "refuse"
    ]
    assert bus.topics()[name].partitions == 3


def test_a_compacted_topic_keeps_the_newest_message_of_each_key(log: Log, bus: Bus) -> None:
    topic = log.topic(cleanup=Cleanup.COMPACT)
    for number in range(3):
        bus.publish(texts(topic, [f"a{number}"], key="a") + texts(topic, [f"b{number}"], key="b"))
    newest = {record.key: record.value for record in everything(bus, topic)}
    assert newest == {b"a": b"a2", b"b": b"b2"}


# Several processes


def test_two_processes_publish_at_once(log: Log, bus: Bus) -> None:
    topic = log.topic(partitions=2)
    processes = [subprocess.Popen(log.child("publish", topic, name, 30)) for name in ("one", "two")]
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
    found = values(everything(bus, topic))
    for name in ("one", "two"):
        assert [v for v in found if v.startswith(name)] == [f"{name} {i}" for i in range(30)]


def test_killing_a_worker_twenty_times_at_random_loses_and_doubles_nothing(log: Log, bus: Bus) -> None:
    topic, target, group = log.topic(partitions=4), log.topic(partitions=3), log.group()
    dice = random.Random(2212_08073)
    sent: dict[bytes, list[bytes]] = defaultdict(list)
    kills = 0
    process = None
    while kills < 20:  # the number that the design asks for
        batch = []
        for _ in range(30):
            key = f"prompt-{dice.randrange(25)}".encode()
            sent[key].append(b"%d" % len(sent[key]))
            batch.append(Outgoing(topic, key, sent[key][-1]))
        bus.publish(batch)
        command = log.child("work", group, f"w{kills % 2}", topic, target, log.quick.session_timeout_s)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(dice.uniform(0, 0.25 if log.kind == "sqlite" else 1.5))
        process.kill()
        process.communicate()
        kills += 1
    expected = 2 * sum(len(numbers) for numbers in sent.values())
    command = log.child("work", group, "w0", topic, target, log.quick.session_timeout_s)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        until(
            lambda: sum(lag.records for lag in bus.lag(group, [topic]) if lag.oldest_ms) == 0,
            "all is committed",
        )
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    results = everything(bus, target)
    assert len(results) == expected
    assert max(Counter((record.key, record.value) for record in results).values()) == 1
    for key, numbers in sent.items():
        mine = [record.value for record in results if record.key == key]
        assert mine == [part + number for number in numbers for part in (b"a", b"b")]
