"""Rate limits by a clock that the test turns, and the bounded queue."""

import asyncio

import pytest

from charter.errors import Overloaded
from charter.gateway.limits import Denied, Places, RateLimiter, Reservation


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_requests_beyond_the_limit_wait_exactly_until_the_next_is_due():
    clock = Clock()
    limiter = RateLimiter(clock)
    assert all(isinstance(limiter.reserve("a", 2, 0, 10), Reservation) for _ in range(2))
    denied = limiter.reserve("a", 2, 0, 10)
    assert denied == Denied("requests", 2, 30.0)
    clock.now = denied.wait_seconds
    assert isinstance(limiter.reserve("a", 2, 0, 10), Reservation)


def test_keys_do_not_share_their_limits():
    limiter = RateLimiter(Clock())
    assert isinstance(limiter.reserve("a", 1, 0, 1), Reservation)
    assert isinstance(limiter.reserve("b", 1, 0, 1), Reservation)
    assert isinstance(limiter.reserve("a", 1, 0, 1), Denied)


def test_tokens_are_reserved_and_settled_with_what_was_used():
    limiter = RateLimiter(Clock())
    first = limiter.reserve("a", 0, 100, 80)
    assert limiter.reserve("a", 0, 100, 80) == Denied("tokens", 100, 36.0)
    first.settle(10)
    first.settle(10)
    second = limiter.reserve("a", 0, 100, 80)
    assert second.remaining == {"x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "10"}


def test_a_request_larger_than_a_minutes_worth_is_served_from_a_full_bucket():
    limiter = RateLimiter(Clock())
    taken = limiter.reserve("a", 0, 100, 5000)
    assert isinstance(taken, Reservation)
    taken.settle(250)
    assert limiter.reserve("a", 0, 100, 100) == Denied("tokens", 100, 150.0)


async def test_places_are_given_in_turn():
    places, order = Places(1, 5, 5.0), []

    async def work(name):
        await places.enter()
        order.append(name)
        await asyncio.sleep(0)
        places.leave()

    await asyncio.gather(*(work(i) for i in range(5)))
    assert order == [0, 1, 2, 3, 4]
    assert (places.running, places.waiting) == (0, 0)


async def test_a_full_queue_turns_away_and_a_slow_one_gives_up():
    places = Places(1, 1, 0.02)
    await places.enter()
    waiting = asyncio.create_task(places.enter())
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="the limit"):
        await places.enter()
    with pytest.raises(Overloaded, match="no place became free"):
        await waiting
    places.leave()
    await places.enter()
    assert (places.running, places.waiting) == (1, 0)


async def test_a_place_given_to_one_who_no_longer_waits_goes_to_the_next():
    places = Places(1, 5, 5.0)
    await places.enter()
    first, second = (asyncio.create_task(places.enter()) for _ in range(2))
    await asyncio.sleep(0)
    places.leave()
    first.cancel()
    await second
    assert (places.running, places.waiting) == (1, 0)
