"""The terminal client, against a server that says what a test wants said (the real one: test_run.py)."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from rich.console import Console

from charter.app import chat
from charter.app.chat import ChatOptions, Conversation, ask, describe, printable
from charter.errors import BackendError, BackendUnavailable, RequestError

REPORT = {
    "verdict": "revised",
    "rounds": 1,
    "principles": [{"id": "no-burglary", "before": 0.93, "after": 0.02}],
    "timings_ms": {"total": 640.0},
    "policy_version": "seed",
}


@asynccontextmanager
async def _endpoint(*lines: str, status: int = 200) -> AsyncIterator[tuple[str, list[web.Request]]]:
    seen: list[web.Request] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        seen.append(request)
        if status != 200:
            return web.Response(status=status, text=lines[0])
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            await response.write(f"{line}\n\n".encode())
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


def _delta(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})


async def test_an_answer_is_streamed_and_its_verdict_stands_beneath() -> None:
    last = "data: " + json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}], "charter": REPORT})
    lines = (": heartbeat", _delta("First take "), _delta("the key."), last, "data: [DONE]")
    shown = io.StringIO()
    async with _endpoint(*lines) as (url, seen):
        options = ChatOptions(url, key="ck-1", guard="observe", temperature=0.0)
        answer = await chat._answer(
            options, Conversation("Be kind.").with_question("Hi"), Console(file=shown)
        )
        sent = await seen[0].json()
    assert answer == "First take the key."
    assert shown.getvalue() == f"First take the key.\n  {describe(REPORT)}\n"
    assert [m["role"] for m in sent["messages"]] == ["system", "user"]
    assert sent["temperature"] == 0.0
    assert sent["stream"] is True
    assert seen[0].headers["authorization"] == "Bearer ck-1"
    assert seen[0].headers["x-charter-guard"] == "observe"


def test_the_verdict_names_rounds_principles_and_time() -> None:
    assert describe(REPORT) == "revised · 1 round of revision · no-burglary 0.93 → 0.02 · 0.6 s · seed"
    assert describe({"verdict": "passed", "rounds": 0, "principles": []}) == "passed · 0.0 s"


async def test_failures_are_one_sentence_with_the_remedy() -> None:
    with pytest.raises(BackendUnavailable, match=r"nothing answers at http://127\.0\.0\.1:9; start it"):
        [event async for event in ask(ChatOptions("http://127.0.0.1:9"), [])]
    with pytest.raises(RequestError, match="is not an address"):
        [event async for event in ask(ChatOptions("nonsense"), [])]
    refusal = json.dumps({"error": {"message": "A key is needed."}})
    async with _endpoint(refusal, status=401) as (url, _):
        with pytest.raises(RequestError, match=r"A key is needed\. \(give a key with --key"):
            [event async for event in ask(ChatOptions(url), [])]
    async with _endpoint("<html>", status=502) as (url, _):
        with pytest.raises(BackendUnavailable, match="status 502"):
            [event async for event in ask(ChatOptions(url), [])]
    async with _endpoint('data: {"error": {"message": "The critic has gone."}}') as (url, _):
        with pytest.raises(BackendError, match="The critic has gone"):
            [event async for event in ask(ChatOptions(url), [])]


def test_an_answer_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x9b1mc\x07\td\ne") == "a[2Jb1mc\td\ne"


def test_only_finished_exchanges_are_remembered() -> None:
    conversation = Conversation()
    conversation.with_question("lost")
    conversation.add("Hi", "Hello.")
    assert [turn["content"] for turn in conversation.with_question("More")] == ["Hi", "Hello.", "More"]
