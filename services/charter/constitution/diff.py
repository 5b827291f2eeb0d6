"""What changed between two constitutions, by meaning: formatting, comments and wrapping do not count."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from charter.constitution.model import Constitution, Principle


class Kind(enum.StrEnum):
    """What happened."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference; `before` is empty for what was added, `after` for what was removed."""

    kind: Kind
    field: str
    """A path such as `principles.no-preaching.weight`."""
    before: str
    after: str


def compare(old: Constitution, new: Constitution) -> tuple[Change, ...]:
    """All differences; empty exactly when the two digests are the same."""
    return (*_header(old, new), *_principles(old, new), *_order(old, new), *_examples(old, new))


def _header(old: Constitution, new: Constitution) -> Iterator[Change]:
    for name in ("name", "version", "language", "description"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield Change(Kind.CHANGED, name, before, after)


def _principles(old: Constitution, new: Constitution) -> Iterator[Change]:
    before = {p.id: p for p in old.principles}
    after = {p.id: p for p in new.principles}
    renamed = _renamed(before, after)
    for name, principle in before.items():
        path = f"principles.{name}"
        if name in after:
            yield from _fields(path, principle, after[name])
        elif name in renamed:
            yield Change(Kind.CHANGED, f"{path}.id", name, renamed[name])
        else:
            yield Change(Kind.REMOVED, path, principle.title, "")
    for name, principle in after.items():
        if name not in before and name not in renamed.values():
            yield Change(Kind.ADDED, f"principles.{name}", "", principle.title)


def _renamed(before: dict[str, Principle], after: dict[str, Principle]) -> dict[str, str]:
    """Old id to new id, where nothing but the id changed."""
    fresh = {replace(p, id=""): name for name, p in after.items() if name not in before}
    gone = {name: replace(p, id="") for name, p in before.items() if name not in after}
    return {name: fresh[principle] for name, principle in gone.items() if principle in fresh}


def _fields(path: str, old: Principle, new: Principle) -> Iterator[Change]:
    for field in fields(Principle):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after:
            yield Change(Kind.CHANGED, f"{path}.{field.name}", _text(before), _text(after))


def _text(value: object) -> str:
    return ", ".join(sorted(value)) if isinstance(value, frozenset) else str(value)


def _order(old: Constitution, new: Constitution) -> Iterator[Change]:
    common = {p.id for p in old.principles} & {p.id for p in new.principles}
    before = [p.id for p in old.principles if p.id in common]
    after = [p.id for p in new.principles if p.id in common]
    if before != after:
        yield Change(Kind.CHANGED, "principles (order)", ", ".join(before), ", ".join(after))


def _examples(old: Constitution, new: Constitution) -> Iterator[Change]:
    for name in ("critique_examples", "preference_examples"):
        before, after = getattr(old, name), getattr(new, name)
        for example in before:
            if example not in after:
                yield Change(Kind.REMOVED, name, example.conversation[-1].content, "")
        for example in after:
            if example not in before:
                yield Change(Kind.ADDED, name, "", example.conversation[-1].content)
        if before != after and set(before) == set(after):
            yield Change(Kind.CHANGED, f"{name} (order or repetition)", str(len(before)), str(len(after)))
