"""Structured logs: an event, fields, and the id of the request that they belong to.

    log = get_logger(__name__)
    log.info("checkpoint loaded", version=version.version, seconds=1.2)

One line for each event, as JSON for machines or `key=value` for people. Built on the standard library's
logging, so that the libraries we use come out in the same shape. Secrets never leave: a field with a
secret's name, and anything in a text that has a secret's form, is masked (`redact`).
"""

from __future__ import annotations

import datetime
import json as json_module
import logging
import re
import secrets
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, TextIO

request_id: ContextVar[str] = ContextVar("charter_request_id", default="")
"""Id of the request that this task serves; empty outside of requests."""

MASK = "[secret]"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_SECRET_NAME = re.compile(
    r"(?:^|[_\-.])(?:api_?key|access_?key|private_?key|secret(?:_?key)?|passw(?:or)?d|passphrase|"
    r"token|authorization|credentials?|cookie|bearer)$",
    re.IGNORECASE,
)
_SECRET_FORMS = (
    re.compile(r"(?P<keep>\bbearer\s+)[^\s\"',;]+", re.IGNORECASE),
    re.compile(r"(?P<keep>\bbasic\s+)[A-Za-z0-9+/=]{8,}", re.IGNORECASE),
    re.compile(r"(?P<keep>://[^\s:/@]*:)[^\s/@]+(?=@)"),
    re.compile(r"(?P<keep>\b(?:sk|hf|ck|pk)[-_])[A-Za-z0-9_\-]{8,}"),
    re.compile(
        r"(?P<keep>\b(?:api[_-]?key|access[_-]?key|secret|passw(?:or)?d|token)[\"']?\s*[=:]\s*[\"']?)"
        r"[^\s\"',;&]{4,}",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<keep>-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL),
)


def bind_request_id(value: str | None = None) -> str:
    """Makes `value` the request id of the current task and of those that it starts; returns it.

    Without a value, or with one that is not 1 to 128 plain characters (a caller could forge log lines
    with it), a new id is made.
    """
    if value is None or not _REQUEST_ID.fullmatch(value):
        value = secrets.token_hex(8)
    request_id.set(value)
    return value


def redact(name: str, value: Any) -> Any:
    """`value` as it may be logged under `name`: masked whole, masked in part, or as it is."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return {str(k): redact(str(k), v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(name, v) for v in value]
    return _redact_text(name, str(value))


def _redact_text(name: str, text: str) -> str:
    if text and _SECRET_NAME.search(name):
        return MASK
    for form in _SECRET_FORMS:
        text = form.sub(lambda m: f"{m['keep']}{MASK}", text)
    return text


class Logger:
    """Writes events with fields. Made by `get_logger`."""

    def __init__(self, inner: logging.Logger) -> None:
        self._inner = inner

    def debug(self, event: str, **fields: Any) -> None:
        """For whoever looks for a fault."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Something happened as it should."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something is wrong, and the service goes on."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something failed that a person should look at."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error, with the traceback of the exception being handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(self, level: int, event: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        if self._inner.isEnabledFor(level):
            self._inner.log(level, "%s", event, extra={"charter_fields": fields}, exc_info=exc_info)


def get_logger(name: str) -> Logger:
    """The logger of a module: `get_logger(__name__)`."""
    return Logger(logging.getLogger(name))


def configure(level: str = "INFO", json: bool = False, stream: TextIO | None = None) -> None:
    """Sends all logs of this process to `stream` (default: standard error) at `level`. Safe to repeat.

    Raises `ConfigError` for a level that does not exist.
    """
    from charter.errors import ConfigError

    if level.upper() not in _LEVELS:
        raise ConfigError(f"log level {level!r} does not exist; choose one of {', '.join(_LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if json else HumanFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "kafka"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _parts(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    fields: Mapping[str, Any] = getattr(record, "charter_fields", {})
    return redact("", record.getMessage()), {k: redact(k, v) for k, v in fields.items()}


def _time(record: logging.LogRecord) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(record.created, datetime.UTC)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, request_id, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        event, fields = _parts(record)
        line = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event,
        }
        if current := request_id.get():
            line["request_id"] = current
        for name, value in fields.items():
            line[name if name not in line else f"field_{name}"] = value
        if record.exc_info:
            line["exception"] = redact("", self.formatException(record.exc_info))
        return json_module.dumps(line, ensure_ascii=False, default=str)


class HumanFormatter(logging.Formatter):
    """`12:30:01.250 INFO  charter.policy  checkpoint loaded  version=a1  request_id=…`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it where there is one."""
        event, fields = _parts(record)
        if current := request_id.get():
            fields["request_id"] = current
        shown = " ".join(f"{k}={_shown(v)}" for k, v in fields.items())
        clock = _time(record).astimezone().strftime("%H:%M:%S.%f")[:-3]
        line = f"{clock} {record.levelname:<7} {record.name}  {event}" + (f"  {shown}" if shown else "")
        line = line.replace("\r", "\\r").replace("\n", "\\n")  # one event is one line, whatever it quotes
        if record.exc_info:
            line += "\n" + str(redact("", self.formatException(record.exc_info)))
        return line


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json_module.dumps(value, ensure_ascii=False, default=str)
    return json_module.dumps(text, ensure_ascii=False) if re.search(r"[\s=\"]", text) or not text else text
