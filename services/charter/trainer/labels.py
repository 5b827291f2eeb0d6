"""From labelled pairs on the bus to rollouts: what one PPO step takes, and which labels it takes.

*Which* is a function of the log alone: a step takes the next labels of the partitions in turn, one from each,
passing over partitions that have none. Read over the same log, the same steps come out, however often the
reader was killed; while the log still grows, the plan of a step under way is kept (`charter.trainer.plan`).
What cannot teach is named and buried; people's labels carry no log-probs and are left to the reward model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from charter.bus import Bus, DeadLetter, Record, is_for
from charter.bus.messages import decode
from charter.errors import BusError, MalformedMessage, RequestError
from charter.trainer.rollout import Rollout
from charter.v1 import events_pb2, types_pb2

PREFERENCES = "preferences"
GROUP = "trainer"

Positions = Mapping[int, int]
"""Partition: offset of the next label."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rollout must fit."""

    vocabulary: int
    context: int
    tokenizer_digest: str = ""
    """Empty: not checked."""
    constitution_digest: str = ""
    """Empty: not checked."""


@dataclass(frozen=True, slots=True)
class Label:
    """A labelled pair that can teach: its event and its two answers, not yet scored."""

    record: Record
    event: events_pb2.PreferenceEvent
    rollouts: tuple[Rollout, Rollout]

    @property
    def texts(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Prompt and answer of each, for the watch."""
        prompt = self.event.conversation[-1].content if self.event.conversation else self.event.prompt_id
        return (prompt, self.event.answer_a.text), (prompt, self.event.answer_b.text)


@dataclass(frozen=True, slots=True)
class Take:
    """What a step consumes."""

    labels: tuple[Label, ...] = ()
    buried: tuple[DeadLetter, ...] = ()
    passed_over: int = 0
    """People's labels."""
    positions: Mapping[int, int] = field(default_factory=dict)
    """Where the next step goes on."""
    records: tuple[Record, ...] = ()
    """All that was consumed, in order within each partition."""


def label_of(record: Record, limits: Limits) -> Label | None:
    """The label in a record; None for a person's. Raises `MalformedMessage` or `RequestError`."""
    event = decode(record, events_pb2.PreferenceEvent)
    if event.human:
        return None
    name = f"label {event.preference_id!r}"
    if limits.tokenizer_digest and event.policy.tokenizer_digest not in ("", limits.tokenizer_digest):
        raise MalformedMessage(
            f"{name} was made with the tokenizer {event.policy.tokenizer_digest[:12]}, and the policy in "
            f"training has {limits.tokenizer_digest[:12]}; its token ids mean other words here: sample the "
            "prompt again from this policy"
        )
    if limits.constitution_digest and event.constitution_digest != limits.constitution_digest:
        raise MalformedMessage(
            f"{name} was given under the constitution {event.constitution_digest[:12]}, and "
            f"{limits.constitution_digest[:12]} is in force; judge the rollout again, or let "
            "the trainer's option constitution be empty to take it"
        )
    answers = (event.answer_a, event.answer_b)
    first, second = (_rollout(event, side, answer) for side, answer in zip("ab", answers, strict=True))
    return Label(
        record,
        event,
        (
            first.checked(limits.vocabulary, limits.context),
            second.checked(limits.vocabulary, limits.context),
        ),
    )


def _rollout(event: events_pb2.PreferenceEvent, side: str, answer: types_pb2.Completion) -> Rollout:
    logprobs = list(answer.logprobs)
    if answer.kept_log_mass:  # compare whole distributions, also where sampling was truncated
        logprobs = [p + kept for p, kept in zip(logprobs, answer.kept_log_mass, strict=True)]
    return Rollout(
        rollout_id=f"{event.preference_id}#{side}",
        prompt_ids=tuple(event.prompt_token_ids),
        answer_ids=tuple(answer.token_ids),
        behaviour_logprobs=tuple(min(0.0, p) if p < 1e-4 else p for p in logprobs),
        score=0.0,
        stopped=answer.finish_reason == types_pb2.FINISH_REASON_STOP,
        temperature=event.temperature or 1.0,
        policy_step=event.policy_step,
    )


def take(bus: Bus, positions: Positions, count: int, limits: Limits) -> Take:
    """The next `count` labels that can teach; fewer where the log does not hold as many.

    Reads, and changes nothing.
    """
    readers = {p: _Reader(bus, p, positions.get(p)) for p in sorted(bus.bounds(PREFERENCES))}
    sorting = _Sorting(limits)
    turn = list(readers)
    while len(sorting.labels) < count:
        if not turn:
            break
        partition = turn.pop(0)
        record = readers[partition].next(count)
        if record is not None:
            turn.append(partition)
            sorting.add(record)
    return sorting.take({p: r.position for p, r in readers.items()})


def take_again(bus: Bus, places: Sequence[tuple[int, int]], positions: Positions, limits: Limits) -> Take:
    """The same labels as before, by partition and offset. Raises `BusError` when they are there no more."""
    sorting = _Sorting(limits)
    ends = dict(positions)
    for partition, offset in places:
        records = bus.fetch(PREFERENCES, partition, offset, max_records=1)
        if not records or records[0].offset != offset:
            raise BusError(
                f"{PREFERENCES}/{partition} no longer has offset {offset}, which a step under way needs; its "
                "retention is shorter than the time that the trainer was down. Remove the trainer's work "
                "folder to go on with newer labels"
            )
        sorting.add(records[0])
        ends[partition] = offset + 1
    return sorting.take(ends)


class _Sorting:
    """Puts records where they belong."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.labels: list[Label] = []
        self._buried: list[DeadLetter] = []
        self._records: list[Record] = []
        self._passed_over = 0

    def add(self, record: Record) -> None:
        """Consumes a record."""
        self._records.append(record)
        if not is_for(record, GROUP):
            return
        try:
            label = label_of(record, self._limits)
        except (MalformedMessage, RequestError) as error:
            self._buried.append(DeadLetter(record, f"{type(error).__name__}: {error}", 1))
            return
        if label is None:
            self._passed_over += 1
        else:
            self.labels.append(label)

    def take(self, positions: Positions) -> Take:
        """All that was added."""
        return Take(
            tuple(self.labels), tuple(self._buried), self._passed_over, positions, tuple(self._records)
        )


class _Reader:
    """One partition, read in chunks."""

    def __init__(self, bus: Bus, partition: int, position: int | None) -> None:
        self._bus = bus
        self._partition = partition
        self._chunk: list[Record] = []
        self.position = position if position is not None else bus.bounds(PREFERENCES)[partition].first

    def next(self, chunk: int) -> Record | None:
        """The next record, or None at the end of the log."""
        if not self._chunk:
            self._chunk = self._bus.fetch(PREFERENCES, self._partition, self.position, max_records=chunk)
        if not self._chunk:
            return None
        record = self._chunk.pop(0)
        self.position = record.offset + 1
        return record
