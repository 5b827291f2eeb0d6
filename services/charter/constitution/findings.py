"""What is wrong with a constitution's tree: the published JSON schema, and what a schema cannot say."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from charter.constitution.explain import REQUESTS, Path_, Place, explain
from charter.constitution.model import Phase
from charter.constitution.source import Node, Problem

TITLE_LENGTH = 160
"""Longer titles are remarked upon: every assessment of every answer reads them."""


@functools.cache
def _validator(schema: Path) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema.read_text("utf-8")))


def problems(file: str, root: Node, schema: Path) -> list[Problem]:
    """Everything that keeps the tree from being a constitution, in the order of its lines."""
    place, data = Place(file, root), root.plain()
    found = [p for e in _validator(schema).iter_errors(data) for p in explain(place, e)]
    if isinstance(data, dict):
        found += [*_ids(place, data), *_weights(place, data), *_conversations(place, data)]
    return sorted(dict.fromkeys(found), key=lambda p: (p.line, p.field))


def remarks(file: str, root: Node) -> list[Problem]:
    """What is allowed but is seldom meant; only for a tree without problems."""
    place, data = Place(file, root), root.plain()
    found = [*_unused(place, data), *_repeated(place, data), *_wording(place, data), *_balance(place, data)]
    return sorted(found, key=lambda p: (p.line, p.field))


# What a schema cannot say --------------------------------------------------------------------------------


def _entries(data: Mapping[str, Any], key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The well-formed entries of a list with their positions; the schema has named the others."""
    entries = data.get(key)
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            yield index, entry


def _ids(place: Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    first: dict[str, Path_] = {}
    for index, principle in _entries(data, "principles"):
        path, name = ("principles", index, "id"), str(principle.get("id", "")).strip()
        if name and name in first:
            what = f'"{name}" is also the id in line {place.root.line_of(first[name])}'
            yield place.problem(path, what, "write instead an id of its own: ids say where a label came from")
        elif name:
            first[name] = path


def _weights(place: Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for index, principle in _entries(data, "principles"):
        weight = principle.get("weight")
        if isinstance(weight, float) and math.isnan(weight):
            yield place.problem(("principles", index, "weight"), "is not a number", "write instead 1.0")


def _conversations(place: Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("critique_examples", "preference_examples"):
        for index, example in _entries(data, key):
            path: Path_ = (key, index, "conversation")
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


def _unused(place: Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for index, principle in _entries(data, "principles"):
        for phase, texts in REQUESTS.items():
            for text in texts:
                if text in principle and phase not in principle["phases"]:
                    what = f"is never used, since phases does not name {phase}"
                    remedy = f"add {phase} to phases, or delete it"
                    yield place.problem(("principles", index, text), what, remedy)


def _repeated(place: Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    first: dict[tuple[str, str], int] = {}
    for index, principle in _entries(data, "principles"):
        for text in ("title", "critique_request", "preference_question"):
            words = " ".join(str(principle.get(text, "")).split())
            other = first.setdefault((text, words), index)
            if words and other != index:
                what = f"is the same as that of {data['principles'][other]['id']}"
                yield place.problem(("principles", index, text), what, "say what sets this principle apart")


def _wording(place: Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for index, principle in _entries(data, "principles"):
        length = len(principle["title"])
        if length > TITLE_LENGTH:
            what = f"has {length} characters; the critic reads it for every answer"
            yield place.problem(("principles", index, "title"), what, f"say it in {TITLE_LENGTH} or fewer")
        if "(A)" in principle.get("preference_question", ""):
            what = "names the options, which Charter adds itself"
            yield place.problem(("principles", index, "preference_question"), what, "end with the question")


def _balance(place: Place, data: Mapping[str, Any]) -> Iterator[Problem]:
    for phase in Phase:
        serving = [p for _, p in _entries(data, "principles") if phase in p["phases"]]
        if len(serving) >= 4 and not any(_asks_for_help(p) for p in serving):
            what = f"no principle of the phase {phase} speaks for helpfulness"
            remedy = "add one, or the model learns that refusing is always safe"
            yield place.problem(("principles",), what, remedy)


def _asks_for_help(principle: Mapping[str, Any]) -> bool:
    words = " ".join(str(v) for v in principle.values()).lower()
    return any(w in words for w in ("helpful", "evasi", "preach", "有用", "有帮助", "回避", "说教"))
