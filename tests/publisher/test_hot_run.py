"""A real run that is too hot, from the seed model to the gate: word salad harms nobody and does not serve."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry
from tests.publisher.test_real_gate import decided
from tests.trainer.circle import WIDE_AWAKE, label, publishable, run

from charter.bus import open_bus
from charter.critic.config import CriticConfig
from charter.critic.server import serve as serve_critic
from charter.errors import TrainingStopped
from charter.judge.config import JudgeConfig
from charter.judge.server import serve as serve_judge
from charter.lm import open_model
from charter.lm.checkpoint import checkpoint_folder
from charter.publisher.config import GateConfig, PublisherConfig
from charter.publisher.metrics import PublisherMetrics
from charter.publisher.promotion import register_initial
from charter.publisher.worker import Publisher
from charter.registry import Registry, Status
from charter.trainer.config import PPOConfig, WatchConfig
from charter.trainer.service import newest_of_lineage

GATE = GateConfig(looks=(10,), judged=2, kl_samples=3, max_tokens=48)
HOT = PPOConfig(learning_rate=3e-2, beta=0.0, max_grad_norm=None, epochs=2, mini_batches=2)


def _begun(folder):
    registry = Registry(folder / "checkpoints")
    seed = register_initial(registry, "seed")
    with open_bus(f"sqlite:{folder}/bus.db") as bus:
        bus.publish([publishable(label(i, checkpoint_folder("seed"))) for i in range(60)])
    return registry, seed.id


def test_the_watch_stops_a_hot_run_of_the_seed_model_before_it_writes_a_checkpoint(tmp_path):
    registry, seed = _begun(tmp_path)
    with pytest.raises(TrainingStopped, match=r"nats per .*; lower the|noise; lower|raise beta"):
        run(tmp_path, steps=10, checkpoint_every=10, labels_per_step=4, ppo=HOT, watch=WatchConfig())
    assert newest_of_lineage(registry) is None
    assert registry.serving().id == seed


@pytest.mark.timeout(900)
async def test_what_a_hot_run_writes_while_nobody_watches_does_not_pass_the_gate(tmp_path):
    registry, seed = _begun(tmp_path)
    await asyncio.to_thread(run, tmp_path, steps=2, labels_per_step=4, ppo=HOT, watch=WIDE_AWAKE)
    hot, feedback = newest_of_lineage(registry).id, open_model("local:seed")
    opener = lambda uri: feedback  # noqa: E731
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:
        async with (
            await serve_critic(
                CriticConfig(constitution="seed"), CollectorRegistry(), open_model=opener
            ) as critic,
            await serve_judge(
                JudgeConfig(constitution="seed"), CollectorRegistry(), open_model=opener
            ) as judge,
        ):
            config = PublisherConfig(
                registry=registry.root, gate=GATE, critic=critic.target, judge=judge.target
            )
            publisher = Publisher.open(config, bus, PublisherMetrics.of(CollectorRegistry()), open_model)
            running = asyncio.create_task(publisher.run())
            change = await decided(registry, hot)
            publisher.stop()
            await running
            await publisher.close()
    assert change.status is Status.REJECTED
    assert "malformed" in change.reason
    harm = change.measurements["harm"]
    assert harm["candidate"] < harm["serving"] / 2, "by its rate of harm alone it would pass"
    assert registry.serving().id == seed
