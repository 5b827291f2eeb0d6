"""One PPO step on real (tiny) models: what must not change its result, and what must."""

from dataclasses import replace

import pytest
import torch
from tests.trainer.world import (
    VOCABULARY,
    config,
    largest_difference,
    llama,
    parameters,
    rollouts,
    value_model,
)

from charter.errors import ConfigError, RequestError, TrainingStopped
from charter.trainer.batch import build_batch
from charter.trainer.config import PPOConfig
from charter.trainer.forward import select_attention
from charter.trainer.rollout import Rollout
from charter.trainer.update import Updater


def _updater(**options):
    return Updater(llama(), value_model(), llama(), config(**options))


def _after(frozen, **options):
    updater = _updater(**options)
    metrics = updater.update(frozen)
    return parameters(updater), metrics


@pytest.fixture(scope="module")
def frozen():
    torch.set_num_threads(1)
    return rollouts(llama(), 12, noise=0.2)


def test_at_step_0_ratio_is_1_nothing_is_clipped_and_there_is_no_divergence(frozen):
    fresh = rollouts(llama(), 12)
    _, metrics = _after(fresh, epochs=1, mini_batches=1)
    assert metrics.ratio_mean == pytest.approx(1.0, abs=1e-5)
    assert metrics.ratio_max == pytest.approx(1.0, abs=1e-4)
    assert metrics.clip_fraction == 0.0
    assert metrics.kl_k1 == 0.0
    assert metrics.kl_k3 == 0.0
    assert metrics.update_kl_k3 == pytest.approx(0.0, abs=1e-9)
    assert metrics.effective_sample_size == pytest.approx(1.0, abs=1e-6)
    assert metrics.behaviour_kl_k3 == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("budget", [40, 97, 10_000])
def test_micro_batches_change_nothing(frozen, budget):
    whole, _ = _after(frozen, micro_batch_tokens=10**6)
    split, metrics = _after(frozen, micro_batch_tokens=budget)
    assert largest_difference(whole, split) < 2e-6
    assert metrics.padding_waste == 0.0


def test_packed_equals_padded_after_a_whole_step(frozen):
    packed, _ = _after(frozen)
    updater = _updater()
    updater.packed = False
    for model in (updater.policy, updater.value_model.backbone, updater.reference):
        select_attention(model, packed=False)
    metrics = updater.update(frozen)
    assert largest_difference(packed, parameters(updater)) < 2e-6
    assert metrics.padding_waste > 0.0


def test_the_same_step_twice_is_the_same_bit_for_bit(frozen):
    first, _ = _after(frozen)
    second, _ = _after(frozen)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_epochs_use_fresh_orders_that_depend_on_seed_and_step():
    updater = _updater()
    orders = [updater._order(e, 12) for e in range(4)]
    assert all(sorted(o) == list(range(12)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    updater.step = 1
    assert updater._order(0, 12) != orders[0]


def test_tokens_that_the_user_wrote_teach_nothing(frozen):
    """What is stored at the places that are not drawn cannot change the step; advantages skip them."""
    mixed = [replace(r, drawn=tuple(j % 3 != 1 for j in range(len(r.answer_ids)))) for r in frozen]
    noisy = [
        replace(
            r,
            behaviour_logprobs=tuple(
                p if d else -7.0 for p, d in zip(r.behaviour_logprobs, r.drawn, strict=True)
            ),
        )
        for r in mixed
    ]
    first, metrics = _after(mixed)
    second, _ = _after(noisy)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert metrics.actions == sum(sum(r.drawn) for r in mixed)
    batch = build_batch(mixed)
    assert batch.lengths.tolist() == [sum(r.drawn) for r in mixed]


def test_tokens_after_the_last_drawn_one_change_nothing(frozen):
    """Padding by other means: text behind the answer, marked as not drawn, is computed and never seen."""
    longer = [
        replace(
            r,
            answer_ids=(*r.answer_ids, 5, 6, 7),
            behaviour_logprobs=(*r.behaviour_logprobs, -1.0, -1.0, -1.0),
            drawn=(*(True for _ in r.answer_ids), False, False, False),
        )
        for r in frozen
    ]
    first, _ = _after(frozen)
    second, _ = _after(longer)
    assert largest_difference(first, second) < 2e-6


def test_stale_rollouts_are_weighed_and_the_weight_is_truncated(frozen):
    stale = [replace(r, behaviour_logprobs=tuple(p - 3.0 for p in r.behaviour_logprobs)) for r in frozen]
    _, metrics = _after(stale, staleness_weight_cap=2.0)
    assert metrics.weight_truncated > 0.9
    _, fresh = _after(frozen)
    assert fresh.effective_sample_size < 1.0


def test_every_weight_at_the_cap_only_scales_the_policy_gradient():
    """Decoupling: behaviour enters by the weight alone, never by the ratio."""
    plain = rollouts(llama(), 12)
    stale = [replace(r, behaviour_logprobs=tuple(p - 30.0 for p in r.behaviour_logprobs)) for r in plain]
    gradients = []
    for batch in (plain, stale):
        _, metrics = _after(batch, epochs=1, mini_batches=1, max_grad_norm=None, staleness_weight_cap=2.0)
        gradients.append(metrics.policy_grad_norm)
    assert gradients[1] == pytest.approx(2.0 * gradients[0], rel=1e-3)


def test_the_policy_moves_towards_what_scores_well():
    """Two answers to each prompt, one good: after some steps the good one is likelier."""
    policy = llama()
    updater = Updater(policy, value_model(), llama(), config(learning_rate=3e-3, mini_batches=1, beta=0.01))
    good, bad = (7, 8, 9), (10, 11, 12)
    from tests.trainer.world import own_logprobs

    prompts = [(1, 2, i) for i in range(3, 7)]

    def preference():
        select_attention(policy, packed=False)
        gaps = [sum(own_logprobs(policy, p, good)) - sum(own_logprobs(policy, p, bad)) for p in prompts]
        frozen = [
            Rollout(f"{p}{a}", p, a, own_logprobs(policy, p, a), 1.0 if a is good else -1.0)
            for p in prompts
            for a in (good, bad)
        ]
        select_attention(policy, packed=True)
        return sum(gaps) / len(gaps), frozen

    before, frozen = preference()
    for _ in range(8):
        updater.update(frozen)
        after, frozen = preference()
    assert after > before + 2.0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's, not ours
def test_lora_teaches_only_the_adapters_and_needs_no_second_model_as_reference(frozen):
    from peft import LoraConfig, get_peft_model

    base = llama()
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    updater = Updater(policy, value_model(), None, config(learning_rate=1e-2))
    assert updater.packed
    before = parameters(updater)
    first = updater.update(frozen)
    second = updater.update(frozen)
    after = parameters(updater)
    changed = {k for k in before if not torch.equal(before[k], after[k]) and k.startswith("policy.")}
    assert changed
    assert all("lora_" in k for k in changed)
    assert first.kl_k3 == pytest.approx(0.0, abs=1e-9)
    assert second.kl_k3 > 0.0


def test_without_a_reference_a_whole_policy_is_refused():
    with pytest.raises(ConfigError, match="reference"):
        Updater(llama(), value_model(), None, config())


def test_gradient_checkpointing_changes_nothing(frozen):
    plain, _ = _after(frozen)
    saved, _ = _after(frozen, gradient_checkpointing=True)
    assert largest_difference(plain, saved) < 2e-6


def test_an_entropy_bonus_raises_entropy(frozen):
    quiet = [replace(r, score=0.0, stopped=True) for r in frozen]

    def entropy_after(bonus):
        updater = _updater(entropy_bonus=bonus, beta=0.0, epochs=1)
        updater.update(quiet)
        return updater.update(quiet).entropy

    assert entropy_after(1.0) > entropy_after(0.0)


def test_the_first_steps_may_be_for_the_value_model_alone(frozen):
    updater = _updater(value_warmup_steps=1)
    before = parameters(updater)
    updater.update(frozen)
    middle = parameters(updater)
    updater.update(frozen)
    after = parameters(updater)
    policy = [k for k in before if k.startswith("policy.")]
    assert all(torch.equal(before[k], middle[k]) for k in policy)
    assert not all(torch.equal(middle[k], after[k]) for k in policy)
    assert not all(torch.equal(before[k], middle[k]) for k in before if k.startswith("value."))


def test_the_adaptive_price_rises_when_the_policy_is_too_far(frozen):
    updater = Updater(llama(seed=5), value_model(), llama(), config(kl_target=0.01, kl_horizon=100.0))
    assert updater.update(frozen).kl_per_answer > 0.02
    assert updater.controller.beta > updater.config.beta


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_not_applied(frozen):
    updater = _updater()
    before = parameters(updater)
    broken = [replace(frozen[0], score=1e38), *frozen[1:]]
    updater.config = replace(updater.config, score_clip=None)
    with pytest.raises(TrainingStopped, match=r"step 0: .*last good"):
        updater.update(broken)
    assert all(torch.equal(before[k], v) for k, v in parameters(updater).items())


def test_a_broken_policy_stops_the_run_before_it_learns(frozen):
    updater = _updater()
    with torch.no_grad():
        updater.policy.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingStopped, match="policy gives numbers that are not finite"):
        updater.update(frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_ids": (), "behaviour_logprobs": ()}, "empty answer"),
        ({"prompt_ids": ()}, "no prompt"),
        ({"behaviour_logprobs": (-1.0,)}, "log-probs"),
        ({"score": float("nan")}, "reward model is broken"),
        ({"temperature": 0.0}, "at random"),
        ({"answer_ids": (VOCABULARY, 1), "behaviour_logprobs": (-1.0, -1.0)}, "another tokenizer"),
        ({"prompt_ids": tuple([1] * 200)}, "context holds 128"),
        ({"drawn": (False, False)}, "drawn"),
    ],
)
def test_a_rollout_that_cannot_teach_is_refused_by_name_before_anything_changes(change, message):
    good = Rollout("r-good", (1, 2), (3, 4), (-1.0, -2.0), 0.5)
    updater = _updater()
    before = parameters(updater)
    with pytest.raises(RequestError, match=message) as caught:
        updater.update([good, replace(good, rollout_id="r-bad", **change)])
    assert "r-bad" in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in parameters(updater).items())


def test_a_prompt_that_fills_the_context_but_for_one_token_is_learned_from():
    full = Rollout("r", tuple([1] * 127), (3,), (-2.0,), 1.0, stopped=False)
    _, metrics = _after([full], mini_batches=1)
    assert metrics.actions == 1
    assert metrics.cut_off_share == 1.0


@pytest.mark.parametrize("options", [{"epochs": 0}, {"lam": 2.0}, {"clip": 0.0}, {"kl_estimator": "k9"}])
def test_options_that_cannot_work_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PPOConfig(**options)
