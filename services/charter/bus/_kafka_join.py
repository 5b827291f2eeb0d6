"""Works around a livelock of kafka-python 3.0 when a group rebalances.

A member joins a group in the background while `poll` waits. When a poll gives up before that is complete and
the join completes before the next poll, kafka-python forgets the result and joins again, which makes every
other member join again, and so on without end. `remember_joins` keeps the result for the next poll.
"""

from __future__ import annotations

from typing import Any


def remember_joins(coordinator: Any) -> None:
    """Patches one consumer's coordinator (`KafkaConsumer._coordinator`)."""
    join, complete = coordinator._do_join_and_sync_async, coordinator._on_join_complete_async
    finished: dict[tuple[int, str], bytes] = {}

    def generation() -> tuple[int, str]:
        now = coordinator._generation
        return now.generation_id, now.member_id

    async def join_or_remember() -> bytes:
        # Only of the generation that is current: a member that was thrown out has another.
        assignment = finished.pop(generation(), None)
        finished.clear()
        if assignment is None:
            assignment = await join()
            finished[generation()] = assignment
        return assignment

    async def complete_and_forget(*arguments: Any) -> Any:
        finished.clear()
        return await complete(*arguments)

    coordinator._do_join_and_sync_async = join_or_remember
    coordinator._on_join_complete_async = complete_and_forget
