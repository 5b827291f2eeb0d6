"""Server-sent events of an OpenAI-compatible server, cut wherever a network may cut them."""

import asyncio
import contextlib
import json

import pytest
from tests.lm.conftest import ask

from charter.errors import BackendError, BackendUnavailable
from charter.lm import open_model
from charter.lm.base import FinishReason, Sampling
from charter.lm.remote import EventReader

TEXT = "Grüße 世界 🗝️\n: data: [DONE] no"


def _events(end=b"\n"):
    """A stream as servers send it: role first, a piece for each character, the usage, and the end."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": c} for c in TEXT)]
    chunks = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}})
    lines = [b": keep-alive", b"", b"event: message", b"id: 1"]
    for chunk in chunks:
        lines += [b"data: " + json.dumps(chunk, ensure_ascii=False).encode(), b""]
    return end.join([*lines, b"data: [DONE]", b"", b""])


def _read(pieces):
    reader = EventReader()
    found = [data for piece in pieces for data in reader.feed(piece)]
    return [*found, *reader.end()]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_are_the_same_wherever_they_are_cut(end):
    stream = _events(end)
    whole = _read([stream])
    assert whole == _read([_events()])
    assert whole[-1] == b"[DONE]"
    assert len(whole) == len(TEXT) + 4
    for place in range(1, len(stream)):
        assert _read([stream[:place], stream[place:]]) == whole, f"cut at {place}"
    assert _read([bytes([byte]) for byte in stream]) == whole


def test_several_data_lines_are_one_event_and_what_is_no_data_is_passed_over():
    stream = b"\xef\xbb\xbfdata: {\ndata:  1}\nretry: 5\n\ndata\n\ndata:\n\n:x\n\ndata: last"
    assert _read([stream]) == [b"{\n 1}", b"last"]


def test_a_line_that_never_ends_is_refused():
    with pytest.raises(BackendError, match="without an end"):
        _read([b"x" * 65536] * 200)


@contextlib.asynccontextmanager
async def _server(pieces, *, chunked=True, broken=False):
    """A bare HTTP server that sends these pieces one after another, each in a packet of its own."""

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(x[15:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:"))
        await reader.readexactly(length)
        coding = b"Transfer-Encoding: chunked\r\n" if chunked else b"Connection: close\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + coding + b"\r\n")
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                await writer.drain()
                await asyncio.sleep(0)
            if chunked and not broken:
                writer.write(b"0\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    model = open_model(f"openai+http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1#m")
    try:
        yield model
    finally:
        await model.close()
        server.close()
        await server.wait_closed()


async def _streamed(model):
    return [chunk async for chunk in model.stream(ask("Hello"), Sampling(max_tokens=9))]


def _pieces(stream, size):
    return [stream[i : i + size] for i in range(0, len(stream), size)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_stream_reads_the_same_through_a_network_that_cuts_it_anywhere(end, size, chunked):
    """A byte at a time cuts every line, every CR LF and every character of several bytes."""
    async with _server(_pieces(_events(end), size), chunked=chunked) as model:
        chunks = await _streamed(model)
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [FinishReason.LENGTH]
    assert (chunks[-1].prompt_tokens, chunks[-1].completion_tokens) == (7, 9)


async def test_what_comes_after_the_end_is_not_read():
    async with _server([_events(), b"data: this is no JSON\n\n"]) as model:
        assert "".join(chunk.text for chunk in await _streamed(model)) == TEXT


async def test_a_last_event_without_its_empty_line_counts():
    stream = _events().removesuffix(b"data: [DONE]\n\n").removesuffix(b"\n\n")
    async with _server([stream], chunked=False) as model:
        assert (await _streamed(model))[-1].completion_tokens == 9


@pytest.mark.parametrize(
    ("pieces", "options", "error", "says"),
    [
        ([_events()[:300]], {"broken": True}, BackendUnavailable, "broke off"),
        ([b"data: {cut\n\n"], {}, BackendError, r"an event that is not JSON: '\{cut'"),
        ([_events()[:400]], {"chunked": False}, BackendError, "not JSON|without a finish reason"),
        ([b'data: {"error": {"message": "out of memory"}}\n\n'], {}, BackendError, "out of memory"),
        ([b"data: [DONE]\n\n"], {}, BackendError, "without a finish reason"),
    ],
)
async def test_a_stream_that_breaks_off_is_an_error_of_ours(pieces, options, error, says):
    async with _server(pieces, **options) as model:
        with pytest.raises(error, match=says):
            await _streamed(model)
