"""A policy and a critic server over one model, as a process: MODEL CONSTITUTION POLICY_PORT CRITIC_PORT."""

from __future__ import annotations

import asyncio
import signal
import sys

from prometheus_client import CollectorRegistry

from charter.critic.config import CriticConfig, Writing
from charter.critic.server import serve as serve_critic
from charter.policy.config import PolicyConfig
from charter.policy.server import serve as serve_policy
from charter.rpc import ServerConfig


async def main(model: str, constitution: str, policy_port: int, critic_port: int) -> None:
    from charter.lm import open_model

    registry = CollectorRegistry()
    shared = await asyncio.to_thread(open_model, f"local:{model}")
    writing = Writing(critique_tokens=8, revision_tokens=12)
    policy = PolicyConfig(model=model, server=ServerConfig(port=policy_port))
    critic = CriticConfig(
        model=model, constitution=constitution, writing=writing, server=ServerConfig(port=critic_port)
    )
    async with (
        await serve_policy(policy, registry, open_model=lambda uri: shared),
        await serve_critic(critic, CollectorRegistry(), open_model=lambda uri: shared),
    ):
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
