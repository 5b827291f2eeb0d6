"""Who may come in, how strictly their answers are held to the constitution, and how much they may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from charter.errors import ConfigError
from charter.gateway.config import GatewayConfig, is_loopback
from charter.gateway.envelope import ApiError, retry_after
from charter.gateway.guard import GuardMode
from charter.gateway.keys import KeyFile
from charter.gateway.limits import Denied, RateLimiter, Reservation

GUARD_HEADER = "x-charter-guard"
_OPEN_KEY = "-"
"""Stands for the key of requests that need none."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may do."""

    key_id: str
    guard: GuardMode
    weakest_guard: GuardMode
    requests_per_minute: int
    tokens_per_minute: int


class Doorkeeper:
    """Lets callers in. Raises `ConfigError` when the door would stand open to other machines."""

    def __init__(self, config: GatewayConfig, keys: KeyFile | None) -> None:
        self._config = config
        self._keys = keys
        self._limiter = RateLimiter()
        if not config.loopback and not (keys and keys.active):
            raise ConfigError(
                f"refusing to listen on {config.host} without API keys, since other machines can reach it; "
                "add one with `charter keys add NAME`, or listen on 127.0.0.1"
            )

    def admit(self, headers: Mapping[str, str]) -> Access:
        """What the sender of these headers may do; raises `ApiError` (401, 403)."""
        config = self._config
        if self._keys is None or not self._keys.in_use:
            _refuse_foreign_pages(headers)
            return Access(
                _OPEN_KEY,
                config.guard,
                config.weakest_guard,
                config.requests_per_minute,
                config.tokens_per_minute,
            )
        record = self._keys.find(_bearer(headers))
        if record is None:
            raise _unauthorised("This API key is not known here, or it was revoked.", "invalid_api_key")
        guard = record.guard or config.guard
        return Access(
            record.id,
            guard,
            record.weakest_guard or guard,
            config.requests_per_minute if record.requests_per_minute is None else record.requests_per_minute,
            config.tokens_per_minute if record.tokens_per_minute is None else record.tokens_per_minute,
        )

    def mode(self, access: Access, headers: Mapping[str, str], asked: GuardMode | None) -> GuardMode:
        """The guard mode of a request: what it asks for, if its key allows that; raises `ApiError`."""
        wishes = [asked] if asked else []
        if header := headers.get(GUARD_HEADER):
            wishes.append(_mode_of(header))
        if not wishes:
            return access.guard
        mode = max(wishes, key=lambda m: m.strictness)
        if mode.strictness < access.weakest_guard.strictness:
            raise ApiError(
                403,
                f"Guard mode {mode.value!r} is weaker than this key allows; "
                f"ask for {access.weakest_guard.value!r} or a stricter one, or for none.",
                code="guard_too_weak",
                type_="permission_error",
                param="charter.guard",
            )
        if mode is not GuardMode.OFF and not self._config.critic:
            raise ApiError(
                400,
                f"Guard mode {mode.value!r} needs a critic, and this endpoint has none; ask for 'off'.",
                code="guard_not_available",
                param="charter.guard",
            )
        return mode

    def reserve(self, access: Access, tokens: int) -> Reservation:
        """Takes the request from its key's limits; raises `ApiError` (429) with Retry-After."""
        taken = self._limiter.reserve(
            access.key_id, access.requests_per_minute, access.tokens_per_minute, tokens
        )
        if isinstance(taken, Denied):
            raise ApiError(
                429,
                f"This key's limit of {taken.per_minute} {taken.what} per minute is reached; "
                f"try again in {taken.wait_seconds:.0f} s.",
                code="rate_limit_exceeded",
                type_=taken.what,
                headers=retry_after(taken.wait_seconds),
            )
        return taken


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise _unauthorised(
            "This endpoint needs an API key: send the header 'Authorization: Bearer <key>'.",
            "missing_api_key",
        )
    return key.strip()


def _unauthorised(message: str, code: str) -> ApiError:
    return ApiError(
        401, message, code=code, type_="authentication_error", headers={"WWW-Authenticate": "Bearer"}
    )


def _mode_of(header: str) -> GuardMode:
    try:
        return GuardMode(header.strip().lower())
    except ValueError:
        raise ApiError(
            400,
            f"The header X-Charter-Guard must be one of {', '.join(GuardMode)}.",
            code="invalid_value",
            param="X-Charter-Guard",
        ) from None


def _refuse_foreign_pages(headers: Mapping[str, str]) -> None:
    """An open endpoint answers this machine, and not web pages that a browser on it happens to show.

    A page of another site gives itself away by its Origin, and by a Host that is not loopback when it
    pointed its own name at this machine (DNS rebinding).
    """
    host = urlsplit(f"//{headers.get('host', 'localhost')}").hostname or ""
    origin = headers.get("origin")
    if not is_loopback(host) or (origin and not is_loopback(urlsplit(origin).hostname or "")):
        raise ApiError(
            403,
            "Without API keys this endpoint answers only this machine by its loopback address; "
            "add a key with `charter keys add NAME` to use it from elsewhere.",
            code="not_loopback",
            type_="permission_error",
        )
