"""Watches a run for the ways in which it goes wrong, and says which one.

Each detector is a pure function of what a step reported and of a baseline taken over the first steps; the
watch stops the run on the first that objects for `patience` steps in a row, so that one odd batch stops
nothing. What went wrong is said in words a person can act on. The last good checkpoint stays in force.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from charter.errors import CheckpointError, TrainingStopped
from charter.trainer.algorithm.metrics import UpdateMetrics
from charter.trainer.config import WatchConfig

IsRefusal = Callable[[str], bool]
"""Whether an answer declines its request; passed in, since what a refusal looks like is not ours to say."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What the watch looks at after a step."""

    step: int
    policy_loss: float
    value_loss: float
    kl_per_answer: float
    update_kl: float
    entropy: float
    answer_length: float
    cut_off_share: float
    refusal_rate: float
    repetition_share: float
    boilerplate_share: float


_AVERAGED = (
    "entropy",
    "answer_length",
    "refusal_rate",
    "boilerplate_share",
)


def observe(metrics: UpdateMetrics, answers: Sequence[tuple[str, str]], is_refusal: IsRefusal) -> Observation:
    """Looks at a step's numbers and texts.

    Args:
        metrics: of the update.
        answers: prompt and answer of each rollout.
        is_refusal: the classifier.
    """
    texts = [answer for _, answer in answers]
    count = max(1, len(texts))
    return Observation(
        step=metrics.step,
        policy_loss=metrics.policy_loss,
        value_loss=metrics.value_loss,
        kl_per_answer=metrics.kl_per_answer,
        update_kl=metrics.update_kl_k3,
        entropy=metrics.entropy,
        answer_length=metrics.answer_length_mean,
        cut_off_share=metrics.cut_off_share,
        refusal_rate=sum(map(is_refusal, texts)) / count,
        repetition_share=sum(map(repeats_itself, texts)) / count,
        boilerplate_share=near_duplicate_share(answers),
    )


# Detectors


def not_finite(seen: Observation) -> str | None:
    """A loss, divergence or entropy that is NaN or infinite."""
    for name in ("policy_loss", "value_loss", "kl_per_answer", "update_kl", "entropy"):
        value = getattr(seen, name)
        if not math.isfinite(value):
            return f"{name} is {value}; lower the learning rate, and look at the scores"
    return None


def kl_out_of_budget(seen: Observation, config: WatchConfig) -> str | None:
    """Too far from the reference, or too far in one step."""
    if seen.kl_per_answer > config.kl_budget:
        return (
            f"the policy is {seen.kl_per_answer:.2f} nats per answer from its reference, the budget is "
            f"{config.kl_budget:g}; raise beta or lower the learning rate"
        )
    if seen.update_kl > config.step_kl_budget:
        return (
            f"one update moved the policy by {seen.update_kl:.2f} nats per token, the budget is "
            f"{config.step_kl_budget:g}; lower the learning rate or the number of epochs"
        )
    return None


def entropy_drift(seen: Observation, baseline: Observation, config: WatchConfig) -> str | None:
    """Collapse to one answer, or dissolution into noise."""
    if seen.entropy < config.entropy_floor * baseline.entropy:
        return (
            f"entropy collapsed from {baseline.entropy:.3f} to {seen.entropy:.3f} nats per token; the policy "
            "gives the same answers again and again; raise beta or add an entropy bonus"
        )
    if seen.entropy > config.entropy_ceiling * baseline.entropy:
        return (
            f"entropy rose from {baseline.entropy:.3f} to {seen.entropy:.3f} nats per token; answers turn "
            "into noise; lower the learning rate"
        )
    return None


def refusal_drift(seen: Observation, baseline: Observation, config: WatchConfig) -> str | None:
    """The run drifts into refusing everything."""
    if seen.refusal_rate > max(config.refusal_limit, baseline.refusal_rate) or (
        seen.refusal_rate > baseline.refusal_rate + config.refusal_rise
    ):
        return (
            f"the policy now refuses {seen.refusal_rate:.0%} of the prompts ({baseline.refusal_rate:.0%} at "
            "the start); what is rewarded is refusing, not following the constitution: look at the reward "
            "model and at the mix of prompts"
        )
    return None


def length_drift(seen: Observation, baseline: Observation, config: WatchConfig) -> str | None:
    """Answers grow, shrink, or never end."""
    factor = seen.answer_length / max(1.0, baseline.answer_length)
    if not 1.0 / config.length_factor <= factor <= config.length_factor:
        return (
            f"answers went from {baseline.answer_length:.0f} to {seen.answer_length:.0f} tokens; the reward "
            "model may be paying for length"
        )
    if seen.cut_off_share > config.cut_off_limit:
        return f"{seen.cut_off_share:.0%} of the answers never end; raise missing_stop_penalty"
    return None


def boilerplate_drift(seen: Observation, baseline: Observation, config: WatchConfig) -> str | None:
    """Answers repeat themselves, or each other."""
    if seen.repetition_share > config.repetition_limit:
        return (
            f"{seen.repetition_share:.0%} of the answers repeat themselves; lower the learning rate or raise "
            "beta"
        )
    if seen.boilerplate_share > baseline.boilerplate_share + config.boilerplate_rise:
        return (
            f"{seen.boilerplate_share:.0%} of the answers nearly equal an answer to another prompt "
            f"({baseline.boilerplate_share:.0%} at the start); the policy has found a phrase that pays"
        )
    return None


_WORDS = re.compile(r"\w+|[^\w\s]")


def repeats_itself(text: str, n: int = 4, limit: float = 0.3) -> bool:
    """Whether more than `limit` of a text's n-grams of words have occurred before in it."""
    words = _WORDS.findall(text.lower())
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(grams) >= 4 and 1.0 - len(set(grams)) / len(grams) > limit


def near_duplicate_share(answers: Sequence[tuple[str, str]], n: int = 3, similarity: float = 0.8) -> float:
    """Share of answers whose word n-grams overlap with another prompt's answer (Jaccard ≥ `similarity`).

    Exact duplicates are grouped first, and only texts that share an n-gram are compared, so a few hundred
    answers cost milliseconds.
    """
    shingles: dict[frozenset[tuple[str, ...]], Counter[str]] = {}
    for prompt, answer in answers:
        words = _WORDS.findall(answer.lower())
        grams = frozenset(tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))
        shingles.setdefault(grams, Counter())[prompt] += 1
    holders: dict[tuple[str, ...], list[int]] = {}
    sets = list(shingles)
    for i, grams in enumerate(sets):
        for gram in grams:
            holders.setdefault(gram, []).append(i)
    duplicated = [len(prompts) > 1 for prompts in shingles.values()]
    for i, grams in enumerate(sets):
        shared = Counter(j for gram in grams for j in holders[gram] if j != i)
        for j, common in shared.items():
            near = common / (len(grams) + len(sets[j]) - common) >= similarity
            if near and len(set(shingles[grams]) | set(shingles[sets[j]])) > 1:
                duplicated[i] = True
                break
    total = sum(c.total() for c in shingles.values())
    return sum(c.total() for c, d in zip(shingles.values(), duplicated, strict=True) if d) / max(1, total)


# The watch


@dataclass(frozen=True, slots=True)
class Watch:
    """What has been seen so far; `after` gives the next one, or raises."""

    config: WatchConfig = field(default_factory=WatchConfig)
    first: tuple[Observation, ...] = ()
    """The steps that make the baseline."""
    objections: int = 0
    """Steps in a row that somebody objected to."""

    def baseline(self) -> Observation | None:
        """Means over the first steps; None until they are over."""
        if len(self.first) < self.config.baseline_steps:
            return None
        means = {name: sum(getattr(o, name) for o in self.first) / len(self.first) for name in _AVERAGED}
        return replace(self.first[0], **means)

    def complaint(self, seen: Observation) -> str | None:
        """What is wrong with a step, if anything; patience not counted."""
        found = kl_out_of_budget(seen, self.config)
        baseline = self.baseline()
        if found or baseline is None:
            return found
        detectors = (refusal_drift, entropy_drift, boilerplate_drift, length_drift)
        return next((c for d in detectors if (c := d(seen, baseline, self.config))), None)

    def after(self, seen: Observation) -> Watch:
        """The watch after a step. Raises `TrainingStopped` when the run has drifted."""
        broken = not_finite(seen)
        complaint = broken or self.complaint(seen)
        objections = self.objections + 1 if complaint else 0
        if broken or objections >= self.config.patience:
            raise TrainingStopped(
                f"training stopped itself at step {seen.step}: {complaint}. The last good checkpoint stays "
                "in force"
            )
        first = self.first
        if len(first) < self.config.baseline_steps:
            first = (*first, seen)
        return replace(self, first=first, objections=objections)

    def write(self, file: Path) -> None:
        """Keeps what has been seen: a run that goes on is measured by how its lineage began."""
        seen = {"objections": self.objections, "first": [asdict(o) for o in self.first]}
        file.write_text(json.dumps(seen, indent=1) + "\n")

    @classmethod
    def read(cls, file: Path, config: WatchConfig) -> Watch:
        """What `write` kept; a new watch where a checkpoint has none. Raises `CheckpointError`."""
        try:
            seen = json.loads(file.read_text())
            first = tuple(Observation(**o) for o in seen["first"])
            return cls(config, first[: config.baseline_steps], int(seen["objections"]))
        except FileNotFoundError:
            return cls(config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}); resume from the checkpoint's parent"
            ) from error
