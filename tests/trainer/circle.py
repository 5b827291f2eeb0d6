"""A log of labels, a registry with a tiny model, and a reward that is a function of the answer's ids."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import torch

from charter.bus import open_bus
from charter.bus.messages import encode
from charter.bus.worker import Backoff
from charter.lm.base import ChatMessage, ModelVersion, Role
from charter.lm.checkpoint import tokenizer_digest
from charter.registry import Facts, Kind, Registry, Status
from charter.rpc import convert
from charter.trainer.config import PPOConfig, TrainerConfig, WatchConfig
from charter.trainer.service import Trainer
from charter.trainer.worker import TrainerWorker
from charter.v1 import events_pb2, types_pb2

WIDE_AWAKE = WatchConfig(kl_budget=1e3, step_kl_budget=1e3, patience=100)


class Scorer:
    """The same answer always gets the same score."""

    def __init__(self, failures=0):
        self.failures = failures
        self.asked = 0

    async def score(self, answers, tokenizer_digest):
        from charter.errors import BackendUnavailable

        self.asked += 1
        if self.asked <= self.failures:
            raise BackendUnavailable("the reward service went away")
        return [random.Random(str((p, a))).gauss(0.0, 1.0) for p, a in answers], "reward-digest"


def world(folder: Path, tiny: Path, labels: int = 64) -> None:
    """Registry, log and labels in a folder."""
    registry = Registry(folder / "checkpoints")

    def copy(into: Path) -> None:
        for file in tiny.iterdir():
            (into / file.name).write_bytes(file.read_bytes())

    manifest = registry.write(Facts(Kind.SEED), copy)
    registry.set_status(manifest.id, Status.SERVING)
    with open_bus(f"sqlite:{folder}/bus.db") as bus:
        bus.publish([publishable(label(i, tiny)) for i in range(labels)])


def publishable(event):
    return encode("preferences", event.prompt_id, event)


def label(number: int, tiny: Path, **fields) -> events_pb2.PreferenceEvent:
    rng = random.Random(number)
    prompt = [rng.randrange(5, 200) for _ in range(rng.randint(3, 8))]
    conversation = convert.messages_to_proto((ChatMessage(Role.USER, f"What about the door {number}?"),))
    event = events_pb2.PreferenceEvent(
        preference_id=f"label-{number}",
        rollout_id=f"rollout-{number}",
        prompt_id=f"prompt-{number}",
        conversation=conversation,
        prompt_token_ids=prompt,
        answer_a=_answer(rng, f"First find the key {number}."),
        answer_b=_answer(rng, f"I will not help {number}."),
        probability_a=0.7,
        opinions=[events_pb2.PreferenceOpinion(principle_id="helpful", weight=1.0)],
        constitution_digest="c-1",
        judge=convert.version_to_proto(ModelVersion("judge", "judge-digest")),
        policy=convert.version_to_proto(ModelVersion("policy", "d", tokenizer_digest(tiny))),
        temperature=1.0,
    )
    event.MergeFrom(events_pb2.PreferenceEvent(**fields))
    return event


def _answer(rng, text):
    ids = [rng.randrange(5, 200) for _ in range(rng.randint(2, 10))]
    return types_pb2.Completion(
        text=text,
        token_ids=ids,
        logprobs=[-5.5 + rng.gauss(0, 0.2) for _ in ids],
        finish_reason=types_pb2.FINISH_REASON_STOP,
    )


def settings(folder: Path, **options) -> TrainerConfig:
    ppo = PPOConfig(learning_rate=1e-3, epochs=2, mini_batches=2, micro_batch_tokens=128)
    defaults = {"labels_per_step": 6, "checkpoint_every": 2, "steps": 6, "watch": WIDE_AWAKE, "ppo": ppo}
    return TrainerConfig(
        registry=str(folder / "checkpoints"),
        bus=f"sqlite:{folder}/bus.db",
        work=folder / "work",
        **{**defaults, **options},
    )


def run(folder: Path, rewards=None, report=None, prepared=None, until=None, **options) -> Trainer:
    """One trainer process's life, in this process; it is told to stop when the event `until` is set."""
    torch.set_num_threads(1)
    config = settings(folder, **options)
    trainer = Trainer(config, Registry(config.registry))
    if prepared:
        prepared(trainer)
    with open_bus(config.bus) as bus:
        worker = TrainerWorker(bus, trainer, rewards or Scorer(), report=report, backoff=Backoff(0.05, 0.2))
        asyncio.run(_lives(worker, until))
    return trainer


async def _lives(worker: TrainerWorker, until) -> None:
    running = asyncio.create_task(worker.run())
    while until is not None and not running.done():
        if await asyncio.to_thread(until.wait, 0.05):
            worker.stop()
            break
    await running


def run_in_process(folder: str, options: dict[str, object]) -> None:
    """What a process that is killed runs."""
    run(Path(folder), **options)
