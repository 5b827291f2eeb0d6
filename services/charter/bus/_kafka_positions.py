"""The committed positions of a group, with what was committed a moment ago.

A transaction is committed when the cluster says so, but its offsets become visible a little later, when the
marker has been written to the group's partition. kafka-python's consumers ask for stable offsets, which waits
for it; its admin client does not, and tells the old position, or none. Nor does that client notice when a
group's coordinator has moved to another broker, as it may when brokers restart: it asks the old one for ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from kafka.protocol.metadata import CoordinatorType

from charter.bus.base import Partition
from kafka import KafkaAdminClient
from kafka import errors as kafka_errors


class StableAdmin(KafkaAdminClient):  # type: ignore[misc]  # kafka-python has no types
    """An admin client that can refuse to tell positions which a transaction is just changing.

    And one that asks anew who coordinates a group when the broker that did is gone, or says that it does not.
    """

    _stable = False

    def stable_group_offsets(self, group_specs: Any) -> Any:
        """As `list_group_offsets`. Raises `UnstableOffsetCommitError`; one caller at a time."""
        self._stable = True
        try:
            return self.list_group_offsets(group_specs)
        finally:
            self._stable = False

    async def _async_list_group_offsets(self, group_specs: Any) -> Any:
        try:
            return await super()._async_list_group_offsets(group_specs)
        except kafka_errors.UnstableOffsetCommitError:
            raise
        except kafka_errors.KafkaError as error:
            for group in group_specs:
                self._manager.cluster._coordinators.pop((CoordinatorType.GROUP, group), None)
            if not isinstance(error, kafka_errors.NotCoordinatorError):
                raise
        return await super()._async_list_group_offsets(group_specs)

    def _list_group_offsets_requests(self, group_specs: Any) -> Iterator[Any]:
        for group_id, request in super()._list_group_offsets_requests(group_specs):
            request.require_stable = self._stable
            yield group_id, request


def positions(
    admin: StableAdmin, group: str, places: Sequence[Any], timeout_s: float, *, or_visible: bool = False
) -> dict[Partition, int]:
    """Of all partitions with a position; `places` are those that may have got their first one just now.

    When a transaction is still under way after `timeout_s`, raises, or tells what is visible.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        # Asked for everything, the cluster leaves out what has no visible position yet: name the places.
        offsets = admin.list_group_offsets(group)[group]
        try:
            offsets |= admin.stable_group_offsets({group: [*{*places, *offsets}]})[group]
            break
        except kafka_errors.UnstableOffsetCommitError:
            if time.monotonic() > deadline:
                if or_visible:
                    break
                raise
            time.sleep(0.02)
    return {Partition(p.topic, p.partition): o.offset for p, o in offsets.items() if o.offset >= 0}
