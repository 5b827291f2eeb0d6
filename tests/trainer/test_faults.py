"""Numbers, drift and labels that go wrong: each ends in a sentence with a remedy, and what is good holds.

A lineage of two steps serves. Then something breaks under the trainer that goes on with it, on a real log and
a real registry; afterwards the newest checkpoint is still the good one, its files are whole, and it serves.
"""

import re
from dataclasses import replace

import pytest
import torch
from tests.trainer.circle import WIDE_AWAKE, Scorer, label, run, world
from tests.trainer.lineage import LABELS, STEPS, heard, holds, labels, letters, publish
from tests.trainer.world import sample

from charter.errors import CheckpointError, TrainingStopped
from charter.registry import Registry
from charter.trainer.config import PPOConfig
from charter.trainer.service import newest_of_lineage
from charter.trainer.watch import Watch
from charter.v1 import types_pb2

# Numbers that are none


class Broken(Scorer):
    """Gives one answer a score that is no number."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    async def score(self, answers, tokenizer_digest):
        scores, digest = await super().score(answers, tokenizer_digest)
        return [*scores[:3], self.value, *scores[4:]], digest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_stops_the_run_and_does_not_come_back_with_the_next(folder, tiny, value):
    publish(folder, labels(tiny))
    with pytest.raises(TrainingStopped) as caught:
        run(folder, Broken(value), steps=5)
    said = str(caught.value)
    assert f"1 of 12 answers a score that is no number ({value} for label 'label-" in said
    assert "start the reward service again from a good model" in said
    assert "last good checkpoint stays in force" in said
    assert holds(folder)
    run(folder, steps=4)
    assert newest_of_lineage(Registry(folder / "checkpoints")).facts.step == 4


def test_a_loss_that_is_not_finite_stops_the_run(folder, tiny):
    """A score within floating point whose square is not: the loss of the value model is infinite."""
    publish(folder, labels(tiny))
    with pytest.raises(TrainingStopped, match=r"step 2: the gradient of the \w.* was not applied.*last good"):
        run(folder, Broken(1e30), steps=5)
    assert holds(folder)


def test_weights_that_are_no_numbers_stop_the_run_before_it_learns(folder, tiny):
    publish(folder, labels(tiny))

    def spoil(trainer):
        with torch.no_grad():
            trainer._updater.policy.model.norm.weight.fill_(float("nan"))

    with pytest.raises(TrainingStopped, match=r"step 2: the policy gives numbers.*Go back to the last good"):
        run(folder, steps=5, prepared=spoil)
    assert holds(folder)


# Drift, as it reads on the log


def _cut_off(event, number):
    for answer in (event.answer_a, event.answer_b):
        answer.finish_reason = types_pb2.FINISH_REASON_LENGTH


def _refusals(event, number):
    event.answer_a.text = event.answer_b.text = f"I'm sorry, but {number} is more than I may tell."


def _boilerplate(event, number):
    event.answer_a.text = event.answer_b.text = "As I always say, all is well that ends well in the end."


def _in_circles(event, number):
    event.answer_a.text = event.answer_b.text = f"{number} press the button " + "and press the button " * 9


def _long(event, number):
    for answer in (event.answer_a, event.answer_b):
        answer.token_ids.extend([number % 200] * 60)
        answer.logprobs.extend([-5.5] * 60)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (_cut_off, {}, r"100% of the answers never end; raise missing_stop_penalty"),
        (_refusals, {}, r"refuses 100% of the prompts \(50% at the start\).*look at the reward model"),
        (
            _boilerplate,
            {},
            r"100% of the answers nearly equal an answer to another.*a phrase that pays",
        ),
        (_in_circles, {}, r"100% of the answers repeat themselves; lower the learning rate"),
        (_long, {}, r"answers went from \d to \d\d tokens; the reward model may be paying for length"),
        (lambda *_: None, {"kl_budget": -100.0}, r"nats per answer from its reference.*raise beta or lower"),
        (lambda *_: None, {"step_kl_budget": 1e-9}, r"one update moved the policy.*lower the learning rate"),
        (lambda *_: None, {"entropy_floor": 1.5}, r"entropy collapsed from .*raise beta or add"),
        (
            lambda *_: None,
            {"entropy_ceiling": 0.5},
            r"entropy rose .*into noise; lower the learning rate",
        ),
    ],
)
def test_a_run_that_drifts_stops_itself_and_what_serves_goes_on(folder, tiny, change, options, message):
    publish(folder, labels(tiny, change))
    watch = replace(WIDE_AWAKE, patience=1, baseline_steps=STEPS, boilerplate_rise=0.6, **options)
    with pytest.raises(TrainingStopped, match=message) as caught:
        run(folder, steps=5, watch=watch)
    assert "training stopped itself at step 2" in str(caught.value), "by how the lineage began, not anew"
    assert "The last good checkpoint stays in force" in str(caught.value)
    assert holds(folder)


def test_a_checkpoint_whose_watch_cannot_be_read_says_so(tmp_path):
    (tmp_path / "watch.json").write_text('{"first": [{}]}')
    with pytest.raises(CheckpointError, match=r"watch.json cannot be read .*resume from"):
        Watch.read(tmp_path / "watch.json", WIDE_AWAKE)


def test_a_reward_that_wants_refusals_is_stopped_on_the_policys_own_answers(tmp_path, tiny):
    """Labels are sampled from the policy as it learns; the reward likes answers that begin as refusals do."""
    world(tmp_path, tiny, labels=0)
    generator, refuses = torch.Generator().manual_seed(0), range(5, 60)
    rates, trained = [], []

    def answered(prompts):
        answers, logps = sample(trained[0]._updater.policy, prompts, generator, 3)
        for answer, logp in zip(answers, logps, strict=True):
            words = " ".join(f"w{i}" for i in answer)
            text = f"I will not. {words}" if answer[0] in refuses else f"First, {words}."
            yield types_pb2.Completion(
                text=text, token_ids=answer, logprobs=logp, finish_reason=types_pb2.FINISH_REASON_STOP
            )

    def sampled(metrics=None):
        prompts = torch.randint(60, 400, (12, 4), generator=generator).tolist()
        pairs = list(zip(prompts, answered(prompts), answered(prompts), strict=True))
        rates.append(sum(a.text.startswith("I will not") for _, *two in pairs for a in two) / 24)
        events = [label(1000 * len(rates) + i, tiny) for i in range(len(pairs))]
        for event, (prompt, a, b) in zip(events, pairs, strict=True):
            event.prompt_token_ids[:] = prompt
            event.answer_a.CopyFrom(a)
            event.answer_b.CopyFrom(b)
        publish(tmp_path, events)

    class Wants(Scorer):
        async def score(self, answers, tokenizer_digest):
            return [3.0 if a[0] in refuses else -1.0 for _, a in answers], "reward-digest"

    def first(trainer):
        trained.append(trainer)
        sampled()

    watch = replace(WIDE_AWAKE, patience=2, entropy_floor=0.0)
    ppo = PPOConfig(learning_rate=1e-2, beta=0.0, micro_batch_tokens=256)
    with pytest.raises(TrainingStopped, match=r"refuses \d+% of the prompts .*look at the reward model"):
        run(
            tmp_path, Wants(), report=sampled, prepared=first, steps=60, labels_per_step=12, watch=watch,
            ppo=ppo, checkpoint_every=1,
        )  # fmt: skip
    assert max(rates) < 1.0, "before all is refused"
    registry = Registry(tmp_path / "checkpoints")
    assert registry.serving().facts.step == 0
    newest = newest_of_lineage(registry)
    assert registry.resolve(newest.id).is_dir()
    assert newest.facts.step == trained[0].step - 1, "the step that gave the alarm is in no checkpoint"


# Labels that cannot teach


def _empty(event, number):
    event.answer_b.ClearField("token_ids")
    event.answer_b.ClearField("logprobs")


def _too_long(event, number):
    event.prompt_token_ids.extend([7] * 512)


def _of_another_tokenizer(event, number):
    event.policy.tokenizer_digest = "another"


def _of_a_stale_constitution(event, number):
    event.constitution_digest = "c-0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_empty, r"rollout 'label-1\d\d#b' has an empty answer, .*sample it again"),
        (_too_long, r"rollout 'label-1\d\d#a' has \d+ tokens; the policy's context holds 512: shorten"),
        (
            _of_another_tokenizer,
            r"label 'label-1\d\d' was made with the tokenizer another.*sample",
        ),
        (
            _of_a_stale_constitution,
            r"label 'label-1\d\d' was given under the constitution c-0.*judge",
        ),
    ],
)
def test_labels_that_cannot_teach_are_buried_and_the_good_checkpoint_stays_until_others_come(
    folder, tiny, change, message
):
    publish(folder, labels(tiny, change, count=LABELS))
    with heard("labels on the log cannot teach") as (told, said):
        run(folder, steps=3, constitution_digest="c-1", until=told)
    assert re.search(message, said[0]["error"]), said
    assert holds(folder), "a step of labels that cannot teach is no step"
    publish(folder, (label(number, tiny) for number in range(200, 200 + LABELS)))
    run(folder, steps=3, constitution_digest="c-1")
    buried = letters(folder)
    assert len(buried) == LABELS
    assert re.search(message, buried[0]), buried[0]
    assert newest_of_lineage(Registry(folder / "checkpoints")).facts.labels.count == LABELS
