"""The embedded log against a model in a few lines: any order of any operations gives the same answers."""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from charter.bus import Consumer, Outgoing, Partition, Record, TopicSpec
from charter.bus._groups import assign
from charter.bus.base import partition_for
from charter.bus.sqlite import SqliteBus, SqliteOptions
from charter.errors import Fenced

PARTITIONS = 3
KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
MEMBERS = st.sampled_from(["one", "two", "three"])


class LogMachine(RuleBasedStateMachine):
    """Members of one group come, go, are replaced, poll, commit and rewind while others publish."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.bus = SqliteBus(
            Path(self.folder.name) / "bus.db",
            SqliteOptions("normal"),
            [TopicSpec("t", PARTITIONS), TopicSpec("out", 1)],
        )
        self.numbers = itertools.count()
        self.log: dict[int, list[bytes]] = defaultdict(list)
        self.committed: dict[int, int] = defaultdict(int)
        self.results: list[bytes] = []
        self.members: dict[str, Consumer] = {}
        self.in_hand: dict[str, list[Record]] = {}
        self.replaced: list[tuple[Consumer, list[Record]]] = []

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4))
    def publish(self, keys: list[bytes]) -> None:
        messages = [Outgoing("t", key, b"%d" % next(self.numbers)) for key in keys]
        for message, position in zip(messages, self.bus.publish(messages), strict=True):
            partition = partition_for(message.key, PARTITIONS)
            assert position == ("t", partition, len(self.log[partition]))
            self.log[partition].append(message.value or b"")

    @rule(name=MEMBERS)
    def join_or_replace(self, name: str) -> None:
        if name in self.members:
            self.replaced.append((self.members[name], self.in_hand[name]))
        self.members[name] = self.bus.consumer("g", ["t"], member=name)
        self.in_hand[name] = []

    @precondition(lambda self: self.members)
    @rule(data=st.data(), count=st.integers(1, 5))
    def poll(self, data: st.DataObject, count: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.members)))
        self.in_hand[name] += self.members[name].poll(count, timeout=0)

    @precondition(lambda self: any(self.in_hand.values()))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, records in self.in_hand.items() if records)))
        records = self.in_hand[name]
        self.members[name].commit(records, publish=[Outgoing("out", b"k", r.value) for r in records])
        for record in records:
            assert record.value == self.log[record.partition][record.offset]
            assert record.offset == self.committed[record.partition]
            self.committed[record.partition] += 1
            self.results.append(record.value or b"")
        self.in_hand[name] = []

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.members)))
        self.members[name].rewind()
        self.in_hand[name] = []

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.members)))
        self.members.pop(name).close()
        self.in_hand.pop(name)

    @precondition(lambda self: self.replaced)
    @rule()
    def a_replaced_member_can_do_nothing(self) -> None:
        consumer, records = self.replaced.pop()
        if records:
            try:
                consumer.commit(records, publish=[Outgoing("out", b"k", b"zombie")])
            except Fenced:
                pass
            else:
                raise AssertionError("a zombie committed")
        consumer.close()

    @invariant()
    def positions_are_those_of_the_model(self) -> None:
        expected = {Partition("t", p): end for p, end in self.committed.items() if end}
        assert self.bus.positions("g") == expected

    @invariant()
    def results_are_there_once_and_in_order(self) -> None:
        assert [record.value for record in self.bus.fetch("out", 0, 0, 10_000)] == self.results

    def teardown(self) -> None:
        self.bus.close()
        self.folder.cleanup()


TestLogAgainstModel = LogMachine.TestCase
TestLogAgainstModel.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def _members() -> st.SearchStrategy[dict[str, frozenset[str]]]:
    return st.dictionaries(
        st.sampled_from("abcdef"),
        st.frozensets(st.sampled_from(["x", "y"]), min_size=1),
        min_size=1,
        max_size=6,
    )


@settings(deadline=None, max_examples=200)
@given(before=_members(), after=_members(), x=st.integers(1, 12), y=st.integers(1, 12))
def test_partitions_are_shared_evenly_and_move_as_little_as_possible(
    before: dict[str, frozenset[str]], after: dict[str, frozenset[str]], x: int, y: int
) -> None:
    partitions = {"x": x, "y": y}
    current = assign(before, partitions, {})
    target = assign(after, partitions, current)
    for topic, count in partitions.items():
        readers = [name for name, topics in after.items() if topic in topics]
        owners = [target.get(Partition(topic, p)) for p in range(count)]
        if not readers:
            assert set(owners) == {None}
            continue
        shares = [owners.count(name) for name in readers]
        assert sum(shares) == count
        assert max(shares) - min(shares) <= 1
        kept = sum(current.get(Partition(topic, p)) == owner for p, owner in enumerate(owners))
        had = [sum(current.get(Partition(topic, p)) == name for p in range(count)) for name in readers]
        base, extra = divmod(count, len(readers))
        most = sum(sorted((min(h, base + 1) for h in had), reverse=True)[:extra]) + sum(
            sorted(min(h, base) for h in sorted(had, key=lambda h: min(h, base + 1), reverse=True)[extra:])
        )
        assert kept == most
