"""The servers that learning needs: a policy to sample from, critic and judge on frozen weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from charter.app.models import SharedModels
from charter.circle.config import CircleConfig, Places
from charter.critic.config import CriticConfig
from charter.judge.config import JudgeConfig
from charter.lm.base import LanguageModel
from charter.policy.config import PolicyConfig
from charter.rpc import ServerConfig

Open = Callable[[str], LanguageModel]


@dataclass(frozen=True, slots=True)
class Servers:
    """host:port of each."""

    sampled: str
    """The policy that is sampled for learning; it gets every candidate at once."""
    serving: tuple[str, ...]
    """The policies that users meet; they get what the gate lets pass."""
    critic: str
    judge: str


def _opener(threads: int) -> Open:
    def opened(uri: str) -> LanguageModel:
        from charter.lm import open_model

        return open_model(uri, threads=threads) if uri.startswith("local:") else open_model(uri)

    return opened


async def start(config: CircleConfig, places: Places, stack: contextlib.AsyncExitStack) -> Servers:
    """Starts them on free ports of the loopback; they drain with the stack."""
    from charter.critic import server as critic
    from charter.judge import server as judge
    from charter.policy import server as policy

    opener = _opener(config.threads)
    shared = SharedModels(opener)

    async def sampling() -> str:
        settings = PolicyConfig(
            model=f"local:{places.model}", registry=str(places.registry), server=_server()
        )
        running = await policy.serve(settings, CollectorRegistry(), open_model=opener)
        stack.push_async_callback(running.drain)
        return running.target

    sampled = await sampling()
    serving = places.policies or (await sampling(),)
    criticising = await critic.serve(
        CriticConfig(model=places.feedback_model, constitution=places.constitution, server=_server()),
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
    return Servers(sampled, serving, criticising.target, judging.target)


def _server() -> ServerConfig:
    return ServerConfig(drain_grace_s=2.0, max_concurrent_calls=1024)
