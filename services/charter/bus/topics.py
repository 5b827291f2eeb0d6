"""Topics as data: `topics.yaml` and its loader."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from charter.bus.base import MAX_MESSAGE_BYTES, Cleanup, TopicChange, TopicSpec
from charter.errors import ConfigError

PROMPTS = "prompts"
CONVERSATIONS = "conversations"
ROLLOUTS = "rollouts"
PREFERENCES = "preferences"
REVISIONS = "revisions"
CHECKPOINTS = "checkpoints"
DEAD_LETTERS = "dead-letters"

DEFAULT_FILE = Path(__file__).with_name("topics.yaml")

_UNITS_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_FIELDS = {"partitions", "key", "message", "retention", "cleanup", "max_message_bytes"}
_NAME = re.compile(r"[a-z][a-z0-9-]{0,99}")


def load_topics(path: Path = DEFAULT_FILE) -> tuple[TopicSpec, ...]:
    """Reads a topics file. Raises `ConfigError` with file, topic, field and remedy."""
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    topics = document.get("topics") if isinstance(document, dict) else None
    if not isinstance(topics, dict) or not topics:
        raise ConfigError(f"{path}: field 'topics' must map each topic's name to its settings")
    return tuple(_topic(path, name, fields) for name, fields in topics.items())


def plan_topics(existing: Mapping[str, TopicSpec], specs: Sequence[TopicSpec]) -> list[TopicChange]:
    """What has to change so that the topics are as `specs` say."""
    return [change for spec in specs for change in _changes(existing.get(spec.name), spec)]


def _changes(now: TopicSpec | None, spec: TopicSpec) -> list[TopicChange]:
    if now is None:
        return [TopicChange(spec.name, "create", f"{spec.partitions} partitions")]
    changes = []
    if now.partitions > spec.partitions:
        detail = f"{now.partitions} partitions cannot become {spec.partitions}"
        return [TopicChange(spec.name, "refuse", detail)]
    if now.partitions < spec.partitions:
        detail = f"{now.partitions} to {spec.partitions}; keys move to other partitions"
        changes.append(TopicChange(spec.name, "add partitions", detail))
    pairs = {f.name: (getattr(now, f.name), getattr(spec, f.name)) for f in fields(TopicSpec)}
    del pairs["partitions"]
    detail = ", ".join(f"{name} {old} to {new}" for name, (old, new) in pairs.items() if old != new)
    if detail:
        changes.append(TopicChange(spec.name, "configure", detail))
    return changes


def _topic(path: Path, name: Any, fields: Any) -> TopicSpec:
    where = f"{path}: topic {name!r}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name is lower-case letters, digits and hyphens, at most 100")
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: settings must be a mapping with at least 'partitions'")
    unknown = sorted(str(field) for field in fields.keys() - _FIELDS)
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; there are {', '.join(sorted(_FIELDS))}")
    return TopicSpec(
        name=name,
        partitions=_positive(where, fields, "partitions", None),
        key=str(fields.get("key", "")),
        message=str(fields.get("message", "")),
        retention_ms=_retention(where, fields.get("retention", "forever")),
        cleanup=_cleanup(where, fields.get("cleanup", "delete")),
        max_message_bytes=_positive(where, fields, "max_message_bytes", MAX_MESSAGE_BYTES),
    )


def _positive(where: str, fields: Mapping[str, Any], field: str, default: int | None) -> int:
    value = fields.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: field {field!r} must be a whole number of at least 1, not {value!r}")
    return value


def _retention(where: str, value: Any) -> int | None:
    if value == "forever":
        return None
    match = re.fullmatch(r"(\d+)([smhd])", str(value))
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"{where}: field 'retention' must read like 12h, 30d or forever, not {value!r}")
    return int(match[1]) * _UNITS_MS[match[2]]


def _cleanup(where: str, value: Any) -> Cleanup:
    try:
        return Cleanup(value)
    except ValueError:
        raise ConfigError(f"{where}: field 'cleanup' must be delete or compact, not {value!r}") from None
