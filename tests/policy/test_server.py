"""The policy server before a fake model, where order matters; `test_real_model` has real weights."""

import asyncio
import contextlib

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.scripted import Scripted

from charter import rpc
from charter.errors import CheckpointError, RequestError
from charter.policy.config import PolicyConfig, SamplingDefaults
from charter.policy.server import serve
from charter.v1 import policy_pb2, types_pb2
from charter.v1.policy_pb2_grpc import PolicyServiceStub

USER = [types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content="How do I open a door?")]


class Opened:
    """Opens fakes by URI; notes what was asked."""

    def __init__(self, **models):
        self.models = models

    def __call__(self, uri):
        model = self.models[uri.rpartition("/")[2].removeprefix("local:")]
        if isinstance(model, Exception):
            raise model
        return model


@contextlib.asynccontextmanager
async def policy(opened, **fields):
    registry = CollectorRegistry()
    async with (
        await serve(PolicyConfig(model="local:first", **fields), registry, open_model=opened) as server,
        rpc.channel(server.target) as channel,
    ):
        yield PolicyServiceStub(channel), registry


async def text_of(stream):
    messages = [m async for m in stream]
    return "".join(m.text for m in messages), messages[-1]


async def test_generate_streams_and_the_last_message_has_reason_usage_and_version():
    async with policy(Opened(first=Scripted(lambda p, s: "First take the key."))) as (stub, _):
        stream = stub.Generate(policy_pb2.GenerateRequest(messages=USER))
        messages = [m async for m in stream]
    assert [m.text for m in messages] == ["First ", "take ", "the ", "key.", ""]
    assert {m.finish_reason for m in messages[:-1]} == {types_pb2.FINISH_REASON_UNSPECIFIED}
    assert messages[0].tokens[0].logprob == -0.5
    last = messages[-1]
    assert last.finish_reason == types_pb2.FINISH_REASON_STOP
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 4)
    assert last.model.version == "scripted"


async def test_what_a_request_leaves_out_takes_the_defaults_that_status_reports():
    model = Scripted()
    defaults = SamplingDefaults(temperature=0.3, max_tokens=17)
    async with policy(Opened(first=model), defaults=defaults) as (stub, _):
        await stub.Sample(policy_pb2.SampleRequest(messages=USER, sampling={"seed": 5}))
        status = await stub.Status(policy_pb2.StatusRequest())
    assert (model.samplings[0].temperature, model.samplings[0].max_tokens, model.samplings[0].seed) == (
        0.3,
        17,
        5,
    )
    assert status.defaults.max_tokens == 17
    assert status.context_length == 512
    assert status.model.version == "scripted"


async def test_sample_gives_n_answers_with_ids_logprobs_and_version():
    async with policy(Opened(first=Scripted(lambda p, s: p.prefill + "then go"))) as (stub, _):
        response = await stub.Sample(policy_pb2.SampleRequest(messages=USER, n=3, prefill="Sure, "))
        status = await stub.Status(policy_pb2.StatusRequest())
    assert [c.text for c in response.completions] == ["Sure, then go"] * 3
    assert list(response.completions[0].token_ids) == [0, 1, 2]
    assert list(response.completions[0].logprobs) == [-0.5] * 3
    assert [t.text for t in response.completions[0].tokens] == ["Sure, ", "then ", "go"]
    assert list(response.prompt_token_ids) == [1, 2, 3]
    assert response.model.version == "scripted"
    assert response.usage.completion_tokens == status.tokens_generated == 9


@pytest.mark.parametrize(
    ("method", "request_", "sentence"),
    [
        ("Sample", policy_pb2.SampleRequest(messages=USER, n=65), "n is 65; give 1 to 64"),
        ("Sample", policy_pb2.SampleRequest(messages=USER, n=-1), "n is -1"),
        ("Sample", policy_pb2.SampleRequest(), "the conversation is empty"),
        ("Sample", policy_pb2.SampleRequest(messages=USER, sampling={"temperature": -1}), "temperature"),
        ("Score", policy_pb2.ScoreRequest(messages=USER), "0 continuations"),
        ("Score", policy_pb2.ScoreRequest(messages=USER, continuations=["Yes", ""]), "is empty"),
        ("Reload", policy_pb2.ReloadRequest(), "there is no folder ''"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_with_a_sentence(method, request_, sentence):
    async with policy(Opened(first=Scripted())) as (stub, _):
        with pytest.raises((RequestError, CheckpointError), match=sentence):
            await getattr(stub, method)(request_)


@pytest.mark.parametrize("how", ["close the stream", "cancel the sample"])
async def test_a_caller_that_goes_away_stops_the_work_in_the_model(how):
    model = Scripted(lambda p, s: "word " * 200, gate=asyncio.Event())
    async with policy(Opened(first=model)) as (stub, _):
        if how == "close the stream":
            stream = stub.Generate(policy_pb2.GenerateRequest(messages=USER))
            await anext(stream)
            assert (await stub.Status(policy_pb2.StatusRequest())).running == 1
            await stream.aclose()
        else:
            asked = asyncio.ensure_future(stub.Sample(policy_pb2.SampleRequest(messages=USER, n=4)))
            while (await stub.Status(policy_pb2.StatusRequest())).running < 4:
                await asyncio.sleep(0.01)
            asked.cancel()
        while (await stub.Status(policy_pb2.StatusRequest())).running:
            await asyncio.sleep(0.01)
    assert model.running == 0


async def test_a_reload_drops_no_request_and_mixes_no_versions_in_an_answer(tmp_path):
    (tmp_path / "second").mkdir()
    gate = asyncio.Event()
    old = Scripted(lambda p, s: "old " * 20, version="first", gate=gate)
    new = Scripted(lambda p, s: "new " * 20, version="second")
    async with policy(Opened(first=old, second=new), registry=str(tmp_path)) as (stub, registry):
        streams = [stub.Generate(policy_pb2.GenerateRequest(messages=USER)) for _ in range(5)]
        for stream in streams:
            await anext(stream)
        reloaded = await stub.Reload(policy_pb2.ReloadRequest(checkpoint="second"))
        assert (reloaded.previous.version, reloaded.current.version) == ("first", "second")
        text, last = await text_of(stub.Generate(policy_pb2.GenerateRequest(messages=USER)))
        assert (text, last.model.version) == ("new " * 20, "second")
        assert not old.closed
        gate.set()
        for stream in streams:
            text, last = await text_of(stream)
            assert (text, last.model.version) == ("old " * 19, "first")
        while not old.closed:
            await asyncio.sleep(0.01)
    shown = generate_latest(registry).decode()
    assert 'charter_model_info{digest="digest of second"' in shown
    assert 'charter_model_info{digest="digest of first"' not in shown
    assert 'charter_model_reloads_total{outcome="done"} 1.0' in shown


async def test_requests_never_fail_while_checkpoints_change_under_them(tmp_path):
    versions = {f"v{i}": Scripted(lambda p, s, i=i: f"v{i} " * 12, version=f"v{i}") for i in range(6)}
    for name in versions:
        (tmp_path / name).mkdir()
    async with policy(
        Opened(first=Scripted(lambda p, s: "v9 " * 12, version="v9"), **versions), registry=str(tmp_path)
    ) as (
        stub,
        _,
    ):
        done = asyncio.Event()

        async def ask():
            count = 0
            while not done.is_set():
                text, last = await text_of(stub.Generate(policy_pb2.GenerateRequest(messages=USER)))
                assert text == f"{last.model.version} " * 12
                count += 1
            return count

        askers = [asyncio.ensure_future(ask()) for _ in range(8)]
        for name in versions:
            await stub.Reload(policy_pb2.ReloadRequest(checkpoint=name))
            await asyncio.sleep(0.02)
        done.set()
        assert min(await asyncio.gather(*askers)) > 0


async def test_a_corrupt_checkpoint_is_refused_and_the_old_one_goes_on(tmp_path):
    (tmp_path / "bad").mkdir()
    opened = Opened(
        first=Scripted(), bad=CheckpointError("bad: model.safetensors is cut off; write it again")
    )
    async with policy(opened, registry=str(tmp_path)) as (stub, registry):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is cut off"):
            await stub.Reload(policy_pb2.ReloadRequest(checkpoint="bad"))
        assert (await stub.Sample(policy_pb2.SampleRequest(messages=USER))).model.version == "scripted"
    assert 'charter_model_reloads_total{outcome="refused"} 1.0' in generate_latest(registry).decode()


async def test_metrics_follow_opentelemetrys_names_for_generative_models():
    async with policy(Opened(first=Scripted())) as (stub, registry):
        await text_of(stub.Generate(policy_pb2.GenerateRequest(messages=USER)))
    for name in (
        "gen_ai_server_request_duration_seconds",
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai_server_time_per_output_token_seconds",
    ):
        labels = {"gen_ai_operation_name": "chat", "version": "scripted"}
        assert registry.get_sample_value(f"{name}_count", labels) == 1
    written = {"gen_ai_token_type": "output", "version": "scripted"}
    assert registry.get_sample_value("gen_ai_server_tokens_total", written) == 2
