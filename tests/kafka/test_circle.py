"""The circle's real samplers, judge workers and trainer on a real broker, killed together with it.

`make chaos` does more kinds of faults, more often.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kafka.casts import RealWorkers
from tests.kafka.chaos import run
from tests.kafka.support import require_tools

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("CHARTER_TEST_KAFKA") != "1", reason="make test-kafka runs this"),
]

FAULTS = {
    "SIGKILL of sampler, judge worker and trainer": 1,
    "SIGSTOP of a judge worker, past its session": 1,
    "every broker killed and restarted": 1,
}


def test_real_workers_under_fire_lose_and_double_nothing_and_keep_the_order(tmp_path: Path) -> None:
    require_tools()
    complaints: list[str] = []
    outcomes = run(tmp_path, RealWorkers(), 1, FAULTS, complaints)
    assert [outcome.fault for outcome in outcomes if not outcome.clean] == []
    assert complaints == []
    *_, everything = outcomes
    assert everything.prompts >= len(FAULTS) * 8  # a fresh one for each partition after each fault
