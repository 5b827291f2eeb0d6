"""The servers that learning needs: a policy to sample from, critic and judge on frozen weights."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from charter.app.models import SharedModels
from charter.circle.config import CircleConfig, Places
from charter.critic.config import CriticConfig
from charter.judge.config import JudgeConfig
from charter.lm.base import LanguageModel
from charter.policy.config import PolicyConfig
from charter.rpc import ServerConfig

Open = Callable[[str], LanguageModel]
Busy = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Servers:
    """host:port of each."""

    sampled: str
    """The policy that is sampled for learning; it gets every candidate at once."""
    serving: tuple[str, ...]
    """The policies that users meet; they get what the gate lets pass."""
    critic: str
    judge: str
    busy: Mapping[str, Busy]
    """Whether the engine that samples, and the one that gives feedback, have work now."""


class _Opener:
    """Opens models, and remembers them for as long as they are used."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._opened: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, uri: str) -> LanguageModel:
        from charter.lm import open_model

        local = uri.startswith("local:")
        model = open_model(uri, threads=self._threads) if local else open_model(uri)
        if local:
            self._opened.add(model)
        return model

    def busy(self) -> bool:
        """Whether an engine that it opened has work."""
        states = [model.status() for model in list(self._opened)]
        return any(state.running + state.waiting for state in states)


async def start(config: CircleConfig, places: Places, stack: contextlib.AsyncExitStack) -> Servers:
    """Starts them on free ports of the loopback; they drain with the stack."""
    from charter.critic import server as critic
    from charter.judge import server as judge
    from charter.policy import server as policy

    samples, serves, gives_feedback = (_Opener(config.threads) for _ in range(3))
    shared = SharedModels(gives_feedback)

    async def sampling(opener: _Opener) -> str:
        settings = PolicyConfig(
            model=f"local:{places.model}", registry=str(places.registry), server=_server()
        )
        running = await policy.serve(settings, CollectorRegistry(), open_model=opener)
        stack.push_async_callback(running.drain)
        return running.target

    sampled = await sampling(samples)
    serving = places.policies or (await sampling(serves),)
    criticising = await critic.serve(
        CriticConfig(
            model=places.feedback_model,
            constitution=places.constitution,
            writing=config.writing,
            server=_server(),
        ),
        CollectorRegistry(),
        open_model=shared.open,
    )
    stack.push_async_callback(criticising.drain)
    judging = await judge.serve(
        JudgeConfig(
            model=places.feedback_model,
            constitution=places.constitution,
            judging=config.judging,
            server=_server(),
        ),
        CollectorRegistry(),
        open_model=shared.open,
    )
    stack.push_async_callback(judging.drain)
    busy = {"sampling": samples.busy, "judging": gives_feedback.busy}
    return Servers(sampled, serving, criticising.target, judging.target, busy)


def _server() -> ServerConfig:
    return ServerConfig(drain_grace_s=2.0, max_concurrent_calls=1024)
