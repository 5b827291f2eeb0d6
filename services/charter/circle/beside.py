"""Learning beside an endpoint: the circle in processes of its own, so that answers never wait for it.

`charter run` starts it when the endpoint answers, and stops both at once. What was begun goes on at the next
start: work that does not end within a moment is killed, and done again from what is whole on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from charter.app.settings import Deployment
from charter.circle.config import CircleConfig, Places
from charter.circle.news import Kind, News, Tell
from charter.circle.partner import Partner
from charter.errors import CharterError
from charter.telemetry.logs import get_logger

log = get_logger(__name__)

GRACE_S = 2.0
"""For the circle as a whole; longer than the one that it gives its own partner."""


class Learning:
    """A circle under way. Made by `start_learning`."""

    def __init__(self, config: CircleConfig, places: Places, tell: Tell) -> None:
        self._partner = Partner(config.niceness, config.threads, grace_s=GRACE_S, family=True)
        self._tell = tell
        self._stopping = False
        self._task = asyncio.create_task(self._run(config, places))

    async def _run(self, config: CircleConfig, places: Places) -> None:
        try:
            await self._partner.call(circle_in_process, config, places, told=self._told)
        except CharterError as error:
            # The endpoint goes on with what is in force; learning needs a person.
            log.error("learning has stopped", error=str(error))
            self._tell(News(Kind.PROBLEM, {"message": f"{type(error).__name__}: {error}"}))

    def _told(self, news: News) -> None:
        if not self._stopping:
            self._tell(news)

    @property
    def pid(self) -> int | None:
        """Of the process that learns."""
        return self._partner.pid

    @property
    def running(self) -> bool:
        """Whether it still learns."""
        return not self._task.done()

    async def stop(self) -> None:
        """Ends the processes within seconds; safe to repeat."""
        self._stopping = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._partner.close()


def start_learning(deployment: Deployment, config: CircleConfig, tell: Tell) -> Learning:
    """Begins to learn, or goes on. Returns at once; for a running event loop.

    Raises `ConfigError` for a deployment that cannot learn here: without a policy server of its own, or with
    a model whose weights are not on this machine.
    """
    return Learning(config, places_of(deployment), tell)


def places_of(deployment: Deployment) -> Places:
    """Where the circle of a deployment works. Raises `ConfigError`."""
    from charter.errors import ConfigError
    from charter.lm.checkpoint import checkpoint_folder

    common = deployment.common
    if deployment.policy is None:
        raise ConfigError("learning needs the policy server in this process; run --target all, or --no-learn")
    if not common.model_uri.startswith("local:"):
        raise ConfigError(
            f"the weights of {common.model} are not on this machine, so nothing can be learned here; give "
            "a local model, or --no-learn"
        )
    server = deployment.policy.server
    host = "127.0.0.1" if server.host in ("0.0.0.0", "[::]", "::") else server.host  # noqa: S104 - compared
    return Places(
        state=common.state.absolute(),
        bus=common.bus_uri,
        model=str(checkpoint_folder(common.model_uri.removeprefix("local:"))),
        feedback_model=common.critic_uri,
        constitution=common.constitution_name,
        policies=(f"{host}:{server.port}",),
    )


def circle_in_process(
    config: CircleConfig, places: Places, tell: Callable[[News], None], stopped: threading.Event
) -> None:
    """The circle in a partner's thread; ends when told to, or raises what the circle raises."""
    asyncio.run(_circle(config, places, tell, stopped))


async def _circle(config: CircleConfig, places: Places, tell: Tell, stopped: threading.Event) -> None:
    from charter.circle.circle import Circle

    partner = Partner(0, config.threads)  # niceness is inherited
    circle = asyncio.create_task(Circle(config, places, tell, partner).run())
    stopping: asyncio.Task[Any] = asyncio.create_task(asyncio.to_thread(stopped.wait))
    try:
        await asyncio.wait({circle, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if circle.done():
            circle.result()
    finally:
        circle.cancel()
        with contextlib.suppress(asyncio.CancelledError, CharterError):
            await circle
        stopped.set()
        await partner.close()
