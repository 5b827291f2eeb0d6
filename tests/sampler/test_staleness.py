"""Pacing by staleness."""

from random import Random

import pytest

from charter.sampler.staleness import StalenessBound


def test_capacity_follows_the_formula():
    bound = StalenessBound(max_staleness=2, batch_size=10)
    assert bound.capacity(version=0, accepted=0, running=0) == 30
    assert bound.capacity(version=0, accepted=20, running=10) == 0
    assert bound.capacity(version=1, accepted=20, running=10) == 10
    assert StalenessBound(0, 10).capacity(version=0, accepted=0, running=0) == 10
    assert bound.capacity(version=0, accepted=100, running=0) == 0


@pytest.mark.parametrize("seed", range(20))
def test_samplers_paced_by_capacity_never_exceed_the_staleness_bound(seed):
    """A simulation: rollouts are begun whenever there is capacity, and are trained on in that order."""
    random = Random(seed)
    bound = StalenessBound(max_staleness=seed % 5, batch_size=1 + seed % 7)
    version, running, queue, accepted, worst = 0, [], [], 0, 0
    for _ in range(600):
        if bound.capacity(version=version, accepted=accepted, running=len(running)) and random.random() < 0.7:
            running.append(version)
        elif running:
            queue.append(running.pop(0))
            accepted += 1
        if len(queue) >= bound.batch_size and random.random() < 0.5:
            worst = max(worst, *(version - made for made in queue[: bound.batch_size]))
            del queue[: bound.batch_size]
            version += 1
    assert version > 10
    assert worst <= bound.max_staleness
