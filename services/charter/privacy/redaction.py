"""Takes what the rules find out of a text."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from charter.privacy.rules import RULES, Kind, Span

_PLACEHOLDER = re.compile(rf"\[(?:{'|'.join(Kind)})\]")
_INVISIBLE = frozenset("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")
_DASHES = frozenset("\u2010\u2011\u2012\u2013\u2014\u2015\u2212")


def redact(text: str) -> tuple[str, dict[str, int]]:
    """The text with `[KIND]` in the place of personal data, and how often each kind was removed.

    Redacting what is already redacted changes nothing. The cost is linear in the length of the text.
    """
    shadow, places = _shadow(text)
    found = _merged((span, rule.kind) for rule in RULES for span in rule.find(shadow))
    parts, counts, position = [], Counter[str](), 0
    for (start, end), kind in found:
        if _PLACEHOLDER.fullmatch(shadow, start, end):
            continue
        first, last = places[start], places[end - 1] + 1
        parts += [text[position:first], f"[{kind}]"]
        counts[kind.value] += 1
        position = last
    return "".join((*parts, text[position:])), dict(counts)


def _shadow(text: str) -> tuple[str, list[int] | range]:
    """The text as the rules read it, and the place in `text` of each of its characters.

    Full-width and other digits, dashes and spaces become plain ones, and invisible characters go, so that
    ０１３８… or a number with a zero-width space in it is found as well.
    """
    if text.isascii():
        return text, range(len(text))
    places = [i for i, c in enumerate(text) if c not in _INVISIBLE]
    return "".join(_plain(text[i]) for i in places), places


def _plain(character: str) -> str:
    if character.isascii():
        return character
    if character in _DASHES:
        return "-"
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Zs":
        return " "
    folded = unicodedata.normalize("NFKC", character)
    return folded if len(folded) == 1 and folded.isascii() else character


def _merged(found: Iterable[tuple[Span, Kind]]) -> list[tuple[Span, Kind]]:
    """Spans in order, overlapping ones as one, with the kind that was found first."""
    ranked = [(span, rank, kind) for rank, (span, kind) in enumerate(found) if span[0] < span[1]]
    merged: list[tuple[Span, int, Kind]] = []
    for (start, end), rank, kind in sorted(ranked):
        if merged and start < merged[-1][0][1]:
            (first, last), best, best_kind = merged[-1]
            winner = min((best, best_kind), (rank, kind))
            merged[-1] = ((first, max(last, end)), *winner)
        else:
            merged.append(((start, end), rank, kind))
    return [(span, kind) for span, _, kind in merged]
