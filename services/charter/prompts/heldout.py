"""Keeps the prompts that figures are measured on out of what is learned from.

Prompts of our own files are apart from the held-out ones by their making; those of users and of a model that
invents prompts could hit one. Files are compared by similarity. In the seed world whole combinations of what
is done to what are held out, in every phrasing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from charter.prompts.service import similarity, trigrams

SEED_HELDOUT = "seed-heldout"


class HeldOut:
    """Says whether a text belongs to what is held out."""

    def __init__(self, sources: Sequence[str], limit: float) -> None:
        """`limit`: similarity from which a text counts as one of a file's. Raises `ConfigError`."""
        self._limit = limit
        files = [s for s in sources if s != SEED_HELDOUT]
        self._pairs = _combinations() if SEED_HELDOUT in sources else []
        self._texts = []
        if files:
            from charter.redteam.prompts import collect

            self._texts = [trigrams(p.conversation[-1].content) for p in collect(files).prompts]

    def __contains__(self, text: str) -> bool:
        plain = text.casefold()
        if any(verb.search(plain) and thing.search(plain) for verb, thing in self._pairs):
            return True
        own = trigrams(text)
        return any(similarity(own, other) >= self._limit for other in self._texts)


def _combinations() -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    from charter.seedmodel.world import GROUPS, Split, combinations

    return [
        (_word(verb.name), _word(thing))
        for group in GROUPS.values()
        for verb, thing, split in combinations(group)
        if split is Split.HELDOUT
    ]


def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(text.casefold())}\b")
