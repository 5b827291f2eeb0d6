"""How many rollouts may be begun: staleness is bounded by pacing the samplers, never by throwing away.

The formula of AReaL (arXiv 2505.24298, section 5.1): by the time the trainer has reached the version at
which the last of the accepted and running rollouts is trained on, that rollout is at most `max_staleness`
versions old. The bound is exact where rollouts are trained on in the order in which they were begun; a
rollout that is overtaken by others is older by as many versions as overtook it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StalenessBound:
    """capacity = (max_staleness + version + 1)·batch_size − (accepted + running)."""

    max_staleness: int
    """Trainer versions that a rollout may be behind when it is trained on; 0 is synchronous."""
    batch_size: int
    """Rollouts that one trainer version consumes."""

    def capacity(self, *, version: int, accepted: int, running: int) -> int:
        """Rollouts that may be begun now; never negative.

        Args:
            version: updates that the trainer has finished.
            accepted: rollouts ever handed over, trained on or waiting.
            running: rollouts under way.
        """
        return max(0, (self.max_staleness + version + 1) * self.batch_size - (accepted + running))
