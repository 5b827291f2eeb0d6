"""The faults of chaos: each is done once and undone before it returns."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable

from tests.kafka.arena import Arena, Outcome
from tests.kafka.proxy import Weather

Fault = Callable[[Arena], None]


def kill(kind: str = "") -> Fault:
    def fault(arena: Arena) -> None:
        arena.workers.one(arena.dice, kind).kill()

    return fault


def kill_one_of_each(arena: Arena) -> None:
    for kind in ("sampler", "judge", "trainer"):
        arena.workers.one(arena.dice, kind).kill()


def stop(kind: str = "") -> Fault:
    def fault(arena: Arena) -> None:
        process = arena.workers.one(arena.dice, kind)
        process.send_signal(signal.SIGSTOP)
        time.sleep(arena.cast.stop_s)
        process.send_signal(signal.SIGCONT)

    return fault


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


def weather(kind: Weather, seconds: float) -> Fault:
    def change(arena: Arena) -> None:
        for proxy in arena.cluster.proxies:
            proxy.change(kind)
        time.sleep(seconds)
        for proxy in arena.cluster.proxies:
            proxy.change(Weather.FINE)

    return change


FAULTS: dict[str, Fault] = {
    "none": lambda arena: time.sleep(1.0),
    "SIGKILL of a worker": kill(),
    "SIGKILL of sampler, judge worker and trainer": kill_one_of_each,
    "SIGKILL of a sampler": kill("sampler"),
    "SIGKILL of a judge worker": kill("judge"),
    "SIGKILL of the trainer": kill("trainer"),
    "SIGKILL of the model servers": kill("models"),
    "SIGSTOP of a worker, past its session": stop(),
    "SIGSTOP of a sampler, past its session": stop("sampler"),
    "SIGSTOP of a judge worker, past its session": stop("judge"),
    "SIGSTOP of the trainer, past its session": stop("trainer"),
    "one broker lost for 8 s": lose_one_broker,
    "every broker killed and restarted": restart_all_brokers,
    "network: connections reset and refused for 5 s": weather(Weather.REFUSED, 5.0),
    "network: silent (half-open) for 12 s": weather(Weather.SILENT, 12.0),
    "network: requests arrive, answers lost for 8 s": weather(Weather.DEAF, 8.0),
    "network: drops in mid-message for 10 s": weather(Weather.LOSSY, 10.0),
    "network: 200 ms late for 10 s": weather(Weather.SLOW, 10.0),
}


def suffer(arena: Arena, name: str, times: int) -> Outcome:
    """Does a fault so often, and counts."""
    before = len(arena.publisher.sent)
    recoveries = []
    with arena.publisher.flowing():
        for _ in range(times):
            time.sleep(arena.dice.uniform(0.5, 2.0))
            FAULTS[name](arena)
            recoveries.append(arena.recover())
    sent = arena.publisher.sent[before:]
    return _outcome(arena, name, times, sent, recoveries)


def all_of_it(arena: Arena) -> Outcome:
    """Everything that was published so far, counted once more: what a later fault did to it, too."""
    return _outcome(arena, "everything, at the end", 1, list(arena.publisher.sent), [0.0])


def _outcome(arena: Arena, name: str, times: int, sent: list[str], recoveries: list[float]) -> Outcome:
    lost, doubled, out_of_order = arena.audit(sent)
    median, worst = statistics.median(recoveries), max(recoveries)
    return Outcome(name, times, len(sent), lost, doubled, out_of_order, median, worst)
