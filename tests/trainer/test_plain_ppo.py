"""A whole step against PPO written plainly: one answer at a time, all logits, lists and loops.

What is shared with the code under test is the models' forward pass and nothing else.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from tests.trainer.circle import label, publishable
from tests.trainer.world import VOCABULARY, config, llama, parameters, reward_model, rollouts, value_model

from charter.bus.base import Record
from charter.trainer.batch import build_batch, micro_batches
from charter.trainer.config import PPOConfig
from charter.trainer.forward import ValueModel, policy_logits, select_attention, slot_values
from charter.trainer.labels import Limits, label_of
from charter.trainer.narrow import narrow_last_layer
from charter.trainer.update import Updater

TEMPERATURE = 0.7
POLICY, REFERENCE, VALUE = 0, 5, 1
"""Seeds of the three models: the policy has left its reference."""


def _rollouts(**fields):
    """Uneven answers; some tokens of every third one were written by the user."""
    made = rollouts(llama(POLICY), 9, temperature=TEMPERATURE, noise=0.2, **fields)
    return [
        replace(r, drawn=tuple(j % 4 != 1 for j in range(len(r.answer_ids)))) if i % 3 == 0 else r
        for i, r in enumerate(made)
    ]


def _updater(**options):
    options = {"missing_stop_penalty": 1.0, "score_clip": 1.5, "beta": 0.2, **options}
    return Updater(llama(POLICY), value_model(VALUE), llama(REFERENCE), config(**options))


_causal = functools.cache(lambda seed: llama(seed).eval())
_reward = functools.cache(lambda: reward_model(VALUE).eval())


@torch.no_grad()
def _distributions(model, rollout):
    """log π of every token of the vocabulary, at each place of the answer."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.answer_ids]])
    logits = model(ids).logits[0].double() / rollout.temperature
    return torch.log_softmax(logits, -1)[len(rollout.prompt_ids) - 1 : -1]


@torch.no_grad()
def _plain_values(rollout):
    """What the reward model says of the text up to each answer token, that token not included."""
    model = _reward()
    ids = [*rollout.prompt_ids, *rollout.answer_ids]
    hidden = model.model(torch.tensor([ids])).last_hidden_state
    return model.score(hidden)[0, len(rollout.prompt_ids) - 1 : -1, 0].tolist()


@functools.cache
def _plain(rollout, beta, gamma=1.0, lam=0.95):
    """Of one answer: log-probs under policy and reference, advantages and returns before whitening."""
    drawn = [j for j in range(len(rollout.answer_ids)) if rollout.drawn is None or rollout.drawn[j]]
    policy, reference = (_distributions(_causal(seed), rollout) for seed in (POLICY, REFERENCE))
    logp, ref = ([float(d[j, rollout.answer_ids[j]]) for j in drawn] for d in (policy, reference))
    valued = _plain_values(rollout)
    values = [valued[j] for j in drawn]
    score = min(max(rollout.score, -1.5), 1.5) - (0.0 if rollout.stopped else 1.0)
    rewards = [-beta * (p - q) for p, q in zip(logp, ref, strict=True)]
    rewards[-1] += score
    advantages, later, after = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        later = reward + gamma * after - value + gamma * lam * later
        after = value
        advantages.insert(0, later)
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    entropy = [float(-(policy[j].exp() * policy[j]).sum()) for j in drawn]
    return {
        "logp": logp, "ref": ref, "advantages": advantages, "returns": returns, "values": values,
        "entropy": entropy,
    }  # fmt: skip


def _all(frozen, name, beta=0.2):
    return torch.tensor([x for r in frozen for x in _plain(r, beta)[name]], dtype=torch.float32)


def test_what_a_step_prepares_is_what_the_plain_way_gives():
    frozen = _rollouts()
    prepared = _updater().prepare(build_batch(frozen))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(prepared.prox_logp, _all(frozen, "logp"), **close)
    torch.testing.assert_close(prepared.ref_logp, _all(frozen, "ref"), **close)
    torch.testing.assert_close(prepared.values, _all(frozen, "values"), **close)
    torch.testing.assert_close(prepared.raw_advantages, _all(frozen, "advantages"), **close)
    torch.testing.assert_close(prepared.returns, _all(frozen, "returns"), **close)
    raw = _all(frozen, "advantages")
    torch.testing.assert_close(prepared.advantages, (raw - raw.mean()) / raw.std(), **close)
    behaviour = [
        p
        for r in frozen
        for p, d in zip(r.behaviour_logprobs, r.drawn or r.answer_ids, strict=True)
        if d or r.drawn is None
    ]
    weights = (_all(frozen, "logp") - torch.tensor(behaviour)).exp().clamp(max=2.0)
    torch.testing.assert_close(prepared.weights, weights, **close)


def test_metrics_are_means_over_real_tokens_and_padding_does_not_dilute_them():
    frozen = _rollouts()
    packed = _updater().update(frozen)
    updater = _updater()
    updater.packed = False
    for model in (updater.policy, updater.value_model.backbone, updater.reference):
        select_attention(model, packed=False)
    padded = updater.update(frozen)
    log_ratio = _all(frozen, "ref") - _all(frozen, "logp")
    answers = torch.tensor([sum(r.drawn) if r.drawn else len(r.answer_ids) for r in frozen])
    expected = {
        "kl_k1": -log_ratio.mean(),
        "kl_k3": (log_ratio.exp() - 1 - log_ratio).mean(),
        "kl_per_answer": -log_ratio.sum() / len(frozen),
        "entropy": _all(frozen, "entropy").mean(),
        "answer_length_mean": answers.float().mean(),
        "cut_off_share": sum(not r.stopped for r in frozen) / len(frozen),
        "explained_variance": 1
        - (_all(frozen, "returns") - _all(frozen, "values")).var() / _all(frozen, "returns").var(),
    }
    for name, value in expected.items():
        assert getattr(packed, name) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    assert padded.padding_waste > 0.05
    for name in (
        *expected,
        "clip_fraction",
        "ratio_mean",
        "ratio_max",
        "effective_sample_size",
        "update_kl_k3",
    ):
        assert getattr(padded, name) == pytest.approx(getattr(packed, name), rel=1e-3, abs=1e-6), name


def test_a_first_optimizer_step_is_adam_on_the_plain_losses():
    """One epoch, one mini-batch: the gradient by autograd on the textbook's loss, then torch's Adam."""
    frozen = _rollouts()
    updater = _updater(epochs=1, mini_batches=1, max_grad_norm=None)
    updater.update(frozen)
    policy = llama(POLICY)
    advantages = _all(frozen, "advantages")
    whitened = ((advantages - advantages.mean()) / advantages.std()).split(
        [len(_plain(r, 0.2)["logp"]) for r in frozen]
    )
    total = torch.zeros(())
    for r, advantage in zip(frozen, whitened, strict=True):
        ids = torch.tensor([[*r.prompt_ids, *r.answer_ids]])
        logp = torch.log_softmax(policy(ids).logits[0] / r.temperature, -1)[len(r.prompt_ids) - 1 : -1]
        drawn = [j for j in range(len(r.answer_ids)) if r.drawn is None or r.drawn[j]]
        now = torch.stack([logp[j, r.answer_ids[j]] for j in drawn])
        behaviour = torch.tensor([r.behaviour_logprobs[j] for j in drawn])
        weight = (now.detach() - behaviour).exp().clamp(max=2.0)
        ratio = (now - now.detach()).exp()
        total = total + (weight * torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))).sum()
    (total / len(advantages)).backward()
    torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5).step()
    found = parameters(updater)
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(found[f"policy.{name}"], value, rtol=1e-3, atol=2e-5)


def test_the_defaults_are_the_papers():
    defaults = PPOConfig()
    assert (defaults.gamma, defaults.lam, defaults.clip, defaults.value_clip) == (1.0, 0.95, 0.2, 0.2)
    assert (defaults.epochs, defaults.value_coefficient, defaults.entropy_bonus) == (4, 0.1, 0.0)
    assert (defaults.beta, defaults.kl_horizon, defaults.kl_estimator) == (0.05, 10_000.0, "k1")
    assert defaults.unbiased_variance
    updater = _updater()
    for optimizer in (updater.policy_optimizer, updater.value_optimizer):
        assert {g["eps"] for g in optimizer.param_groups} == {1e-5}


def test_the_steered_price_moves_by_the_papers_formula_and_what_the_step_saw():
    frozen = _rollouts()
    updater = _updater(kl_target=6.0, kl_horizon=100.0)
    metrics = updater.update(frozen)
    error = min(max(metrics.kl_per_answer / 6.0 - 1.0, -0.2), 0.2)
    assert updater.controller.beta == pytest.approx(0.2 * (1 + error * len(frozen) / 100.0))


def test_every_epoch_takes_every_answer_once_in_a_fresh_order(monkeypatch):
    updater, seen = _updater(epochs=4, mini_batches=2), []
    step = updater._optimizer_step
    monkeypatch.setattr(
        updater,
        "_optimizer_step",
        lambda b, p, answers, tally: (seen.append(answers), step(b, p, answers, tally)),
    )
    metrics = updater.update(_rollouts())
    assert metrics.optimizer_steps == len(seen) == 8
    epochs = [tuple(seen[2 * i]) + tuple(seen[2 * i + 1]) for i in range(4)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len(set(epochs)) == 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_in_every_model_also_where_it_is_configured(checkpointing):
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    def shape(**more):
        torch.manual_seed(0)
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5,
            embd_pdrop=0.5, attn_pdrop=0.5, pad_token_id=0, **more,
        )  # fmt: skip

    def updater():
        value = ValueModel.from_reward_model(GPT2ForSequenceClassification(shape(num_labels=1)))
        models = (GPT2LMHeadModel(shape()).train(), value.train(), GPT2LMHeadModel(shape()).train())
        return Updater(*models, config(epochs=1, mini_batches=1, gradient_checkpointing=checkpointing))

    frozen = rollouts(GPT2LMHeadModel(shape()).eval(), 6)
    one, other = updater(), updater()
    metrics = one.update(frozen)
    assert metrics.ratio_max == pytest.approx(1.0, abs=1e-4)
    assert metrics.kl_k3 == pytest.approx(0.0, abs=1e-9)
    assert metrics.effective_sample_size == pytest.approx(1.0, abs=1e-6)
    other.update(frozen)
    first, second = parameters(one), parameters(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_value_model_begins_as_the_reward_model_or_with_a_head_of_zeros():
    frozen = _rollouts()
    batch = build_batch(frozen)
    model = value_model(VALUE)
    zero = ValueModel.from_causal_model(llama())
    for each in (model, zero):
        narrow_last_layer(each.backbone)
    [micro] = micro_batches(batch, range(len(frozen)), 10_000, packed=False)
    with torch.no_grad():
        torch.testing.assert_close(
            slot_values(model, micro), _all(frozen, "values")[micro.slots], rtol=1e-4, atol=1e-4
        )
        assert torch.equal(slot_values(zero, micro), torch.zeros(len(micro.slots)))
    assert not zero.head.weight.any()


def test_what_stands_in_the_padding_changes_nothing():
    batch = build_batch(_rollouts())
    model, value = llama(POLICY).eval(), value_model(VALUE).eval()
    for each in (model, value.backbone):
        narrow_last_layer(each)
    [micro] = micro_batches(batch, range(len(batch)), 10_000, packed=False)
    noise = torch.randint(0, VOCABULARY, micro.input_ids.shape, generator=torch.Generator().manual_seed(2))
    other = replace(micro, input_ids=torch.where(micro.attention_mask, micro.input_ids, noise))
    assert not torch.equal(micro.input_ids, other.input_ids)
    with torch.no_grad():
        assert torch.equal(policy_logits(model, micro, micro.flat), policy_logits(model, other, other.flat))
        assert torch.equal(slot_values(value, micro), slot_values(value, other))


def test_where_sampling_was_truncated_the_kept_mass_goes_into_the_behaviours_log_prob(tmp_path):
    event = label(1, tmp_path)
    drawn = list(event.answer_a.logprobs)
    event.answer_a.kept_log_mass.extend([math.log(0.8)] * len(drawn))
    message = publishable(event)
    record = Record(message.topic, 0, 0, message.key, message.value, message.headers, 0)
    first, second = label_of(record, Limits(1000, 512)).rollouts
    assert first.behaviour_logprobs == pytest.approx([p + math.log(0.8) for p in drawn], abs=1e-5)
    assert second.behaviour_logprobs == pytest.approx(list(event.answer_b.logprobs))
    assert first.temperature == event.temperature
