"""API keys: made here, shown once, kept only as hashes, compared in constant time.

A key reads `ck-<id>-<secret>`. The id finds the record; the secret has 256 random bits, so one SHA-256 is
enough to keep it (nothing can be guessed that a slow hash would have to slow down). Whoever changes the
file holds its lock; gateways notice the change within a second, without a restart.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from charter.errors import ConfigError
from charter.gateway.guard import GuardMode
from charter.telemetry.logs import get_logger

log = get_logger(__name__)

_KEY = re.compile(r"ck-(?P<id>[a-z0-9]{8})-(?P<secret>[A-Za-z0-9_-]{43})")
_NO_HASH = "0" * 64
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known about a key; never the key itself."""

    id: str
    name: str
    """Whose it is, for people."""
    sha256: str
    """Of the secret part."""
    created_unix: int
    guard: GuardMode | None = None
    """Mode of requests with this key; None: the gateway's."""
    weakest_guard: GuardMode | None = None
    """Weakest mode that a request may ask for; None: the key's own mode, so that none weaker is allowed."""
    requests_per_minute: int | None = None
    """None: the gateway's; 0: unlimited."""
    tokens_per_minute: int | None = None
    """None: the gateway's; 0: unlimited."""
    revoked_unix: int | None = None


class KeyFile:
    """The file of keys, read again when it changes."""

    def __init__(self, path: Path, check_seconds: float = 1.0) -> None:
        self._path = path
        self._check_seconds = check_seconds
        self._checked = 0.0
        self._stamp = _stamp(path)
        self._records: dict[str, KeyRecord] = {}
        self._load()

    @property
    def in_use(self) -> bool:
        """Whether a key is asked for: from the first key on, even when all have been revoked."""
        self._refresh()
        return bool(self._records)

    @property
    def active(self) -> tuple[KeyRecord, ...]:
        """The keys that open the door."""
        self._refresh()
        return tuple(r for r in self._records.values() if r.revoked_unix is None)

    def find(self, key: str) -> KeyRecord | None:
        """The record of an active key, or None; takes the same time for a wrong secret and an unknown id."""
        self._refresh()
        match = _KEY.fullmatch(key)
        record = self._records.get(match["id"]) if match else None
        digest = hashlib.sha256((match["secret"] if match else key).encode(errors="replace")).hexdigest()
        same = hmac.compare_digest(digest, record.sha256 if record else _NO_HASH)
        return record if record and same and record.revoked_unix is None else None

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < self._check_seconds:
            return
        self._checked = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._load()
            log.info(
                "keys loaded",
                path=str(self._path),
                active=sum(r.revoked_unix is None for r in self._records.values()),
            )
        except ConfigError as error:
            log.error("keys not loaded; those read before stay in force", reason=str(error))

    def _load(self) -> None:
        records = read_keys(self._path)
        if self._records and not records:
            # Emptying the file under a running gateway must not open its door.
            raise ConfigError(
                f"key file {self._path} has no keys any more; put it back, or restart without keys"
            )
        self._records = {r.id: r for r in records}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_keys(path: Path) -> tuple[KeyRecord, ...]:
    """All keys of a file, revoked ones included; none when there is no file. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {path} ({error}); check its permissions") from error
    try:
        document = json.loads(text)
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']!r} is not {_FORMAT}")
        return tuple(_from_json(entry) for entry in document["keys"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the key file {path} is not one that `charter keys` wrote ({type(error).__name__}: {error}); "
            "restore it from a backup, or move it away and add keys anew"
        ) from error


def _from_json(entry: dict[str, Any]) -> KeyRecord:
    def mode(name: str) -> GuardMode | None:
        return GuardMode(entry[name]) if entry.get(name) is not None else None

    return KeyRecord(**{**entry, "guard": mode("guard"), "weakest_guard": mode("weakest_guard")})


def add_key(
    path: Path,
    name: str,
    *,
    guard: GuardMode | None = None,
    weakest_guard: GuardMode | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> tuple[KeyRecord, str]:
    """Adds a key to the file; returns its record and the key, which cannot be had again."""
    if guard and weakest_guard and guard.strictness < weakest_guard.strictness:
        raise ConfigError(
            f"guard mode {guard} is weaker than the weakest that the key allows, {weakest_guard}"
        )
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    record = KeyRecord(
        id=key_id,
        name=name,
        sha256=hashlib.sha256(secret.encode()).hexdigest(),
        created_unix=int(time.time()),
        guard=guard,
        weakest_guard=weakest_guard,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    with _locked(path):
        _write(path, (*read_keys(path), record))
    return record, f"ck-{key_id}-{secret}"


def revoke_key(path: Path, key_id: str) -> KeyRecord:
    """Revokes the key with this id; safe to repeat. Raises `ConfigError` when there is none."""
    with _locked(path):
        records = read_keys(path)
        found = next((r for r in records if r.id == key_id), None)
        if found is None:
            raise ConfigError(f"no key {key_id!r} in {path}; `charter keys list` shows their ids")
        if found.revoked_unix is None:
            revoked = replace(found, revoked_unix=int(time.time()))
            _write(path, tuple(revoked if r.id == key_id else r for r in records))
            return revoked
        return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, records: tuple[KeyRecord, ...]) -> None:
    """Replaces the file as one act, readable by its owner only."""
    text = json.dumps({"format": _FORMAT, "keys": [asdict(r) for r in records]}, indent=2)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
