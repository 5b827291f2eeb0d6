"""The process on the other core: its answers, its errors, its end."""

import asyncio
from pathlib import Path

import pytest
from tests.circle import work

from charter.circle.partner import Partner, PartnerDiedError
from charter.errors import BackendError, TrainingStopped


async def test_a_partner_works_tells_fails_stops_and_says_when_it_died():
    # One process for all of it: each takes seconds to import torch.
    partner = Partner()
    try:
        told = []
        assert await partner.call(work.adds, 2, 3, told=told.append) == 5
        assert told == ["adding"]
        with pytest.raises(TrainingStopped, match="too many refusals"):
            await partner.call(work.drifts)
        with pytest.raises(BackendError, match="ZeroDivisionError: nothing by nothing"):
            await partner.call(work.breaks)

        begun = asyncio.Event()
        waiting = asyncio.create_task(
            partner.call(work.waits, told=lambda word: (told.append(word), begun.set()))
        )
        await begun.wait()
        assert await partner.call(work.adds, 1, 1) == 2  # calls run side by side
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert told[-1] == "stopped"

        with pytest.raises(PartnerDiedError, match="goes on where it was"):
            await partner.call(work.dies)
    finally:
        await partner.close()
        await partner.close()


async def test_work_that_does_not_stop_is_killed_after_the_grace_with_its_children():
    partner = Partner(grace_s=0.2, family=True)
    child = asyncio.get_running_loop().create_future()
    working = asyncio.create_task(partner.call(work.goes_on, told=child.set_result))
    family = [partner.pid, await child]
    assert all(_lives(pid) for pid in family)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    await partner.close()
    async with asyncio.timeout(60):
        while any(_lives(pid) for pid in family):
            await asyncio.sleep(0.05)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
