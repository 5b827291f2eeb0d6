"""A reward server in a process of its own, to be killed: `python -m tests.reward.child FOLDER BUS INIT`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.reward.conftest import small_config

from charter.reward import server


async def main(folder: str, bus: str, init: str) -> None:
    config = replace(small_config(Path(folder), init), bus=bus)
    running = await server.serve(config, CollectorRegistry())
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(running.port, flush=True)  # noqa: T201 - the test reads it
    await stop.wait()
    await running.drain()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    asyncio.run(main(*sys.argv[1:]))
