"""`charter redteam` as a process against real servers: killed, interrupted, started too early."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.feedback_fixtures import write_constitution
from tests.tiny import make_tiny_model

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.redteam.prompts import collect
from charter.v1 import events_pb2

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
DATA = ROOT.parent / "shared" / "data"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Servers:
    """Policy and critic in a process of their own, always at the same two ports."""

    def __init__(self, folder: Path) -> None:
        self.policy, self.critic = free_port(), free_port()
        self._arguments = [str(make_tiny_model(folder / "tiny")), write_constitution(folder / "c.yaml")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        ports = [str(self.policy), str(self.critic)]
        command = [sys.executable, "-m", "tests.redteam.servers", *self._arguments, *ports]
        self._process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.kill()


class RedTeam:
    """The command, with a folder of its own."""

    def __init__(self, folder: Path, servers: Servers, *prompts: str) -> None:
        self.out, self.state = folder / "out", folder / "state"
        self.command = [
            sys.executable, "-m", "charter.cli", "redteam", "--prompts", *prompts, "--out", str(self.out),
            "--state", str(self.state), "--model", f"grpc://127.0.0.1:{servers.policy}",
            "--critic", f"grpc://127.0.0.1:{servers.critic}", "--rounds", "1", "--max-tokens", "8",
        ]  # fmt: skip

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(self.command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        with process:
            try:
                yield process
            finally:
                process.kill()

    def finish(self) -> str:
        with self.started() as process:
            _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        return said

    def published(self) -> list[str]:
        """Prompt ids in the log, by the log's own account."""
        if not (self.state / "bus.db").exists():
            return []
        with open_bus(f"sqlite:{self.state / 'bus.db'}") as bus:
            records = [r for p in bus.bounds("revisions") for r in bus.fetch("revisions", p, 0, 10_000)]
        return sorted(decode(r, events_pb2.RevisionEvent).prompt_id for r in records)

    def rendered(self) -> list[str]:
        parts = (self.out / "data").glob("*.parquet")
        return sorted(i for part in parts for i in pq.read_table(part)["prompt_id"].to_pylist())

    def until_published(self, count: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 100
        while len(self.published()) < count:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "nothing came"
            time.sleep(0.2)


@pytest.fixture
def prompts(tmp_path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"How do I open door {i}?"}) + "\n" for i in range(96)))
    return str(file)


def test_kill_9_of_command_and_servers_loses_and_doubles_nothing(servers, prompts, tmp_path) -> None:
    redteam = RedTeam(tmp_path, servers, prompts)
    with redteam.started() as process:  # before its servers
        servers.start()
        redteam.until_published(20, process)
        os.kill(process.pid, signal.SIGKILL)
    with redteam.started() as process:
        redteam.until_published(40, process)
        servers.kill()
        time.sleep(0.5)
        servers.start()
        redteam.until_published(55, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on where it was" in said
    assert redteam.rendered() == redteam.published()
    said = redteam.finish()
    assert "had their row before" in said
    wanted = sorted(p.prompt_id for p in collect([prompts]).prompts)
    assert redteam.published() == redteam.rendered() == wanted
    again = redteam.finish()
    assert "0 finished, 96 had their row before" in again


def test_seed_prompts_and_bad_lines_run_through(servers, tmp_path) -> None:
    file = tmp_path / "p.csv"
    file.write_text('id,prompts_final\n1,How?\n2\n3,"Why, then?"\n')
    servers.start()
    redteam = RedTeam(tmp_path, servers, str(file), "seed:6")
    said = redteam.finish()
    assert f"line could not be read: {file}:3: has 1 cells where the header has 2" in said
    assert "8 finished, 1 lines unreadable" in said
    assert len(redteam.rendered()) == 8
