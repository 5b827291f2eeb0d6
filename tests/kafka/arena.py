"""Where the circle comes under fire: brokers behind proxies, workers that are started again, and the count.

A cast says who works (`tests.kafka.casts`). While prompts keep coming, faults are done to it
(`tests.kafka.faults`). After each, when everything published has gone through, what lies on the topics and
in the trainer's records is counted; `Outcome` is a line of the table.
"""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.kafka.proxy import Proxy
from tests.kafka.support import CACHE, patiently

from charter.bus import Bus, Outgoing, open_bus
from charter.bus.base import partition_for
from charter.bus.broker import Broker, BrokerOptions, fetch_kafka, free_port
from charter.bus.messages import decode, encode
from charter.bus.topics import load_topics
from charter.v1 import events_pb2, types_pb2

PARTITIONS = 8
KEYS = 40
OPTIONS = "timeout=10&transaction_timeout=10"
PATIENCE_S = 240.0


class Cast(Protocol):
    """Who works in an arena."""

    pairs: Sequence[str]
    """The labels of a rollout, as their ids end."""
    rate: float
    """Prompts a second while a fault is done."""
    company: int
    """Prompts that are added when the last labels wait for more: a real trainer learns by full steps."""
    stop_s: float
    """A stopped worker is given up by its group in less."""

    def prepare(self, folder: Path, uri: str) -> dict[str, list[str]]:
        """The module and arguments of each worker, by its name; all that they need lies in `folder`."""
        ...

    def counted(self) -> Counter[str]:
        """How often each label, by its id, was counted by the trainer, as of now."""
        ...


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    fault: str
    times: int
    prompts: int
    lost: int
    """Prompts, rollouts or labels that are missing, and labels that the trainer did not count."""
    doubled: int
    """Those that are there, or were counted, more than once."""
    out_of_order: int
    """Keys whose rollouts or labels are not in the order of publication."""
    recover_median_s: float
    """From the end of a fault until a fresh prompt of every partition has become labels that count."""
    recover_worst_s: float

    @property
    def clean(self) -> bool:
        """Nothing lost, nothing doubled, all in order."""
        return not (self.lost or self.doubled or self.out_of_order)


HEAD = (
    f"{'fault':48} {'times':>5} {'prompts':>7} {'lost':>5} {'doubled':>7} {'disorder':>8}"
    f" {'recover s':>10} {'worst':>6}"
)


def line(o: Outcome) -> str:
    return (
        f"{o.fault:48} {o.times:5} {o.prompts:7} {o.lost:5} {o.doubled:7} {o.out_of_order:8}"
        f" {o.recover_median_s:10.1f} {o.recover_worst_s:6.1f}"
    )


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Cluster:
    """Brokers, each behind a proxy."""

    def __init__(self, folder: Path, size: int) -> None:
        jars = fetch_kafka(CACHE)
        voters = [(node, free_port()) for node in range(1, size + 1)]
        self.brokers: list[Broker] = []
        self.proxies: list[Proxy] = []
        for node, controller_port in voters:
            broker = Broker(
                folder / f"broker-{node}",
                jars,
                node=node,
                voters=voters,
                controller_port=controller_port,
                advertised_port=free_port(),
                options=BrokerOptions(heap_mb=256, start_timeout_s=300.0),
            )
            self.brokers.append(broker)
            self.proxies.append(Proxy(int(broker.address.rpartition(":")[2]), broker.port))

    @property
    def uri(self) -> str:
        return f"kafka://{','.join(broker.address for broker in self.brokers)}?{OPTIONS}"

    def start(self) -> None:
        for proxy in self.proxies:
            proxy.start()
        self.start_brokers()

    def start_brokers(self) -> None:
        for broker in self.brokers:
            broker.launch()
        for broker in self.brokers:
            broker.wait()

    def stop(self) -> None:
        for broker in self.brokers:
            broker.kill()
        for proxy in self.proxies:
            proxy.stop()


class Workers:
    """The processes; a thread starts those again that end."""

    def __init__(self, folder: Path, commands: dict[str, list[str]]) -> None:
        self.ended: list[str] = []
        """Who ended without being killed, and how."""
        self._folder = folder
        self._commands = commands
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            for name, command in self._commands.items():
                process = self._processes.get(name)
                if process is None or process.poll() is not None:
                    if process is not None and process.returncode != -signal.SIGKILL:
                        self.ended.append(f"{name} ended with {process.returncode}")
                        say(f"  {self.ended[-1]} and is started again")
                    self._processes[name] = self._start(name, command)
            self._stopping.wait(0.2)

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log)

    def one(self, dice: random.Random, kind: str = "") -> subprocess.Popen[bytes]:
        """Any one, or one of a kind: `sampler` for `sampler-0` and `sampler-1`."""
        return self._processes[dice.choice(sorted(n for n in self._commands if n.startswith(kind)))]

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        for process in self._processes.values():
            process.kill()
            process.wait()


class Publisher:
    """Publishes prompts: several of one key, so that order can be checked. Their texts name them."""

    def __init__(self, uri: str, rate: float) -> None:
        self._bus = open_bus(uri)
        self._rate = rate
        self._numbers: Counter[str] = Counter()
        self._dice = random.Random(1)
        self.sent: list[str] = []
        self._lock = threading.Lock()

    def publish(self, keys: Sequence[str]) -> list[str]:
        """One prompt for each key. Tries until the bus takes them."""
        with self._lock:
            texts = []
            messages: list[Outgoing] = []
            for key in keys:
                texts.append(f"{key} number {self._numbers[key]:06d}")
                self._numbers[key] += 1
                turn = types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content=texts[-1])
                event = events_pb2.PromptEvent(prompt_id=key, conversation=[turn])
                messages.append(encode("prompts", key, event))
            patiently(lambda: self._bus.publish(messages))
            self.sent += texts
            return texts

    def some(self, count: int) -> None:
        """Of random keys."""
        self.publish([f"key-{self._dice.randrange(KEYS)}" for _ in range(count)])

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Publishes all the while."""
        stop = threading.Event()

        def flow() -> None:
            while not stop.wait(2 / self._rate):
                self.some(2)

        thread = threading.Thread(target=flow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(PATIENCE_S)

    def close(self) -> None:
        self._bus.close()


class Topic:
    """Everything on a topic; what was read is not read again."""

    def __init__(self, bus: Bus, name: str, message: type[Any]) -> None:
        self._bus, self._name, self._message = bus, name, message
        self._next: dict[int, int] = {}
        self._events: list[Any] = []

    def events(self) -> list[Any]:
        patiently(self._read_on)
        return self._events

    def _read_on(self) -> None:
        for partition, bounds in self._bus.bounds(self._name).items():
            offset = self._next.get(partition, bounds.first)
            while found := self._bus.fetch(self._name, partition, offset, 500):
                self._events += [decode(record, self._message) for record in found]
                offset = self._next[partition] = found[-1].offset + 1


class Arena:
    """Everything together, and how to judge it."""

    def __init__(
        self, cast: Cast, cluster: Cluster, workers: Workers, publisher: Publisher, observer: Bus
    ) -> None:
        self.cast = cast
        self.cluster = cluster
        self.workers = workers
        self.publisher = publisher
        self.dice = random.Random(2212_08073)
        self.dead_letters = Topic(observer, "dead-letters", events_pb2.DeadLetterEvent)
        self._prompts = Topic(observer, "prompts", events_pb2.PromptEvent)
        self._rollouts = Topic(observer, "rollouts", events_pb2.RolloutEvent)
        self._labels = Topic(observer, "preferences", events_pb2.PreferenceEvent)

    def recover(self) -> float:
        """Seconds until fresh prompts of every partition have become labels that are counted."""
        started = time.monotonic()
        keys = [
            next(k for k in _keys() if partition_for(k.encode(), PARTITIONS) == p) for p in range(PARTITIONS)
        ]
        self._wait_for(self.publisher.publish(keys))
        return time.monotonic() - started

    def _wait_for(self, texts: Sequence[str]) -> None:
        """Until the labels of these prompts count, or patience ends: what is missing then is lost."""
        deadline = time.monotonic() + PATIENCE_S
        wanted = {name for text in texts for name in self.labels_of(text)}
        known, changed = 0, time.monotonic()
        while time.monotonic() < deadline:
            counted = self.cast.counted()
            if len(counted) > known:
                known, changed = len(counted), time.monotonic()
                if wanted <= self._by_name(counted).keys():
                    return
            if self.cast.company and time.monotonic() > changed + 1.0 and self._labelled(wanted):
                self.publisher.some(self.cast.company)
                changed = time.monotonic()
            time.sleep(0.1)

    def _labelled(self, names: set[str]) -> bool:
        return names <= {_name(label) for label in self._labels.events()}

    def labels_of(self, text: str) -> list[str]:
        """What the labels of a prompt are called."""
        return [f"{text}/{pair}" for pair in self.cast.pairs]

    def _by_name(self, counted: Counter[str]) -> Counter[str]:
        names = {label.preference_id: _name(label) for label in self._labels.events()}
        named: Counter[str] = Counter()
        for preference_id, times in counted.items():
            named[names.get(preference_id, preference_id)] += times
        return named

    def audit(self, sent: Sequence[str]) -> tuple[int, int, int]:
        """Lost, doubled, and keys out of order among what was `sent`."""
        self._wait_for(sent)
        wanted = set(sent)
        all_labels = {name for text in wanted for name in self.labels_of(text)}
        counted = self._by_name(self.cast.counted())
        stages = {
            "prompts": (Counter(_text(p) for p in self._prompts.events()), wanted),
            "rollouts": (Counter(_text(r) for r in self._rollouts.events()), wanted),
            "labels": (Counter(_name(p) for p in self._labels.events()), all_labels),
            "counted labels": (counted, all_labels),
        }
        lost = doubled = 0
        for stage, (found, names) in stages.items():
            missing = sorted(name for name in names if found[name] == 0)
            twice = sorted(name for name in names if found[name] > 1)
            lost += len(missing)
            doubled += sum(found[name] - 1 for name in twice)
            for what, which in (("lost", missing), ("doubled", twice)):
                if which:
                    say(f"  {len(which)} {stage} {what}: {', '.join(which[:5])} …")
        return lost, doubled, _disorder(self._rollouts.events()) + _disorder(self._labels.events())


def _keys() -> Iterator[str]:
    return (f"key-{number}" for number in itertools.count())


def _text(event: Any) -> str:
    return str(event.conversation[-1].content)


def _name(label: events_pb2.PreferenceEvent) -> str:
    return f"{_text(label)}/{label.preference_id.rpartition('/')[2]}"


def _disorder(events: list[Any]) -> int:
    """How many keys are out of order: texts sort as they were published."""
    order: dict[str, list[str]] = defaultdict(list)
    for event in events:
        order[event.prompt_id].append(_text(event))
    return sum(texts != sorted(texts) for texts in order.values())


@contextmanager
def arena(folder: Path, cast: Cast, brokers: int) -> Iterator[Arena]:
    """An arena in which everybody is up."""
    with ExitStack() as stack:
        cluster = Cluster(folder, brokers)
        stack.callback(cluster.stop)
        cluster.start()
        with open_bus(cluster.uri) as bus:
            bus.apply_topics(load_topics())
        observer = stack.enter_context(open_bus(cluster.uri))
        publisher = Publisher(cluster.uri, cast.rate)
        stack.callback(publisher.close)
        workers = Workers(folder, cast.prepare(folder, cluster.uri))
        stack.callback(workers.stop)
        workers.start()
        made = Arena(cast, cluster, workers, publisher, observer)
        made.recover()
        yield made
