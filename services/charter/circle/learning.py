"""What the partner process does: SL-CAI, and later the reward model and PPO side by side.

Functions of this module run in `charter.circle.partner`; torch and TRL are imported there alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from charter.circle.config import CircleConfig, Places
from charter.errors import BackendUnavailable
from charter.lm.base import Conversation

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Supervised:
    """What SL-CAI came to."""

    checkpoint: str
    revisions: int
    changed: int
    own: int
    loss: float
    steps: int


def sl_cai(
    config: CircleConfig,
    places: Places,
    parent: str,
    revisions: Path,
    helpful: Sequence[Conversation],
    answerer: str,
    tell: Tell,
    stopped: threading.Event,
) -> Supervised:
    """Trains on the revisions and own answers, registers the checkpoint as a candidate. Returns its id."""
    from charter.bus import open_bus
    from charter.registry import Facts, Kind, Registry, Status
    from charter.registry.events import announcement
    from charter.sft.pipeline import Sources, run

    target = places.state / "sl-cai"
    if target.exists():  # a kill came between training and registering; its content gives the same id
        shutil.rmtree(target)
    outcome = run(
        Sources(places.model, (revisions,), "", tuple(helpful), answerer),
        replace(config.sft, tuning=replace(config.sft.tuning, seed=config.seed)),
        target,
        note=lambda what, done, total, remark: tell(
            {"what": what, "done": done, "total": total, "remark": remark}
        ),
        logs=places.state / "logs" / "sl-cai",
        stop=stopped.is_set,
    )
    registry = Registry(places.registry)
    facts = Facts(
        Kind.SFT,
        parent=parent,
        constitution_digest=outcome.constitution_digests[0] if outcome.constitution_digests else "",
        note=f"SL-CAI on {outcome.mixture.revisions} revisions and {outcome.mixture.own} own answers",
    )
    manifest = registry.write(facts, functools.partial(_copied, target))
    change = registry.status(manifest.id) or registry.set_status(
        manifest.id, Status.CANDIDATE, "written by SL-CAI"
    )
    with open_bus(places.bus) as bus:
        bus.publish([announcement(manifest, registry.root, change)])
    shutil.rmtree(target)
    mixture = outcome.mixture
    return Supervised(
        manifest.id,
        mixture.revisions,
        outcome.changed,
        mixture.own,
        outcome.trained.loss,
        outcome.trained.steps,
    )


def _copied(source: Path, into: Path) -> None:
    shutil.copytree(source, into, dirs_exist_ok=True)


def reinforce(config: CircleConfig, places: Places, policy: str, tell: Tell, stopped: threading.Event) -> int:
    """The reward service and the trainer, until the steps are done or it is told to stop; returns the step.

    `policy` is the checkpoint that a new lineage starts from. Raises `TrainingStopped` when the run drifts.
    """
    return asyncio.run(_reinforce(config, places, policy, tell, stopped))


async def _reinforce(
    config: CircleConfig, places: Places, policy: str, tell: Tell, stopped: threading.Event
) -> int:
    from prometheus_client import CollectorRegistry

    from charter.registry import Registry
    from charter.reward import server

    init = str(Registry(places.registry).resolve(policy))
    if config.reward_from_feedback and places.feedback_model.startswith("local:"):
        init = places.feedback_model
    running = await server.serve(_reward_config(config, places, init), CollectorRegistry())
    watching = asyncio.create_task(_tell_reward(running.target, tell))
    try:
        if not await _reward_in_force(running.target, stopped):
            return 0
        return await _train(config, places, policy, running.target, tell, stopped)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await running.drain()


def _reward_config(config: CircleConfig, places: Places, init: str) -> Any:
    from charter.reward.config import RewardConfig
    from charter.rpc import ServerConfig

    return RewardConfig(
        init=init,
        folder=places.state / "reward",
        registry=str(places.registry),
        bus=places.bus,
        schedule=replace(config.reward_schedule, first=config.first_pairs),
        window=config.reward_window,
        tuning=replace(config.reward_tuning, seed=config.seed),
        promotion=config.reward_promotion,
        learner=config.reward_learner,
        server=ServerConfig(drain_grace_s=2.0),
    )


async def _reward_in_force(target: str, stopped: threading.Event) -> bool:
    """Waits for the first reward model; False when stopped meanwhile."""
    from charter.rpc import channel
    from charter.v1 import reward_pb2
    from charter.v1.reward_pb2_grpc import RewardServiceStub

    connection = channel(target)
    try:
        stub = RewardServiceStub(connection)
        while not stopped.is_set():
            status = await stub.Status(reward_pb2.RewardServiceStatusRequest())
            if status.HasField("model"):
                return True
            await asyncio.sleep(0.3)
        return False
    finally:
        await connection.close()


async def _tell_reward(target: str, tell: Tell) -> None:
    """Tells what the reward service says of itself, whenever that changes."""
    from charter.rpc import channel
    from charter.v1 import reward_pb2
    from charter.v1.reward_pb2_grpc import RewardServiceStub

    connection = channel(target)
    stub, before = RewardServiceStub(connection), None
    try:
        while True:
            with contextlib.suppress(BackendUnavailable):
                status = await stub.Status(reward_pb2.RewardServiceStatusRequest())
                now = {
                    "reward": status.state,
                    "model": status.model.version,
                    "accuracy": status.heldout_accuracy,
                    "calibration": status.calibration_error,
                    "drift": status.drift,
                    "labels": status.labels_seen,
                }
                if now != before:
                    tell(now)
                    before = now
            await asyncio.sleep(1.0)
    finally:
        await connection.close()


async def _train(
    config: CircleConfig, places: Places, policy: str, reward: str, tell: Tell, stopped: threading.Event
) -> int:
    from charter.bus import open_bus
    from charter.registry import Registry
    from charter.trainer.config import TrainerConfig
    from charter.trainer.rewards import RewardClient
    from charter.trainer.service import Trainer
    from charter.trainer.worker import TrainerWorker

    settings = TrainerConfig(
        policy=policy,
        registry=str(places.registry),
        bus=places.bus,
        reward=reward,
        work=places.state / "trainer",
        log=places.state / "logs" / "ppo",
        labels_per_step=config.labels_per_step,
        checkpoint_every=config.checkpoint_every,
        steps=config.steps,
        constitution=places.constitution,
        ppo=replace(config.ppo, seed=config.seed),
        watch=config.watch,
    )
    trainer = await asyncio.to_thread(Trainer, settings, Registry(places.registry))
    tell({"training": trainer.step})
    rewards = RewardClient(reward)
    with open_bus(places.bus) as bus:
        worker = TrainerWorker(
            bus, trainer, rewards, report=lambda m: tell({"metrics": m.as_dict(), "at": time.time()})
        )
        stopping = asyncio.create_task(_stop_when(stopped, worker))
        try:
            await worker.run()
        finally:
            stopping.cancel()
            await rewards.close()
    return trainer.step


async def _stop_when(stopped: threading.Event, worker: Any) -> None:
    while not await asyncio.to_thread(stopped.wait, 0.5):
        pass
    worker.stop()
