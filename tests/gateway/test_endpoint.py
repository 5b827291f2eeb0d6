"""The endpoint before the official openai client, over real gRPC servers."""

import asyncio
import threading

import openai
import pytest
from tests.gateway.deployment import HELLO, deployed, http
from tests.scripted import Scripted

from charter.gateway.guard import GuardMode
from charter.lm.base import Role

OFF = {"guard": GuardMode.OFF}


async def test_one_answer_with_usage_version_and_report(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        done = await made.ask("good day to you", seed=7, temperature=0.3, max_tokens=9, stop=["END"])
    assert done.choices[0].message.content == "good day to you"
    assert done.choices[0].finish_reason == "stop"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 4, 7)
    assert done.model == "charter"
    assert done.charter["policy_version"] == "scripted"
    assert done.charter["verdict"] == "unassessed"
    sampling = made.policy_model.samplings[-1]
    assert (sampling.seed, sampling.temperature, sampling.max_tokens, sampling.stop) == (7, 0.3, 9, ("END",))


async def test_the_model_reads_system_messages_and_all_turns(tmp_path):
    turns = [("system", "Be kind."), ("user", "hello"), ("assistant", "hi"), ("user", "and now?")]
    async with deployed(tmp_path, **OFF) as made:
        await made.ask("fine", messages=[{"role": r, "content": c} for r, c in turns])
    read = made.policy_model.prompts[-1].messages
    assert [(m.role.value, m.content) for m in read] == turns
    assert read[0].role is Role.SYSTEM


async def test_an_answer_cut_at_its_length_says_so(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        done = await made.ask("one two three four", max_completion_tokens=2)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("one two ", "length")


async def test_several_answers_and_their_logprobs(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        done = await made.ask("well met", n=3, logprobs=True, top_logprobs=2)
    assert [c.index for c in done.choices] == [0, 1, 2]
    assert [t.token for t in done.choices[2].logprobs.content] == ["well ", "met"]
    assert done.choices[0].logprobs.content[0].logprob == -0.5
    assert done.choices[0].logprobs.content[0].bytes == list(b"well ")
    assert done.usage.completion_tokens == 6


async def test_a_stream_gives_role_text_reason_counts_and_report(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        stream = await made.ask("one two three", stream=True, stream_options={"include_usage": True})
        chunks = [c async for c in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 6
    assert chunks[-1].charter["policy_version"] == "scripted"
    assert len({c.id for c in chunks}) == 1


async def test_without_counts_the_last_chunk_of_a_stream_has_the_report(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        chunks = [c async for c in await made.ask("one two", stream=True, n=2, logprobs=True)]
    reports = [i for i, c in enumerate(chunks) if getattr(c, "charter", None)]
    assert reports == [len(chunks) - 1]
    assert {c.choices[0].index for c in chunks} == {0, 1}
    assert all(c.usage is None for c in chunks)
    said = [c.choices[0] for c in chunks if c.choices[0].delta.content]
    assert [c.logprobs.content[0].token for c in said if c.index == 1] == ["one ", "two"]


async def test_tokens_leave_at_once_when_nothing_holds_them_back(tmp_path):
    policy = Scripted(lambda p, s: "first second third", gate=asyncio.Event())
    async with deployed(tmp_path, policy=policy, **OFF) as made:
        stream = await made.ask(stream=True)
        chunks = aiter(stream)
        assert (await anext(chunks)).choices[0].delta.role == "assistant"
        assert (await anext(chunks)).choices[0].delta.content == "first "
        policy.gate.set()
        assert "".join([c.choices[0].delta.content or "" async for c in chunks]) == "second third"


async def test_the_synchronous_client_works_unchanged(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        made.policy_model.write = lambda p, s: "hello from afar"

        def talk():
            with openai.OpenAI(base_url=made.url, api_key="none") as client:
                whole = client.chat.completions.create(model="charter", messages=HELLO)
                stream = client.chat.completions.create(model="charter", messages=HELLO, stream=True)
                pieces = [c.choices[0].delta.content or "" for c in stream]
                return whole.choices[0].message.content, "".join(pieces), client.models.list().data[0].id

        assert await asyncio.to_thread(talk) == ("hello from afar", "hello from afar", "charter")
        assert threading.active_count() < 20


async def test_the_clients_stream_helper_works(tmp_path):
    async with deployed(tmp_path, **OFF) as made, made.client() as client:
        made.policy_model.write = lambda p, s: "one two"
        async with client.chat.completions.stream(model="charter", messages=HELLO) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
    assert final.choices[0].message.content == "one two"


async def test_models_are_listed_with_what_serves_them(tmp_path):
    async with deployed(tmp_path) as made, made.client() as client:
        (model,) = (await client.models.list()).data
        assert (await client.models.retrieve("charter")).id == model.id == "charter"
        assert model.charter["policy_version"] == "scripted"
        assert model.charter["context_length"] == 512
        with pytest.raises(openai.NotFoundError, match="no model"):
            await client.models.retrieve("other")


async def test_a_request_id_is_taken_over_or_made_and_reaches_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    async with deployed(tmp_path, **OFF) as made, http(made.url) as session:
        body = {"model": "charter", "messages": HELLO}
        chat = "v1/chat/completions"
        async with session.post(chat, json=body, headers={"X-Request-Id": "my-id-1"}) as given:
            assert given.headers["X-Request-Id"] == "my-id-1"
            assert (await given.json())["id"] == "chatcmpl-my-id-1"
        async with session.post(chat, json=body, headers={"X-Request-Id": "a b"}) as forged:
            assert len(forged.headers["X-Request-Id"]) == 16
    answered = [r for r in caplog.records if r.getMessage() == "answered"]
    assert answered[0].charter_fields["status"] == 200
    assert "hello" not in str([r.charter_fields for r in answered])


async def test_health_readiness_and_metrics(tmp_path):
    async with deployed(tmp_path) as made, http(made.url) as session:
        async with session.get("healthz") as healthy, session.get("readyz") as ready:
            assert (healthy.status, ready.status) == (200, 200)
            assert await ready.json() == {"status": "ready", "policy": "ok", "critic": "ok"}
        await made.ask("a good answer")
        async with session.get("metrics") as response:
            text = await response.text()
    assert 'charter_gateway_requests_total{guard="gated",outcome="ok",stream="no"} 1.0' in text
    assert 'charter_gateway_verdicts_total{principle="none",verdict="passed"} 1.0' in text
    assert 'charter_gateway_stage_seconds_count{stage="assess"} 1.0' in text
    assert "hello" not in text


async def test_requests_queue_and_are_turned_away_when_the_queue_is_full(tmp_path):
    policy = Scripted(gate=asyncio.Event())
    async with deployed(tmp_path, policy=policy, max_running=1, max_waiting=1, **OFF) as made:
        first, second = (asyncio.create_task(made.ask()) for _ in range(2))
        while made.metric("charter_gateway_waiting") < 1:
            await asyncio.sleep(0.005)
        with pytest.raises(openai.InternalServerError) as full:
            await made.ask()
        assert full.value.status_code == 503
        assert full.value.code == "overloaded"
        assert int(full.value.response.headers["Retry-After"]) >= 1
        policy.gate.set()
        assert (await first).choices
        assert (await second).choices
    assert policy.most_at_once == 1


async def test_a_stop_lets_answers_under_way_finish(tmp_path):
    policy = Scripted(lambda p, s: "one two", gate=asyncio.Event())
    async with deployed(tmp_path, policy=policy, drain_seconds=10.0, **OFF) as made:
        stream = await made.ask(stream=True)
        draining = asyncio.create_task(made.gateway.drain())
        await asyncio.sleep(0.15)
        policy.gate.set()
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "one two"
        await draining
