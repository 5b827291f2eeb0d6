"""From a file to a `Constitution`, or to a list of all that is wrong with it.

A constitution is named by a path, or by a bare name such as `seed` or `charter.zh`, which is looked for in
`$CHARTER_CONSTITUTIONS`, in `./constitutions`, and in the folder that came with Charter.

Texts are normalised before they enter the records, so that re-wrapping a paragraph, quoting it another way
or saving it on another system does not change the digest: Unicode NFC, and in everything but conversations
and worked answers each run of white space is one space (none between two Chinese characters).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charter.constitution.findings import problems, remarks
from charter.constitution.model import Constitution, CritiqueExample, Phase, PreferenceExample, Principle
from charter.constitution.source import Problem, parse_yaml, read_text
from charter.errors import ConfigError, ConstitutionError
from charter.lm.base import ChatMessage, Conversation, Role

ENV = "CHARTER_CONSTITUTIONS"
SCHEMA = "constitution.schema.json"
MAX_SHOWN = 50
"""Problems that one error message lists; a thousand lines hide the first."""

_HAN = r"[\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"
_BETWEEN_HAN = re.compile(rf"(?<={_HAN}) +(?={_HAN})")


@dataclass(frozen=True, slots=True)
class Report:
    """What a look at a file found."""

    constitution: Constitution | None
    """None when there are problems."""
    problems: tuple[Problem, ...]
    """What keeps the file from being used."""
    remarks: tuple[Problem, ...] = ()
    """What is allowed and seldom meant."""


def folders() -> list[Path]:
    """Where bare names are looked for, in this order."""
    here = Path(__file__).resolve()
    named = os.environ.get(ENV)
    candidates = [
        *([Path(named)] if named else []),
        Path("constitutions"),
        here.parents[1] / "constitutions",  # an installed package
        here.parents[3] / "constitutions",  # a checkout
    ]
    return [folder for folder in candidates if folder.is_dir()]


def resolve(name: str | os.PathLike[str]) -> Path:
    """The file that a path or a bare name means; `ConstitutionError` when there is none."""
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) != 1:
        return path
    for folder in folders():
        if (folder / f"{path}.yaml").is_file():
            return folder / f"{path}.yaml"
    known = sorted({f.name.removesuffix(".yaml") for folder in folders() for f in folder.glob("*.yaml")})
    raise ConstitutionError(
        f"no constitution is called {path}; write a path to a YAML file, or one of "
        f"{', '.join(known) or '(none)'}, or name their folder in {ENV}"
    )


def schema_path() -> Path:
    """The published JSON schema; `ConfigError` when the installation lacks it."""
    for folder in reversed(folders()):  # Charter's own before a user's
        if (folder / SCHEMA).is_file():
            return folder / SCHEMA
    raise ConfigError(f"{SCHEMA} is missing; install Charter again, or set {ENV} to the folder that has it")


def load(name: str | os.PathLike[str]) -> Constitution:
    """The constitution at a path or of a bare name.

    Raises `ConstitutionError` that lists every problem as `file:line: field: what is wrong; what to do`.
    """
    report = check(name)
    if report.constitution is None:
        raise ConstitutionError(listing(report.problems))
    return report.constitution


def check(name: str | os.PathLike[str]) -> Report:
    """Reads a file and says all that is wrong with it; raises only when it is no text at all."""
    path = resolve(name)
    return check_text(str(path), read_text(path))


def check_text(file: str, text: str) -> Report:
    """As `check`, for a text that is already in memory; `file` is how the problems call it."""
    root, found = parse_yaml(file, text)
    if root is None:
        return Report(None, tuple(found))
    found += problems(file, root, schema_path())
    if found:
        return Report(None, tuple(sorted(found, key=lambda p: p.line)))
    return Report(from_record(root.plain()), (), tuple(remarks(file, root)))


def listing(found: tuple[Problem, ...]) -> str:
    """Problems one a line, the first fifty of them."""
    lines = [str(p) for p in found[:MAX_SHOWN]]
    if len(found) > MAX_SHOWN:
        lines.append(f"… and {len(found) - MAX_SHOWN} more; correct these first")
    return "\n".join(lines)


def from_record(record: Mapping[str, Any]) -> Constitution:
    """The constitution that a checked record describes."""
    return Constitution(
        name=_line(record["name"]),
        version=_line(record["version"]),
        language=_line(record["language"]),
        description=_line(record["description"]),
        principles=tuple(_principle(p) for p in record["principles"]),
        critique_examples=tuple(_critique_example(e) for e in record.get("critique_examples", ())),
        preference_examples=tuple(_preference_example(e) for e in record.get("preference_examples", ())),
    )


def _principle(record: Mapping[str, Any]) -> Principle:
    phases = frozenset(Phase(p) for p in record["phases"])
    return Principle(
        id=_line(record["id"]),
        title=_line(record["title"]),
        rationale=_line(record["rationale"]),
        category=_line(record["category"]),
        priority=int(record["priority"]),
        weight=float(record["weight"]),
        phases=phases,
        critique_request=_line(record.get("critique_request", "")),
        revision_request=_line(record.get("revision_request", "")),
        preference_question=_line(record.get("preference_question", "")),
    )


def _critique_example(record: Mapping[str, Any]) -> CritiqueExample:
    return CritiqueExample(
        conversation=_conversation(record["conversation"]),
        answer=_block(record["answer"]),
        critique_request=_line(record["critique_request"]),
        critique=_block(record["critique"]),
        revision_request=_line(record["revision_request"]),
        revision=_block(record["revision"]),
    )


def _preference_example(record: Mapping[str, Any]) -> PreferenceExample:
    return PreferenceExample(
        conversation=_conversation(record["conversation"]),
        answer_a=_block(record["answer_a"]),
        answer_b=_block(record["answer_b"]),
        question=_line(record["question"]),
        note=_block(record.get("note", "")),
        better=record["better"],
    )


def _conversation(turns: list[Mapping[str, str]]) -> Conversation:
    return tuple(ChatMessage(Role(t["role"]), _block(t["content"])) for t in turns)


def _line(text: str) -> str:
    """A paragraph, however it was wrapped."""
    return _BETWEEN_HAN.sub("", " ".join(unicodedata.normalize("NFC", text).split()))


def _block(text: str) -> str:
    """A text whose lines matter; only what no reader sees is removed."""
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()
