"""`charter run`: one or several services in one process and one event loop, from start to a clean stop.

What can fail at once (a taken port or folder, a wrong setting, an unreadable constitution) fails before
anything slow begins. The endpoint listens early; `/readyz` turns green when the models are loaded.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

from charter.app.broker import bus_of
from charter.app.explain import as_yaml
from charter.app.ports import PortReservations
from charter.app.screen import Screen
from charter.app.services import Services
from charter.app.settings import Deployment, read_common, read_deployment
from charter.app.signals import StopSignal
from charter.app.state import StateFolder
from charter.config import Sources, assignments
from charter.telemetry import logs


def run_from_flags(flags: Mapping[str, object], settings: Sequence[str], file: Path | None) -> int:
    """Runs until it is told to stop; returns the exit status. Raises `CharterError` when it cannot start."""
    sources = _sources(flags, settings, file)
    common = read_common(sources, quiet=sys.stderr.isatty())
    logs.configure(common.log.level, common.log.json)
    with ExitStack() as stack:
        state = stack.enter_context(StateFolder(common.state, common.targets))
        common = replace(common, bus=stack.enter_context(bus_of(common.bus, state.path)))
        ports = stack.enter_context(closing(PortReservations()))
        deployment = read_deployment(sources, common, ports)
        runner = stack.enter_context(asyncio.Runner(loop_factory=_new_loop))
        finished = runner.run(_serve(deployment, ports, state, Screen()))
        if not finished:
            # A thread is still reading weights, and nothing can interrupt it; all else is closed.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    return 0


def show(flags: Mapping[str, object], settings: Sequence[str], file: Path | None) -> str:
    """The settings that `run_from_flags` would run by, as YAML; ports 0 are chosen at the start."""
    sources = _sources(flags, settings, file)
    return as_yaml(read_deployment(sources, read_common(sources), None))


def _sources(flags: Mapping[str, object], settings: Sequence[str], file: Path | None) -> Sources:
    return Sources(file=file, environment=os.environ, flags={**flags, **assignments(settings)})


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


@asynccontextmanager
async def _learning(deployment: Deployment, screen: Screen, stops: AsyncExitStack) -> AsyncIterator[None]:
    """Learns, where that is wanted, until `stops` is closed; news goes to the screen while entered."""
    if deployment.learning is None:
        yield
        return
    from charter.circle.beside import start_learning
    from charter.circle.live import shown

    with shown(screen.console) as tell:
        learning = start_learning(deployment, deployment.learning, tell)
        stops.push_async_callback(learning.stop)
        yield


async def _serve(deployment: Deployment, ports: PortReservations, state: StateFolder, screen: Screen) -> bool:
    """Starts, waits for a signal, stops; False when a start that cannot be interrupted is still under way."""
    began = time.monotonic()
    services = Services(deployment, ports)
    learning = AsyncExitStack()
    with StopSignal() as stop:
        waiting = asyncio.create_task(stop.wait())
        try:
            address = await services.start_endpoint()
            state.note_address(address)
            screen.starting(deployment, address)
            starting = asyncio.create_task(services.start_models())
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                screen.ready(time.monotonic() - began, address)
                async with _learning(deployment, screen, learning):
                    await services.run_until(waiting)
            screen.stopping()
        finally:
            waiting.cancel()
            await asyncio.gather(services.stop(), learning.aclose())
        screen.stopped()
        return starting.done()
