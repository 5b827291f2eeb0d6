"""A saved and resumed run ends with the parameters of the run that was not interrupted, bit for bit."""

from dataclasses import replace

import pytest
import torch
from tests.trainer.world import config, llama, parameters, rollouts, value_model

from charter.errors import CheckpointError
from charter.trainer import state
from charter.trainer.algorithm.controller import AdaptiveKL
from charter.trainer.update import Updater


def _fresh(lora=False, **options):
    policy, reference = llama(), llama()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        policy, reference = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"])), None
    return Updater(policy, value_model(), reference, config(**options))


@pytest.fixture(scope="module")
def frozen():
    torch.set_num_threads(1)
    return rollouts(llama(), 8, noise=0.1)


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_target": 0.01, "kl_horizon": 50.0}, {"value_warmup_steps": 2}, {"lora": True}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's, not ours
def test_a_saved_and_loaded_updater_goes_on_bit_for_bit(tmp_path, frozen, options):
    whole = _fresh(**options)
    for _ in range(3):
        whole.update(frozen)
    first = _fresh(**options)
    first.update(frozen)
    state.save(first, tmp_path)
    second = _fresh(**options)
    state.load(second, tmp_path)
    assert second.step == 1
    assert second.controller == first.controller
    for _ in range(2):
        second.update(frozen)
    assert _equal(parameters(whole), parameters(second))
    assert second.controller == whole.controller


def test_the_saved_policy_is_an_ordinary_checkpoint_with_the_policys_weights(tmp_path, frozen):
    from transformers import AutoModelForCausalLM

    updater = _fresh()
    updater.update(frozen)
    state.save(updater, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert _equal(dict(loaded.state_dict()), dict(updater.policy.state_dict()))
    assert "charter_packed" not in (tmp_path / "config.json").read_text()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_saving_adapters_writes_merged_weights_and_leaves_the_policy_alone(tmp_path, frozen):
    from transformers import AutoModelForCausalLM

    updater = _fresh(lora=True, learning_rate=1e-2)
    updater.update(frozen)
    before = parameters(updater)
    state.save(updater, tmp_path)
    assert _equal(before, parameters(updater))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = updater.policy(input_ids=ids, segments=(4,), use_cache=False).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_state_of_another_shape_is_refused_by_name(tmp_path, frozen):
    updater = _fresh()
    updater.update(frozen)
    state.save(updater, tmp_path)
    other = Updater(llama(hidden_size=16), value_model(), llama(hidden_size=16), config())
    with pytest.raises(CheckpointError, match="other parameters"):
        state.load(other, tmp_path)
    with pytest.raises(CheckpointError, match="seed"):
        state.load(Updater(llama(), value_model(), llama(), config(seed=9)), tmp_path)
    with pytest.raises(CheckpointError, match="for serving only"):
        state.load(updater, tmp_path / "nowhere")


def test_a_damaged_state_is_refused_by_name(tmp_path, frozen):
    updater = _fresh()
    updater.update(frozen)
    state.save(updater, tmp_path)
    file = tmp_path / "trainer" / "value.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        state.load(_fresh(), tmp_path)


def test_a_fixed_price_follows_the_configuration_and_a_steered_one_the_checkpoint(tmp_path, frozen):
    steered = _fresh(kl_target=0.01, kl_horizon=50.0)
    steered.update(frozen)
    state.save(steered, tmp_path)
    again = _fresh(kl_target=0.01, kl_horizon=50.0, beta=0.3)
    state.load(again, tmp_path)
    assert again.controller == replace(AdaptiveKL(0.0, 0.01, 50.0), beta=steered.controller.beta)
