import asyncio
import socket
import urllib.request

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import generate_latest

from charter import rpc
from charter.errors import BackendUnavailable, ConfigError, Overloaded, RequestError
from charter.v1 import judge_pb2, policy_pb2
from charter.v1.judge_pb2_grpc import JudgeServiceStub
from charter.v1.policy_pb2_grpc import PolicyServiceStub

JUDGE = "charter.v1.JudgeService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def compare(text="") -> judge_pb2.CompareRequest:
    return judge_pb2.CompareRequest(answer_a=text)


async def health(channel, service="") -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return response.status


async def test_health_is_serving_for_the_server_and_each_service(start):
    async with await start() as server, grpc.aio.insecure_channel(server.target) as plain:
        for name in ("", JUDGE, "charter.v1.PolicyService"):
            assert await health(plain, name) == SERVING


async def test_reflection_lists_the_services(start):
    async with await start() as server, grpc.aio.insecure_channel(server.target) as plain:
        stub = reflection_pb2_grpc.ServerReflectionStub(plain)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        names = [
            s.name
            async for r in stub.ServerReflectionInfo(requests)
            for s in r.list_services_response.service
        ]
    assert {JUDGE, "charter.v1.PolicyService", "grpc.health.v1.Health"} <= set(names)


async def test_while_draining_health_is_not_serving_and_calls_in_flight_finish(start, judge):
    entered, release = asyncio.Event(), asyncio.Event()

    async def behave(request, context):
        entered.set()
        await release.wait()
        return judge_pb2.CompareResponse(probability=0.75)

    judge.behave = behave
    server = await start(drain_delay_s=0.2)
    async with rpc.channel(server.target) as channel, grpc.aio.insecure_channel(server.target) as plain:
        watch = health_pb2_grpc.HealthStub(plain).Watch(health_pb2.HealthCheckRequest(service=JUDGE))
        assert (await watch.read()).status == SERVING
        call = asyncio.ensure_future(JudgeServiceStub(channel).Compare(compare()))
        await entered.wait()
        drain = asyncio.ensure_future(server.drain())
        assert (await watch.read()).status == NOT_SERVING
        assert not call.done()
        watch.cancel()
        release.set()
        assert (await call).probability == 0.75
        await drain
        await server.drain()  # safe to repeat
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()


async def test_calls_that_outlast_the_grace_are_cancelled(start, judge):
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def behave(request, context):
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    judge.behave = behave
    server = await start(drain_grace_s=0.05)
    async with rpc.channel(server.target) as channel:
        call = asyncio.ensure_future(JudgeServiceStub(channel).Compare(compare(), timeout=20))
        await entered.wait()
        await server.drain()
        await asyncio.wait_for(cancelled.wait(), 5)
        with pytest.raises(BackendUnavailable):
            await call


async def test_what_a_service_holds_is_released_after_the_last_call(services, registry):
    import dataclasses

    closed = []

    async def close():
        closed.append(True)

    services[0] = dataclasses.replace(services[0], close=close)
    async with await rpc.serve(services, rpc.ServerConfig(), registry):
        assert not closed
    assert closed == [True]


async def test_a_taken_port_is_a_sentence(start):
    async with await start() as server:
        with pytest.raises(ConfigError, match=rf"{server.port}: the port is taken.*choose another port"):
            await start(port=server.port)


async def test_a_taken_metrics_port_is_a_sentence_and_frees_the_first(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="metrics port"):
            await start(metrics_port=taken.getsockname()[1])


async def test_calls_beyond_the_limit_are_refused_with_a_sentence_and_health_still_answers(
    start, judge, registry
):
    entered, release = asyncio.Event(), asyncio.Event()

    async def behave(request, context):
        entered.set()
        await release.wait()
        return judge_pb2.CompareResponse()

    judge.behave = behave
    async with await start(max_concurrent_calls=1) as server, rpc.channel(server.target) as channel:
        stub = JudgeServiceStub(channel)
        first = asyncio.ensure_future(stub.Compare(compare()))
        await entered.wait()
        with pytest.raises(Overloaded, match="1 calls at once and is full; try again later"):
            await stub.Compare(compare())
        async with grpc.aio.insecure_channel(server.target) as plain:
            assert await health(plain) == SERVING
        release.set()
        await first
        await stub.Compare(compare())
    assert 'rpc_server_rejected_calls_total{rpc_method="Compare"' in generate_latest(registry).decode()


async def test_a_message_above_four_mebibytes_passes_and_one_above_the_limit_is_a_request_error(start, judge):
    received = []

    async def behave(request, context):
        received.append(len(request.answer_a))
        return judge_pb2.CompareResponse()

    judge.behave = behave
    limit = 6 * 1024 * 1024
    async with await start(max_message_bytes=limit) as server, rpc.channel(server.target) as channel:
        stub = JudgeServiceStub(channel)
        await stub.Compare(compare("x" * (5 * 1024 * 1024)))
        with pytest.raises(RequestError, match="too large"):
            await stub.Compare(compare("x" * (7 * 1024 * 1024)))
    assert received == [5 * 1024 * 1024]


async def test_metrics_count_calls_by_method_and_status(start, judge, registry):
    async def behave(request, context):
        if request.answer_a:
            raise RequestError("no")
        return judge_pb2.CompareResponse()

    judge.behave = behave
    async with await start(metrics_port=0) as server, rpc.channel(server.target) as channel:
        stub = JudgeServiceStub(channel)
        await stub.Compare(compare())
        with pytest.raises(RequestError):
            await stub.Compare(compare("x"))
        url = f"http://127.0.0.1:{server.metrics_port}/metrics"
        text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())).decode()

    def count(code):
        labels = {"rpc_service": JUDGE, "rpc_method": "Compare", "rpc_response_status_code": code}
        return registry.get_sample_value("rpc_server_call_duration_seconds_count", labels)

    assert (count("OK"), count("INVALID_ARGUMENT")) == (1, 1)
    assert "rpc_server_call_duration_seconds_count" in text
    active = {"rpc_service": JUDGE, "rpc_method": "Compare"}
    assert registry.get_sample_value("rpc_server_active_calls", active) == 0
    assert registry.get_sample_value("charter_server_serving", {"rpc_service": JUDGE}) == 0


async def test_connections_grow_old_so_that_clients_look_for_new_servers(start, judge):
    async with await start(max_connection_age_s=0.2, max_connection_age_grace_s=5) as server:
        peers = set()

        async def behave(request, context):
            peers.add(context.peer())
            return judge_pb2.CompareResponse()

        judge.behave = behave
        async with rpc.channel(server.target) as channel:
            while len(peers) < 2:
                await JudgeServiceStub(channel).Compare(compare())
                await asyncio.sleep(0.02)


async def test_closing_a_stream_cancels_the_work_on_the_server(start, policy):
    policy.stop_after = 10**9
    async with await start() as server, rpc.channel(server.target) as channel:
        stream = PolicyServiceStub(channel).Generate(policy_pb2.GenerateRequest())
        assert (await anext(stream)).text == "0"
        await stream.aclose()
        await asyncio.wait_for(policy.ended.wait(), 5)
    assert policy.cancelled


async def test_cancelling_the_task_that_reads_a_stream_cancels_the_work_on_the_server(start, policy):
    policy.stop_after = 10**9
    async with await start() as server, rpc.channel(server.target) as channel:
        started = asyncio.Event()

        async def read():
            async for _ in PolicyServiceStub(channel).Generate(policy_pb2.GenerateRequest()):
                started.set()

        task = asyncio.ensure_future(read())
        await started.wait()
        task.cancel()
        await asyncio.wait_for(policy.ended.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert policy.cancelled


async def test_a_reader_that_stops_reading_and_goes_away_frees_the_server_that_waits_to_send(
    start, policy, registry
):
    policy.stop_after, policy.padding = 10**9, "x" * 1_000_000
    async with await start() as server, rpc.channel(server.target) as channel:
        stream = PolicyServiceStub(channel).Generate(policy_pb2.GenerateRequest())
        await anext(stream)
        await asyncio.sleep(0.3)  # the window of flow control is full: the server waits in its send
        await stream.aclose()
        await asyncio.wait_for(policy.ended.wait(), 5)
        active = {"rpc_service": "charter.v1.PolicyService", "rpc_method": "Generate"}
        while registry.get_sample_value("rpc_server_active_calls", active):
            await asyncio.sleep(0.01)
    assert policy.cancelled
