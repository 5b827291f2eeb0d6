"""`charter run --settings`: the configuration in force as a YAML file with the meaning beside each key.

What it prints can be saved, changed and given back with --config.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from charter.app.settings import Deployment


def as_yaml(deployment: Deployment) -> str:
    """All settings, section by section; sections of services that do not run here are left out."""
    lines = list(_fields(deployment.common, 0))
    for name in ("gateway", "policy", "critic", "judge", "learning"):
        config = getattr(deployment, name)
        if config is not None:
            lines += ["", f"{name}:", *_fields(config, 1)]
    return "\n".join(lines) + "\n"


def _fields(config: Any, depth: int) -> Iterator[str]:
    indent, meanings = "  " * depth, _meanings(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if meaning := meanings.get(field.name):
            yield from textwrap.wrap(
                meaning, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _fields(value, depth + 1)
        else:
            yield f"{indent}{field.name}: {_scalar(value)}"


def _meanings(schema: type) -> dict[str, str]:
    """Field → the string beneath it in the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, note in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(note, ast.Expr)
            and isinstance(note.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(note.value.value).split())
    return found


def _scalar(value: Any) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_scalar(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)  # JSON's scalars are YAML's
