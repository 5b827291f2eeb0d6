"""`charter run --bus kafka`: Charter starts its broker, finds its data again, and takes it down with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kafka.support import require_tools
from tests.running import SHORT_CONSTITUTION, Run, status

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(os.environ.get("CHARTER_TEST_KAFKA") != "1", reason="make test-kafka runs this"),
]


def test_the_broker_lives_and_ends_with_charter(tmp_path: Path) -> None:
    require_tools()
    (tmp_path / "short.yaml").write_text(SHORT_CONSTITUTION)
    for _ in range(2):
        run = Run(
            tmp_path, "--bus", "kafka", "--target", "gateway", "--guard", "off", "--port", "0",
            "--state", str(tmp_path / "state"), "--constitution", str(tmp_path / "short.yaml"),
            "--model", "org/any", "--set", "gateway.critic=",
        )  # fmt: skip
        try:
            assert status(f"{run.url}/healthz") == 200
            assert run.interrupt() == 0
        finally:
            run.close()
    assert (tmp_path / "state/kafka/data").is_dir()
