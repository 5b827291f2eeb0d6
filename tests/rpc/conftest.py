"""A judge whose behaviour each test gives: the scaffolding is what is tested, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from charter import rpc
from charter.v1 import judge_pb2, policy_pb2
from charter.v1.judge_pb2_grpc import JudgeServiceServicer, add_JudgeServiceServicer_to_server
from charter.v1.policy_pb2_grpc import PolicyServiceServicer, add_PolicyServiceServicer_to_server

JUDGE = "charter.v1.JudgeService"
POLICY = "charter.v1.PolicyService"


class Judge(JudgeServiceServicer):
    """Awaits `behave(request, context)` and answers with what it returns."""

    def __init__(self):
        async def behave(request, context):
            return judge_pb2.CompareResponse(probability=0.5)

        self.behave = behave

    async def Compare(self, request, context):
        return await self.behave(request, context)


class Policy(PolicyServiceServicer):
    """Streams numbers until `stop_after`; notes how its last stream ended."""

    def __init__(self):
        self.stop_after = 3
        self.padding = ""
        self.error = None
        self.ended = asyncio.Event()
        self.cancelled = False

    async def Generate(self, request, context) -> AsyncIterator[policy_pb2.GenerateResponse]:
        try:
            for i in range(self.stop_after):
                yield policy_pb2.GenerateResponse(text=str(i) + self.padding)
                await asyncio.sleep(0.005)
            if self.error:
                raise self.error
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled = True
            raise
        finally:
            self.ended.set()


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def judge():
    return Judge()


@pytest.fixture
def policy():
    return Policy()


@pytest.fixture
def services(judge, policy):
    return [
        rpc.Service(JUDGE, add_JudgeServiceServicer_to_server, judge),
        rpc.Service(POLICY, add_PolicyServiceServicer_to_server, policy),
    ]


@pytest.fixture
def start(services, registry):
    """Starts a server with the given `ServerConfig` fields."""
    return lambda **fields: rpc.serve(services, rpc.ServerConfig(**fields), registry)
