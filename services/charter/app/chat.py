"""`charter chat`: a conversation in the terminal over the OpenAI endpoint, each answer with its verdict.

Everything that arrives is printed without its control characters, so that no answer can drive the terminal.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from rich.console import Console
from rich.text import Text

from charter.errors import BackendError, BackendUnavailable, CharterError, RequestError

HELP = "/clear forgets the conversation, /history shows it, /quit (or Ctrl-D) leaves; Ctrl-C stops an answer."


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What `charter chat` was asked for; None leaves it to the endpoint."""

    url: str
    key: str = ""
    model: str = "charter"
    guard: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None


@dataclass(slots=True)
class Conversation:
    """The turns so far; an answer that failed or was stopped leaves no trace of its question."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def with_question(self, question: str) -> list[dict[str, str]]:
        """The messages to send."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return [*start, *self.turns, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        """Notes a finished exchange."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of the answer's stream: text, or what the guard says of the whole answer."""

    text: str = ""
    verdict: dict[str, Any] | None = None


def run_chat(options: ChatOptions) -> int:
    """Talks until /quit or the end of the input; returns the exit status."""
    console = Console(highlight=False, soft_wrap=True)
    conversation = Conversation(options.system)
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and recall in input()
    console.print(Text(f"Charter at {options.url}. {HELP}", style="dim"))
    with asyncio.Runner() as runner:
        while True:
            question = _read(console)
            if question is None or question == "/quit":
                return 0
            if question.startswith("/"):
                _command(question, conversation, console)
            elif question:
                with suppress(KeyboardInterrupt):
                    _exchange(runner, options, conversation, question, console)


def _read(console: Console) -> str | None:
    try:
        return (input("you> ") if sys.stdin.isatty() else input()).strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _command(command: str, conversation: Conversation, console: Console) -> None:
    if command == "/clear":
        conversation.turns.clear()
        console.print(Text("forgotten", style="dim"))
    elif command == "/history":
        for turn in conversation.turns:
            console.print(Text(f"{turn['role']}: {turn['content']}", style="dim"))
    else:
        console.print(Text(HELP, style="dim"))


def _exchange(
    runner: asyncio.Runner, options: ChatOptions, conversation: Conversation, question: str, console: Console
) -> None:
    try:
        answer = runner.run(_answer(options, conversation.with_question(question), console))
    except CharterError as error:
        console.print(Text(printable(str(error)), style="red"))
        return
    except KeyboardInterrupt:
        console.print(Text("\nstopped", style="dim"))
        raise
    conversation.add(question, answer)


async def _answer(options: ChatOptions, messages: list[dict[str, str]], console: Console) -> str:
    written: list[str] = []
    verdict: dict[str, Any] = {}
    events = ask(options, messages)
    try:
        async for event in events:
            if event.text:
                written.append(event.text)
                console.print(Text(printable(event.text)), end="")
            verdict = event.verdict or verdict
    finally:
        await events.aclose()
    console.print()
    if verdict:
        console.print(Text(f"  {describe(verdict)}", style="dim"))
    return "".join(written)


# The endpoint -----------------------------------------------------------------------------------------------


async def ask(options: ChatOptions, messages: list[dict[str, str]]) -> AsyncGenerator[Event, None]:
    """Streams one answer. Raises `BackendUnavailable`, `BackendError` or `RequestError`, each a sentence."""
    headers = {"authorization": f"Bearer {options.key}"} if options.key else {}
    if options.guard:
        headers["x-charter-guard"] = options.guard
    body: dict[str, Any] = {"model": options.model, "messages": messages, "stream": True}
    body |= {"temperature": options.temperature} if options.temperature is not None else {}
    body |= {"max_tokens": options.max_tokens} if options.max_tokens is not None else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120)
    address = f"{options.url.rstrip('/')}/v1/chat/completions"
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, read_bufsize=2**20) as session,
            session.post(address, json=body, headers=headers) as response,
        ):
            if response.status != 200:
                raise _refusal(response.status, await response.text())
            async for line in response.content:
                for event in _events(line.decode("utf-8", "replace").strip()):
                    yield event
    except aiohttp.ClientConnectorError as error:
        raise BackendUnavailable(
            f"nothing answers at {options.url}; start it with `make run`, or name another address with --url"
        ) from error
    except aiohttp.InvalidURL as error:
        raise RequestError(f"{options.url} is not an address; write it like http://127.0.0.1:8080") from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BackendUnavailable(f"the connection to {options.url} broke ({error or 'timed out'})") from error


def _events(line: str) -> Iterator[Event]:
    """What one line of server-sent events says; comments are heartbeats."""
    if not line.startswith("data:") or line == "data: [DONE]":
        return
    chunk = json.loads(line.removeprefix("data:"))
    if "error" in chunk:
        raise BackendError(str(chunk["error"].get("message", chunk["error"])))
    for choice in chunk.get("choices", ()):
        yield Event(text=(choice.get("delta") or {}).get("content") or "")
    if chunk.get("charter"):
        yield Event(verdict=chunk["charter"])


def _refusal(status: int, body: str) -> CharterError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the endpoint answered with status {status}"
    if status == 401:
        message += " (give a key with --key or CHARTER_API_KEY)"
    return RequestError(message) if status < 500 else BackendUnavailable(message)


# Showing ----------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` without control characters, which could move the cursor or ask the terminal for something."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 0x20 and not 0x7F <= ord(c) <= 0x9F))


def describe(verdict: dict[str, Any]) -> str:
    """The guard's report on an answer in one line: what became of it, under which principles, how fast."""
    rounds = int(verdict.get("rounds") or 0)
    parts = [str(verdict.get("verdict", ""))]
    parts += [f"{rounds} round{'s' if rounds > 1 else ''} of revision"] if rounds else []
    parts += [", ".join(_principle(p) for p in verdict.get("principles") or ())]
    parts += [str(note) for note in verdict.get("notes") or ()]
    parts += [f"{float((verdict.get('timings_ms') or {}).get('total') or 0) / 1000:.1f} s"]
    parts += [str(verdict.get("policy_version") or "")]
    return printable(" · ".join(part for part in parts if part))


def _principle(found: dict[str, Any]) -> str:
    before, after = found.get("before"), found.get("after")
    return f"{found.get('id')} {before}" + ("" if after is None else f" → {after}")
