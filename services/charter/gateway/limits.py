"""How much a key may ask for each minute, and how many requests are worked on at once.

Rates are token buckets: a full minute's worth may come at once, then it refills evenly. Tokens are
reserved when a request comes (its `max_tokens`) and settled when the answer is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from charter.errors import Overloaded


class Bucket:
    """A token bucket: `per_minute` units, refilled evenly; it may be overdrawn by `settle`."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """What is left now."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60.0)
        self._at = now
        return self._level

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` (at most a minute's worth) can be taken; 0: now."""
        lacking = min(amount, self.per_minute) - self.level
        return max(0.0, lacking * 60.0 / self.per_minute)

    def take(self, amount: float) -> None:
        """Takes `amount`, or gives it back when negative."""
        self._level = min(self.per_minute, self.level - amount)


@dataclass(frozen=True, slots=True)
class Denied:
    """Why a request is turned away, and for how long."""

    what: str
    """"requests" or "tokens"."""
    per_minute: int
    wait_seconds: float


class Reservation:
    """What a request took from its key's buckets; `settle` it once with what it really used."""

    __slots__ = ("_reserved", "_tokens", "remaining")

    def __init__(self, tokens: Bucket | None, reserved: float, remaining: dict[str, str]) -> None:
        self._tokens = tokens
        self._reserved = reserved
        self.remaining = remaining
        """OpenAI's `x-ratelimit-*` headers."""

    def settle(self, used: int) -> None:
        """Corrects the reservation to `used` tokens; safe to repeat, only the first counts."""
        if self._tokens is not None:
            self._tokens.take(used - self._reserved)
            self._tokens = None


_FREE = Reservation(None, 0.0, {})


class RateLimiter:
    """Buckets for each key; a changed limit starts with a full bucket."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def reserve(
        self, key_id: str, requests_per_minute: int, tokens_per_minute: int, tokens: int
    ) -> Reservation | Denied:
        """Takes one request and `tokens` tokens, or says how long to wait; 0 per minute is unlimited."""
        if not requests_per_minute and not tokens_per_minute:
            return _FREE
        requests = self._bucket(key_id, "requests", requests_per_minute)
        budget = self._bucket(key_id, "tokens", tokens_per_minute)
        for what, bucket, amount in (("requests", requests, 1.0), ("tokens", budget, float(tokens))):
            if bucket is not None and (wait := bucket.wait_for(amount)):
                return Denied(what, bucket.per_minute, wait)
        headers = {}
        reserved = min(float(tokens), float(tokens_per_minute))
        for what, bucket, amount in (("requests", requests, 1.0), ("tokens", budget, reserved)):
            if bucket is not None:
                bucket.take(amount)
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
        return Reservation(budget, reserved, headers)

    def _bucket(self, key_id: str, what: str, per_minute: int) -> Bucket | None:
        if not per_minute:
            return None
        bucket = self._buckets.get((key_id, what))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key_id, what] = Bucket(per_minute, self._clock)
        return bucket


class Places:
    """A bounded number of places to work, and a bounded, fair queue for them."""

    def __init__(self, running: int, waiting: int, wait_seconds: float) -> None:
        self._free = running
        self._max_waiting = waiting
        self._wait_seconds = wait_seconds
        self._queue: deque[asyncio.Future[None]] = deque()
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def enter(self) -> None:
        """Takes a place, waiting in turn; raises `Overloaded` when the queue is full or too slow."""
        if self._free and not self._queue:
            self._free -= 1
            self.running += 1
            return
        if len(self._queue) >= self._max_waiting:
            raise Overloaded(
                f"{self.running} requests are running and {self.waiting} waiting, which is the limit"
            )
        place = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            async with asyncio.timeout(self._wait_seconds):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self.leave()  # the place was given at the very moment that the caller stopped waiting
            else:
                with contextlib.suppress(ValueError):  # `leave` may have dropped it already
                    self._queue.remove(place)
            if isinstance(error, TimeoutError):
                raise Overloaded(f"no place became free within {self._wait_seconds:g} s") from None
            raise

    def leave(self) -> None:
        """Gives the place to the next in the queue."""
        self.running -= 1
        self._free += 1
        while self._queue and self._free:
            place = self._queue.popleft()
            if not place.done():
                self._free -= 1
                self.running += 1
                place.set_result(None)
