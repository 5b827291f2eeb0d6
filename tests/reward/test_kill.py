"""kill -9 of the service in the middle of a round: it goes on, and the model is the undisturbed one's."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.reward.conftest import make_event, small_config

from charter import rpc
from charter.bus import open_bus
from charter.bus.messages import encode
from charter.errors import BackendUnavailable
from charter.finetune.checkpoints import Vocabulary
from charter.registry import Registry
from charter.registry.registry import REWARD
from charter.reward.rounds import Job, run
from charter.v1 import reward_pb2
from charter.v1.reward_pb2_grpc import RewardServiceStub

ROOT = Path(__file__).parents[2]


class Child:
    """A server in a process of its own."""

    def __init__(self, folder: Path, bus: str, vocabulary: Vocabulary) -> None:
        command = [sys.executable, "-m", "tests.reward.child", str(folder), bus, str(vocabulary.folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line, f"the server ended with code {self.process.wait()}"
        self.port = int(line)

    def learner(self) -> int:
        """Pid of the process that trains."""
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
        raise AssertionError("no learner is running")

    async def until(self, *states: str, step: int = 0) -> None:
        """Returns when the service is in one of these states, and the round has come so far."""
        async with rpc.channel(f"127.0.0.1:{self.port}") as channel:
            stub = RewardServiceStub(channel)
            while True:
                assert self.process.poll() is None, "the server ended by itself"
                with suppress(BackendUnavailable):
                    async for news in stub.Train(reward_pb2.TrainRequest(follow_only=True)):
                        assert news.state != "kept_old", news.message
                        if news.state in states and news.step >= step:
                            return
                await asyncio.sleep(0.02)

    def kill(self) -> None:
        """As `kill -9`; safe to repeat."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def _is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_service_ends_with_the_model_of_an_undisturbed_one(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    bus = f"sqlite:{tmp_path / 'bus.db'}"
    with open_bus(bus) as opened:
        events = [make_event(vocabulary, n) for n in range(160)]
        opened.publish([encode("preferences", e.prompt_id, e) for e in events])

    first = Child(tmp_path / "reward", bus, vocabulary)
    try:
        asyncio.run(first.until("training", step=5))
        learner = first.learner()
    finally:
        first.kill()
    deadline = time.monotonic() + 60
    while _is_alive(learner):
        assert time.monotonic() < deadline, "the learner outlived its service"
        time.sleep(0.02)
    assert (tmp_path / "reward/job.json").exists()

    second = Child(tmp_path / "reward", bus, vocabulary)
    try:
        asyncio.run(second.until("training", step=2))
        os.kill(second.learner(), signal.SIGKILL)
        asyncio.run(second.until("in_force"))
        second.process.terminate()
        assert second.process.wait(60) == 0
    finally:
        second.kill()

    registry = Registry(tmp_path / "reward/models")
    made = registry.resolve(registry.serving(REWARD).id) / "model.safetensors"
    config = small_config(tmp_path / "undisturbed", str(vocabulary.folder))
    config.folder.mkdir()
    _copy_in_order_of_arrival(tmp_path / "reward/labels.db", config.folder / "labels.db")
    run(Job(1, 160, str(vocabulary.folder), False), config, tmp_path / "round")
    assert made.read_bytes() == (tmp_path / "round/model/model.safetensors").read_bytes()


def _copy_in_order_of_arrival(source: Path, target: Path) -> None:
    import sqlite3

    with sqlite3.connect(source) as labels:
        labels.execute("VACUUM INTO ?", (str(target),))
    labels.close()
