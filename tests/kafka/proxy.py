"""A TCP proxy that can drop, delay and go silent: the network between Charter and a broker."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import threading
from collections.abc import Coroutine
from typing import Any


class Weather(enum.Enum):
    """What the network does to every connection."""

    FINE = "fine"
    SLOW = "slow"
    """Every piece of data arrives `DELAY_S` late."""
    SILENT = "silent"
    """Connections stay open and nothing arrives, as when a cable is cut: half-open connections."""
    REFUSED = "refused"
    """Connections are reset, and new ones refused at once."""
    DEAF = "deaf"
    """Requests arrive and answers are lost: what was asked for happens, and nobody is told."""
    LOSSY = "lossy"
    """Now and then a connection breaks in the middle of a message."""


DELAY_S = 0.2
BREAKS = 0.05
"""Share of the pieces of data at which a lossy connection breaks."""


class Proxy:
    """Listens on `port` and forwards to `target_port`, both on loopback, in a thread of its own."""

    def __init__(self, port: int, target_port: int) -> None:
        self.port = port
        self.accepted = 0
        """Connections so far."""
        self._target_port = target_port
        self._weather = Weather.FINE
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._robbed: set[asyncio.StreamWriter] = set()
        """To clients that lack an answer: their connections cannot go on."""
        self._dice = random.Random(port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{port}", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._call(self._listen())

    def change(self, weather: Weather) -> None:
        self._call(self._change(weather))

    def stop(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _change(self, weather: Weather) -> None:
        self._weather = weather
        self._changed.set()
        self._changed = asyncio.Event()
        if weather is Weather.REFUSED:
            self._reset()
        for writer in self._robbed:
            writer.transport.abort()
        self._robbed.clear()

    async def _close(self) -> None:
        self._server.close()
        self._weather = Weather.REFUSED
        self._changed.set()
        self._reset()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._weather is Weather.REFUSED:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._forward(reader, back), self._forward(there, writer, answers=True))
        self._writers -= {writer, back}

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                while self._weather is Weather.SILENT:
                    await self._changed.wait()
                if self._weather is Weather.DEAF and answers:
                    self._robbed.add(writer)
                    continue
                if self._weather is Weather.LOSSY and self._dice.random() < BREAKS:
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    break
                if self._weather is Weather.SLOW:
                    await asyncio.sleep(DELAY_S)
                writer.write(data)
                await writer.drain()
        writer.close() if self._weather is Weather.LOSSY else writer.transport.abort()
