"""The circle under fire: `make chaos`, or `make chaos CHAOS=--short`.

A three-broker cluster on loopback behind proxies, two samplers, two judges and a trainer, each a process that
is started again when it ends. While prompts keep coming, one fault after the other is done to them. After
each, when everything published has gone through, what lies on the topics and in the trainer's manifest is
counted:

- lost: prompts, rollouts or labels that are missing, and labels that the trainer did not count;
- doubled: those that are there, or were counted, more than once;
- disorder: keys whose rollouts are not in the order of publication;
- recover: seconds from the end of a fault until a fresh prompt of every partition has become labels that
  count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.kafka.chaos_worker import ANSWERS
from tests.kafka.proxy import Proxy, Weather
from tests.kafka.support import CACHE

from charter.bus import Bus, Outgoing, Record, open_bus
from charter.bus.base import partition_for
from charter.bus.broker import Broker, BrokerOptions, fetch_kafka, free_port, missing_tools
from charter.bus.messages import decode, encode
from charter.bus.topics import load_topics
from charter.errors import BackendUnavailable, CharterError
from charter.v1 import events_pb2, types_pb2

WORKERS = (("sampler", 2), ("judge", 2), ("trainer", 1))
LABELS = ANSWERS * (ANSWERS - 1) // 2
PARTITIONS = 8
KEYS = 40
RATE = 15.0
"""Prompts a second while a fault is done."""
OPTIONS = "timeout=10&transaction_timeout=10"
PATIENCE_S = 240.0


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    fault: str
    times: int
    prompts: int
    lost: int
    doubled: int
    out_of_order: int
    recover_median_s: float
    recover_worst_s: float


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

    def __init__(self, folder: Path, uri: str) -> None:
        self.manifest = folder / "manifest.json"
        self._folder = folder
        self._uri = uri
        self._commands = {
            f"{role}-{number}": [role, uri, f"{role}-{number}", str(self.manifest)]
            for role, count in WORKERS
            for number in range(count)
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            for name, arguments in self._commands.items():
                process = self._processes.get(name)
                if process is None or process.poll() is not None:
                    if process is not None and process.returncode != -signal.SIGKILL:
                        say(f"  {name} ended with {process.returncode} and is started again")
                    self._processes[name] = self._start(name, arguments)
            self._stopping.wait(0.2)

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "tests.kafka.chaos_worker", *arguments]
            return subprocess.Popen(command, stdout=log, stderr=log)

    def one(self, dice: random.Random) -> subprocess.Popen[bytes]:
        return self._processes[dice.choice(sorted(self._processes))]

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        for process in self._processes.values():
            process.kill()
            process.wait()


class Publisher:
    """Publishes prompts: several of one key, so that order can be checked."""

    def __init__(self, uri: str) -> None:
        self._bus = open_bus(uri)
        self._numbers: Counter[str] = Counter()
        self._dice = random.Random(1)
        self.sent: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def publish(self, keys: list[str]) -> list[str]:
        """Publishes one prompt for each key; the texts name them. Tries until the bus takes them."""
        with self._lock:
            texts = []
            messages: list[Outgoing] = []
            for key in keys:
                texts.append(f"{key}#{self._numbers[key]:06d}")
                self._numbers[key] += 1
                turn = types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content=texts[-1])
                event = events_pb2.PromptEvent(prompt_id=key, conversation=[turn])
                messages.append(encode("prompts", key, event))
            self._patiently(messages)
            self.sent += zip(keys, texts, strict=True)
            return texts

    def _patiently(self, messages: list[Outgoing]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._bus.publish(messages)
                return
            except BackendUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Publishes all the while."""
        stop = threading.Event()

        def flow() -> None:
            while not stop.wait(2 / RATE):
                self.publish([f"key-{self._dice.randrange(KEYS)}" for _ in range(2)])

        thread = threading.Thread(target=flow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(PATIENCE_S)

    def close(self) -> None:
        self._bus.close()


class Arena:
    """Everything together, and how to judge it."""

    def __init__(self, cluster: Cluster, workers: Workers, publisher: Publisher, observer: Bus) -> None:
        self.cluster = cluster
        self.workers = workers
        self.publisher = publisher
        self.observer = observer
        self.dice = random.Random(2212_08073)

    def counted(self) -> Counter[str]:
        if not self.workers.manifest.exists():
            return Counter()
        return Counter(json.loads(self.workers.manifest.read_text())["counts"])

    def recover(self) -> float:
        """Seconds until fresh prompts of every partition have become labels that are counted."""
        started = time.monotonic()
        keys = [
            next(k for k in _keys() if partition_for(k.encode(), PARTITIONS) == p) for p in range(PARTITIONS)
        ]
        self._wait_for(self.publisher.publish(keys))
        return time.monotonic() - started

    def _wait_for(self, texts: list[str]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        wanted = {label for text in texts for label in labels(text)}
        while not wanted <= self.counted().keys():
            if time.monotonic() > deadline:
                return  # what is missing then is lost, and the audit says so
            time.sleep(0.1)

    def audit(self, sent: list[tuple[str, str]]) -> tuple[int, int, int]:
        """Lost, doubled, and keys out of order among what was `sent`."""
        self._wait_for([text for _, text in sent])
        wanted = {text for _, text in sent}
        prompts = Counter(_prompt(r) for r in everything(self.observer, "prompts"))
        rollouts = [decode(r, events_pb2.RolloutEvent) for r in everything(self.observer, "rollouts")]
        made = Counter(rollout.rollout_id for rollout in rollouts)
        preferences = everything(self.observer, "preferences")
        labelled = Counter(decode(r, events_pb2.PreferenceEvent).preference_id for r in preferences)
        counted = self.counted()
        lost = doubled = 0
        all_labels = {label for text in wanted for label in labels(text)}
        stages = {
            "prompts": (prompts, wanted),
            "rollouts": (made, wanted),
            "labels": (labelled, all_labels),
            "counted labels": (counted, all_labels),
        }
        for stage, (found, ids) in stages.items():
            missing = sorted(id_ for id_ in ids if found[id_] == 0)
            twice = sorted(id_ for id_ in ids if found[id_] > 1)
            lost += len(missing)
            doubled += sum(found[id_] - 1 for id_ in twice)
            for what, which in (("lost", missing), ("doubled", twice)):
                if which:
                    say(f"  {len(which)} {stage} {what}: {', '.join(which[:5])} …")
        order: dict[str, list[str]] = defaultdict(list)
        for rollout in rollouts:
            order[rollout.prompt_id].append(rollout.rollout_id)
        return lost, doubled, sum(ids != sorted(ids) for ids in order.values())


def _keys() -> Iterator[str]:
    return (f"key-{number}" for number in itertools.count())


def _prompt(record: Record) -> str:
    return decode(record, events_pb2.PromptEvent).conversation[-1].content


def labels(text: str) -> list[str]:
    return [f"{text}:{a}-{b}" for a, b in itertools.combinations(range(ANSWERS), 2)]


def everything(bus: Bus, topic: str) -> list[Record]:
    records: list[Record] = []
    for partition, bounds in bus.bounds(topic).items():
        offset = bounds.first
        while found := bus.fetch(topic, partition, offset, 500):
            records += found
            offset = found[-1].offset + 1
    return records


# The faults: each is done once and undone before it returns.


def kill_worker(arena: Arena) -> None:
    arena.workers.one(arena.dice).kill()


def stop_worker(arena: Arena) -> None:
    process = arena.workers.one(arena.dice)
    process.send_signal(signal.SIGSTOP)
    time.sleep(9.0)  # its session lasts six seconds
    process.send_signal(signal.SIGCONT)


def lose_one_broker(arena: Arena) -> None:
    broker = arena.dice.choice(arena.cluster.brokers)
    broker.kill()
    time.sleep(8.0)
    broker.start()


def restart_all_brokers(arena: Arena) -> None:
    for broker in arena.cluster.brokers:
        broker.kill()
    time.sleep(2.0)
    arena.cluster.start_brokers()


def weather(kind: Weather, seconds: float) -> Callable[[Arena], None]:
    def change(arena: Arena) -> None:
        for proxy in arena.cluster.proxies:
            proxy.change(kind)
        time.sleep(seconds)
        for proxy in arena.cluster.proxies:
            proxy.change(Weather.FINE)

    return change


FAULTS: dict[str, tuple[Callable[[Arena], None], int, int]] = {
    "none": (lambda arena: time.sleep(1.0), 2, 1),
    "SIGKILL of a worker": (kill_worker, 20, 3),
    "SIGSTOP of a worker for 9 s (session: 6 s)": (stop_worker, 4, 1),
    "one broker lost for 8 s": (lose_one_broker, 3, 1),
    "every broker killed and restarted": (restart_all_brokers, 3, 1),
    "network: connections reset and refused for 5 s": (weather(Weather.REFUSED, 5.0), 3, 1),
    "network: silent (half-open) for 12 s": (weather(Weather.SILENT, 12.0), 3, 1),
    "network: 200 ms late for 10 s": (weather(Weather.SLOW, 10.0), 2, 1),
}
"""What is done, how often, and how often in the short form."""


NEED_THREE = {"one broker lost for 8 s"}
"""The others are done to a single broker, which is the harder case."""


def suffer(arena: Arena, name: str, short: bool) -> Outcome:
    fault, often, seldom = FAULTS[name]
    times = seldom if short else often
    before = len(arena.publisher.sent)
    recoveries = []
    with arena.publisher.flowing():
        for _ in range(times):
            time.sleep(arena.dice.uniform(0.5, 2.0))
            fault(arena)
            recoveries.append(arena.recover())
    sent = arena.publisher.sent[before:]
    lost, doubled, out_of_order = arena.audit(sent)
    median, worst = statistics.median(recoveries), max(recoveries)
    return Outcome(name, times, len(sent), lost, doubled, out_of_order, median, worst)


def run(
    folder: Path, brokers: int, names: list[str], short: bool, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Does every fault of `names` to a circle of its own and returns what came of it."""
    with ExitStack() as stack:
        cluster = Cluster(folder, brokers)
        stack.callback(cluster.stop)
        cluster.start()
        with open_bus(cluster.uri) as bus:
            bus.apply_topics(load_topics())
        observer = stack.enter_context(open_bus(cluster.uri))
        publisher = Publisher(cluster.uri)
        stack.callback(publisher.close)
        workers = Workers(folder, cluster.uri)
        stack.callback(workers.stop)
        workers.start()
        arena = Arena(cluster, workers, publisher, observer)
        arena.recover()  # everyone is up
        outcomes = []
        for name in names:
            outcomes.append(suffer(arena, name, short))
            report(outcomes[-1])
        return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="The circle under fire.")
    parser.add_argument("--short", action="store_true", help="each fault once or a few times")
    parser.add_argument(
        "--brokers", type=int, choices=(1, 3), help="default: one, then three for what needs them"
    )
    parser.add_argument(
        "--fault", action="append", choices=sorted(FAULTS), help="only this one; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--keep", type=Path, help="keep logs and data in this folder")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that brokers and workers are ended too
    problem = missing_tools()
    if problem is not None:
        say(f"make chaos needs a Kafka broker, and {problem}")
        return 1
    names = options.fault or list(FAULTS)
    alone = [n for n in names if n not in NEED_THREE]
    together = [n for n in names if n in NEED_THREE]
    arenas = [(options.brokers, names)] if options.brokers else [(1, alone), (3, together)]
    heads = f"{'times':>5} {'prompts':>7} {'lost':>5} {'doubled':>7} {'disorder':>8}"
    say(f"{'fault':48} {heads} {'recover s':>10} {'worst':>6}")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            outcomes = []
            for brokers, chosen in arenas:
                folder = (options.keep or Path(temporary)) / f"brokers-{brokers}"
                folder.mkdir(parents=True, exist_ok=True)
                if chosen:
                    outcomes += run(folder, brokers, chosen, options.short, print_line)
        except CharterError as error:
            say(f"make chaos: {error}")
            return 1
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return 1 if any(o.lost or o.doubled or o.out_of_order for o in outcomes) else 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def print_line(o: Outcome) -> None:
    say(
        f"{o.fault:48} {o.times:5} {o.prompts:7} {o.lost:5} {o.doubled:7} {o.out_of_order:8}"
        f" {o.recover_median_s:10.1f} {o.recover_worst_s:6.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
