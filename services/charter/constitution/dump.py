"""A constitution as YAML that people like to edit: `check_text(…, dumps(c))` gives `c` again."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from charter.constitution.model import Constitution, Phase

_HEADER = "# yaml-language-server: $schema=constitution.schema.json\n"


def dumps(constitution: Constitution) -> str:
    """The YAML text; texts of several lines are written as blocks."""
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.allow_unicode = True
    stream = io.StringIO()
    yaml.dump(_styled(record(constitution)), stream)
    return _HEADER + stream.getvalue()


def record(constitution: Constitution) -> dict[str, Any]:
    """The constitution as the mapping that its file holds; empty optional fields are left out."""
    whole = asdict(constitution)
    for principle in whole["principles"]:
        principle["phases"] = [phase.value for phase in Phase if phase in principle["phases"]]
    kept = {key: _plain(value) for key, value in whole.items() if value not in ((), "")}
    for principle in kept["principles"]:
        for text in [k for k, v in principle.items() if v == ""]:
            del principle[text]
    for example in kept.get("preference_examples", ()):
        if not example["note"]:
            del example["note"]
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, str) else value  # enumerations are strings


def _styled(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _styled(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_styled(v) for v in value]
    if not isinstance(value, str):
        return value
    if not all(c.isprintable() or c == "\n" for c in value) or key == "version":
        return DoubleQuotedScalarString(value)  # the only style that can escape
    return LiteralScalarString(value) if "\n" in value else value
