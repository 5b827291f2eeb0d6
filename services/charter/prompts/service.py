"""Choosing prompts: sources by weight, and within a source those on which the answers still disagree.

A prompt whose answers the judge tells apart clearly (one good, one bad) teaches most; one on which all
answers are alike teaches nothing. Interest is an average of |2p - 1| over a prompt's labels, scaled to the
surest label seen, so that clamped labels (0.4 to 0.6) count like unclamped ones.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from charter.lm.base import ChatMessage, Conversation, Role
from charter.prompts.config import PromptsConfig
from charter.redteam.prompts import prompt_id


class Source(enum.StrEnum):
    """Where a prompt comes from; the values are the field names of `Weights`."""

    RED_TEAM = "red_team"
    HELPFUL = "helpful"
    PRODUCTION = "production"
    GENERATED = "generated"


KEPT = (Source.PRODUCTION, Source.GENERATED)
"""Sources whose prompts no file has: they are part of the state."""


@dataclass(frozen=True, slots=True)
class SourcedPrompt:
    """A conversation that ends with a user's turn, and its source."""

    conversation: Conversation
    source: Source
    id: str = field(init=False)
    """Digest of the conversation: the same text is the same prompt, whoever brings it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", prompt_id(self.conversation))

    @property
    def request(self) -> str:
        """What the user asks at last."""
        return self.conversation[-1].content


@dataclass(slots=True)
class _Pool:
    prompts: list[SourcedPrompt] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    interest: list[float] = field(default_factory=list)

    def keep_newest(self, count: int) -> None:
        if len(self.prompts) > count:
            del self.prompts[:-count], self.interest[:-count]
            self.places = {p.id: i for i, p in enumerate(self.prompts)}


class Mixer:
    """Draws prompts. The same additions, labels and draws give the same prompts."""

    def __init__(self, config: PromptsConfig) -> None:
        self._config = config
        self._rng = random.Random(config.seed)
        self._pools = {source: _Pool() for source in Source}
        self._limits = {
            Source.PRODUCTION: config.production_kept,
            Source.GENERATED: config.generated_kept,
        }
        self._surest = 1e-3

    def add(self, prompts: Iterable[SourcedPrompt]) -> int:
        """Takes in prompts that no source has yet and says how many were new; new ones interest fully."""
        new = 0
        for prompt in prompts:
            if any(prompt.id in pool.places for pool in self._pools.values()):
                continue
            pool = self._pools[prompt.source]
            pool.places[prompt.id] = len(pool.prompts)
            pool.prompts.append(prompt)
            pool.interest.append(1.0)
            new += 1
        for source, limit in self._limits.items():
            self._pools[source].keep_newest(limit)
        return new

    def on_labelled(self, prompt_id: str, probability: float) -> None:
        """Notes how clearly the judge told two answers to this prompt apart."""
        sureness = min(abs(2 * probability - 1), 1.0)
        self._surest = max(self._surest, sureness)
        for pool in self._pools.values():
            place = pool.places.get(prompt_id)
            if place is not None:
                keep = self._config.memory
                pool.interest[place] = keep * pool.interest[place] + (1 - keep) * sureness / self._surest

    def draw(self, count: int) -> list[SourcedPrompt]:
        """`count` prompts, repetitions possible; empty when there is none at all."""
        sources = [s for s in Source if self._pools[s].prompts]
        weights = [getattr(self._config.weights, s.value) for s in sources]
        if not sum(weights):
            return []
        return [self._draw_from(self._pools[s]) for s in self._rng.choices(sources, weights, k=count)]

    def _draw_from(self, pool: _Pool) -> SourcedPrompt:
        # Rejection sampling: constant time however large the pool, exact for interest within [0, 1].
        ceiling = 1.0 + self._config.floor
        while True:
            place = self._rng.randrange(len(pool.prompts))
            if self._rng.random() * ceiling < pool.interest[place] + self._config.floor:
                return pool.prompts[place]

    def examples(self, count: int) -> list[SourcedPrompt]:
        """Different red-team prompts to show when new ones are invented; fewer where there are fewer."""
        pool = self._pools[Source.RED_TEAM].prompts
        return self._rng.sample(pool, min(count, len(pool)))

    def requests(self, *sources: Source) -> list[str]:
        """What the prompts of these sources ask."""
        return [p.request for s in sources for p in self._pools[s].prompts]

    def __len__(self) -> int:
        return sum(len(p.prompts) for p in self._pools.values())

    # What survives a restart -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the files of the configuration do not tell, for JSON."""
        version, numbers, gauss = self._rng.getstate()
        return {
            "random": [version, list(numbers), gauss],
            "surest": self._surest,
            "interest": {
                p.id: round(value, 6)
                for pool in self._pools.values()
                for p, value in zip(pool.prompts, pool.interest, strict=True)
                if value != 1.0
            },
            "kept": {
                s.value: [[[m.role.value, m.content] for m in p.conversation] for p in self._pools[s].prompts]
                for s in KEPT
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; call it after the files' prompts were added."""
        for name, conversations in state["kept"].items():
            self.add(
                SourcedPrompt(tuple(ChatMessage(Role(r), text) for r, text in turns), Source(name))
                for turns in conversations
            )
        for pool in self._pools.values():
            pool.interest = [float(state["interest"].get(p.id, 1.0)) for p in pool.prompts]
        self._surest = float(state["surest"])
        version, numbers, gauss = state["random"]
        self._rng.setstate((version, tuple(numbers), gauss))


def trigrams(text: str) -> frozenset[str]:
    """The runs of three words of a text, case folded; of three characters where there are no three words.

    Languages that write no spaces, such as Chinese, are compared by characters.
    """
    words = text.casefold().split()
    if len(words) >= 3:
        return frozenset(" ".join(words[i : i + 3]) for i in range(len(words) - 2))
    joined = " ".join(words)
    return frozenset(joined[i : i + 3] for i in range(max(len(joined) - 2, 1)))


def similarity(one: frozenset[str], two: frozenset[str]) -> float:
    """Jaccard's index, 0 to 1; 1 for two empty sets."""
    return len(one & two) / len(one | two) if one | two else 1.0


def novel(candidates: Iterable[str], known: Iterable[str], limit: float) -> Iterator[str]:
    """The candidates that resemble neither a known text nor an earlier candidate by `limit` or more."""
    seen = [trigrams(text) for text in known]
    for text in candidates:
        own = trigrams(text)
        if text.strip() and all(similarity(own, other) < limit for other in seen):
            seen.append(own)
            yield text
