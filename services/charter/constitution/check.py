"""What is wrong with a constitution's tree: the published JSON schema, and what a schema cannot say.

Every finding becomes a `Problem` in words for the person who wrote the file, who need not be a programmer.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from charter.constitution.model import Phase
from charter.constitution.source import Node, Problem, field_name

TITLE_LENGTH = 160
"""Longer titles are remarked upon: every assessment of every answer reads them."""

REQUESTS = {
    Phase.CRITIQUE: ("critique_request", "revision_request"),
    Phase.PREFERENCE: ("preference_question",),
}
"""The texts that a principle must have for each phase it serves."""

_EXAMPLES = {
    "id": "do-not-help-to-harm",
    "title": "The answer does not help anyone to hurt others.",
    "rationale": "Why this rule exists, for people.",
    "category": "harm",
    "priority": "1",
    "weight": "1.0",
    "phases": "[critique, preference]",
    "name": "my-constitution",
    "version": '"1.0.0"',
    "language": "en",
    "description": "What this constitution is for.",
    "better": "A",
    "role": "user",
    "critique_request": "Say in which ways the answer breaks this rule.",
    "revision_request": "Rewrite the answer so that it keeps this rule.",
    "preference_question": "Which answer keeps this rule better?",
}
_KINDS = {"string": "a text", "number": "a number", "integer": "a whole number", "array": "a list"}

_Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Makes problems of one file."""

    file: str
    root: Node

    def problem(self, path: _Path, what: str, remedy: str) -> Problem:
        return Problem(self.file, self.root.line_of(path), field_name(path), what, remedy)


@functools.cache
def _validator(schema: Path) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema.read_text("utf-8")))


def problems(file: str, root: Node, schema: Path) -> list[Problem]:
    """Everything that keeps the tree from being a constitution, in the order of its lines."""
    place, data = _Place(file, root), root.plain()
    found = [p for e in _validator(schema).iter_errors(data) for p in _schema_problems(place, e)]
    if isinstance(data, dict):
        found += [*_ids(place, data), *_weights(place, data), *_conversations(place, data)]
    return sorted(dict.fromkeys(found), key=lambda p: (p.line, p.field))


def remarks(file: str, root: Node) -> list[Problem]:
    """What is allowed but is seldom meant; only for a tree without problems."""
    place, data = _Place(file, root), root.plain()
    found = [*_unused(place, data), *_repeated(place, data), *_wording(place, data), *_balance(place, data)]
    return sorted(found, key=lambda p: (p.line, p.field))


# The schema's findings in plain words --------------------------------------------------------------------


def _schema_problems(place: _Place, error: ValidationError) -> Iterator[Problem]:
    path: _Path = tuple(error.absolute_path)
    instance, wanted = error.instance, error.validator_value
    key = str(path[-1]) if path else ""
    match error.validator:
        case "required":
            for name in wanted:
                if name not in instance:
                    yield _missing(place, path, name, instance)
        case "additionalProperties":
            known = list(error.schema["properties"])
            for name in instance:
                if name not in known:
                    yield _unknown(place, (*path, name), name, known)
        case "type":
            yield _wrong_type(place, path, instance, wanted)
        case "enum":
            options = [str(w) for w in wanted]
            near = _nearest(str(instance).lower(), options)
            what = f"is {_shown(instance)}, which is none of {', '.join(options)}"
            yield place.problem(path, what, f"write instead {near or ' or '.join(options)}")
        case "pattern" if wanted == r"\S":
            yield place.problem(path, "is empty", "write the text" + _example(key))
        case "pattern":
            yield place.problem(path, f"is {_shown(instance)}", f"write instead {_well_formed(key, instance)}")
        case "minItems":
            yield place.problem(path, "is an empty list", "write at least one entry" + _example(key))
        case "uniqueItems":
            yield place.problem(path, f"repeats an entry: {_shown(instance)}", "name each phase once")
        case "minimum" | "exclusiveMinimum" | "maximum":
            what = f"is {_shown(instance)}, which is out of range"
            yield place.problem(path, what, f"write instead {_range(error.schema)}")
        case "maxLength":
            what = f"has {len(instance):,} characters, and at most {wanted:,} are allowed"
            yield place.problem(path, what, "shorten it")
        case "maxItems":
            what = f"has {len(instance):,} entries, and at most {wanted:,} are allowed"
            yield place.problem(path, what, "leave some out")
        case _:  # a rule added to the schema later still gets its place and its reason
            yield place.problem(path, error.message, "see constitutions/constitution.schema.json")


def _missing(place: _Place, path: _Path, name: str, instance: Mapping[str, Any]) -> Problem:
    phase = next((p for p, texts in REQUESTS.items() if name in texts), None)
    what = f"{name} is missing"
    if phase and "phases" in instance:
        what += f", and the principle serves the phase {phase}"
    near = _nearest(name, [k for k in instance if isinstance(k, str)], cutoff=0.8)
    remedy = f"write instead of {near}: {name}" if near else f"add a line such as `{name}: {_EXAMPLES.get(name, '…')}`"
    return place.problem(path, what, remedy)


def _unknown(place: _Place, path: _Path, name: str, known: list[str]) -> Problem:
    near = _nearest(name.lower().replace("-", "_").replace(" ", "_"), known)
    remedy = f"write instead {near}" if near else f"delete it, or write one of {', '.join(known)}"
    return place.problem(path, "is not a known field", remedy)


def _wrong_type(place: _Place, path: _Path, instance: Any, wanted: str) -> Problem:
    key = str(path[-1]) if path else ""
    if wanted == "object":
        what = f"is {_shown(instance)} where fields are expected"
        fields = "name, version, language, description, principles" if not path else "its fields"
        return place.problem(path, what, f"write {fields}, each as `key: value` on a line of its own")
    what = f"is {_shown(instance)}, and must be {_KINDS[wanted]}"
    if instance is None:
        return place.problem(path, "has no value", f"write {_KINDS[wanted]}" + _example(key))
    if wanted == "string" and isinstance(instance, int | float):
        return place.problem(path, what, f'write instead it in quotes: "{_source_text(instance)}"')
    if wanted == "array" and isinstance(instance, str):
        return place.problem(path, what, f"write instead [{instance}]")
    if wanted in ("number", "integer") and isinstance(instance, str) and _is_number(instance):
        return place.problem(path, what, f"write instead {instance.strip()}, without quotes")
    return place.problem(path, what, f"write instead {_KINDS[wanted]}" + _example(key))


def _source_text(instance: Any) -> str:
    return str(instance).lower() if isinstance(instance, bool) else str(instance)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _well_formed(key: str, instance: str) -> str:
    if key in ("id", "name", "category"):
        words = "".join(c if c.isascii() and c.isalnum() else " " for c in instance.lower()).split()
        return f"lower-case words joined by hyphens, such as {'-'.join(words) or _EXAMPLES[key]}"
    return f"something like {_EXAMPLES.get(key, '…')}"


def _range(schema: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f"a number above {schema['exclusiveMinimum']} and at most {schema['maximum']}, such as 1.0"
    return f"a whole number from {schema['minimum']} to {schema['maximum']}"


def _example(key: str) -> str:
    return f", such as `{_EXAMPLES[key]}`" if key in _EXAMPLES else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a group of fields"
    if isinstance(value, list):
        return f"the list [{', '.join(str(v)[:20] for v in value[:4])}{', …' if len(value) > 4 else ''}]"
    if value is None:
        return "empty"
    text = " ".join(str(_source_text(value)).split())
    return f'"{text[:40]}…"' if len(text) > 41 else f'"{text}"'


def _nearest(word: str, known: list[str], cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=cutoff)), None)


# What a schema cannot say --------------------------------------------------------------------------------


def _entries(data: Mapping[str, Any], key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The well-formed entries of a list with their positions; the schema has named the others."""
    entries = data.get(key)
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            yield index, entry


def _ids(place: _Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    first: dict[str, _Path] = {}
    for index, principle in _entries(data, "principles"):
        path, name = ("principles", index, "id"), str(principle.get("id", "")).strip()
        if name and name in first:
            what = f'"{name}" is also the id in line {place.root.line_of(first[name])}'
            yield place.problem(path, what, "write instead an id of its own: ids say where a label came from")
        elif name:
            first[name] = path


def _weights(place: _Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for index, principle in _entries(data, "principles"):
        weight = principle.get("weight")
        if isinstance(weight, float) and math.isnan(weight):
            yield place.problem(("principles", index, "weight"), "is not a number", "write instead 1.0")


def _conversations(place: _Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("critique_examples", "preference_examples"):
        for index, example in _entries(data, key):
            path: _Path = (key, index, "conversation")
            turns = list(_entries(example, "conversation"))
            if turns and turns[-1][1].get("role") in ("system", "assistant"):
                what = f"the last turn is the {turns[-1][1]['role']}'s"
                remedy = "end with the user's turn: the answer that follows it has a field of its own"
                yield place.problem((*path, turns[-1][0]), what, remedy)
            for turn, message in turns[1:]:
                if message.get("role") == "system":
                    what = "a system turn stands after another turn"
                    yield place.problem((*path, turn), what, "put it first, or leave it out")


# Remarks -------------------------------------------------------------------------------------------------


def _unused(place: _Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for index, principle in _entries(data, "principles"):
        for phase, texts in REQUESTS.items():
            for text in texts:
                if text in principle and phase not in principle["phases"]:
                    what = f"is never used, since phases does not name {phase}"
                    yield place.problem(("principles", index, text), what, f"add {phase} to phases, or delete it")


def _repeated(place: _Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    first: dict[tuple[str, str], int] = {}
    for index, principle in _entries(data, "principles"):
        for text in ("title", "critique_request", "preference_question"):
            words = " ".join(str(principle.get(text, "")).split())
            other = first.setdefault((text, words), index)
            if words and other != index:
                what = f"is the same as that of {data['principles'][other]['id']}"
                yield place.problem(("principles", index, text), what, "say what sets this principle apart")


def _wording(place: _Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for index, principle in _entries(data, "principles"):
        length = len(principle["title"])
        if length > TITLE_LENGTH:
            what = f"has {length} characters; the critic reads it for every answer"
            yield place.problem(("principles", index, "title"), what, f"say it in {TITLE_LENGTH} or fewer")
        if "(A)" in principle.get("preference_question", ""):
            what = "names the options, which Charter adds itself"
            yield place.problem(("principles", index, "preference_question"), what, "end with the question")


def _balance(place: _Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for phase in Phase:
        serving = [p for _, p in _entries(data, "principles") if phase in p["phases"]]
        if len(serving) >= 4 and not any(_asks_for_help(p) for p in serving):
            what = f"no principle of the phase {phase} speaks for helpfulness"
            remedy = "add one, or the model learns that refusing is always safe"
            yield place.problem(("principles",), what, remedy)


def _asks_for_help(principle: Mapping[str, Any]) -> bool:
    words = " ".join(str(v) for v in principle.values()).lower()
    return any(w in words for w in ("helpful", "evasi", "preach", "有用", "有帮助", "回避", "说教"))
