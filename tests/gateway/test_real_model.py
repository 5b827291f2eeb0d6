"""The endpoint before a real (random, tiny) model: real weights, tokens, log-probs, engine and reload."""

import asyncio
import math

import openai
import pytest
from prometheus_client import CollectorRegistry
from tests.gateway.deployment import HELLO, http, write_constitution
from tests.tiny import CONTEXT_LENGTH, make_tiny_model

from charter import rpc
from charter.critic import server as critic_server
from charter.critic.config import CriticConfig
from charter.errors import CheckpointError
from charter.gateway import server as gateway_server
from charter.gateway.config import GatewayConfig
from charter.gateway.guard import GuardMode
from charter.policy import server as policy_server
from charter.policy.config import PolicyConfig
from charter.v1 import policy_pb2
from charter.v1.policy_pb2_grpc import PolicyServiceStub

ASK = {"model": "charter", "messages": HELLO, "max_tokens": 24, "seed": 3, "temperature": 1.0}
OFF = {"charter": {"guard": "off"}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture
async def endpoint(weights, tmp_path):
    """(gateway, policy) with a real model behind both policy and critic."""
    uri = f"local:{weights}"
    constitution = str(write_constitution(tmp_path / "c.yaml"))
    async with (
        await policy_server.serve(PolicyConfig(model=uri), CollectorRegistry()) as policy,
        await critic_server.serve(
            CriticConfig(model=uri, constitution=constitution), CollectorRegistry()
        ) as critic,
        await gateway_server.serve(
            GatewayConfig(
                port=0,
                policy=f"grpc://{policy.target}",
                critic=critic.target,
                constitution=constitution,
                guard=GuardMode.GATED,
            ),
            CollectorRegistry(),
        ) as gateway,
    ):
        yield gateway, policy


@pytest.fixture
async def client(endpoint):
    async with openai.AsyncOpenAI(base_url=endpoint[0].url, api_key="none", max_retries=0) as made:
        yield made


async def test_whole_and_streamed_answers_agree_and_the_log_probs_belong_to_the_text(client):
    whole = await client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3, extra_body=OFF)
    stream = await client.chat.completions.create(**ASK, stream=True, logprobs=True, extra_body=OFF)
    chunks = [c async for c in stream]
    text = whole.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    entries = whole.choices[0].logprobs.content
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed][: len(entries)] == [e.token for e in entries]
    assert [e.logprob for e in streamed][: len(entries)] == pytest.approx(
        [e.logprob for e in entries], abs=1e-4
    )
    assert len(entries) <= whole.usage.completion_tokens <= 24
    assert all(len(e.top_logprobs) == 3 and e.logprob <= 0 for e in entries)
    assert math.exp(entries[0].top_logprobs[0].logprob) <= 1


async def test_the_same_seed_says_the_same_and_n_answers_differ(client):
    twice = [await client.chat.completions.create(**ASK, n=3, extra_body=OFF) for _ in range(2)]
    texts = [[c.message.content for c in done.choices] for done in twice]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


async def test_a_gated_answer_of_a_random_model_comes_with_a_whole_report(client):
    done = await client.chat.completions.create(**ASK)
    assert done.choices[0].message.content
    assert done.charter["verdict"] in ("passed", "revised", "refused", "flagged")
    assert len(done.charter["policy_digest"]) == 64
    assert done.charter["timings_ms"]["assess"] > 0


async def test_characters_of_several_bytes_are_never_cut_by_a_stream(client):
    ask = ASK | {"messages": [{"role": "user", "content": "你好,请告诉我怎样开门🙂"}], "extra_body": OFF}
    whole = await client.chat.completions.create(**ask)
    stream = await client.chat.completions.create(**ask, stream=True)
    pieces = [c.choices[0].delta.content or "" async for c in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.prompt_tokens > 30, "what the tokenizer does not know it reads as bytes"


async def test_a_prompt_longer_than_the_context_is_refused_by_the_model_itself(client):
    messages = [{"role": "user", "content": "door " * 2 * CONTEXT_LENGTH}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=str(CONTEXT_LENGTH)) as caught:
            await client.chat.completions.create(**ASK | {"messages": messages}, stream=stream)
        assert caught.value.code == "context_length_exceeded"


async def test_a_corrupt_checkpoint_changes_nothing_and_a_good_one_takes_over(
    client, endpoint, weights, tmp_path
):
    _, policy = endpoint
    before = (await client.models.retrieve("charter")).charter["policy_digest"]
    corrupt = make_tiny_model(tmp_path / "corrupt", seed=2)
    file = corrupt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    async with rpc.channel(policy.target) as channel:
        stub = PolicyServiceStub(channel)
        with pytest.raises(CheckpointError):
            await stub.Reload(policy_pb2.ReloadRequest(checkpoint=str(corrupt)))
        done = await client.chat.completions.create(**ASK, extra_body=OFF)
        assert done.charter["policy_digest"] == before
        good = make_tiny_model(tmp_path / "good", seed=3)
        await stub.Reload(policy_pb2.ReloadRequest(checkpoint=str(good)))
    after = await client.chat.completions.create(**ASK, extra_body=OFF)
    assert after.charter["policy_digest"] not in (before, None)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_empties_the_engine(endpoint, stream):
    gateway, policy = endpoint
    body = {
        "model": "charter",
        "messages": HELLO,
        "max_tokens": 450,
        "n": 4,
        "stream": stream,
        "seed": 5,
    } | OFF
    async with rpc.channel(policy.target) as channel, http(gateway.url) as session:
        stub = PolicyServiceStub(channel)

        async def running():
            status = await stub.Status(policy_pb2.StatusRequest())
            return status.running + status.waiting

        asking = asyncio.create_task(session.post("v1/chat/completions", json=body))
        while not await running() and not asking.done():
            await asyncio.sleep(0.001)
        asking.cancel()
        if asking.done() and not asking.cancelled():
            asking.result().close()
        while await running():
            await asyncio.sleep(0.005)
        status = await stub.Status(policy_pb2.StatusRequest())
    assert status.tokens_generated < 4 * 450
