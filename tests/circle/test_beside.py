"""Learning beside an endpoint, as processes: it goes on after a kill, and Ctrl-C ends all of it."""

import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest
from tests.running import Run

from charter.registry import Kind, Registry
from charter.trainer.service import newest_of_lineage

SMALL = {
    "revisions": 24, "first_pairs": 40, "labels_per_step": 4, "checkpoint_every": 1,
    "reward_schedule.min_heldout": 2, "reward_promotion.min_accuracy": 0.0, "gate.looks": "[10]",
    "gate.judged": 2, "gate.kl_samples": 2, "sft.tuning.epochs": 1, "reward_tuning.epochs": 1,
    "prompts.red_team": '["seed:60:harmful"]', "prompts.helpful": '["seed:60:plain"]',
}  # fmt: skip
PATIENCE_S = 400.0


def _start(folder: Path) -> Run:
    options = [f"--set=learning.{key}={value}" for key, value in SMALL.items()]
    run = Run(folder, "--port", "0", "--state", str(folder / "state"), "--learn", *options)
    run.ready()
    return run


def _until(run: Run, condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert run.process.poll() is None, run.output
        assert "learning has stopped" not in run.output, run.output
        assert time.monotonic() < deadline, f"no {what}:\n{run.output}"
        time.sleep(0.3)


def _descendants(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    children = [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]
    return [*children, *(c for child in children for c in _descendants(child))]


def _asks(url: str) -> str:
    body = {"model": "charter", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def _of_kind(registry: Registry, kind: Kind) -> list[str]:
    return [m.id for m in registry.list() if m.facts.kind is kind]


@pytest.mark.timeout(900)
def test_learning_goes_on_where_it_was_killed_beside_an_endpoint_that_answers(tmp_path):
    registry = Registry(tmp_path / "state" / "checkpoints")
    run = _start(tmp_path)
    try:
        _until(run, lambda: _of_kind(registry, Kind.SFT), "SL-CAI checkpoint")
        family = _descendants(run.process.pid)
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
        _until_gone(family)
        [tuned] = _of_kind(registry, Kind.SFT)

        run = _start(tmp_path)
        assert _asks(run.url) is not None
        _until(run, lambda: newest_of_lineage(registry) is not None, "checkpoint of PPO")
        assert _asks(run.url) is not None
        assert _of_kind(registry, Kind.SFT) == [tuned]
        first = newest_of_lineage(registry)
        assert registry.lineage(first.id)[-2].id == tuned
        family = _descendants(run.process.pid)
        assert run.interrupt() == 0, run.output
        _until_gone(family)

        step = newest_of_lineage(registry).facts.step
        run = _start(tmp_path)
        _until(run, lambda: newest_of_lineage(registry).facts.step > step, "further step")
        assert run.interrupt() == 0, run.output
    finally:
        run.close()


def _until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < deadline, f"processes {left} outlive their parent"
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
