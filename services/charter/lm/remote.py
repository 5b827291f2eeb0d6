"""What the HTTP backends share: requests that fail as our errors, and contents without control words.

A remote server tokenises text, and most recognise special tokens in what users wrote. The words that
chat formats use for control are therefore broken up by a space (`defused`) before they leave.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp

from charter.errors import (
    BackendError,
    BackendUnavailable,
    BackendUnsupported,
    ConfigError,
    ContextOverflow,
    Overloaded,
    RequestError,
)
from charter.lm.base import ChatMessage, Conversation

T = TypeVar("T")

_CONTROL = re.compile(
    r"<(?=[|｜][^<>\n]{1,60}[|｜]>|/?s>|/?SYS>>|<SYS>>|(?:start|end)_of_turn>|/?(?:bos|eos|pad|unk)>)"
    r"|\[(?=/?INST\])"
)
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\n|\Z)")
_LONGEST_LINE = 1 << 23
_OVERFLOW = re.compile(r"context length|max_total_tokens|max_input_tokens|must have less than|too long", re.I)


def defused(text: str) -> str:
    """The text with control words of common chat formats broken up: `<|end|>` becomes `< |end|>`."""
    return _CONTROL.sub(lambda m: m.group() + " ", text)


def turns(messages: Conversation) -> list[dict[str, str]]:
    """A conversation as JSON, contents defused; raises `RequestError` for an empty one."""
    if not messages:
        raise RequestError("the conversation is empty; it needs at least one message")
    return [_turn(m) for m in messages]


def _turn(message: ChatMessage) -> dict[str, str]:
    return {"role": message.role.value, "content": defused(message.content)}


class EventReader:
    """Splits a byte stream into the data of server-sent events, however it was cut.

    https://html.spec.whatwg.org/multipage/server-sent-events.html: lines end in LF, CR LF or CR, several
    `data:` lines make one event, an empty line ends it. All else (comments, names, ids) is passed over.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._begun = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that these bytes complete. Raises `BackendError` for an endless line."""
        if self._rest.endswith(b"\r"):  # perhaps the first half of CR LF
            del self._rest[-1]
            piece = b"\r" + piece
        first, *others = _LINE_END.split(piece)
        self._rest += first
        if not others:
            if len(self._rest) > _LONGEST_LINE:
                raise BackendError(
                    f"a line of {len(self._rest)} bytes without an end; the server does not send events"
                )
            return []
        lines = [bytes(self._rest), *others[:-1]]
        self._rest = bytearray(others[-1])
        return [data for line in lines if (data := self._line(line)) is not None]

    def end(self) -> list[bytes]:
        """The event that was not ended by an empty line, as some servers leave their last one."""
        found = [self._line(line) for line in (bytes(self._rest.rstrip(b"\r")), b"")]
        return [data for data in found if data is not None]

    def _line(self, line: bytes) -> bytes | None:
        if not self._begun:
            line, self._begun = line.removeprefix(codecs.BOM_UTF8), True
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        whole, self._data = b"\n".join(self._data).strip(), []
        return whole or None


class HttpServer:
    """A server that speaks JSON; its session is made in the loop that first uses it."""

    def __init__(self, base: str, *, api_key: str = "", timeout_s: float = 120.0) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"timeout_s is {timeout_s}; give seconds above 0")
        self.base = base
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10)
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The JSON at a path."""
        return await self._json("GET", path, None, timeout_s)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that answers a JSON body."""
        return await self._json("POST", path, body, None)

    async def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> Any:
        try:
            async with await self._request(method, path, body, timeout_s) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as e:
            raise unreachable(self.base, e) from e
        try:
            return json.loads(text)
        except ValueError as e:
            raise BackendError(f"{self.base}{path} answered with something that is not JSON") from e

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """The JSON of each server-sent event up to `[DONE]`; closing the iterator hangs up.

        Raises `BackendError` for an event that is not JSON.
        """
        reader = EventReader()
        try:
            async with await self._request("POST", path, body, None) as response:
                async for piece in response.content.iter_any():
                    for data in reader.feed(piece):
                        if data == b"[DONE]":
                            return
                        yield self._event(data)
                for data in reader.end():
                    if data == b"[DONE]":
                        return
                    yield self._event(data)
        except (aiohttp.ClientError, TimeoutError) as e:
            raise unreachable(self.base, e) from e

    def _event(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as e:
            raise BackendError(
                f"{self.base} sent an event that is not JSON: {data[:100].decode(errors='replace')!r}"
            ) from e

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> aiohttp.ClientResponse:
        """A response of success; raises what any other means."""
        timeout = self._timeout if timeout_s is None else aiohttp.ClientTimeout(total=timeout_s)
        session, url = self._open(), f"{self.base}{path}"
        try:
            response = await session.request(method, url, json=body, timeout=timeout)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            # The server had closed an idle connection of the pool. It has no answer begun, so asking
            # again repeats nothing.
            response = await session.request(method, url, json=body, timeout=timeout)
        if response.status >= 400:
            async with response:
                raise http_error(response.status, await response.text(), url)
        return response

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                timeout=self._timeout,
                connector=aiohttp.TCPConnector(limit=0),  # the caller's own limits decide
            )
        return self._session

    async def close(self) -> None:
        """Closes the connections; safe to repeat."""
        if self._session is not None:
            await self._session.close()


def unreachable(base: str, error: BaseException) -> BackendUnavailable:
    """The server cannot be reached, or broke off."""
    return BackendUnavailable(
        f"{base} cannot be reached or broke off ({type(error).__name__}: {error}); is the server running?"
    )


def http_error(status: int, text: str, where: str) -> Exception:
    """What an HTTP status means in our tree, with the server's own words."""
    said = _message(text)
    if status in (400, 413, 422) and _OVERFLOW.search(said):
        return ContextOverflow(f"{where} says: {said}")
    if status == 429:
        return Overloaded(f"{where} is overloaded: {said}")
    if status in (502, 503, 504):
        return BackendUnavailable(f"{where} is unavailable now ({status}): {said}")
    if status in (404, 405, 501):
        return BackendUnsupported(f"{where} does not offer this ({status}): {said}")
    if status in (400, 422):
        return RequestError(f"{where} refused the request: {said}")
    return BackendError(f"{where} failed with {status}: {said}")


def _message(text: str) -> str:
    try:
        found = json.loads(text)
        for key in ("error", "detail", "message"):
            inner = found.get(key) if isinstance(found, dict) else None
            if isinstance(inner, dict):
                inner = inner.get("message")
            if inner:
                return str(inner)[:500]
    except ValueError:
        pass
    return text[:500]


async def gathered(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first failure, or being cancelled, cancels the rest and waits for them to end."""
    tasks = [asyncio.ensure_future(c) for c in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
