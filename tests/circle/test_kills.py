"""kill -9 of sampler, judge and reward service at work on one log: nothing is lost, nothing doubled."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from tests.circle.lives import ANSWERS, log_of
from tests.tiny import make_tiny_model

from charter.bus import open_bus
from charter.bus.messages import decode, encode
from charter.lm.checkpoint import tokenizer_digest
from charter.v1 import events_pb2, types_pb2

ROOT = Path(__file__).parents[2]
ROLES = ("sampler", "judge", "reward")
KILLS, PROMPTS = 20, 24
PATIENCE_S = 120.0


class Lives:
    """`tests.circle.lives` in one role."""

    def __init__(self, role: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.circle.lives", role, str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def tell(self, word: str) -> None:
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def answer(self) -> int:
        return int(self.process.stdout.readline())

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def _ask(bus, start):
    message = [types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content="What is it?")]
    bus.publish(
        [
            encode("prompts", f"p{i}", events_pb2.PromptEvent(prompt_id=f"p{i}", conversation=message))
            for i in range(start, start + PROMPTS)
        ]
    )


def _all(bus, topic, kind):
    return [decode(r, kind) for p in bus.bounds(topic) for r in bus.fetch(topic, p, 0, 100_000)]


def _stored(folder):
    with closing(sqlite3.connect(folder / "reward" / "labels.db")) as labels:
        return Counter(name for (name,) in labels.execute("SELECT preference_id FROM labels"))


@pytest.mark.timeout(300)
def test_twenty_kills_of_each_lose_and_double_no_rollout_and_no_label(tmp_path):
    tiny = make_tiny_model(tmp_path / "tiny")
    (tmp_path / "tokenizer").write_text(tokenizer_digest(tiny))
    lives = [Lives(role, tmp_path) for role in ROLES]
    try:
        with open_bus(log_of(tmp_path)) as bus:
            for number in range(KILLS):
                _ask(bus, number * PROMPTS)
                for life in lives:
                    life.tell("kill")
                assert [life.answer() for life in lives] == [-signal.SIGKILL] * len(lives)
            assert _stored(tmp_path), "what was killed had done some of the work"
            for life in lives:
                life.tell("last")
                assert life.answer() > 0
            asked = KILLS * PROMPTS
            groups = {"sampler": "prompts", "judge": "rollouts", "reward": "preferences"}
            deadline = time.monotonic() + PATIENCE_S
            while any(
                bus.bounds(topic) and sum(lag.records for lag in bus.lag(group, [topic]))
                for group, topic in groups.items()
            ):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            for life in lives:
                life.tell("end")
                assert life.answer() == 0
            rollouts = _all(bus, "rollouts", events_pb2.RolloutEvent)
            assert Counter(r.prompt_id for r in rollouts) == {f"p{i}": 1 for i in range(asked)}
            assert all(len(r.answers) == ANSWERS for r in rollouts)
            wanted = {f"{r.rollout_id}/{pair}": 1 for r in rollouts for pair in ("0-1", "2-3")}
            labels = _all(bus, "preferences", events_pb2.PreferenceEvent)
            assert Counter(label.preference_id for label in labels) == wanted
            assert _stored(tmp_path) == wanted
            assert _all(bus, "dead-letters", events_pb2.DeadLetterEvent) == []
    finally:
        for life in lives:
            life.close()
