"""The JSON schema's findings in words for the person who wrote the file, who need not be a programmer."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jsonschema.exceptions import ValidationError

from charter.constitution.model import Phase
from charter.constitution.source import Node, Problem, field_name

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


Path_ = tuple[str | int, ...]
"""Where a value stands: `("principles", 3, "weight")`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Makes problems of one file."""

    file: str
    root: Node

    def problem(self, path: Path_, what: str, remedy: str) -> Problem:
        """A problem at `path`, with the line that it has in the file."""
        return Problem(self.file, self.root.line_of(path), field_name(path), what, remedy)


def explain(place: Place, error: ValidationError) -> Iterator[Problem]:
    """One or more problems for a finding of the schema's validator."""
    path: Path_ = tuple(error.absolute_path)
    schema: Any = error.schema
    instance: Any = error.instance
    wanted: Any = error.validator_value
    if error.validator == "required":
        yield from _missing_fields(place, path, instance, wanted, schema)
    elif error.validator == "additionalProperties":
        known = list(schema["properties"])
        yield from (_unknown(place, (*path, n), n, known) for n in instance if n not in known)
    elif error.validator == "type":
        yield _wrong_type(place, path, instance, str(wanted))
    else:
        words = _VALUES.get(str(error.validator))
        # A rule that is added to the schema later still gets its place and its reason.
        what, remedy = (
            words(str(path[-1]) if path else "", instance, wanted)
            if words
            else (error.message, "see constitutions/constitution.schema.json")
        )
        yield place.problem(path, what, remedy)


def _missing_fields(
    place: Place, path: Path_, instance: Mapping[str, Any], wanted: list[str], schema: Mapping[str, Any]
) -> Iterator[Problem]:
    known = schema.get("properties", {})
    others = [k for k in instance if k not in known]
    for name in wanted:
        if name not in instance and not _nearest(name, others):  # a misspelling is named as such
            yield _missing(place, path, name, instance)


def _missing(place: Place, path: Path_, name: str, instance: Mapping[str, Any]) -> Problem:
    phase = next((p for p, texts in REQUESTS.items() if name in texts), None)
    what = f"{name} is missing"
    if phase and "phases" in instance:
        what += f", and the principle serves the phase {phase}"
    return place.problem(path, what, f"add a line such as `{name}: {_EXAMPLES.get(name, '…')}`")


def _unknown(place: Place, path: Path_, name: str, known: list[str]) -> Problem:
    near = _nearest(name.lower().replace("-", "_").replace(" ", "_"), known)
    remedy = f"write instead {near}" if near else f"delete it, or write one of {', '.join(known)}"
    return place.problem(path, "is not a known field", remedy)


def _wrong_type(place: Place, path: Path_, instance: Any, wanted: str) -> Problem:
    key = str(path[-1]) if path else ""
    if wanted == "object":
        what = f"is {_shown(instance)} where fields are expected"
        fields = "name, version, language, description, principles" if not path else "its fields"
        return place.problem(path, what, f"write {fields}, each as `key: value` on a line of its own")
    what = f"is {_shown(instance)}, and must be {_KINDS[wanted]}"
    if instance is None:
        return place.problem(path, "has no value", f"write {_KINDS[wanted]}" + _example(key))
    if wanted == "string" and isinstance(instance, int | float):
        return place.problem(path, what, f'write instead "{_source_text(instance)}", in quotes')
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


def _example(key: str) -> str:
    return f", such as `{_EXAMPLES[key]}`" if key in _EXAMPLES else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a group of fields"
    if isinstance(value, list):
        return f"the list [{', '.join(str(v)[:20] for v in value[:4])}{', …' if len(value) > 4 else ''}]"
    if value is None:
        return "empty"
    if not isinstance(value, str):
        return _source_text(value)
    text = " ".join(value.split())
    return f'"{text[:40]}…"' if len(text) > 41 else f'"{text}"'


def _nearest(word: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)


# Findings about one value: (key, value, the schema's limit) -> what is wrong, what to do --------------------


def _enum(_: str, value: Any, wanted: list[str]) -> tuple[str, str]:
    near = _nearest(str(value).lower(), wanted)
    remedy = f"write instead {near or ' or '.join(wanted)}"
    return f"is {_shown(value)}, which is none of {', '.join(wanted)}", remedy


def _pattern(key: str, value: str, wanted: str) -> tuple[str, str]:
    if wanted == r"\S":
        return "is empty", "write the text" + _example(key)
    return f"is {_shown(value)}", f"write instead {_well_formed(key, value)}"


def _range(key: str, value: float, _: float) -> tuple[str, str]:
    range_ = "a whole number from 1 to 1000" if key == "priority" else "a number above 0 and at most 1000"
    return f"is {_shown(value)}, which is out of range", f"write instead {range_}" + _example(key)


def _too_long(_: str, value: str | list[Any], wanted: int) -> tuple[str, str]:
    unit = "characters" if isinstance(value, str) else "entries"
    return f"has {len(value):,} {unit}, and at most {wanted:,} are allowed", "shorten it"


_VALUES: dict[str, Callable[[str, Any, Any], tuple[str, str]]] = {
    "enum": _enum,
    "pattern": _pattern,
    "minimum": _range,
    "exclusiveMinimum": _range,
    "maximum": _range,
    "maxLength": _too_long,
    "maxItems": _too_long,
    "minItems": lambda key, _, __: ("is an empty list", "write at least one entry" + _example(key)),
    "uniqueItems": lambda _, value, __: (f"repeats an entry: {_shown(value)}", "name each phase once"),
}
