"""A lineage of two steps that serves, for tests in which something breaks under it."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

from tests.trainer.circle import label, publishable

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.registry import Registry
from charter.trainer.service import newest_of_lineage
from charter.v1 import events_pb2

STEPS, LABELS = 2, 6


def holds(folder: Path) -> bool:
    """Whether the good checkpoint is the newest, whole, and in force."""
    registry = Registry(folder / "checkpoints")
    newest = newest_of_lineage(registry)
    assert registry.resolve(newest.id).is_dir()
    return newest.facts.step == STEPS and registry.serving().id == newest.id


def publish(folder: Path, labels) -> None:
    with open_bus(f"sqlite:{folder}/bus.db") as bus:
        bus.publish([publishable(each) for each in labels])


def labels(tiny, change=lambda event, number: None, count=30):
    for number in range(100, 100 + count):
        event = label(number, tiny)
        change(event, number)
        yield event


def letters(folder: Path) -> list[str]:
    with open_bus(f"sqlite:{folder}/bus.db") as bus:
        return [decode(r, events_pb2.DeadLetterEvent).error for r in bus.fetch("dead-letters", 0, 0)]


@contextlib.contextmanager
def heard(event: str):
    """An event that is set when the trainer logs this, and what it said with it."""
    heard, said = threading.Event(), []

    class Listener(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith(event):
                said.append(record.charter_fields)
                heard.set()

    listener, logger = Listener(), logging.getLogger("charter.trainer.worker")
    logger.addHandler(listener)
    try:
        yield heard, said
    finally:
        logger.removeHandler(listener)
