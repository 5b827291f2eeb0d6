"""What the gateway costs: requests per second and added latency with guard `off`, beside two pass-throughs.

    python bench/gateway.py [--seconds 3] [--rounds 3] [--json FILE]

One HTTP stub without think time stands behind all three: Charter's gateway (as `openai+http://`), FastAPI
with httpx, and FastAPI with aiohttp. Each gateway is a process of its own on the first core; the stub and
the load share the second, and both speak HTTP from bytes made beforehand, so that they cost little.
Rounds are interleaved and medians taken. Added latency is the median through the gateway less the median
straight to the stub at the same concurrency. The gateway does its whole work: validation, limits, a
request id, metrics, a structured line in the log, the `charter` field. The pass-throughs do nothing.
Targets, at concurrency 64: at least 2 times httpx and 0.3 times aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

TOKENS = 64
CONCURRENCIES = (1, 16, 64)
GATEWAYS = ("charter", "httpx", "aiohttp")
TARGETS = {"httpx": 2.0, "aiohttp": 0.3}

# The stub: answers from bytes made beforehand ---------------------------------------------------------------


def _stub_answers() -> tuple[bytes, bytes]:
    """A whole completion, and a stream of `TOKENS` events in one chunked response."""
    head = {"id": "stub", "created": 0, "model": "stub"}
    usage = {"prompt_tokens": 9, "completion_tokens": TOKENS, "total_tokens": TOKENS + 9}
    message = {"role": "assistant", "content": "word " * TOKENS}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = json.dumps(head | {"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
    length = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(whole)}\r\n\r\n"

    def event(delta: dict[str, str], reason: str | None, **more: Any) -> bytes:
        chunk = {"object": "chat.completion.chunk", **more}
        chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": reason}]
        return _chunked(b"data: " + json.dumps(head | chunk).encode() + b"\n\n")

    parts = [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"]
    parts += [event({"content": "word "}, None) for _ in range(TOKENS)]
    parts += [event({}, "stop", usage=usage), _chunked(b"data: [DONE]\n\n"), b"0\r\n\r\n"]
    return length.encode() + whole, b"".join(parts)


def _chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class _Stub(asyncio.Protocol):
    """Just enough of HTTP/1.1: a request ends after the bytes that its Content-Length says."""

    whole, stream = _stub_answers()

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + size], self._buffer[end + 4 + size :]
            streamed = b'"stream": true' in body or b'"stream":true' in body
            self._transport.write(self.stream if streamed else self.whole)


async def _serve_stub(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Stub, "127.0.0.1", port)
    await server.serve_forever()


# The gateways ----------------------------------------------------------------------------------------------


def serve_httpx(port: int, upstream: str) -> None:
    """FastAPI passing through with httpx."""
    import httpx
    import uvicorn

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        client = request.app.state.client
        asked = client.build_request("POST", f"{upstream}/chat/completions", json=body)
        if not body.get("stream"):
            answer = await client.send(asked)
            return Response(answer.content, answer.status_code, media_type="application/json")
        answer = await client.send(asked, stream=True)

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:
                await answer.aclose()

        return StreamingResponse(parts(), answer.status_code, media_type="text/event-stream")

    uvicorn.run(app, port=port, log_level="error", access_log=False)


def serve_aiohttp(port: int, upstream: str) -> None:
    """FastAPI passing through with aiohttp."""
    import aiohttp
    import uvicorn

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        session = request.app.state.session
        if not body.get("stream"):
            async with session.post(f"{upstream}/chat/completions", json=body) as answer:
                return Response(await answer.read(), answer.status, media_type="application/json")
        answer = await session.post(f"{upstream}/chat/completions", json=body)

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for part in answer.content.iter_any():
                    yield part
            finally:
                answer.release()

        return StreamingResponse(parts(), answer.status, media_type="text/event-stream")

    uvicorn.run(app, port=port, log_level="error", access_log=False)


def serve_charter(port: int, upstream: str) -> None:
    """The gateway as it is, guard off; its log goes nowhere, and is written all the same."""
    import uvloop
    from prometheus_client import CollectorRegistry

    from charter.gateway.config import GatewayConfig
    from charter.gateway.guard import GuardMode
    from charter.gateway.server import run
    from charter.telemetry import configure

    configure("INFO", json=True, stream=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
    policy = f"openai+{upstream}#stub"
    config = GatewayConfig(port=port, policy=policy, model="stub", guard=GuardMode.OFF, max_running=256)
    uvloop.run(run(config, CollectorRegistry()))


# The load --------------------------------------------------------------------------------------------------


class _Asker(asyncio.Protocol):
    """One connection that asks again as soon as it was answered."""

    def __init__(self, request: bytes, stream: bool, until: float, latencies: list[float]) -> None:
        self._request, self._stream, self._until, self._latencies = request, stream, until, latencies
        self._buffer = bytearray()
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._buffer.clear()
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._complete():
            return
        if not self._buffer.startswith(b"HTTP/1.1 200"):
            self._fail(f"the answer was {bytes(self._buffer[:300])!r}")
            return
        now = time.perf_counter()
        self._latencies.append(now - self._began)
        if now < self._until:
            self._ask()
        elif not self.done.done():
            self.done.set_result(None)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection broke: {error}")

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(reason))

    def _complete(self) -> bool:
        if self._stream and self._buffer.startswith(b"HTTP/1.1 200"):
            return self._buffer.endswith(b"0\r\n\r\n") and b"[DONE]" in self._buffer[-64:]
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._buffer[:end]).lower()
        size = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        return len(self._buffer) >= end + 4 + size


@dataclass
class Cell:
    """One gateway at one concurrency for some seconds."""

    per_second: float
    median_ms: float
    p95_ms: float
    cpu_s_per_thousand: float


async def _load(port: int, concurrency: int, stream: bool, seconds: float) -> tuple[list[float], float]:
    body = {
        "model": "stub",
        "messages": [{"role": "user", "content": "How do I open a door?"}],
        "stream": stream,
    }
    text = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(text)}\r\n\r\n".encode() + text
    latencies: list[float] = []
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    askers = [
        (await loop.create_connection(
            lambda: _Asker(request, stream, began + seconds, latencies), "127.0.0.1", port
        ))[1]
        for _ in range(concurrency)
    ]  # fmt: skip
    await asyncio.gather(*(a.done for a in askers))
    return latencies, time.perf_counter() - began


def measure(port: int, pid: int, concurrency: int, stream: bool, seconds: float) -> Cell:
    """Asks for `seconds` at this concurrency, after a short warm-up."""
    import uvloop

    uvloop.run(_load(port, concurrency, stream, min(0.5, seconds / 4)))
    cpu = _cpu_seconds(pid)
    latencies, wall = uvloop.run(_load(port, concurrency, stream, seconds))
    cpu = _cpu_seconds(pid) - cpu
    latencies.sort()
    return Cell(
        len(latencies) / wall,
        statistics.median(latencies) * 1000,
        latencies[int(0.95 * (len(latencies) - 1))] * 1000,
        cpu / len(latencies) * 1000,
    )


# Processes -------------------------------------------------------------------------------------------------


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def _process(role: str, upstream: str = "") -> Iterator[tuple[int, int]]:
    """Port and process id of a role that answers."""
    port = _free_port()
    command = [sys.executable, __file__, "--role", role, "--port", str(port), "--upstream", upstream]
    process = subprocess.Popen(command)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            if process.poll() is not None:
                raise RuntimeError(f"{role} stopped with status {process.returncode} while it started")
            time.sleep(0.05)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(20)


def _pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def _run_role(role: str, port: int, upstream: str) -> None:
    _pin(1 if role == "stub" else 0)
    if role == "stub":
        import uvloop

        uvloop.run(_serve_stub(port))
    else:
        {"httpx": serve_httpx, "aiohttp": serve_aiohttp, "charter": serve_charter}[role](port, upstream)


# The report ------------------------------------------------------------------------------------------------


def run(seconds: float, rounds: int) -> dict[str, Any]:
    """All cells, interleaved; medians over the rounds."""
    cells: dict[tuple[str, bool, int], list[Cell]] = {}
    peaks = {}
    with contextlib.ExitStack() as stack:
        stub_port, stub_pid = stack.enter_context(_process("stub"))
        upstream = f"http://127.0.0.1:{stub_port}/v1"
        running = {name: stack.enter_context(_process(name, upstream)) for name in GATEWAYS}
        running["direct"] = (stub_port, stub_pid)
        _pin(1)
        for round_ in range(rounds):
            for stream in (False, True):
                for concurrency in CONCURRENCIES:
                    for name, (port, pid) in running.items():
                        cell = measure(port, pid, concurrency, stream, seconds)
                        cells.setdefault((name, stream, concurrency), []).append(cell)
                        print(f"  round {round_ + 1} {name:8} {_kind(stream):6} at {concurrency:2}: "
                              f"{cell.per_second:8.0f}/s", file=sys.stderr)  # fmt: skip
        peaks = {name: round(_peak_mib(pid), 1) for name, (_, pid) in running.items() if name != "direct"}
    rows = []
    for (name, stream, concurrency), found in cells.items():
        direct = statistics.median(c.median_ms for c in cells["direct", stream, concurrency])
        row = {f: round(statistics.median(getattr(c, f) for c in found), 3) for f in Cell.__annotations__}
        row["added_ms"] = round(row["median_ms"] - direct, 3)
        rows.append({"gateway": name, "kind": _kind(stream), "concurrency": concurrency} | row)
    return {"seconds": seconds, "rounds": rounds, "rows": rows, "peak_mib": peaks, "ratios": _ratios(rows)}


def _kind(stream: bool) -> str:
    return "stream" if stream else "whole"


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    speed = {(r["gateway"], r["kind"], r["concurrency"]): r["per_second"] for r in rows}
    return [
        {
            "kind": kind,
            "concurrency": concurrency,
            "over": rival,
            "ratio": round(speed["charter", kind, concurrency] / speed[rival, kind, concurrency], 2),
            "target": TARGETS[rival] if concurrency == 64 else None,
        }
        for kind in ("whole", "stream")
        for concurrency in CONCURRENCIES
        for rival in TARGETS
    ]


def show(result: dict[str, Any]) -> None:
    """The table that people read."""
    print("kind    at  gateway   requests/s  median ms  added ms  p95 ms  CPU s/1000")
    for r in sorted(result["rows"], key=lambda r: (r["kind"], r["concurrency"], r["gateway"])):
        print(
            f"{r['kind']:6} {r['concurrency']:3}  {r['gateway']:8} {r['per_second']:11.0f} "
            f"{r['median_ms']:10.2f} {r['added_ms']:9.2f} {r['p95_ms']:7.2f} {r['cpu_s_per_thousand']:11.3f}"
        )
    print("peak memory, MiB:", ", ".join(f"{k} {v}" for k, v in result["peak_mib"].items()))
    for r in result["ratios"]:
        if r["target"]:
            met = "met" if r["ratio"] >= r["target"] else "MISSED"
            where = f"{r['kind']} at {r['concurrency']}"
            print(f"{where}: {r['ratio']} of {r['over']} (target {r['target']}: {met})")


def main() -> None:
    """Runs the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="writes all figures there")
    parser.add_argument("--role", choices=("stub", *GATEWAYS), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--upstream", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        _run_role(args.role, args.port, args.upstream)
        return
    result = run(args.seconds, args.rounds)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
