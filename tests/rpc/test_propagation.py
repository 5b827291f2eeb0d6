"""What travels with a call: errors, the request id, and what is left of the deadline."""

import asyncio
import itertools

import grpc
import grpc.aio
import pytest

from charter import errors, rpc
from charter.rpc.errors import error_of, status_of
from charter.telemetry import bind_request_id, request_id
from charter.v1 import judge_pb2, policy_pb2
from charter.v1.judge_pb2_grpc import JudgeServiceStub
from charter.v1.policy_pb2_grpc import PolicyServiceStub

TREE = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.CharterError)]


def raising(error):
    async def behave(request, context):
        raise error

    return behave


@pytest.mark.parametrize("kind", TREE, ids=lambda k: k.__name__)
async def test_a_client_raises_the_class_and_the_sentence_that_the_server_raised(start, judge, kind):
    judge.behave = raising(kind("prompt 7 is wrong; write „ja“ or 是"))
    async with await start() as server, rpc.channel(server.target) as channel:
        with pytest.raises(kind) as caught:
            await JudgeServiceStub(channel).Compare(judge_pb2.CompareRequest())
    assert type(caught.value) is kind
    assert str(caught.value) == "prompt 7 is wrong; write „ja“ or 是"


async def test_an_error_in_the_middle_of_a_stream_arrives_after_what_was_sent(start, policy):
    policy.error = errors.BackendUnavailable("the engine stopped; start it again")
    async with await start() as server, rpc.channel(server.target) as channel:
        stream = PolicyServiceStub(channel).Generate(policy_pb2.GenerateRequest())
        assert [(await anext(stream)).text for _ in range(3)] == ["0", "1", "2"]
        with pytest.raises(errors.BackendUnavailable, match="the engine stopped"):
            await anext(stream)


async def test_a_fault_of_ours_tells_no_secrets_to_the_caller(start, judge, caplog):
    judge.behave = raising(RuntimeError("/home/someone/weights: password=hunter2"))
    async with await start() as server, rpc.channel(server.target) as channel:
        with pytest.raises(errors.BackendError, match="an internal error; the server's log") as caught:
            await JudgeServiceStub(channel).Compare(judge_pb2.CompareRequest())
    assert "hunter2" not in str(caught.value)
    assert "call failed" in caplog.text


async def test_other_clients_get_a_status_code_that_fits(start, judge):
    judge.behave = raising(errors.ContextOverflow("too long"))
    async with await start() as server, grpc.aio.insecure_channel(server.target) as plain:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await JudgeServiceStub(plain).Compare(judge_pb2.CompareRequest())
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert caught.value.details() == "too long"


def test_statuses_of_other_servers_become_our_errors():
    assert isinstance(error_of(grpc.StatusCode.UNIMPLEMENTED, "no"), errors.BackendUnsupported)
    assert isinstance(error_of(grpc.StatusCode.DATA_LOSS, "no"), errors.BackendError)
    assert "db:1 cannot be reached" in str(error_of(grpc.StatusCode.UNAVAILABLE, "gone", target="db:1"))
    forged = error_of(grpc.StatusCode.UNAVAILABLE, "x", name="SystemExit")
    assert isinstance(forged, errors.BackendUnavailable)


def test_a_very_long_sentence_is_cut_to_fit_the_headers():
    _, sentence, _ = status_of(errors.RequestError("是" * 5000))
    assert len(sentence.encode()) <= 1500
    assert sentence.endswith("…")


async def test_the_request_id_travels_with_the_call(start, judge):
    seen = []

    async def behave(request, context):
        seen.append(request_id.get())
        return judge_pb2.CompareResponse()

    judge.behave = behave
    bind_request_id("req-42")
    async with await start() as server, rpc.channel(server.target) as channel:
        await JudgeServiceStub(channel).Compare(judge_pb2.CompareRequest())
        async with grpc.aio.insecure_channel(server.target) as plain:
            await JudgeServiceStub(plain).Compare(judge_pb2.CompareRequest())
    assert seen[0] == "req-42"
    assert seen[1]
    assert seen[1] != "req-42"


async def test_a_call_made_while_serving_another_gets_what_is_left_of_its_time(start, judge):
    left = []

    async with await start() as server, rpc.channel(server.target) as channel:

        async def behave(request, context):
            left.append(context.time_remaining())
            if not request.answer_a:
                await asyncio.sleep(0.3)
                await JudgeServiceStub(channel).Compare(judge_pb2.CompareRequest(answer_a="inner"))
            return judge_pb2.CompareResponse()

        judge.behave = behave
        await JudgeServiceStub(channel).Compare(judge_pb2.CompareRequest(), timeout=5)
    outer, inner = left
    assert inner <= (outer - 0.3) * 1.031  # gRPC may send a timeout of up to 3 % more that it sent before


async def test_time_limit_bounds_every_call_inside_it(start, judge):
    left = []

    async def behave(request, context):
        left.append(context.time_remaining())
        return judge_pb2.CompareResponse()

    judge.behave = behave
    async with await start() as server, rpc.channel(server.target) as channel:
        stub = JudgeServiceStub(channel)
        with rpc.time_limit(20):
            await stub.Compare(judge_pb2.CompareRequest())
            with rpc.time_limit(1000):
                await stub.Compare(judge_pb2.CompareRequest())
        assert rpc.remaining_seconds() is None
        await stub.Compare(judge_pb2.CompareRequest())
    assert left[0] <= 20
    assert left[1] <= 20
    assert left[2] > 500


async def test_a_deadline_that_passes_is_backend_unavailable_and_stops_the_work(start, judge):
    stopped = asyncio.Event()

    async def behave(request, context):
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    judge.behave = behave
    async with await start() as server, rpc.channel(server.target) as channel:
        with pytest.raises(errors.BackendUnavailable, match="before the deadline"):
            await JudgeServiceStub(channel).Compare(judge_pb2.CompareRequest(), timeout=0.1)
        await asyncio.wait_for(stopped.wait(), 5)


async def test_only_unavailable_is_tried_again(start, judge):
    attempts = itertools.count(1)
    codes = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL]
    seen = []

    async def behave(request, context):
        seen.append(next(attempts))
        await context.abort(codes[len(seen) - 1], "not now")

    judge.behave = behave
    async with await start() as server, rpc.channel(server.target) as channel:
        with pytest.raises(errors.BackendError, match="INTERNAL"):
            await JudgeServiceStub(channel).Compare(judge_pb2.CompareRequest())
    assert seen == [1, 2, 3]


async def test_what_our_server_found_unavailable_behind_it_is_not_tried_again(start, judge):
    seen = []

    async def behave(request, context):
        seen.append(1)
        raise errors.BackendUnavailable("the model is away")

    judge.behave = behave
    async with await start() as server, rpc.channel(server.target) as channel:
        with pytest.raises(errors.BackendUnavailable, match="the model is away"):
            await JudgeServiceStub(channel).Compare(judge_pb2.CompareRequest())
    assert len(seen) == 1


async def test_a_client_recovers_without_a_restart_when_the_server_returns(start):
    server = await start()
    async with rpc.channel(server.target, rpc.ClientConfig(max_reconnect_s=0.2)) as channel:
        stub = JudgeServiceStub(channel)
        await stub.Compare(judge_pb2.CompareRequest())
        await server.drain()
        with pytest.raises(errors.BackendUnavailable, match="cannot be reached"):
            await stub.Compare(judge_pb2.CompareRequest(), timeout=5)
        async with await start(port=server.port):
            await channel.ready(10)
            assert (await stub.Compare(judge_pb2.CompareRequest(), timeout=10)).probability == 0.5


async def test_waiting_for_a_server_that_is_not_there_ends_with_a_sentence(start):
    server = await start()
    await server.drain()
    async with rpc.channel(server.target) as channel:
        with pytest.raises(errors.BackendUnavailable, match="is the service running there"):
            await channel.ready(0.2)
