"""The one configuration loader: YAML file, then environment, then flags, into frozen dataclasses.

A configuration is a frozen dataclass whose fields are scalars, enums, tuples, mappings or further frozen
dataclasses. The later source wins: defaults < file < environment < flags. Unknown keys are refused with the
nearest known one, and every message names its origin (`charter.yaml:12`, `$CHARTER__GATEWAY__PORT`).

Environment variables are `CHARTER__<SECTION>__<FIELD>`. The double underscore is deliberate: Kubernetes gives
every pod variables such as CHARTER_GATEWAY_PORT=tcp://10.0.0.7:8080 for a Service of that name.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from charter.errors import ConfigError

T = TypeVar("T")
PREFIX = "CHARTER__"
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def load(
    schema: type[T],
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> T:
    """Builds `schema` from all sources; `flags` has dotted keys, and None there means "not given".

    Raises `ConfigError` with origin, key, and what to write instead.
    """
    return Sources(file=file, environment=environment, flags=flags).build(schema)


class Sources:
    """All that was configured, from which sections are built one after another.

    For a configuration of several parts, where the defaults of one follow from another: first the top level
    is built (`beside` names the sections that it skips), then each section, with the defaults that follow.
    """

    def __init__(
        self,
        *,
        file: Path | None = None,
        environment: Mapping[str, str] | None = None,
        flags: Mapping[str, object] | None = None,
    ) -> None:
        tree = _from_file(file) if file is not None else _Node({}, "")
        tree = _merge(tree, _from_environment(environment or {}))
        self._tree = _merge(tree, _from_flags(flags or {}))

    def build(
        self,
        schema: type[T],
        section: str = "",
        *,
        defaults: Mapping[str, object] | None = None,
        beside: Mapping[str, type] | None = None,
    ) -> T:
        """The dataclass of the top level, or of one section; `defaults` yield to everything configured."""
        sections = dict(beside or {})
        nodes = {key: node for key, node in self._tree.value.items() if key not in sections}
        tree = _Node(nodes, self._tree.origin)
        if section:
            tree = self._tree.value.get(section, _Node({}, ""))
        tree = _merge(_Node(_from_flags(defaults or {}, "default of").value, ""), tree)
        known = [f"{name}.{key}" for name, part in sections.items() for key, _ in keys_of(part)]
        return cast(
            T, _Builder(section, [*(key for key, _ in keys_of(schema, section)), *known]).build(schema, tree)
        )


def assignments(items: Sequence[str]) -> dict[str, object]:
    """Reads `--set section.field=value` arguments into flags."""
    flags: dict[str, object] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {item}: write it as section.field=value, for example gateway.port=9000")
        flags[key.strip()] = value
    return flags


# Sources --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    """A value and where it came from; mappings hold nodes, so that each key knows its own line."""

    value: Any
    origin: str


def _merge(below: _Node, above: _Node) -> _Node:
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return _Node(merged, above.origin or below.origin)


def _from_file(path: Path) -> _Node:
    try:
        data = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a readable YAML file") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: is not valid YAML ({error.problem}); correct that line") from error
    if data is None:
        return _Node({}, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: must hold keys and values at its top level, like `gateway:`")
    return _with_lines(data, str(path), 1)


def _with_lines(value: object, file: str, line: int) -> _Node:
    origin = f"{file}:{line}"
    if isinstance(value, dict):
        positions: Any = value
        return _Node(
            {str(key): _with_lines(item, file, positions.lc.key(key)[0] + 1) for key, item in value.items()},
            origin,
        )
    if isinstance(value, list):
        rows: Any = value
        return _Node(
            [_with_lines(item, file, rows.lc.item(row)[0] + 1) for row, item in enumerate(value)], origin
        )
    return _Node(value, origin)


def _from_environment(environment: Mapping[str, str]) -> _Node:
    tree = _Node({}, "")
    for name, value in sorted(environment.items()):
        if name.startswith(PREFIX):
            keys = name.removeprefix(PREFIX).lower().split("__")
            tree = _merge(tree, _nested(keys, _Node(value, f"${name}")))
    return tree


def _from_flags(flags: Mapping[str, object], origin: str = "option") -> _Node:
    tree = _Node({}, "")
    for name, value in flags.items():
        if value is not None:
            tree = _merge(tree, _nested(name.split("."), _Node(value, f"{origin} {name}")))
    return tree


def _nested(keys: list[str], leaf: _Node) -> _Node:
    for key in reversed(keys):
        leaf = _Node({key: leaf}, leaf.origin)
    return leaf


# Values ---------------------------------------------------------------------------------------------------


class _Builder:
    """Turns a tree into dataclasses; `known` is every key that a suggestion may name."""

    def __init__(self, section: str, known: list[str]) -> None:
        self._section = section
        self._known = known

    def build(self, schema: type, tree: _Node) -> Any:
        return self._dataclass(schema, tree, self._section)

    def _dataclass(self, schema: type, node: _Node, path: str, default: object = None) -> Any:
        """What is not given comes from `default`, which its parent has there by default, or the schema."""
        if not isinstance(node.value, dict):
            raise ConfigError(f"{node.origin}: {path} is a section; give its fields, not {node.value!r}")
        hints = typing.get_type_hints(schema)
        fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
        base: Any = default if isinstance(default, schema) else None
        given = {}
        for key, child in node.value.items():
            name = f"{path}.{key}" if path else key
            if key not in fields:
                raise self._unknown(child.origin, name, list(fields))
            usual = _default(fields[key]) if base is None else getattr(base, key)
            given[key] = self._value(hints[key], child, name, usual)
        for field in fields.values():
            if field.name not in given and base is None and _required(field):
                where = f"{node.origin}: " if node.origin else ""
                raise ConfigError(
                    f"{where}{path + '.' if path else ''}{field.name} is missing; it has no default"
                )
        try:
            return schema(**given) if base is None else dataclasses.replace(base, **given)
        except (ValueError, ConfigError) as error:
            where = node.origin or path
            raise ConfigError(f"{where}: {error}" if where else str(error)) from error

    def _unknown(self, origin: str, path: str, siblings: list[str]) -> ConfigError:
        parent, _, key = path.rpartition(".")
        if not parent:
            siblings = list(dict.fromkeys([*siblings, *(known.partition(".")[0] for known in self._known)]))
        near = [
            f"{parent}.{name}" if parent else name
            for name in difflib.get_close_matches(key, siblings, 1, 0.5)
        ]
        near = near or [known for known in self._known if known.rpartition(".")[2] == key]
        near = near or difflib.get_close_matches(path, self._known, 1, 0.6)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(siblings)}"
        return ConfigError(f"{origin}: unknown key '{path}'; {hint}")

    def _value(self, kind: Any, node: _Node, path: str, default: object = None) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(cast(type, kind), node, path, default)
        if origin in (typing.Union, types.UnionType):
            return self._union(arguments, node, path, default)
        if origin is tuple:
            return tuple(self._value(arguments[0], item, path) for item in _items(node, path))
        if origin in (dict, Mapping, typing.get_origin(Mapping[str, str])):
            if not isinstance(node.value, dict):
                raise _wrong(node, path, "keys and values")
            return {key: self._value(arguments[1], item, path) for key, item in node.value.items()}
        if origin is typing.Literal:
            return _choice(node, path, {str(value): value for value in arguments})
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return node.value if isinstance(node.value, kind) else _choice(
                node, path, {str(member.value): member for member in kind}
            )  # fmt: skip
        return _scalar(kind, node, path)

    def _union(self, arguments: tuple[Any, ...], node: _Node, path: str, default: object) -> Any:
        if type(None) in arguments and node.value in (None, "", "none"):
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        for kind in kinds[:-1]:
            try:
                return self._value(kind, node, path, default)
            except ConfigError:
                continue
        return self._value(kinds[-1], node, path, default)


def keys_of(schema: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration, dotted, with its type; what `--set` and the file accept."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys_of(cast(type, hints[field.name]), name)
        else:
            yield name, hints[field.name]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> object:
    """Of a field; None where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _items(node: _Node, path: str) -> list[_Node]:
    if isinstance(node.value, list | tuple):
        return [item if isinstance(item, _Node) else _Node(item, node.origin) for item in node.value]
    if isinstance(node.value, str) and node.origin.startswith(("$", "option")):
        if node.value.lstrip().startswith("["):  # as in the file; else items between commas
            try:
                listed = YAML(typ="safe").load(node.value)
            except YAMLError:
                listed = None
            if not isinstance(listed, list):
                raise _wrong(node, path, "a list, as in [a, b]")
            return [_Node(item, node.origin) for item in listed]
        return [_Node(part.strip(), node.origin) for part in node.value.split(",") if part.strip()]
    raise _wrong(node, path, "a list")


def _choice(node: _Node, path: str, choices: Mapping[str, Any]) -> Any:
    # YAML reads a bare `off` or `on` as text here (YAML 1.2), so names such as `off` need no quotes.
    if str(node.value) in choices:
        return choices[str(node.value)]
    near = difflib.get_close_matches(str(node.value), list(choices), 1, 0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ConfigError(f"{node.origin}: {path} is '{node.value}'; {hint}one of: {', '.join(choices)}")


def _scalar(kind: Any, node: _Node, path: str) -> Any:
    value = node.value
    if kind is Any or kind is object:
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _TRUE | _FALSE:
            return str(value).lower() in _TRUE
        raise _wrong(node, path, "true or false")
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise _wrong(node, path, "a number")
        try:
            number = kind(value)
        except ValueError:
            raise _wrong(node, path, "a whole number" if kind is int else "a number") from None
        if kind is int and isinstance(value, float) and number != value:
            raise _wrong(node, path, "a whole number")
        return number
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is str and isinstance(value, str):
        return str(value)
    if kind in (str, Path):
        raise _wrong(node, path, "text (put it in quotes)")
    raise TypeError(f"{path}: configurations cannot hold {kind}")


def _wrong(node: _Node, path: str, wanted: str) -> ConfigError:
    shown = (
        "keys"
        if isinstance(node.value, dict)
        else "a list"
        if isinstance(node.value, list)
        else repr(node.value)
    )
    return ConfigError(f"{node.origin}: {path} is {shown}; it must be {wanted}")
