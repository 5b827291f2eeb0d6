"""A part of the circle that fails ends it with its own words, and nothing goes on in silence."""

import asyncio
from types import SimpleNamespace

import pytest

from charter.circle.circle import Circle
from charter.circle.config import CircleConfig, Places
from charter.errors import CheckpointError, ConfigError


class Learner:
    """A partner whose work goes on until it is told to stop."""

    def __init__(self):
        self.stopped = False

    async def call(self, work, *args, told):
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped = True


async def _fails(error):
    raise error


async def _goes_on(*_):
    await asyncio.Event().wait()


@pytest.mark.parametrize("which", ["the gate", "the workers"])
async def test_a_part_that_fails_ends_the_learning_with_its_reason(tmp_path, which):
    learner = Learner()
    circle = Circle(
        CircleConfig(), Places(tmp_path, f"sqlite:{tmp_path}/bus.db", "m", "local:m", "seed"), print, learner
    )
    error = CheckpointError("the gate cannot go on; make room")
    gate = asyncio.create_task(_fails(error) if which == "the gate" else _goes_on())
    circle._feed = _goes_on if which == "the gate" else lambda *_: _fails(ConfigError("no prompts"))
    with pytest.raises((CheckpointError, ConfigError), match=r"make room|no prompts"):
        async with asyncio.timeout(30):
            await circle._reinforce(None, None, None, SimpleNamespace(running=gate), "sft")
    assert learner.stopped
    gate.cancel()
