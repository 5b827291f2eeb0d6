"""A whole deployment on loopback: real policy and critic servers over gRPC, and a real gateway under uvicorn.

The language models inside are the fake of `tests.scripted`, since these tests are about what happens to
answers of which it is known whether they are good; `test_real_model.py` has real weights.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import openai
from prometheus_client import CollectorRegistry
from tests.scripted import Scripted

from charter import rpc
from charter.critic import server as critic_server
from charter.critic.config import CriticConfig
from charter.gateway import server as gateway_server
from charter.gateway.config import GatewayConfig
from charter.policy import server as policy_server
from charter.policy.config import PolicyConfig
from charter.rpc import ServerConfig
from charter.v1 import policy_pb2
from charter.v1.policy_pb2_grpc import PolicyServiceStub

CONSTITUTION = """
name: test
version: "1"
language: {language}
description: Three principles of which the scripted critic knows the titles.
principles:
  - {{id: no-harm, title: Do no harm., rationale: r, category: harm, priority: 1, weight: 1.0,
      phases: [critique], critique_request: Is it harmful?, revision_request: Make it harmless.}}
  - {{id: no-secrets, title: Keep secrets., rationale: r, category: privacy, priority: 1, weight: 1.0,
      phases: [critique], critique_request: Is it indiscreet?, revision_request: Make it discreet.}}
  - {{id: be-helpful, title: Be of help., rationale: r, category: helpfulness, priority: 2, weight: 1.0,
      phases: [critique], critique_request: Is it useless?, revision_request: Make it useful.}}
"""
WORDS = {"Do no harm.": "harm", "Keep secrets.": "secret", "Be of help.": "useless"}
"""An answer breaks the principle with this title when it has this word."""
HELLO = [{"role": "user", "content": "hello"}]


def write_constitution(path: Path, language: str = "en") -> Path:
    path.write_text(CONSTITUTION.format(language=language))
    return path


def critic_model(revise=lambda answer, request: "a good answer") -> Scripted:
    """A fake critic: an answer breaks a principle when it has the principle's word; `revise` rewrites it."""

    def weigh(prompt, continuation):
        asked = prompt.messages[-1].content
        answer = re.search(r"<answer>(.*?)</answer>", asked, re.DOTALL)[1]
        title = re.search(r"<principle>(.*?)</principle>", asked)[1]
        return -0.01 if (WORDS[title] in answer) == (continuation == "Yes") else -6.0

    def write(prompt, sampling):
        asked = prompt.messages[-1].content
        answer = re.search(r"<answer>(.*?)</answer>", asked, re.DOTALL)[1]
        request = asked.rpartition("\n")[2]
        return revise(answer, request) if request.startswith("Make") else "It is not good."

    return Scripted(write, weigh, version="critic-1")


@dataclass
class Deployment:
    """What is running; parts can be stopped and started again on the same port."""

    policy_model: Scripted
    critic_model: Scripted
    constitution: Path
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    policy: rpc.RunningServer | None = None
    critic: rpc.RunningServer | None = None
    gateway: gateway_server.RunningGateway | None = None
    asker: openai.AsyncOpenAI | None = None

    async def start_policy(self, port: int = 0) -> None:
        config = PolicyConfig(model="scripted:", server=_listening(port))
        self.policy = await policy_server.serve(
            config, CollectorRegistry(), open_model=lambda uri: self.policy_model
        )

    async def start_critic(self, port: int = 0) -> None:
        config = CriticConfig(
            model="scripted:", constitution=str(self.constitution), watch_s=0.02, server=_listening(port)
        )
        self.critic = await critic_server.serve(
            config, CollectorRegistry(), open_model=lambda uri: self.critic_model
        )

    @property
    def url(self) -> str:
        return self.gateway.url

    def client(self, **options) -> openai.AsyncOpenAI:
        """The official client."""
        return openai.AsyncOpenAI(**{"base_url": self.url, "api_key": "none", "max_retries": 0} | options)

    async def ask(self, answer=None, messages=HELLO, **fields):
        """One chat completion by the official client; `answer` is what the policy is to write."""
        if answer is not None:
            self.policy_model.write = lambda prompt, sampling: answer
        if self.asker is None:
            self.asker = self.client()
        return await self.asker.chat.completions.create(model="charter", messages=messages, **fields)

    async def policy_status(self) -> policy_pb2.StatusResponse:
        async with rpc.channel(self.policy.target) as channel:
            return await PolicyServiceStub(channel).Status(policy_pb2.StatusRequest())

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def _listening(port: int) -> ServerConfig:
    return ServerConfig(port=port, drain_grace_s=0.2)


@contextlib.asynccontextmanager
async def deployed(folder: Path, *, policy=None, critic=None, language="en", without_critic=False, **config):
    """A deployment, guarded by default; `config` is the gateway's."""
    made = Deployment(
        policy or Scripted(), critic or critic_model(), write_constitution(folder / "c.yaml", language)
    )
    await made.start_policy()
    await made.start_critic()
    settings = {
        "port": 0,
        "policy": f"grpc://{made.policy.target}",
        "critic": "" if without_critic else made.critic.target,
        "constitution": str(made.constitution),
        "drain_seconds": 1.0,
    } | config
    try:
        made.gateway = await gateway_server.serve(GatewayConfig(**settings), made.registry)
        yield made
    finally:
        if made.asker is not None:
            await made.asker.close()
        if made.gateway is not None:
            await made.gateway.drain()
        await made.critic.drain()
        await made.policy.drain()


@contextlib.asynccontextmanager
async def http(url: str):
    """A bare HTTP client, for what the official one would not send."""
    async with aiohttp.ClientSession(base_url=url.removesuffix("v1")) as session:
        yield session
