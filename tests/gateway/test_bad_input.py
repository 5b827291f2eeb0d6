"""Bad input and bad luck: each ends in OpenAI's envelope with a sentence, and the gateway goes on."""

import asyncio
import json

import openai
import pytest
from tests.gateway.deployment import HELLO, critic_model, deployed, http
from tests.scripted import Scripted

from charter.errors import BackendError, ContextOverflow
from charter.gateway.guard import GuardMode

CHAT = "v1/chat/completions"
OFF = {"guard": GuardMode.OFF}


async def refused(made, *, method="POST", path=CHAT, headers=None, **content):
    """Status and error of a request that is refused."""
    async with (
        http(made.url) as session,
        session.request(method, path, headers=headers, **content) as response,
    ):
        body = await response.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert response.headers["X-Request-Id"]
        assert body["error"]["message"].endswith(".")
        return response.status, body["error"]


async def test_malformed_json(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        status, error = await refused(made, data=b'{"model": "charter", ')
        told = {"guard": "-", "stream": "-", "outcome": "invalid_json"}
        assert made.metric("charter_gateway_requests_total", **told) == 1
    assert (status, error["code"]) == (400, "invalid_json")


async def test_wrong_types(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        status, error = await refused(made, json={"model": "charter", "messages": "hello"})
        assert (status, error["param"]) == (400, "messages")
        with pytest.raises(openai.BadRequestError, match="max_tokens: should be a valid integer"):
            await made.ask(max_tokens="many")


async def test_an_unknown_model(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        status, error = await refused(made, json={"model": "gpt-99", "messages": HELLO})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'charter'" in error["message"]


async def test_more_answers_than_allowed(tmp_path):
    async with deployed(tmp_path, max_n=2, **OFF) as made:
        status, error = await refused(made, json={"model": "charter", "messages": HELLO, "n": 3})
    assert (status, error["param"]) == (400, "n")


@pytest.mark.parametrize("declared", [True, False])
async def test_an_oversized_body_is_refused_before_it_is_read_whole(tmp_path, declared):
    body = json.dumps({"model": "charter", "messages": [{"role": "user", "content": "x" * 5000}]}).encode()

    async def parts():
        yield body[:3000]
        yield body[3000:]

    async with deployed(tmp_path, max_body_bytes=4000, **OFF) as made:
        status, error = await refused(made, data=body if declared else parts())
    assert (status, error["code"]) == (413, "request_too_large")
    assert "4000 bytes" in error["message"]


async def test_a_prompt_longer_than_the_context(tmp_path):
    def write(prompt, sampling):
        raise ContextOverflow(
            "the prompt has 900 tokens and the context 512; send fewer or shorter messages."
        )

    async with deployed(tmp_path, policy=Scripted(write), **OFF) as made:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="900 tokens") as caught:
                await made.ask(stream=stream)
            assert caught.value.code == "context_length_exceeded"


async def test_a_conversation_too_long_to_be_checked_is_withheld(tmp_path):
    def weigh(prompt, continuation):
        raise ContextOverflow("too long")

    critic = critic_model()
    critic.weigh = weigh
    async with deployed(tmp_path, critic=critic) as made:
        with pytest.raises(openai.BadRequestError, match="too long for its answer to be checked") as caught:
            await made.ask("some harm")
    assert caught.value.code == "context_length_exceeded"


async def test_a_body_that_never_ends_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("charter.gateway.app._READ_SECONDS", 0.05)

    async def parts():
        yield b'{"model":'
        await asyncio.sleep(20)

    async with deployed(tmp_path, **OFF) as made:
        status, error = await refused(made, data=parts())
    assert (status, error["code"]) == (408, "request_timeout")


async def test_control_characters(tmp_path):
    message = {"role": "user", "content": "hello\x1b[2J"}
    async with deployed(tmp_path, **OFF) as made:
        status, error = await refused(made, json={"model": "charter", "messages": [message]})
    assert (status, error["code"], error["param"]) == (400, "control_character", "messages[0].content")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("GET", "nowhere", (404, "not_found")), ("GET", CHAT, (405, "method_not_allowed")),
     ("POST", "v1/completions", (404, "not_found"))],
)  # fmt: skip
async def test_paths_and_methods_that_do_not_exist(tmp_path, method, path, expected):
    async with deployed(tmp_path, **OFF) as made:
        status, error = await refused(made, method=method, path=path)
    assert (status, error["code"]) == expected


async def test_a_dead_policy_server_gives_503_and_recovers_without_a_restart(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        port = made.policy.port
        await made.policy.drain()
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="cannot be reached just now") as dead:
                await made.ask(stream=stream)
            assert (dead.value.status_code, dead.value.code) == (503, "backend_unavailable")
            assert str(port) not in str(dead.value), "our addresses are not the caller's business"
            assert dead.value.response.headers["Retry-After"]
        async with http(made.url) as session, session.get("readyz") as ready:
            assert ready.status == 503
            assert (await ready.json())["policy"] == "cannot be reached"
        await made.start_policy(port)
        assert await _eventually(made) == "back again"


async def _eventually(made):
    while True:
        try:
            return (await made.ask("back again")).choices[0].message.content
        except openai.InternalServerError:
            await asyncio.sleep(0.05)


async def test_a_policy_that_dies_in_mid_stream_ends_it_with_an_error_event(tmp_path):
    policy = Scripted(lambda p, s: "one two three", gate=asyncio.Event())
    async with deployed(tmp_path, policy=policy, **OFF) as made:
        stream = aiter(await made.ask(stream=True))
        await anext(stream)
        await made.policy.drain()
        with pytest.raises(openai.APIError, match=r"cannot be reached|failed"):
            async for _ in stream:
                pass
        assert made.metric("charter_gateway_running") == 0


async def test_an_unforeseen_failure_tells_nothing_of_the_words(tmp_path, caplog):
    def write(prompt, sampling):
        raise BackendError("failed on the words: my secret diary")

    async with deployed(tmp_path, policy=Scripted(write), **OFF) as made:
        with pytest.raises(openai.InternalServerError) as failed:
            await made.ask(messages=[{"role": "user", "content": "my secret diary"}])
    assert "secret diary" not in str(failed.value)


async def test_an_answer_that_takes_too_long_is_given_up(tmp_path):
    policy = Scripted(gate=asyncio.Event())
    async with deployed(tmp_path, policy=policy, request_seconds=0.3, **OFF) as made:
        with pytest.raises(openai.InternalServerError, match=r"took longer|deadline") as late:
            await made.ask()
        assert late.value.status_code == 504
        await _idle(made)


async def _idle(made):
    """Returns when the policy server has nothing running; bounded by the test's own time limit."""
    while (await made.policy_status()).running:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("guard", ["off", "gated"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_cancels_the_work_down_to_the_model(tmp_path, guard, stream):
    policy = Scripted(lambda p, s: "one two three", gate=asyncio.Event())
    async with deployed(tmp_path, policy=policy) as made:
        body = {"model": "charter", "messages": HELLO, "stream": stream, "n": 2, "charter": {"guard": guard}}
        async with http(made.url) as session:
            asking = asyncio.create_task(session.post(CHAT, json=body))
            while (await made.policy_status()).running < 2:
                await asyncio.sleep(0.01)
            asking.cancel()
            if asking.done() and not asking.cancelled():
                asking.result().close()
        await _idle(made)
        while made.metric("charter_gateway_running"):
            await asyncio.sleep(0.01)
        told = {"guard": guard, "stream": "yes" if stream else "no", "outcome": "cancelled"}
        while not made.metric("charter_gateway_requests_total", **told):
            await asyncio.sleep(0.01)


async def test_a_client_that_hangs_up_while_the_critic_works_cancels_that_too(tmp_path):
    critic = critic_model()
    critic.gate = asyncio.Event()
    async with deployed(tmp_path, critic=critic) as made:
        async with http(made.url) as session:
            asking = asyncio.create_task(session.post(CHAT, json={"model": "charter", "messages": HELLO}))
            while not critic.running:
                await asyncio.sleep(0.01)
            asking.cancel()
        while critic.running:
            await asyncio.sleep(0.01)


async def test_an_unreadable_constitution_changes_nothing(tmp_path):
    async with deployed(tmp_path) as made:
        before = (await made.ask("some harm")).charter
        made.constitution.write_text("principles: [oh no")
        while not made.metric("charter_constitution_reloads_total", service="gateway", outcome="refused"):
            await asyncio.sleep(0.05)
        after = (await made.ask("some harm")).charter
    assert after["constitution"] == before["constitution"]
    assert after["verdict"] == "revised"


async def test_a_new_constitution_comes_into_force_without_a_restart(tmp_path):
    async with deployed(tmp_path) as made:
        before = (await made.ask("useless")).charter
        made.constitution.write_text(made.constitution.read_text().replace("priority: 2", "priority: 1"))
        while (after := (await made.ask("useless")).charter)["constitution"] == before["constitution"]:
            await asyncio.sleep(0.05)
        await made.ask("useless")
        in_force = {s.labels["digest"] for m in made.registry.collect() for s in m.samples
                    if s.name == "charter_constitution_info"}  # fmt: skip
    assert in_force == {after["constitution"][:16]}


async def test_a_client_that_goes_while_it_sends_leaves_no_trace(tmp_path, caplog):
    async with deployed(tmp_path, **OFF) as made:
        _, writer = await asyncio.open_connection("127.0.0.1", made.gateway.port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100\r\n\r\n"
        writer.write(f'{head}{{"model":'.encode())
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        assert (await made.ask("still here")).choices[0].message.content == "still here"
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
