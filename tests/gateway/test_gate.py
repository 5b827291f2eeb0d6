"""The guard's modes, end to end: what leaves, what does not, and what is said about it."""

import asyncio
import json

import openai
import pytest
from tests.gateway.deployment import HELLO, critic_model, deployed, http
from tests.scripted import Scripted

from charter.errors import ContextOverflow
from charter.gateway.guard import GuardMode, GuardRules


async def raw_chat(made, headers=None, **fields):
    """The response with its headers, which the official client hides."""
    async with http(made.url) as session:
        body = {"model": "charter", "messages": HELLO} | fields
        async with session.post("v1/chat/completions", json=body, headers=headers) as response:
            return response.headers, await response.text()


async def test_a_draft_that_passes_is_given_as_it_is(tmp_path):
    async with deployed(tmp_path) as made:
        done = await made.ask("a fine answer", logprobs=True)
    assert done.choices[0].message.content == "a fine answer"
    assert done.charter["verdict"] == "passed"
    assert done.charter["rounds"] == 0
    assert done.charter["principles"] == []
    assert len(done.charter["constitution"]) == 64
    assert done.charter["critic_version"] == "critic-1"
    assert done.choices[0].logprobs.content[0].token == "a "


async def test_a_draft_in_doubt_is_revised_by_the_worst_principle_and_the_headers_tell(tmp_path):
    async with deployed(tmp_path) as made:
        made.policy_model.write = lambda p, s: "harm, and useless too"
        headers, text = await raw_chat(made, logprobs=True)
    body = json.loads(text)
    assert body["choices"][0]["message"]["content"] == "a good answer"
    assert body["choices"][0]["logprobs"] is None
    report = body["charter"]
    assert (report["verdict"], report["rounds"]) == ("revised", 1)
    assert [p["id"] for p in report["principles"]] == ["no-harm", "be-helpful"]
    assert report["principles"][0]["before"] > 0.9 > 0.1 > report["principles"][0]["after"]
    assert any("logprobs" in note for note in report["notes"])
    assert headers["X-Charter-Verdict"] == "revised"
    assert headers["X-Charter-Rounds"] == "1"
    assert headers["X-Charter-Principles"] == "no-harm,be-helpful"
    assert headers["X-Charter-Constitution"] == report["constitution"]
    assert headers["X-Charter-Policy-Version"] == "scripted"


async def test_one_revision_may_not_undo_another(tmp_path):
    """The first revision mends the harm and tells a secret; only the second passes all principles."""
    answers = {"some harm": "a secret", "a secret": "a good answer"}
    critic = critic_model(lambda answer, request: answers[answer])
    async with deployed(tmp_path, critic=critic) as made:
        done = await made.ask("some harm")
    assert done.choices[0].message.content == "a good answer"
    assert done.charter["rounds"] == 2
    assert [p["id"] for p in done.charter["principles"]] == ["no-harm", "no-secrets"]


async def test_what_no_revision_mends_is_refused_with_the_kind_of_principle(tmp_path):
    critic = critic_model(lambda answer, request: "still harm")
    async with deployed(tmp_path, critic=critic, rules=GuardRules(max_rounds=2)) as made:
        done = await made.ask("much harm")
    said = done.choices[0].message.content
    assert "harm" not in said.replace("Do no harm", "")
    assert "somebody being hurt" in said
    assert "Do no harm" in said
    assert (done.charter["verdict"], done.charter["rounds"]) == ("refused", 2)
    assert done.charter["principles"][0]["after"] is None
    assert made.metric("charter_gateway_verdicts_total", verdict="refused", principle="no-harm") == 1


async def test_without_room_for_a_revision_the_draft_is_judged_as_it_is(tmp_path):
    def no_room(answer, request):
        raise ContextOverflow("the prompt has 600 tokens and the context 512")

    async with deployed(tmp_path, critic=critic_model(no_room)) as made:
        harmful = await made.ask("some harm")
        useless = await made.ask("useless")
    assert (harmful.charter["verdict"], harmful.charter["rounds"]) == ("refused", 0)
    assert (useless.charter["verdict"], useless.choices[0].message.content) == ("flagged", "useless")


async def test_what_stays_only_unhelpful_is_given_and_flagged_rather_than_refused(tmp_path):
    critic = critic_model(lambda answer, request: "useless once more")
    async with deployed(tmp_path, critic=critic, rules=GuardRules(max_rounds=1)) as made:
        done = await made.ask("useless", logprobs=True)
    assert done.choices[0].message.content == "useless once more"
    assert (done.charter["verdict"], done.charter["rounds"]) == ("flagged", 1)
    assert done.choices[0].logprobs is None


async def test_a_refusal_speaks_the_constitutions_language(tmp_path):
    critic = critic_model(lambda answer, request: "still harm")
    async with deployed(tmp_path, critic=critic, language="zh-Hans") as made:
        done = await made.ask("much harm")
    assert "很抱歉" in done.choices[0].message.content


async def test_observe_gives_the_answer_and_reports_the_doubt(tmp_path):
    async with deployed(tmp_path) as made:
        done = await made.ask("some harm", extra_body={"charter": {"guard": "observe"}})
        assert done.choices[0].message.content == "some harm"
        assert done.charter["verdict"] == "flagged"
        assert done.charter["principles"][0]["id"] == "no-harm"
        extra = {"charter": {"guard": "observe"}}
        chunks = [c async for c in await made.ask("some harm", stream=True, extra_body=extra)]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "some harm"
    assert chunks[-1].charter["verdict"] == "flagged"
    assert made.metric("charter_gateway_verdicts_total", verdict="flagged", principle="no-harm") == 2


async def test_off_asks_no_critic(tmp_path):
    async with deployed(tmp_path) as made:
        done = await made.ask("some harm", extra_headers={"X-Charter-Guard": "off"})
        assert made.critic_model.prompts == []
    assert done.choices[0].message.content == "some harm"
    assert done.charter["verdict"] == "unassessed"


async def test_always_revises_even_a_clean_draft(tmp_path):
    async with deployed(tmp_path) as made:
        done = await made.ask("a fine answer", extra_headers={"X-Charter-Guard": "always"})
    assert done.choices[0].message.content == "a good answer"
    assert done.charter["rounds"] == 1


async def test_each_of_several_answers_is_gated(tmp_path):
    drafts = iter(["a fine answer", "some harm", "a secret"])
    async with deployed(tmp_path, policy=Scripted(lambda p, s: next(drafts))) as made:
        headers, text = await raw_chat(made, n=3)
    body = json.loads(text)
    assert [c["message"]["content"] for c in body["choices"]] == [
        "a fine answer",
        "a good answer",
        "a good answer",
    ]
    assert [c["verdict"] for c in body["charter"]["choices"]] == ["passed", "revised", "revised"]
    assert headers["X-Charter-Verdict"] == "revised"
    assert headers["X-Charter-Principles"] == "no-harm,no-secrets"


async def test_nothing_leaves_a_gated_stream_before_the_gate_and_heartbeats_keep_it_open(tmp_path):
    critic = critic_model()
    critic.gate = asyncio.Event()
    async with deployed(tmp_path, critic=critic, heartbeat_seconds=0.03) as made, http(made.url) as session:
        made.policy_model.write = lambda p, s: "some harm here"
        body = {"model": "charter", "messages": HELLO, "stream": True}
        async with session.post("v1/chat/completions", json=body) as response:
            early = [await response.content.readline() for _ in range(6)]
            assert all(line.startswith(b":") for line in early[::2])
            assert all(line == b"\n" for line in early[1::2])
            critic.gate.set()
            rest = await response.text()
    assert "harm here" not in rest
    events = [json.loads(e.removeprefix("data: ")) for e in rest.split("\n\n") if e.startswith("data: {")]
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == "a good answer"
    assert events[-1]["charter"]["verdict"] == "revised"
    assert rest.endswith("data: [DONE]\n\n")


async def test_a_gated_stream_that_is_quick_has_its_verdict_in_the_headers(tmp_path):
    async with deployed(tmp_path) as made:
        made.policy_model.write = lambda p, s: "one two three"
        headers, text = await raw_chat(made, stream=True)
    assert headers["X-Charter-Verdict"] == "passed"
    assert headers["Content-Type"].startswith("text/event-stream")
    assert text.count('"content":"one "') == 1, "the policy's own tokens are the pieces"


async def test_a_guarded_answer_is_withheld_while_the_critic_is_away_and_given_when_it_is_back(tmp_path):
    async with deployed(tmp_path) as made:
        port = made.critic.port
        await made.critic.drain()
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="withheld") as away:
                await made.ask("some harm", stream=stream)
            assert (away.value.status_code, away.value.code) == (503, "guard_unavailable")
            assert away.value.response.headers["Retry-After"]
        observed = await made.ask("some harm", extra_headers={"X-Charter-Guard": "observe"})
        assert observed.charter["verdict"] == "unassessed"
        assert observed.charter["notes"]
        await made.start_critic(port)
        assert await _eventually(made) == "a good answer"


async def _eventually(made):
    """Asks until the connection is back; bounded by the test's own time limit."""
    while True:
        try:
            return (await made.ask("some harm")).choices[0].message.content
        except openai.InternalServerError:
            await asyncio.sleep(0.05)


async def test_fail_open_is_a_choice(tmp_path):
    async with deployed(tmp_path, fail_open=True) as made:
        await made.critic.drain()
        done = await made.ask("some harm")
    assert done.choices[0].message.content == "some harm"
    assert done.charter["verdict"] == "unassessed"


async def test_a_request_may_be_stricter_but_not_weaker_than_allowed(tmp_path):
    async with deployed(tmp_path, weakest_guard=GuardMode.GATED) as made:
        for weaker in (
            {"extra_headers": {"X-Charter-Guard": "off"}},
            {"extra_body": {"charter": {"guard": "observe"}}},
        ):
            with pytest.raises(openai.PermissionDeniedError, match="weaker than this key allows"):
                await made.ask("some harm", **weaker)
        stricter = await made.ask("fine", extra_headers={"X-Charter-Guard": "ALWAYS"})
        assert stricter.charter["guard"] == "always"
        with pytest.raises(openai.BadRequestError, match="must be one of"):
            await made.ask("fine", extra_headers={"X-Charter-Guard": "maybe"})


async def test_a_gateway_without_critic_says_so_when_a_guard_is_asked_for(tmp_path):
    async with deployed(tmp_path, without_critic=True, guard=GuardMode.OFF) as made:
        with pytest.raises(openai.BadRequestError, match="needs a critic"):
            await made.ask("fine", extra_headers={"X-Charter-Guard": "gated"})
