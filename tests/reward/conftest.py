"""A toy world that a tiny random model learns in seconds: polite answers are better than rude ones."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from tests.tiny import make_tiny_model

from charter.finetune.checkpoints import Vocabulary, load_vocabulary
from charter.finetune.config import TuningConfig
from charter.finetune.tokens import tokenise
from charter.lm.base import ChatMessage, ModelVersion, Role
from charter.reward.config import AugmentConfig, LearnerConfig, RewardConfig, ScheduleConfig, WindowConfig
from charter.reward.labels import LabelStore
from charter.reward.pairs import Pair
from charter.reward.window import is_heldout
from charter.rpc import convert
from charter.v1 import events_pb2, types_pb2

THINGS = ("cup", "door", "key", "house", "table", "water")
KIND = ("I will help you with the {}.", "First find the {}, then take it.", "I can help: take the {}.")
RUDE = ("Does it harm the {}? No.", "The {} is material to judge.", "Text between the {} and you.")


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return load_vocabulary(make_tiny_model(tmp_path_factory.mktemp("tiny"), spread=0.05))


def make_pair(vocabulary: Vocabulary, number: int, seed: int = 0) -> Pair:
    """One label; the same number and seed give the same one."""
    rng = random.Random(f"{seed}/{number}")
    thing = rng.choice(THINGS)
    asked = (ChatMessage(Role.USER, f"What about the {thing} {number}?"),)
    kind, rude = (tokenise(vocabulary, asked, rng.choice(kinds).format(thing)) for kinds in (KIND, RUDE))
    probability = rng.choice((0.7, 0.8, 0.9, 0.95))
    pair = Pair(
        f"label-{seed}-{number}",
        f"prompt-{number}",
        kind.prompt_ids,
        kind.answer_ids,
        rude.answer_ids,
        probability,
        constitution_digest="c0ffee",
        judge_digest="judge",
        principles=("polite",),
    )
    if rng.random() < 0.5:
        return replace(pair, answer_a=pair.answer_b, answer_b=pair.answer_a, probability=1 - probability)
    return pair


def make_event(vocabulary: Vocabulary, number: int, seed: int = 0) -> events_pb2.PreferenceEvent:
    """The same as the judge publishes it."""
    pair = make_pair(vocabulary, number, seed)
    policy = ModelVersion("policy-1", "d", vocabulary.digest)
    return events_pb2.PreferenceEvent(
        preference_id=pair.preference_id,
        prompt_id=pair.prompt_id,
        prompt_token_ids=pair.prompt_ids,
        answer_a=types_pb2.Completion(token_ids=pair.answer_a),
        answer_b=types_pb2.Completion(token_ids=pair.answer_b),
        probability_a=pair.probability,
        policy=convert.version_to_proto(policy),
        judge=types_pb2.ModelVersion(digest="judge"),
        constitution_digest="c0ffee",
        opinions=[events_pb2.PreferenceOpinion(principle_id="polite")],
    )


def small_config(folder: Path, init: str) -> RewardConfig:
    """Rounds of a second or two."""
    return RewardConfig(
        init=init,
        folder=folder,
        schedule=ScheduleConfig(first=160, every=80, min_heldout=20, catch_up=True),
        window=WindowConfig(newest=120, replay=24, heldout=60, heldout_share=0.3, reference=16),
        augment=AugmentConfig(mismatched=0.1, replaced=0.1),
        tuning=TuningConfig(learning_rate=4e-3, epochs=4, batch_size=16),
        learner=LearnerConfig(threads=1, niceness=0),
    )


@pytest.fixture
def config(vocabulary: Vocabulary, tmp_path: Path) -> RewardConfig:
    return small_config(tmp_path / "reward", str(vocabulary.folder))


def fill(config: RewardConfig, vocabulary: Vocabulary, count: int, start: int = 0) -> None:
    """Stores labels without a service."""
    with LabelStore(config.folder / "labels.db") as labels:
        for number in range(start, start + count):
            pair = make_pair(vocabulary, number)
            labels.add(pair, is_heldout(pair.prompt_id, config.window.heldout_share))
