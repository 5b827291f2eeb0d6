"""Consumer groups on the SQLite log: who is alive, who owns which partition, and who may still commit.

A *claim* is a row for each partition of a group: its owner, the member that should have it (target), and an
epoch that grows with every change of hands. A member that polled under an older epoch is a zombie: its commit
is refused. A living owner in the middle of a batch keeps its partition until it has committed (cooperative
rebalancing), at most until `wanted_by`.

Times here are `time.monotonic()`, which every process of one machine shares until it reboots; a sign of life
from the future is from before a reboot, and its member is dead.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from charter.bus._store import read_topics
from charter.bus.base import ConsumerOptions, Partition
from charter.errors import BusError, Fenced


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a group, and the session that proves that a process still is this member."""

    group: str
    name: str
    session: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A partition that a member owns."""

    epoch: int
    wanted: bool
    """Another member should have it: hand it over when no record is in hand."""


def assign(
    members: Mapping[str, frozenset[str]], partitions: Mapping[str, int], current: Mapping[Partition, str]
) -> dict[Partition, str]:
    """Who should own what: even within each topic, and moving as little as possible.

    Counts within a topic differ by one at most. `members` maps names to topics, `partitions` topics to their
    number of partitions, and `current` is what is owned now. Topics that nobody reads are left out.
    """
    result: dict[Partition, str] = {}
    load: Counter[str] = Counter()
    for topic in sorted(partitions):
        readers = sorted(name for name, topics in members.items() if topic in topics)
        if not readers:
            continue
        places = [Partition(topic, p) for p in range(partitions[topic])]
        kept: dict[str, list[Partition]] = {name: [] for name in readers}
        for place in places:
            if current.get(place) in kept:
                kept[current[place]].append(place)
        base, extra = divmod(len(places), len(readers))
        # Those who hold more keep more; ties go to who has less elsewhere.
        order = sorted(readers, key=lambda name: (-min(len(kept[name]), base + 1), load[name], name))
        quota = {name: base + (1 if rank < extra else 0) for rank, name in enumerate(order)}
        for name in readers:
            result.update(dict.fromkeys(kept[name][: quota[name]], name))
        free = iter([place for place in places if place not in result])
        for name in order:
            for _ in range(quota[name] - min(len(kept[name]), quota[name])):
                result[next(free)] = name
        load.update(result[place] for place in places)
    return result


def _key(member: Member) -> tuple[str, str, str]:
    return member.group, member.name, member.session


def join(
    db: sqlite3.Connection, member: Member, topics: Iterable[str], options: ConsumerOptions, now: float
) -> None:
    """Enters the group, or takes this member's place over from the process that held it before."""
    unknown = sorted(set(topics) - read_topics(db).keys())
    if unknown:
        raise BusError(f"topic {unknown[0]!r} does not exist; create it with `charter topics apply`")
    db.execute(
        "INSERT OR REPLACE INTO members (grp, member, session, topics, beat, session_timeout)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            member.group,
            member.name,
            member.session,
            json.dumps(sorted(topics)),
            now,
            options.session_timeout_s,
        ),
    )
    # The process that ran under this name before must not commit any more.
    db.execute("UPDATE claims SET epoch = epoch + 1 WHERE grp = ? AND owner = ?", (member.group, member.name))
    rebalance(db, member.group, now, options.rebalance_timeout_s)


def leave(db: sqlite3.Connection, member: Member, options: ConsumerOptions, now: float) -> None:
    """Gives every partition back at once."""
    gone = db.execute(
        "DELETE FROM members WHERE grp = ? AND member = ? AND session = ?",
        _key(member),
    ).rowcount
    if gone:
        rebalance(db, member.group, now, options.rebalance_timeout_s)


def is_member(db: sqlite3.Connection, member: Member) -> bool:
    """Whether the session still counts. False when the group has given this member up (join again).

    Raises `Fenced` when another process runs under this name.
    """
    row = db.execute(
        "SELECT session FROM members WHERE grp = ? AND member = ?", (member.group, member.name)
    ).fetchone()
    if row is None:
        return False
    if row[0] != member.session:
        raise Fenced(
            f"group {member.group!r}: another process runs as member {member.name!r}; "
            "stop this one, or give each process a member name of its own"
        )
    return True


def beat(db: sqlite3.Connection, member: Member, now: float) -> None:
    """Gives a sign of life, if the session still counts."""
    db.execute(
        "UPDATE members SET beat = ? WHERE grp = ? AND member = ? AND session = ?",
        (now, *_key(member)),
    )


def topic_changed(db: sqlite3.Connection, topic: str, now: float) -> None:
    """Shares out the partitions that a topic gained among the groups that read it."""
    groups = {
        group
        for group, topics in db.execute("SELECT grp, topics FROM members")
        if topic in json.loads(topics)
    }
    for group in groups:
        rebalance(db, group, now, ConsumerOptions().rebalance_timeout_s)


def expire(db: sqlite3.Connection, group: str, options: ConsumerOptions, now: float) -> None:
    """Gives up the members that have been silent too long, and ends the patience with slow handovers."""
    silent = db.execute(
        "DELETE FROM members WHERE grp = ? AND (beat + session_timeout < ? OR beat > ? + 1)",
        (group, now, now),
    ).rowcount
    overdue = db.execute(
        "UPDATE claims SET owner = NULL WHERE grp = ? AND wanted_by < ?", (group, now)
    ).rowcount
    if silent or overdue:
        rebalance(db, group, now, options.rebalance_timeout_s)


def rebalance(db: sqlite3.Connection, group: str, now: float, patience_s: float) -> None:
    """Brings the claims to what the living members should own; a handover may take `patience_s`."""
    members = {
        name: frozenset(json.loads(topics))
        for name, topics in db.execute("SELECT member, topics FROM members WHERE grp = ?", (group,))
    }
    wanted_topics = frozenset().union(*members.values()) if members else frozenset()
    partitions = {name: spec.partitions for name, spec in read_topics(db).items() if name in wanted_topics}
    claims = {
        Partition(topic, partition): (owner, epoch, wanted_by)
        for topic, partition, owner, epoch, wanted_by in db.execute(
            "SELECT topic, partition, owner, epoch, wanted_by FROM claims WHERE grp = ?", (group,)
        )
    }
    owners = {place: owner for place, (owner, _, _) in claims.items() if owner in members}
    targets = assign(members, partitions, owners)
    for place in claims.keys() | targets.keys():
        owner, epoch, wanted_by = claims.get(place, (None, 0, None))
        target = targets.get(place)
        if place not in owners:  # nobody alive holds it: it changes hands now
            row: tuple[str | None, str | None, int, float | None] = (target, target, epoch + 1, None)
        elif owners[place] == target:
            row = (owner, target, epoch, None)
        else:
            row = (owner, target, epoch, now + patience_s if wanted_by is None else wanted_by)
        db.execute(
            "INSERT OR REPLACE INTO claims (grp, topic, partition, owner, target, epoch, wanted_by)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (group, *place, *row),
        )


def owned(db: sqlite3.Connection, member: Member) -> dict[Partition, Claim]:
    """What the member owns now; nothing when its session is over."""
    rows = db.execute(
        "SELECT topic, partition, epoch, wanted_by IS NOT NULL FROM claims JOIN members USING (grp)"
        " WHERE grp = ? AND owner = ? AND member = ? AND session = ? ORDER BY topic, partition",
        (member.group, member.name, member.name, member.session),
    )
    return {
        Partition(topic, partition): Claim(epoch, bool(wanted)) for topic, partition, epoch, wanted in rows
    }


def hand_over(db: sqlite3.Connection, member: Member, places: Iterable[Partition]) -> None:
    """Gives partitions to the members that should have them."""
    for place in places:
        db.execute(
            "UPDATE claims SET owner = target, epoch = epoch + 1, wanted_by = NULL"
            " WHERE grp = ? AND topic = ? AND partition = ? AND owner = ? AND wanted_by IS NOT NULL",
            (member.group, *place, member.name),
        )


def read_positions(db: sqlite3.Connection, group: str) -> dict[Partition, int]:
    """The committed positions of a group."""
    rows = db.execute("SELECT topic, partition, offset FROM positions WHERE grp = ?", (group,))
    return {Partition(topic, partition): offset for topic, partition, offset in rows}


def move_positions(
    db: sqlite3.Connection, member: Member, epochs: Mapping[Partition, int], ends: Mapping[Partition, int]
) -> None:
    """Commits positions, if the member owns every one of the partitions under the epoch that it polled in."""
    claims = owned(db, member)
    for place in ends:
        claim = claims.get(place)
        if claim is None or claim.epoch != epochs.get(place):
            raise Fenced(
                f"group {member.group!r}: {place.topic}/{place.partition} went to another member while "
                f"{member.name!r} worked; its work is thrown away, the other does it"
            )
    db.executemany(
        "INSERT OR REPLACE INTO positions (grp, topic, partition, offset) VALUES (?, ?, ?, ?)",
        [(member.group, *place, offset) for place, offset in ends.items()],
    )
