"""A process whose children work and are killed: `python -m tests.circle.lives ROLE FOLDER`.

All is imported once, and each life is forked from that, so that it begins at once. It obeys lines of input:
`kill` has a life and kills it at a random instant after it has begun to work; `last` begins one that goes on;
`end` stops that in good order. Each is answered by a line.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.reward.conftest import small_config
from tests.scripted import Scripted

from charter.bus import open_bus
from charter.bus.worker import WorkerOptions
from charter.feedback.records import Compared, Opinion, Source
from charter.finetune.checkpoints import load_vocabulary
from charter.judge import worker as judging
from charter.lm.base import ModelVersion
from charter.reward import server
from charter.reward.config import ScheduleConfig
from charter.sampler import worker as sampling
from charter.sampler.config import SamplerConfig

OPTIONS = WorkerOptions(max_records=4, poll_timeout_s=0.05, drain_s=5.0, room_interval_s=0.02)
ANSWERS = 4
LONGEST_S = 0.25

Begun = Callable[[], None]


def log_of(folder: Path) -> str:
    """URI of the log that all of them share."""
    return f"sqlite:{folder / 'bus.db'}?synchronous=normal"


async def _pause() -> None:
    await asyncio.sleep(random.uniform(0, 0.02))  # so that a kill finds work in hand


class SlowPolicy(Scripted):
    """Takes its time, and has a tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        super().__init__(lambda prompt, sampling: f"the answer {sampling.seed}")
        self.version = replace(self.version, tokenizer_digest=tokenizer)

    async def generate(self, prompt, sampling, n=1):
        await _pause()
        return await super().generate(prompt, sampling, n)


class SlowJudge:
    """Says the same of all, after a moment."""

    async def compare(self, conversation, answer_a, answer_b, *, seed):
        await _pause()
        opinion = Opinion("helpful", 1.0, 0.7, 0.8)
        return Compared(0.75, (opinion,), Source("c0ffee", ModelVersion("judge", "judge")))


async def sampler(folder: Path, begun: Begun, ended: asyncio.Event) -> None:
    with open_bus(log_of(folder)) as bus:
        config = SamplerConfig(answers=ANSWERS, batch_size=100_000)
        policy = SlowPolicy((folder / "tokenizer").read_text())
        worker = sampling.worker(bus, policy, config, member="sampler-0", options=OPTIONS)
        await _until(ended, worker, begun)


async def judge(folder: Path, begun: Begun, ended: asyncio.Event) -> None:
    with open_bus(log_of(folder)) as bus:
        worker = judging.worker(bus, SlowJudge(), member="judge-0", options=OPTIONS)
        await _until(ended, worker, begun)


async def _until(ended, worker, begun) -> None:
    begun()
    running = asyncio.create_task(worker.run())
    await ended.wait()
    worker.stop()
    await running


async def reward(folder: Path, begun: Begun, ended: asyncio.Event) -> None:
    config = small_config(folder / "reward", str(folder / "tiny"))
    never = ScheduleConfig(first=1_000_000, every=1_000_000)
    running = await server.serve(replace(config, bus=log_of(folder), schedule=never), CollectorRegistry())
    begun()
    await ended.wait()
    await running.drain()


ROLES = {"sampler": sampler, "judge": judge, "reward": reward}


def _born(role: str, folder: Path) -> int:
    """Pid of a life that has begun to work."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        asyncio.run(_life(role, folder, lambda: os.write(writes, b"!")))
        os._exit(0)
    os.close(writes)
    assert os.read(reads, 1) == b"!", "a life ended before it began"
    os.close(reads)
    return pid


async def _life(role: str, folder: Path, begun: Begun) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ROLES[role](folder, begun, ended)


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(role: str, folder: Path) -> None:
    dice, last = random.Random(role), 0
    if role == "reward":
        load_vocabulary(folder / "tiny")  # imports what a life would otherwise import, which takes seconds
    for line in sys.stdin:
        match line.strip():
            case "kill":
                pid = _born(role, folder)
                time.sleep(dice.uniform(0, LONGEST_S))
                os.kill(pid, signal.SIGKILL)
                answer = _exit_code(pid)
            case "last":
                answer = last = _born(role, folder)
            case "end":
                os.kill(last, signal.SIGTERM)
                answer, last = _exit_code(last), 0
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    if last:
        os.kill(last, signal.SIGKILL)  # whoever gave the orders is gone


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
