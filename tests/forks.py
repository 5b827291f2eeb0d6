"""Processes to be killed, forked from a server that has imported what they need: a life begins at once."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def fork_server() -> ForkServerContext:
    """The one fork server of a test run. What it loads is settled when it starts, so all ask for the same."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.publisher.lives", "tests.trainer.warm"])
    started = context.Process(target=print)
    started.start()
    started.join()
    return context
