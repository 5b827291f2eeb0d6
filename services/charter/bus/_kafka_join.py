"""Works around two faults of kafka-python 3.0 when a group rebalances.

A member joins a group in the background while `poll` waits. A poll may give up before the join is complete;
when the join then completes before the next poll,

1. kafka-python forgets the result and joins again, which makes every other member join again, without end;
2. or, when the join was made because a topic's partitions became known, it believes that there is nothing to
   join, never looks at the result, and is thrown out of the group when the session ends.

`remember_joins` keeps the result for the next poll, and says that a join which began must be finished.
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
        coordinator.request_rejoin()
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
