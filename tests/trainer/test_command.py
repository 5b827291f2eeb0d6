"""`charter train`: the example configurations, and a whole run against a reward service over gRPC."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from tests.tiny import make_tiny_model
from tests.trainer.circle import settings, world
from typer.testing import CliRunner

from charter.config import load
from charter.errors import ConfigError
from charter.registry import Registry
from charter.trainer.cli import app
from charter.trainer.config import TrainerConfig
from charter.trainer.service import newest_of_lineage
from charter.v1 import reward_pb2, reward_pb2_grpc, types_pb2

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["7b-1gpu.yaml", "7b-8gpu.yaml"])
def test_the_example_configurations_are_valid(name):
    config = load(TrainerConfig, file=ROOT / "configs" / name)
    assert config.precision == "bfloat16"
    assert config.ppo.gradient_checkpointing
    assert (config.lora.rank > 0) is (name == "7b-1gpu.yaml")


def test_a_mistyped_option_is_refused_with_the_right_one(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("ppo:\n  learning_rat: 1e-5\n")
    with pytest.raises(ConfigError, match=r"train\.yaml:2.*ppo\.learning_rate"):
        load(TrainerConfig, file=file)


class _Reward(reward_pb2_grpc.RewardServiceServicer):
    """Scores by the answer's ids; checks what it is told about the tokenizer."""

    def __init__(self):
        self.tokenizers = set()
        self.scored = threading.Event()

    def Score(self, request, context):
        self.tokenizers.add(request.tokenizer_digest)
        self.scored.set()
        scores = [random.Random(str(list(a.answer_token_ids))).gauss(0, 1) for a in request.answers]
        return reward_pb2.RewardServiceScoreResponse(
            scores=scores, model=types_pb2.ModelVersion(version="r", digest="reward-1")
        )


@pytest.fixture
def reward():
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = _Reward()
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None).wait()


def _options(folder, reward):
    config = settings(folder)
    return [
        f"registry={config.registry}", f"bus={config.bus}", f"work={config.work}", f"reward={reward.target}",
        f"log={folder / 'log'}", "labels_per_step=6", "checkpoint_every=2", "ppo.learning_rate=1e-3",
    ]  # fmt: skip


def _arguments(options):
    return [part for option in options for part in ("--set", option)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_a_run_writes_checkpoints_and_metrics_that_tools_read(tmp_path, reward):
    world(tmp_path, make_tiny_model(tmp_path / "tiny", spread=0.1), labels=30)
    done = CliRunner().invoke(app, _arguments([*_options(tmp_path, reward), "steps=3"]))
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "step 2: score" in done.output
    newest = newest_of_lineage(Registry(tmp_path / "checkpoints"))
    assert newest.facts.step == 3
    assert newest.facts.reward_model_digest == "reward-1"
    assert newest.id in done.output
    lines = [json.loads(x) for x in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [0, 1, 2]
    assert {"kl_k1", "kl_k3", "staleness_histogram", "effective_sample_size"} <= lines[0].keys()
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))
    assert len(reward.tokenizers) == 1


def test_sigterm_saves_what_was_learned_and_stops(tmp_path, reward):
    world(tmp_path, make_tiny_model(tmp_path / "tiny", spread=0.1), labels=18)
    arguments = _arguments([*_options(tmp_path, reward), "checkpoint_every=1000"])
    process = subprocess.Popen(
        [sys.executable, "-m", "charter.cli", "train", *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert reward.scored.wait(200)
    metrics, deadline = tmp_path / "log" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    newest = newest_of_lineage(Registry(tmp_path / "checkpoints"))
    assert newest is not None
    assert 1 <= newest.facts.step <= 3
    assert f"stopped at step {newest.facts.step}" in output
