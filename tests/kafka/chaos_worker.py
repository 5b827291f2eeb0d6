"""One worker of the circle under fire, as a process of its own.

chaos_worker.py sampler|judge URI MEMBER         a bus worker
chaos_worker.py trainer URI MEMBER MANIFEST      counts labels; positions and counts live in one file

The work stands in for a language model (it waits, and makes up answers); everything around it is real.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from charter.bus import ConsumerOptions, Outgoing, Record, open_bus
from charter.bus.messages import decode, encode
from charter.bus.worker import Backoff, Handler, Worker, WorkerOptions
from charter.errors import BackendUnavailable
from charter.telemetry.logs import configure, get_logger
from charter.v1 import events_pb2

ANSWERS = 4
CONSUMER = ConsumerOptions(session_timeout_s=6.0, rebalance_timeout_s=15.0)


async def sample(record: Record) -> list[Outgoing]:
    prompt = decode(record, events_pb2.PromptEvent)
    await asyncio.sleep(random.uniform(0.005, 0.03))
    text = prompt.conversation[-1].content
    rollout = events_pb2.RolloutEvent(
        rollout_id=text, prompt_id=prompt.prompt_id, conversation=prompt.conversation
    )
    for number in range(ANSWERS):
        rollout.answers.add(text=f"answer {number}", token_ids=range(40), logprobs=[-1.0] * 40)
    return [encode("rollouts", prompt.prompt_id, rollout)]


async def judge(record: Record) -> list[Outgoing]:
    rollout = decode(record, events_pb2.RolloutEvent)
    await asyncio.sleep(random.uniform(0.005, 0.03))
    labels = []
    for a, b in itertools.combinations(range(len(rollout.answers)), 2):
        label = events_pb2.PreferenceEvent(
            preference_id=f"{rollout.rollout_id}/{a}-{b}",
            rollout_id=rollout.rollout_id,
            prompt_id=rollout.prompt_id,
            conversation=rollout.conversation,
            probability_a=0.7,
        )
        labels.append(encode("preferences", rollout.prompt_id, label))
    return labels


ROLES: dict[str, tuple[str, Handler]] = {"sampler": ("prompts", sample), "judge": ("rollouts", judge)}


async def work(role: str, uri: str, member: str) -> None:
    topic, handler = ROLES[role]
    options = WorkerOptions(poll_timeout_s=0.5, backoff=Backoff(0.1, 1.0), drain_s=5.0)
    with open_bus(uri) as bus:
        worker = Worker(
            bus, role, [topic], handler, member=member, options=options, consumer_options=CONSUMER
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()


def train(uri: str, manifest: Path) -> None:
    """Each label once: what was counted and up to where lies in one file, replaced whole."""
    state = json.loads(manifest.read_text()) if manifest.exists() else {"positions": {}, "counts": {}}
    counts = Counter(state["counts"])
    positions = {int(partition): offset for partition, offset in state["positions"].items()}
    with open_bus(uri) as bus:
        while True:
            try:
                found = 0
                for partition, bounds in bus.bounds("preferences").items():
                    records = bus.fetch("preferences", partition, positions.get(partition, bounds.first), 200)
                    counts.update(decode(r, events_pb2.PreferenceEvent).preference_id for r in records)
                    if records:
                        positions[partition] = records[-1].offset + 1
                    found += len(records)
            except BackendUnavailable as error:
                get_logger(__name__).warning("the log is unavailable", error=str(error))
                time.sleep(0.5)
                continue
            if found:
                draft = manifest.with_suffix(".draft")
                draft.write_text(json.dumps({"positions": positions, "counts": counts}))
                os.replace(draft, manifest)
            time.sleep(0.1)


if __name__ == "__main__":
    configure("WARNING")
    role, uri, member, *rest = sys.argv[1:]
    if role == "trainer":
        train(uri, Path(rest[0]))
    else:
        asyncio.run(work(role, uri, member))
