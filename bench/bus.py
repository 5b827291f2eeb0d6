"""Both logs side by side: messages a second, and the time from publication to receipt.

    python -m bench.bus [--seconds 5] [--kafka kafka://host:port] [--json FILE]

For transactions of 1, 16 and 256 rollouts of realistic size (4 answers of 64 tokens: ids, log-probabilities
and text, about 4 KB each): one process publishes, then consumes and commits each batch together with as many
results, which is what a judge does. Then, at a quiet pace, one rollout at a time goes from publisher to
consumer, and the clock says how long it took. Without --kafka a local broker is started (Java, Maven).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from charter.bus import Bus, Outgoing, open_bus
from charter.bus.broker import fetch_kafka, local_broker, missing_tools
from charter.bus.messages import encode
from charter.bus.topics import load_topics
from charter.v1 import events_pb2

SIZES = (1, 16, 256)
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "kafka"
DICE = random.Random(7)
WORDS = [
    "the",
    "answer",
    "is",
    "to",
    "boil",
    "water",
    "and",
    "then",
    "pour",
    "it",
    "slowly",
    "over",
    "fresh",
    "leaves",
]


def rollout(number: int) -> Outgoing:
    """A rollout as the sampler makes it: 4 answers of 64 tokens."""
    event = events_pb2.RolloutEvent(rollout_id=f"r{number}", prompt_id=f"p{number}", temperature=1.0)
    event.prompt_token_ids.extend(DICE.randrange(2048) for _ in range(48))
    for _ in range(4):
        event.answers.add(
            text=" ".join(DICE.choices(WORDS, k=48)),
            token_ids=[DICE.randrange(2048) for _ in range(64)],
            logprobs=[-DICE.expovariate(1.0) for _ in range(64)],
            kept_log_mass=[-0.01] * 64,
        )
    return encode("rollouts", event.prompt_id, event)


def publish(bus: Bus, size: int, seconds: float) -> tuple[float, float]:
    """Rollouts a second, and milliseconds of a transaction at the median."""
    batches = [[rollout(i * size + j) for j in range(size)] for i in range(max(2, 256 // size))]
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        bus.publish(batches[len(times) % len(batches)])
        times.append(time.perf_counter() - before)
    return len(times) * size / (time.perf_counter() - started), statistics.median(times) * 1000


def consume(bus: Bus, group: str, size: int, seconds: float) -> tuple[float, float]:
    """Rollouts a second that are taken, answered by one message each, and committed; ms of a commit."""
    done, times = 0, []
    with bus.consumer(group, ["rollouts"]) as consumer:
        while not (records := consumer.poll(size, 1.0)):
            pass
        started = time.perf_counter()
        while records and time.perf_counter() - started < seconds:
            results = [Outgoing("preferences", r.key, (r.value or b"")[:2000]) for r in records]
            before = time.perf_counter()
            consumer.commit(records, publish=results)
            times.append(time.perf_counter() - before)
            done += len(records)
            records = consumer.poll(size, 1.0)
        took = time.perf_counter() - started
    return done / took, statistics.median(times) * 1000


@contextmanager
def echo_process(uri: str) -> Iterator[None]:
    """A process that receives what is published to `prompts` and says when on `conversations`."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--receiver", uri], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def receiver(uri: str) -> None:
    """Writes for each message the milliseconds since it was about to be published."""
    with open_bus(uri) as bus, bus.consumer("receiver", ["prompts"]) as consumer:
        while not consumer.assignment():
            consumer.poll(1, 0.2)
        print("ready", flush=True)
        while True:
            for record in consumer.poll(100, 1.0):
                sent = float(record.headers["sent"])
                took = f"{(time.time() - sent) * 1000:.3f}".encode()
                consumer.commit([record], publish=[Outgoing("conversations", record.key, took)])


def latency(uri: str, bus: Bus, count: int) -> tuple[float, float]:
    """Milliseconds from just before `publish` to receipt in another process: median and 99th percentile."""
    with echo_process(uri):
        for number in range(count):
            message = rollout(number)
            sent = repr(time.time()).encode()
            bus.publish([Outgoing("prompts", message.key, message.value, {"sent": sent})])
            time.sleep(0.03)
        deadline = time.time() + 30
        times: list[float] = []
        while len(times) < count and time.time() < deadline:
            time.sleep(0.5)
            parts = bus.bounds("conversations")
            times = [float(r.value or b"0") for p in parts for r in bus.fetch("conversations", p, 0, 10_000)]
    times.sort()
    return statistics.median(times), times[min(len(times) - 1, int(len(times) * 0.99))]


def measure(name: str, uri: str, seconds: float) -> dict[str, float]:
    """All figures of one log."""
    figures: dict[str, float] = {}
    with open_bus(uri) as bus:
        bus.apply_topics(load_topics())
        for size in SIZES:
            figures[f"publish/s x{size}"], figures[f"publish ms x{size}"] = publish(bus, size, seconds)
        for size in SIZES:
            rate, commit_ms = consume(bus, f"bench-{size}", size, seconds)
            figures[f"consume+commit/s x{size}"], figures[f"commit ms x{size}"] = rate, commit_ms
        figures["receipt ms median"], figures["receipt ms p99"] = latency(
            uri, bus, max(40, int(seconds * 40))
        )
    print(f"measured {name}", file=sys.stderr)
    return figures


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure")
    parser.add_argument("--kafka", help="a cluster that runs already")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--receiver", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receiver:
        receiver(options.receiver)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("full", "normal"):
            uri = f"sqlite:{folder}/{mode}.db?synchronous={mode}"
            results[f"sqlite {mode}"] = measure(f"sqlite {mode}", uri, options.seconds)
        if options.kafka:
            results["kafka"] = measure("kafka", options.kafka, options.seconds)
        elif missing_tools() is None:
            fetch_kafka(CACHE)
            with local_broker(Path(folder) / "broker", CACHE) as broker:
                results["kafka"] = measure("kafka", f"kafka://{broker.address}", options.seconds)
        else:
            print(f"kafka left out: {missing_tools()}")
    print(f"rollouts of {len(rollout(0).value or b'')} bytes")
    print(f"{'':24}" + "".join(f"{name:>16}" for name in results) + f"{'kafka/full':>12}")
    for figure in results["sqlite full"]:
        values = [figures[figure] for figures in results.values()]
        ratio = f"{values[-1] / values[0]:12.2f}" if "kafka" in results else ""
        print(f"{figure:24}" + "".join(f"{value:16.1f}" for value in values) + ratio)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
