"""A reward server in a process of its own, to be killed: `python -m tests.reward.child FOLDER BUS INIT`."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.reward.conftest import small_config

from charter import rpc
from charter.reward import server


async def main(folder: str, bus: str, init: str) -> None:
    config = replace(small_config(Path(folder), init), bus=bus)
    running = await server.serve(config, CollectorRegistry())
    print(running.port, flush=True)  # noqa: T201 - the test reads it
    await rpc.run_until_signalled(running)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    asyncio.run(main(*sys.argv[1:]))
