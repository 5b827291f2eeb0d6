"""Which labels a round sees: the newest, a replay of older ones, and held-out ones to measure on. Pure."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from charter.reward.config import ScheduleConfig, WindowConfig


def is_heldout(prompt_id: str, share: float) -> bool:
    """Whether a prompt is kept from training: by its id alone, so that all of its pairs are, always."""
    digest = hashlib.sha256(f"heldout/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True, slots=True)
class Chosen:
    """Numbers of the labels of one round, each ascending."""

    newest: tuple[int, ...]
    replay: tuple[int, ...]
    heldout: tuple[int, ...]
    reference: tuple[int, ...]


def choose(
    training: Sequence[int], heldout: Sequence[int], config: WindowConfig, *, seed: int, number: int
) -> Chosen:
    """The labels of round `number`, from the ascending numbers of all so far; depends on nothing else."""
    older, newest = training[: -config.newest], training[-config.newest :]
    rng = random.Random(f"{seed}/replay/{number}")
    replay = sorted(rng.sample(older, min(config.replay, len(older))))
    return Chosen(
        tuple(newest), tuple(replay), tuple(heldout[-config.heldout :]), tuple(heldout[: config.reference])
    )


def next_round(trained: int, labels: int, heldout: int, config: ScheduleConfig) -> int | None:
    """How many labels the next round takes, from the first on; None while there are too few new ones.

    Args:
        trained: labels that the last round took, 0 before the first.
        labels: labels so far.
        heldout: held-out ones among them.
        config: the schedule.
    """
    if heldout < config.min_heldout:
        return None
    due = trained + config.every if trained else config.first
    if labels < due:
        return None
    if config.catch_up:
        return due
    return due + (labels - due) // config.every * config.every
