"""How many rollouts are under way, and whether more may be begun: `charter.sampler.staleness`, on the bus.

What the trainer has consumed is version · batch_size; so `accepted - version · batch_size` is just what
waits at the judge and at the trainer, and the bus knows both. Human labels in the same topic count until they
are read, which only holds the sampler back for a moment.
"""

from __future__ import annotations

from charter.bus import Bus
from charter.sampler.config import SamplerConfig
from charter.sampler.staleness import StalenessBound

JUDGE_GROUP, TRAINER_GROUP = "judge", "trainer"
ROLLOUTS, PREFERENCES = "rollouts", "preferences"


class Pacer:
    """Says whether a sampler may take another batch of prompts."""

    def __init__(self, bus: Bus, config: SamplerConfig, batch: int) -> None:
        """`batch`: prompts that a sampler takes at once, all of which must fit."""
        self._bus = bus
        self._bound = StalenessBound(config.max_staleness, config.batch_size)
        self._labels_per_rollout = config.answers // 2
        limit = (config.max_staleness + 1) * config.batch_size
        # Several samplers may look at the same moment; with one, the bound is exact.
        self._needed = min(batch * config.samplers, limit)

    def under_way(self) -> int:
        """Rollouts that are published and not yet trained on."""
        waiting = sum(lag.records for lag in self._bus.lag(JUDGE_GROUP, [ROLLOUTS]))
        labels = sum(lag.records for lag in self._bus.lag(TRAINER_GROUP, [PREFERENCES]))
        return waiting + -(-labels // self._labels_per_rollout)

    def has_room(self) -> bool:
        """Whether a whole batch of rollouts may be begun. Asks the bus."""
        return self._bound.capacity(version=0, accepted=self.under_way(), running=0) >= self._needed
