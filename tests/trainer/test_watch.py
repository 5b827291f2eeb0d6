"""Runs that go wrong stop themselves and say why."""

from dataclasses import replace

import pytest
import torch
from tests.trainer.world import VOCABULARY, config, llama, sample, value_model

from charter.errors import TrainingStopped
from charter.trainer.config import WatchConfig
from charter.trainer.rollout import Rollout
from charter.trainer.update import Updater
from charter.trainer.watch import (
    Observation,
    Watch,
    near_duplicate_share,
    observe,
    repeats_itself,
)

CALM = Observation(
    step=0, policy_loss=0.1, value_loss=0.1, kl_per_answer=0.5, update_kl=0.01, entropy=1.0,
    answer_length=40.0, cut_off_share=0.0, refusal_rate=0.3, repetition_share=0.0, boilerplate_share=0.1,
)  # fmt: skip


def _settled(**options):
    watch = Watch(WatchConfig(**options))
    for step in range(3):
        watch = watch.after(replace(CALM, step=step))
    return watch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_per_answer": 30.0}, "30.00 nats per answer from its reference"),
        ({"update_kl": 2.0}, "one update moved"),
        ({"entropy": 0.1}, "entropy collapsed from 1.000 to 0.100"),
        ({"entropy": 4.0}, "turn into noise"),
        ({"refusal_rate": 0.8}, "refuses 80% of the prompts"),
        ({"answer_length": 200.0}, "paying for length"),
        ({"answer_length": 4.0}, "from 40 to 4 tokens"),
        ({"cut_off_share": 0.9}, "never end"),
        ({"repetition_share": 0.5}, "repeat themselves"),
        ({"boilerplate_share": 0.9}, "a phrase that pays"),
    ],
)
def test_each_kind_of_drift_stops_the_run_after_some_patience_and_is_named(change, message):
    watch = _settled(patience=2)
    drifted = replace(CALM, step=7, **change)
    watch = watch.after(drifted)
    with pytest.raises(TrainingStopped, match=message) as caught:
        watch.after(replace(drifted, step=8))
    assert "step 8" in str(caught.value)
    assert "last good checkpoint stays in force" in str(caught.value)


def test_one_odd_step_stops_nothing():
    watch = _settled(patience=2).after(replace(CALM, refusal_rate=0.9))
    assert watch.objections == 1
    assert watch.after(CALM).objections == 0


@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "kl_per_answer", "update_kl"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stop_the_run_at_once(name, value):
    with pytest.raises(TrainingStopped, match=name):
        Watch().after(replace(CALM, **{name: value}))


def test_a_calm_run_goes_on_for_ever():
    watch = _settled()
    for step in range(3, 50):
        watch = watch.after(replace(CALM, step=step, refusal_rate=0.3 + 0.2 * (step % 2), entropy=0.8))
    assert watch.objections == 0


def test_a_policy_that_always_refused_is_not_blamed_for_drift():
    start = replace(CALM, refusal_rate=1.0)
    watch = Watch(WatchConfig(patience=1))
    for _ in range(10):
        watch = watch.after(start)


def test_repetition_is_seen_and_ordinary_text_is_not():
    assert repeats_itself("press the button now. " * 6)
    assert not repeats_itself("First find the key, then turn it, then push the door until it opens for you.")
    assert not repeats_itself("I will not help.")


def test_near_duplicates_count_only_between_prompts():
    phrase = "I cannot help with that request because it could hurt other people around you"
    same = [(f"p{i}", phrase + (" today" if i % 2 else "")) for i in range(6)]
    other = [(f"q{i}", " ".join(f"w{i}{j}" for j in range(12))) for i in range(6)]
    assert near_duplicate_share(same) == 1.0
    assert near_duplicate_share(other) == 0.0
    assert near_duplicate_share(same + other) == 0.5
    assert near_duplicate_share([("p", phrase)] * 4) == 0.0


# Real runs of a tiny model, sampled from itself

REFUSAL, LENGTH = 5, 4


def _run(reward, watch, steps=40, **options):
    """PPO of a tiny model on its own samples until the watch stops it."""
    updater = Updater(
        llama(), value_model(), llama(), config(mini_batches=1, micro_batch_tokens=256, **options)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        prompts = torch.randint(6, VOCABULARY, (24, 3), generator=generator).tolist()
        answers, logp = sample(updater.policy, prompts, generator, LENGTH)
        frozen = [
            Rollout(f"{i}", tuple(p), tuple(a), tuple(lp), reward(a))
            for i, (p, a, lp) in enumerate(zip(prompts, answers, logp, strict=True))
        ]
        metrics = updater.update(frozen)
        texts = [(str(p), " ".join(map(str, a))) for p, a in zip(prompts, answers, strict=True)]
        watch = watch.after(observe(metrics, texts, lambda text: str(REFUSAL) in text.split()))


def test_a_reward_that_wants_refusals_is_stopped_before_everything_is_refused():
    watch = Watch(WatchConfig(kl_budget=1e3, step_kl_budget=1e3, entropy_floor=0.0, patience=2))
    with pytest.raises(TrainingStopped, match=r"refuses \d+% of the prompts .*look at the reward model"):
        _run(lambda answer: 3.0 if REFUSAL in answer else -1.0, watch, learning_rate=1e-2, beta=0.0)


def test_a_run_that_is_too_hot_is_stopped_by_its_budget():
    watch = Watch(WatchConfig(kl_budget=2.0, patience=2))
    with pytest.raises(TrainingStopped, match="nats per"):
        _run(lambda answer: float(sum(answer)) / 60, watch, learning_rate=3e-2, beta=0.0, epochs=3)
