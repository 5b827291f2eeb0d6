"""A deadline for every call, and clients that can be replaced.

kafka-python waits on its network thread without bound, and some of what it does there has no end of its own.
Its admin client moreover asks who the brokers are only now and then: when all of them restarted at once, one
that was late stayed unknown to it, and every call that concerned that one's partitions was refused for
minutes, while the cluster was well. So no call waits longer than an operation may take, and a client that
failed is given up: the next call opens another, which asks anew.
"""

from __future__ import annotations

import threading
from typing import Any

from kafka.net.compat import KafkaNetClient

from charter.bus._kafka_client import KafkaOptions
from charter.bus._kafka_positions import StableAdmin
from kafka import KafkaConsumer

CLOSING_S = 5.0
"""How long `retire` waits for a client to close."""

READ_WAIT_MS = 10

_GRACE_S = 1.0
"""What kafka-python's own deadlines have before ours, since they know better what they waited for."""


def opened(kind: Any, options: KafkaOptions, settings: dict[str, Any]) -> Any:
    """A client of kafka-python whose calls keep no caller for longer than an operation may take.

    Raises `KafkaError`; nothing is left running then, as kafka-python itself would.
    """
    networks = []

    def network(**configs: Any) -> Any:
        made = KafkaNetClient(**configs)
        networks.append(made)
        _with_deadline(made, options.timeout_s + _GRACE_S)
        _with_backoff(made._manager)
        return made

    try:
        return kind(**settings, kafka_client=network)
    except BaseException:
        for made in networks:
            retire(made)
        raise


def _with_deadline(client: Any, seconds: float) -> None:
    network, manager = client._net, client._manager
    run_without_bound = network.run

    def run(work: Any, *arguments: Any) -> Any:
        begun = network.call_soon_with_future(work, *arguments)
        return run_without_bound(manager.wait_for, begun, seconds * 1000)

    network.run = run


def _with_backoff(manager: Any) -> None:
    """Connections that are accepted and then cut, as by a proxy before a dead broker, count as failures.

    kafka-python forgets its backoff as soon as a connection is accepted, and would try hundreds of times a
    second.
    """
    connect_only = manager._connect

    async def connect(node: Any, connection: Any, **options: Any) -> None:
        failures = manager._backoff.get(node.node_id)
        await connect_only(node, connection, **options)
        if connection.closed and node.node_id not in manager._backoff:
            if failures is not None:
                manager._backoff[node.node_id] = failures
            manager.update_backoff(node.node_id)

    manager._connect = connect


def retire(client: Any) -> None:
    """Closes a client that may be stuck, without waiting for it for long."""
    closing = threading.Thread(target=client.close, name="charter-bus-closing", daemon=True)
    closing.start()
    closing.join(CLOSING_S)


class Clients:
    """The admin client and the reader of a bus; each is opened at its first use. One caller at a time."""

    def __init__(self, options: KafkaOptions) -> None:
        """Opens nothing yet."""
        self._options = options
        self._admin: StableAdmin | None = None
        self._reader: KafkaConsumer | None = None

    @property
    def admin(self) -> StableAdmin:
        """For all but records."""
        if self._admin is None:
            self._admin = opened(StableAdmin, self._options, self._options.common())
        return self._admin

    @property
    def reader(self) -> KafkaConsumer:
        """For records, outside any group."""
        if self._reader is None:
            # It reads what is there. A fetch that waits at the broker for more would hold up the next one.
            settings = {**self._options.consumer(), "fetch_max_wait_ms": READ_WAIT_MS}
            self._reader = opened(KafkaConsumer, self._options, settings)
        return self._reader

    def give_up(self) -> None:
        """Closes both; the next use opens others."""
        clients = [client for client in (self._admin, self._reader) if client is not None]
        self._admin = self._reader = None
        for client in clients:
            retire(client)
