"""A process of its own that uses a log: the tests start, stop and kill it.

child.py URI work GROUP MEMBER SOURCE TARGET SESSION_S   a worker; says `ready`, ends on SIGTERM
child.py URI hold GROUP MEMBER SOURCE TARGET SESSION_S   takes a record, says `taken`; after a line of input
                                                         commits it and says `committed` or `fenced`
child.py URI publish TOPIC NAME COUNT                    publishes COUNT messages, one transaction each
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys

from charter.bus import ConsumerOptions, Outgoing, Record, open_bus
from charter.bus.worker import Backoff, Worker, WorkerOptions
from charter.errors import Fenced


def say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def work(uri: str, group: str, member: str, source: str, target: str, session_s: str) -> None:
    async def handle(record: Record) -> list[Outgoing]:
        await asyncio.sleep(random.uniform(0, 0.004))
        return [Outgoing(target, record.key, part + record.value) for part in (b"a", b"b")]

    async def main() -> None:
        with open_bus(uri) as bus:
            worker = Worker(
                bus,
                group,
                [source],
                handle,
                member=member,
                options=WorkerOptions(max_records=8, poll_timeout_s=0.2, backoff=Backoff(0.05, 1.0)),
                consumer_options=ConsumerOptions(session_timeout_s=float(session_s)),
            )
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
            say("ready")
            await worker.run()

    asyncio.run(main())


def hold(uri: str, group: str, member: str, source: str, target: str, session_s: str) -> None:
    options = ConsumerOptions(session_timeout_s=float(session_s))
    with open_bus(uri) as bus, bus.consumer(group, [source], member, options) as consumer:
        while not (records := consumer.poll(1, 1.0)):
            pass
        say("taken")
        sys.stdin.readline()
        try:
            consumer.commit(records, publish=[Outgoing(target, b"k", b"from the zombie")])
            say("committed")
        except Fenced:
            say("fenced")


def publish(uri: str, topic: str, name: str, count: str) -> None:
    with open_bus(uri) as bus:
        for number in range(int(count)):
            bus.publish([Outgoing(topic, name.encode(), f"{name} {number}".encode())])


if __name__ == "__main__":
    uri, command, *arguments = sys.argv[1:]
    {"work": work, "hold": hold, "publish": publish}[command](uri, *arguments)
