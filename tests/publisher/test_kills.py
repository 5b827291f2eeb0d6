"""kill -9 of the publisher at any instant between a candidate and the reload of the last policy server."""

import asyncio
import contextlib
import itertools
import random
import time
from collections import defaultdict
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.forks import fork_server
from tests.publisher.lives import live
from tests.registry.conftest import filler
from tests.scripted import Scripted

from charter.bus import open_bus
from charter.lm.base import ChatMessage, Prompt, Role, Sampling
from charter.lm.policy_client import PolicyModel
from charter.policy.config import PolicyConfig
from charter.policy.server import serve
from charter.registry import Facts, Kind, Registry, Status
from charter.registry.events import announcement

KILLS = 20
ASKED = Prompt((ChatMessage(Role.USER, "How do I open the door?"),))
PROMOTED = (Status.PROMOTING, Status.SERVING, Status.RETIRED)


class Doors:
    """Opens checkpoints for one policy server, slowly; notes what was opened and how it stood then."""

    def __init__(self, registry):
        self.registry, self.opened = registry, []
        self.knocked = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def __call__(self, uri):
        name = Path(uri).name
        change = self.registry.status(name)
        self.opened.append((name, change.status))
        self.loop.call_soon_threadsafe(self.knocked.set)
        time.sleep(0.05)
        return Scripted(lambda p, s: f"{name} " * 6, version=name)


async def _until(condition, seconds):
    """Waits for it, and says whether it came."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        await asyncio.sleep(0.005)
    return found


def _instant(registry, name, door, mode):
    """Whether the moment for a kill of this mode is there, or can come no more."""
    status = registry.status(name).status
    match mode:
        case 0:  # the gate has decided, and no server is told, or only the first
            return status is not Status.CANDIDATE
        case 1 | 2:  # the second server is in the middle of its reload
            return door.knocked.is_set() or status not in (Status.CANDIDATE, Status.PROMOTING)
        case _:  # any moment
            return True


@pytest.mark.timeout(300)
async def test_twenty_kills_give_no_second_verdict_and_serve_nothing_that_was_not_promoted(tmp_path):
    context = fork_server()
    registry = Registry(tmp_path / "checkpoints")
    seed = registry.write(Facts(Kind.SEED), filler(0.5))
    registry.set_status(seed.id, Status.SERVING)
    doors, answers, killed_at = [Doors(registry) for _ in range(2)], [], defaultdict(int)
    async with contextlib.AsyncExitStack() as stack:
        bus = stack.enter_context(open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal"))
        servers = [
            await stack.enter_async_context(
                await serve(
                    PolicyConfig(model=f"local:{registry.resolve(seed.id)}", registry=registry.root),
                    CollectorRegistry(),
                    open_model=door,
                )
            )
            for door in doors
        ]
        targets = tuple(server.target for server in servers)
        policies = [PolicyModel(target) for target in targets]
        for policy in policies:
            stack.push_async_callback(policy.close)
        made = itertools.count(1)

        def candidate():
            step = next(made)
            manifest = registry.write(Facts(Kind.RL, seed.id, step=step), filler(step))
            change = registry.set_status(manifest.id, Status.CANDIDATE)
            bus.publish([announcement(manifest, registry.root, change)])
            return manifest.id

        def born():
            process = context.Process(target=live, args=(tmp_path, targets))
            process.start()
            return process

        async def user(policy):
            while not done.is_set():
                answers.append((await policy.generate(ASKED, Sampling())).completions[0])
                await asyncio.sleep(0.005)

        done, dice = asyncio.Event(), random.Random(3)
        users = [asyncio.create_task(user(policy)) for policy in policies]
        for number in range(KILLS):
            doors[1].knocked.clear()
            name = candidate()
            process = born()
            await _until(lambda n=name, mode=number % 4: _instant(registry, n, doors[1], mode), 60)
            if number % 4 == 3:
                await asyncio.sleep(dice.uniform(0.1, 1.0))
            process.kill()
            await asyncio.to_thread(process.join)
            assert process.exitcode == -9
            killed_at[registry.status(name).status] += 1
        last = born()
        opens = (Status.CANDIDATE, Status.PROMOTING)
        assert await _until(
            lambda: all((c := registry.status(m.id)) and c.status not in opens for m in registry.list()), 60
        )
        final = candidate()
        assert await _until(lambda: registry.status(final).status not in opens, 60)
        serving = registry.serving().id
        for policy in policies:
            while (await policy.info()).model.version != serving:
                await asyncio.sleep(0.02)
        done.set()
        await asyncio.gather(*users)
        last.kill()
        await asyncio.to_thread(last.join)
    assert killed_at[Status.PROMOTING] >= 3, f"between gating and reload: {dict(killed_at)}"
    _one_verdict_each(registry)
    for name, status in itertools.chain.from_iterable(door.opened for door in doors):
        assert name == seed.id or status in PROMOTED, f"{name} was loaded as {status}"
    assert all(a.text == f"{a.model.version} " * 6 for a in answers), "no answer of two versions"


def _one_verdict_each(registry):
    ways = {
        (Status.CANDIDATE, Status.PROMOTING, Status.SERVING),
        (Status.CANDIDATE, Status.REJECTED),
        (Status.CANDIDATE, Status.SUPERSEDED),
    }
    gone = set()
    for manifest in registry.list():
        if manifest.facts.kind is Kind.RL:
            history = registry.history(manifest.id)
            way = tuple(change.status for change in history)
            assert way in ways, f"{manifest.id}: {way}"
            gone.add(way)
            if way[-1] is Status.SERVING:
                assert history[1].measurements == history[2].measurements
    assert len(gone) >= 2, "some passed and some did not"
