"""What the circle tells whoever watches: small records, the same for a terminal, a log and a report."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Phase(enum.StrEnum):
    """What the circle is about. Which one it is follows from what lies on the disk, so it survives kills."""

    STARTING = "starting"
    REVISING = "revising"
    """The seed's answers are criticised and revised."""
    SUPERVISED = "supervised learning"
    """SL-CAI on the revisions."""
    COMPARING = "comparing"
    """The judge labels pairs of SL-CAI's answers, from which the first reward model is made."""
    REINFORCING = "reinforcing"
    """PPO on fresh answers; a candidate now and then goes through the gate."""
    DONE = "done"


class Kind(enum.StrEnum):
    """What a piece of news is about; the fields of `News.values` that come with it."""

    PHASE = "phase"
    """phase"""
    PROGRESS = "progress"
    """what, done, total, remark"""
    STEP = "step"
    """the trainer's metrics of one update"""
    REWARD = "reward"
    """state, accuracy, calibration, drift, message: of the reward model"""
    GATE = "gate"
    """checkpoint, step, status, reason, measurements: what became of a candidate"""
    QUEUES = "queues"
    """name of a topic: records that wait, and records a second"""
    BUSY = "busy"
    """who, begin, end: an engine (`sampling`, `judging`) had work from one time to the other"""
    BUS = "bus"
    """group of sampler and judge: seconds in each phase of its batches; when PPO ends"""
    PROBLEM = "problem"
    """message: something failed; the circle stands still or has ended"""


@dataclass(frozen=True, slots=True)
class News:
    """One thing that happened."""

    kind: Kind
    values: Mapping[str, Any]
    at: float = field(default_factory=time.time)


Tell = Callable[[News], None]
"""Takes news; called by the event loop's thread, and must be quick."""
