"""Who may come in: keys, modes, limits, and open doors only on loopback."""

import subprocess
import sys

import openai
import pytest
from prometheus_client import CollectorRegistry
from tests.gateway.deployment import HELLO, deployed, http

from charter.errors import ConfigError
from charter.gateway import server
from charter.gateway.config import GatewayConfig, is_loopback
from charter.gateway.guard import GuardMode
from charter.gateway.keys import add_key, revoke_key

OFF = {"guard": GuardMode.OFF}
ASK = {"model": "charter", "messages": HELLO}


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "keys.json"


async def test_without_keys_loopback_is_open(tmp_path, keys):
    async with deployed(tmp_path, keys=keys, **OFF) as made:
        assert (await made.ask("hi")).choices


async def test_with_keys_a_missing_a_wrong_and_a_revoked_one_stay_outside(tmp_path, keys):
    record, key = add_key(keys, "alice")
    _, other = add_key(keys, "bob")
    async with deployed(tmp_path, keys=keys, **OFF) as made:
        async with http(made.url) as session:
            for path in ("v1/models", "v1/models/charter"):
                async with session.get(path) as response:
                    assert response.status == 401
            async with session.post("v1/chat/completions", json=ASK) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert (await response.json())["error"]["code"] == "missing_api_key"
            async with session.get("healthz") as response:
                assert response.status == 200
        async with made.client(api_key=key[:-2] + "xx") as client:
            with pytest.raises(openai.AuthenticationError, match="not known here") as wrong:
                await client.chat.completions.create(**ASK)
            assert wrong.value.code == "invalid_api_key"
        async with made.client(api_key=key) as client:
            assert (await client.chat.completions.create(**ASK)).choices
        revoke_key(keys, record.id)
        async with made.client(api_key=other) as client:
            assert (await client.models.list()).data


async def test_no_key_is_written_to_the_log(tmp_path, keys, caplog):
    caplog.set_level("DEBUG", logger="charter")
    record, key = add_key(keys, "alice")
    async with deployed(tmp_path, keys=keys, **OFF) as made, made.client(api_key=key) as client:
        await client.chat.completions.create(**ASK)
    said = [(r.getMessage(), getattr(r, "charter_fields", {})) for r in caplog.records]
    assert any(fields.get("key") == record.id for _, fields in said)
    assert key.split("-", 2)[2] not in str(said)


async def test_the_keys_own_guard_mode_holds_and_may_only_be_tightened(tmp_path, keys):
    _, strict = add_key(keys, "strict", guard=GuardMode.GATED)
    _, free = add_key(keys, "free", guard=GuardMode.GATED, weakest_guard=GuardMode.OFF)
    off = {"extra_body": {"charter": {"guard": "off"}}}
    async with deployed(tmp_path, keys=keys) as made:
        made.policy_model.write = lambda p, s: "some harm"
        async with made.client(api_key=strict) as client:
            assert (await client.chat.completions.create(**ASK)).charter["verdict"] == "revised"
            with pytest.raises(openai.PermissionDeniedError, match="weaker"):
                await client.chat.completions.create(**ASK, **off)
        async with made.client(api_key=free) as client:
            assert (await client.chat.completions.create(**ASK, **off)).choices[
                0
            ].message.content == "some harm"
            both = await client.chat.completions.create(
                **ASK, **off, extra_headers={"X-Charter-Guard": "gated"}
            )
            assert both.charter["guard"] == "gated", "of two wishes the stricter counts"


async def test_a_keys_limits_answer_429_with_retry_after(tmp_path, keys):
    _, key = add_key(keys, "alice", requests_per_minute=2)
    _, small = add_key(keys, "bob", tokens_per_minute=50)
    async with deployed(tmp_path, keys=keys, **OFF) as made:
        async with made.client(api_key=key) as client:
            raw = await client.chat.completions.with_raw_response.create(**ASK)
            assert raw.headers["x-ratelimit-remaining-requests"] == "1"
            await client.chat.completions.create(**ASK)
            with pytest.raises(openai.RateLimitError, match="2 requests per minute") as many:
                await client.chat.completions.create(**ASK)
            assert many.value.code == "rate_limit_exceeded"
            assert 1 <= int(many.value.response.headers["Retry-After"]) <= 30
        async with made.client(api_key=small) as client:
            await client.chat.completions.create(**ASK, max_tokens=50)
            with pytest.raises(openai.RateLimitError, match="50 tokens per minute"):
                await client.chat.completions.create(**ASK, max_tokens=50)


async def test_an_open_endpoint_answers_no_foreign_web_page(tmp_path):
    async with deployed(tmp_path, **OFF) as made, http(made.url) as session:
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example:80"}):
            async with session.post("v1/chat/completions", json=ASK, headers=headers) as response:
                assert response.status == 403
                assert (await response.json())["error"]["code"] == "not_loopback"
        async with session.post(
            "v1/chat/completions", json=ASK, headers={"Origin": "http://localhost:3000"}
        ) as own:
            assert own.status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
async def test_an_address_that_others_can_reach_needs_keys(tmp_path, keys, host):
    for file in (None, keys):
        with pytest.raises(ConfigError, match="without API keys"):
            await server.serve(GatewayConfig(host=host, keys=file, **OFF), CollectorRegistry())
    record, _ = add_key(keys, "alice")
    revoke_key(keys, record.id)
    with pytest.raises(ConfigError, match="without API keys"):
        await server.serve(GatewayConfig(host=host, keys=keys, **OFF), CollectorRegistry())


async def test_with_keys_any_address_may_be_listened_on(tmp_path, keys):
    _, key = add_key(keys, "alice")
    async with (
        deployed(tmp_path, host="0.0.0.0", keys=keys, **OFF) as made,
        made.client(api_key=key) as client,
    ):
        assert (await client.chat.completions.create(**ASK)).choices


async def test_a_taken_port_is_told_in_a_sentence(tmp_path):
    async with deployed(tmp_path, **OFF) as made:
        with pytest.raises(ConfigError, match="choose another port"):
            await server.serve(GatewayConfig(port=made.gateway.port, **OFF), CollectorRegistry())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"guard": GuardMode.GATED}, "needs a critic"),
        ({"guard": GuardMode.OFF, "weakest_guard": GuardMode.GATED}, "weaker than the weakest"),
        ({"guard": GuardMode.OFF, "max_running": 0}, "above 0"),
    ],
)
def test_a_configuration_that_cannot_work_says_why(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        GatewayConfig(**fields)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_loopback_is_this_machine_and_nothing_else(host, expected):
    assert is_loopback(host) is expected


def test_the_gateway_serves_without_torch_or_transformers(tmp_path):
    """In a process of its own in which they cannot be imported, as in a pod that has them not."""
    code = """
import asyncio, sys
for name in ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"):
    sys.modules[name] = None
from prometheus_client import CollectorRegistry
from charter.gateway.config import GatewayConfig
from charter.gateway.server import serve
async def main():
    config = GatewayConfig(port=0, critic="127.0.0.1:1", bus=f"sqlite:{sys.argv[1]}")
    async with await serve(config, CollectorRegistry()) as gateway:
        print(gateway.url)
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bus.db")], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("http://127.0.0.1:"), done.stderr
