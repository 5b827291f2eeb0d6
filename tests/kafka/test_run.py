"""`charter run --bus kafka`: Charter starts its broker, finds its data again, and takes it down with it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from tests.kafka.support import require_tools
from tests.running import SHORT_CONSTITUTION, Run, status

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(os.environ.get("CHARTER_TEST_KAFKA") != "1", reason="make test-kafka runs this"),
]


def gateway_on_kafka(folder: Path) -> Run:
    (folder / "short.yaml").write_text(SHORT_CONSTITUTION)
    return Run(
        folder, "--bus", "kafka", "--target", "gateway", "--guard", "off", "--port", "0",
        "--state", str(folder / "state"), "--constitution", str(folder / "short.yaml"),
        "--model", "org/any", "--set", "gateway.critic=",
    )  # fmt: skip


def brokers_of(folder: Path) -> list[int]:
    """The processes that run on the configuration in a state folder."""
    found = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    ours = str(folder / "state/kafka/server.properties")
    return [int(line.split()[0]) for line in found if "kafka.Kafka" in line and ours in line]


def test_the_broker_lives_and_ends_with_charter(tmp_path: Path) -> None:
    require_tools()
    for _ in range(2):
        run = gateway_on_kafka(tmp_path)
        try:
            assert status(f"{run.url}/healthz") == 200
            assert run.interrupt() == 0
        finally:
            run.close()
    assert (tmp_path / "state/kafka/data").is_dir()
    assert brokers_of(tmp_path) == []


def test_the_broker_ends_with_a_charter_that_is_killed_and_starts_again(tmp_path: Path) -> None:
    require_tools()
    for _ in range(2):
        run = gateway_on_kafka(tmp_path)
        try:
            assert status(f"{run.url}/healthz") == 200
            assert len(brokers_of(tmp_path)) == 1
        finally:
            run.close()  # by SIGKILL
        deadline = time.monotonic() + 60
        while brokers_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert brokers_of(tmp_path) == []
