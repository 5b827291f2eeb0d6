"""Old weights go while the circle learns; what serves, what may be served again, and all manifests stay."""

import asyncio
import contextlib
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.tiny import make_tiny_model
from tests.trainer.circle import label, publishable, run
from typer.testing import CliRunner

from charter.bus import open_bus
from charter.circle.config import CircleConfig, Places
from charter.circle.servers import Servers
from charter.circle.serving import Publishing, register_seed
from charter.cli import app
from charter.lm.policy_client import PolicyModel
from charter.policy.config import PolicyConfig
from charter.policy.server import serve
from charter.registry import Kind, Registry, Status
from charter.trainer.service import newest_of_lineage

KEEP, LABELS = 2, 6
AWAY = "127.0.0.1:1"
"""Critic and judge: the gate waits for them, so that only a person promotes here."""


def _places(folder: Path, tiny: Path) -> Places:
    return Places(
        state=folder,
        bus=f"sqlite:{folder}/bus.db",
        model=str(tiny),
        feedback_model=f"local:{tiny}",
        constitution="seed",
    )


def _begun(folder: Path, tiny: Path) -> Registry:
    folder.mkdir()
    registry = Registry(folder / "checkpoints")
    register_seed(registry, _places(folder, tiny))
    with open_bus(f"sqlite:{folder}/bus.db") as bus:
        bus.publish([publishable(label(i, tiny)) for i in range(8 * LABELS)])
    return registry


async def _learns(folder: Path, steps: int) -> None:
    await asyncio.to_thread(run, folder, steps=steps, checkpoint_every=1, labels_per_step=LABELS)


def _steps(registry: Registry) -> dict[int, str]:
    """Ids of PPO's checkpoints that have their weights."""
    return {m.facts.step: m.id for m in registry.list() if m.facts.kind is Kind.RL}


async def _until(condition):
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


async def _charter(*arguments):
    done = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    assert done.exit_code == 0, done.output + repr(done.exception)


async def test_pruning_leaves_what_serves_what_may_serve_again_all_manifests_and_the_learning(tmp_path):
    tiny = make_tiny_model(tmp_path / "tiny", spread=0.1)
    calm = _begun(tmp_path / "calm", tiny)
    registry, root = _begun(tmp_path / "run", tiny), str(tmp_path / "run" / "checkpoints")
    config = PolicyConfig(model=f"local:{tiny}", registry=root)
    async with contextlib.AsyncExitStack() as stack:
        targets = []
        for _ in range(2):
            server = await stack.enter_async_context(await serve(config, CollectorRegistry()))
            targets.append(server.target)
        users = PolicyModel(targets[1])
        stack.push_async_callback(users.close)
        places = _places(tmp_path / "run", tiny)
        bus = stack.enter_context(open_bus(places.bus))
        where = Servers(targets[0], (targets[1],), AWAY, AWAY, {})
        await stack.enter_async_context(
            Publishing(CircleConfig(keep=KEEP), places, where, bus, registry, lambda news: None)
        )
        await _learns(tmp_path / "run", 3)
        first, second = (_steps(registry)[step] for step in (1, 2))
        for name in (first, second):
            await _charter("promote", name, "--registry", root)
        await _learns(tmp_path / "run", 6)
        await _until(lambda: set(_steps(registry)) == {1, 2, 5, 6})
        newest = newest_of_lineage(registry)
        lineage = Registry(root).lineage(newest.id)
        assert [m.facts.step for m in lineage] == [6, 5, 4, 3, 2, 1, 0]
        assert [m.facts.labels.count for m in lineage[:-1]] == [LABELS] * 6
        assert registry.status(lineage[3].id).status is Status.SUPERSEDED
        assert not (tmp_path / "run" / "checkpoints" / lineage[3].id).exists()
        assert (await users.info()).model.version == second
        await _charter("rollback", "--registry", root)
        assert (await users.info()).model.version == first
        await _learns(tmp_path / "run", 8)
    await _learns(tmp_path / "calm", 8)
    assert newest_of_lineage(registry).digest == newest_of_lineage(calm).digest, "learning saw none of it"
