"""`charter train`: PPO by a configuration file, from the labels on the bus to checkpoints in the registry."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from charter.trainer.algorithm.metrics import UpdateMetrics

app = typer.Typer(help="Trains by a configuration file.", invoke_without_command=True)


@app.callback()
def train(
    config: Annotated[
        Path | None, typer.Option("--config", exists=True, dir_okay=False, help="YAML; see configs/.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One option, for example ppo.learning_rate=1e-4.")
    ] = None,
) -> None:
    """Teaches the policy from the labelled pairs on the bus; Ctrl-C or SIGTERM saves and stops.

    A run goes on where the newest checkpoint stopped. Several devices: `accelerate launch … -m charter.cli
    train --config FILE`.
    """
    from charter.config import assignments, load
    from charter.trainer.config import TrainerConfig

    loaded = load(TrainerConfig, file=config, environment=os.environ, flags=assignments(set_ or []))
    from charter.registry import Registry
    from charter.trainer.service import Trainer

    trainer = Trainer(loaded, Registry(loaded.registry))
    if trainer.is_first:
        asyncio.run(_first(trainer))
    else:
        trainer.follow()


async def _first(trainer: object) -> None:
    """Reads the log until it is told to stop."""
    from charter.bus import open_bus
    from charter.trainer.rewards import RewardClient
    from charter.trainer.service import Trainer
    from charter.trainer.worker import TrainerWorker

    assert isinstance(trainer, Trainer)
    rewards = RewardClient(trainer.config.reward)
    with open_bus(trainer.config.bus) as bus:
        worker = TrainerWorker(bus, trainer, rewards, report=_show)
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, worker.stop)
        typer.echo(f"training goes on at step {trainer.step}; waiting for labels on {trainer.config.bus}")
        try:
            await worker.run()
        finally:
            await rewards.close()
    typer.echo(f"stopped at step {trainer.step}; the newest checkpoint is {trainer.parent or 'none yet'}")


def _show(metrics: UpdateMetrics) -> None:
    parts = (
        f"step {metrics.step}: score {metrics.score_mean:+.2f}",
        f"KL {metrics.kl_per_answer:.2f} nats",
        f"entropy {metrics.entropy:.2f}",
        f"clipped {metrics.clip_fraction:.0%}",
        f"explained {metrics.explained_variance:.0%}",
        f"staleness {metrics.staleness_mean:.1f}",
        f"{sum(metrics.seconds.values()):.1f} s",
    )
    typer.echo(", ".join(parts))
