"""The policy server on the embedded engine, with real (random) weights."""

import asyncio
import contextlib
import shutil

import pytest
from prometheus_client import CollectorRegistry
from tests.tiny import make_tiny_model

from charter import rpc
from charter.errors import CheckpointError, ContextOverflow
from charter.policy.config import PolicyConfig
from charter.policy.server import serve
from charter.v1 import policy_pb2, types_pb2
from charter.v1.policy_pb2_grpc import PolicyServiceStub

USER = [types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content="How do I open the door?")]


@pytest.fixture(scope="module")
def registry_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    for seed in (1, 2):
        make_tiny_model(folder / f"ck-{seed}", seed=seed)
    shutil.copytree(folder / "ck-2", folder / "ck-cut")
    weights = folder / "ck-cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(folder / "ck-2", folder / "ck-empty")
    (folder / "ck-empty" / "config.json").unlink()
    return folder


@contextlib.asynccontextmanager
async def policy(folder):
    config = PolicyConfig(model=f"local:{folder / 'ck-1'}", registry=str(folder))
    async with await serve(config, CollectorRegistry()) as server, rpc.channel(server.target) as channel:
        yield PolicyServiceStub(channel)


def generate(**sampling):
    return policy_pb2.GenerateRequest(messages=USER, sampling=sampling)


async def test_a_streamed_answer_is_the_sampled_one(registry_folder):
    sampling = {"seed": 5, "max_tokens": 30, "temperature": 1.0}
    async with policy(registry_folder) as stub:
        streamed = [m async for m in stub.Generate(generate(**sampling))]
        sampled = await stub.Sample(policy_pb2.SampleRequest(messages=USER, sampling=sampling, n=2))
    assert "".join(m.text for m in streamed) == sampled.completions[0].text
    ids = [t.token_id for m in streamed for t in m.tokens]
    assert ids == list(sampled.completions[0].token_ids)
    assert sampled.model.version == "ck-1"
    assert sampled.model.digest
    assert len(sampled.prompt_token_ids) == streamed[-1].usage.prompt_tokens > 0
    assert sampled.completions[0].text != sampled.completions[1].text


async def test_a_caller_that_hangs_up_frees_the_engine(registry_folder):
    async with policy(registry_folder) as stub:
        stream = stub.Generate(generate(max_tokens=400, temperature=1.0, seed=3))
        await anext(stream)
        assert (await stub.Status(policy_pb2.StatusRequest())).running == 1
        await stream.aclose()
        while (status := await stub.Status(policy_pb2.StatusRequest())).running:
            await asyncio.sleep(0.01)
        assert status.tokens_generated == 0  # counted where an answer comes to its end; this one never did


async def test_a_reload_between_requests_leaves_answers_under_way_with_their_version(registry_folder):
    async with policy(registry_folder) as stub:
        stream = stub.Generate(generate(max_tokens=300, temperature=1.0, seed=3))
        first = await anext(stream)
        reloaded = await stub.Reload(policy_pb2.ReloadRequest(checkpoint="ck-2"))
        assert reloaded.previous.version == "ck-1"
        assert reloaded.current.version == "ck-2"
        assert reloaded.previous.digest != reloaded.current.digest
        sampled = await stub.Sample(policy_pb2.SampleRequest(messages=USER, sampling={"max_tokens": 4}))
        assert sampled.model == reloaded.current
        rest = [m async for m in stream]
        assert rest[-1].model == reloaded.previous
    async with policy(registry_folder) as stub:
        alone = [m async for m in stub.Generate(generate(max_tokens=300, temperature=1.0, seed=3))]
    assert first.text + "".join(m.text for m in rest) == "".join(m.text for m in alone)


@pytest.mark.parametrize("checkpoint", ["ck-cut", "ck-empty", "ck-9"])
async def test_a_corrupt_or_missing_checkpoint_is_refused_and_the_old_one_serves(registry_folder, checkpoint):
    async with policy(registry_folder) as stub:
        with pytest.raises(CheckpointError, match=checkpoint):
            await stub.Reload(policy_pb2.ReloadRequest(checkpoint=checkpoint))
        sampled = await stub.Sample(policy_pb2.SampleRequest(messages=USER, sampling={"max_tokens": 2}))
        status = await stub.Status(policy_pb2.StatusRequest())
    assert sampled.model.version == status.model.version == "ck-1"
    assert status.context_length == 512


async def test_a_prompt_longer_than_the_context_is_the_callers_error(registry_folder):
    long = [types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content="door " * 2000)]
    async with policy(registry_folder) as stub:
        with pytest.raises(ContextOverflow):
            await stub.Sample(policy_pb2.SampleRequest(messages=long))
        with pytest.raises(ContextOverflow):
            _ = [m async for m in stub.Generate(policy_pb2.GenerateRequest(messages=long))]
        with pytest.raises(ContextOverflow):
            await stub.Score(policy_pb2.ScoreRequest(messages=long, continuations=["Yes"]))


async def test_scores_are_the_log_probs_of_what_would_be_written(registry_folder):
    async with policy(registry_folder) as stub:
        scored = await stub.Score(
            policy_pb2.ScoreRequest(messages=USER, continuations=["Yes", "No, not at all"])
        )
    assert len(scored.scores) == 2
    assert all(p <= 0 for s in scored.scores for p in s.logprobs)
    assert [len(s.token_ids) for s in scored.scores] == [len(s.logprobs) for s in scored.scores]
    assert scored.model.version == "ck-1"


async def test_versions_change_under_load_and_each_answer_is_one_that_its_version_gives_alone(
    registry_folder,
):
    """Six users stream and sample while checkpoints take turns; nothing fails, no answer mixes weights."""
    names, seeds, answers = ("ck-1", "ck-2"), range(4), []

    def sampling(seed):
        return {"seed": seed, "max_tokens": 24, "temperature": 1.0}

    async def one(stub, user, seed):
        if user % 2:
            messages = [m async for m in stub.Generate(generate(**sampling(seed)))]
            return messages[-1].model, [t.token_id for m in messages for t in m.tokens], seed
        request = policy_pb2.SampleRequest(messages=USER, sampling=sampling(seed), n=2)
        sampled = await stub.Sample(request)
        return sampled.model, list(sampled.completions[0].token_ids), seed

    async with policy(registry_folder) as stub:
        done = asyncio.Event()

        async def user(number):
            while not done.is_set():
                answers.append(await one(stub, number, seeds[len(answers) % len(seeds)]))

        users = [asyncio.create_task(user(number)) for number in range(6)]
        for turn in range(8):
            count = len(answers)
            await stub.Reload(policy_pb2.ReloadRequest(checkpoint=names[(turn + 1) % 2]))
            while len(answers) < count + 12:
                await asyncio.sleep(0.01)
        done.set()
        await asyncio.gather(*users)
        alone = {}
        for name in names:
            version = (await stub.Reload(policy_pb2.ReloadRequest(checkpoint=name))).current
            for seed in seeds:
                alone[version.digest, seed] = (await one(stub, 1, seed))[1]
    assert len({model.digest for model, _, _ in answers}) == 2
    assert all(ids == alone[model.digest, seed] for model, ids, seed in answers)
    assert all(alone[a, s] != alone[b, s] for a, b in [tuple({d for d, _ in alone})] for s in seeds)
