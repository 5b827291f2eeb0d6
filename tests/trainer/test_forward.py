"""Log-probs and values of packed answers against the plain way: one sequence at a time, all logits."""

import pytest
import torch
from tests.trainer.world import VOCABULARY, llama, own_logprobs, rollouts, value_model

from charter.trainer.batch import build_batch, micro_batches
from charter.trainer.forward import (
    can_pack,
    logprobs_and_entropy,
    policy_logits,
    select_attention,
    selected_logprobs,
    slot_values,
)
from charter.trainer.narrow import narrow_last_layer


def _ready(model, *, packed):
    select_attention(model, packed=packed)
    narrow_last_layer(model)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _mistral_with_a_window():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=5, head_dim=8,
        )
    )  # fmt: skip


def _gemma2_with_soft_caps():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("make", "packs"),
    [
        (llama, True),
        (_gpt2, True),
        (_mistral_with_a_window, True),
        (_gemma2_with_soft_caps, False),
        (_mamba, False),
    ],
)
def test_any_architecture_gives_packed_answers_the_logprobs_they_have_alone(make, packs, caplog):
    model = make().eval()
    frozen = rollouts(model, 9)
    packed = can_pack(model)
    narrow_last_layer(model)
    assert packed is packs
    assert ("cannot be packed" in caplog.text) is not packs
    batch = build_batch(frozen)
    for micro in micro_batches(batch, range(len(batch)), 90, packed=packed):
        logits = policy_logits(model, micro, micro.flat)
        logp, entropy = logprobs_and_entropy(logits, batch.targets[micro.slots], torch.ones(len(micro.slots)))
        torch.testing.assert_close(logp, batch.behaviour_logp[micro.slots], rtol=1e-4, atol=1e-5)
        full = torch.log_softmax(logits, -1)
        torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))


def test_packed_equals_padded_for_logprobs_and_values():
    model, value = llama().eval(), value_model().eval()
    batch = build_batch(rollouts(model, 9))
    for each in (model, value.backbone):
        narrow_last_layer(each)
    found = {}
    for packed in (True, False):
        select_attention(model, packed=packed)
        select_attention(value.backbone, packed=packed)
        logp, values = torch.zeros(len(batch.acts)), torch.zeros(len(batch.acts))
        for micro in micro_batches(batch, range(len(batch)), 100, packed=packed):
            with torch.no_grad():
                logits = policy_logits(model, micro, micro.flat)
                values[micro.slots] = slot_values(value, micro)
            logp[micro.slots] = torch.log_softmax(logits, -1).gather(-1, batch.targets[micro.slots, None])[
                :, 0
            ]
        found[packed] = logp, values
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-4, atol=1e-5)


def test_temperature_divides_the_logits():
    model = llama().eval()
    batch = build_batch(rollouts(model, 4))
    _ready(model, packed=True)
    prompt, answer = batch.rollouts[0].prompt_ids, batch.rollouts[0].answer_ids
    micro = micro_batches(batch, [0], 100, packed=True)[0]
    scale = torch.full((len(answer),), 1 / 0.7)
    logp, _ = logprobs_and_entropy(policy_logits(model, micro, micro.flat), batch.targets[micro.slots], scale)
    select_attention(model, packed=False)
    torch.testing.assert_close(
        logp, torch.tensor(own_logprobs(model, prompt, answer, 0.7)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("make", "narrows"), [(llama, True), (_gpt2, True), (_mamba, False)])
def test_the_last_feed_forward_runs_for_the_slots_alone_and_changes_no_gradient(make, narrows):
    batch = build_batch(rollouts(make().eval(), 6))
    gradients, rows = [], []
    for narrow in (False, True):
        model = make().eval()
        packed = can_pack(model)
        assert narrow_last_layer(model) is narrows
        micro = micro_batches(batch, range(6), 10_000, packed=packed)[0]
        last = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)][-1][-1]
        if narrows:
            inner = next(m for m in last.mlp.modules() if m is not last.mlp)
            inner.register_forward_hook(lambda m, i, o: rows.append(i[0].shape[:-1].numel()))
        if not narrow and narrows:
            del last.mlp.forward
        policy_logits(model, micro, micro.flat).logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5)
    if narrows:
        assert rows == [micro.computed_tokens, len(micro.slots)]


def test_no_logits_are_computed_for_prompts():
    model = llama().eval()
    batch = build_batch(rollouts(model, 6))
    _ready(model, packed=True)
    micro = micro_batches(batch, range(6), 10_000, packed=True)[0]
    assert policy_logits(model, micro, micro.flat).shape == (len(micro.slots), VOCABULARY)
    assert len(micro.slots) == sum(len(r.answer_ids) for r in batch.rollouts)
    assert micro.computed_tokens == sum(r.tokens for r in batch.rollouts)


def test_selected_logprobs_and_their_gradient_are_those_of_log_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 701, generator=generator) * 4
    targets = torch.randint(0, 701, (300,), generator=generator)
    scale = torch.rand(300, generator=generator) + 0.5
    weight = torch.randn(300, generator=generator)
    plain = logits.clone().requires_grad_()
    expected = torch.log_softmax(plain * scale[:, None], -1).gather(-1, targets[:, None])[:, 0]
    (expected * weight).sum().backward()
    ours = logits.clone().requires_grad_()
    found = selected_logprobs(ours * 1.0, targets, scale)
    (found * weight).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_autograd_notices_if_somebody_else_needs_the_logits():
    logits = torch.randn(4, 9, requires_grad=True).tanh()  # tanh's backward pass needs its result
    found = selected_logprobs(logits, torch.zeros(4, dtype=torch.long), torch.ones(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_logprobs_are_float32_even_where_the_model_computes_in_bfloat16():
    model, value = llama().eval().to(torch.bfloat16), value_model().to(torch.bfloat16)
    _ready(model, packed=True)
    _ready(value.backbone, packed=False)
    batch = build_batch(rollouts(llama(), 3))
    micro = micro_batches(batch, range(3), 1000, packed=True)[0]
    logp = selected_logprobs(
        policy_logits(model, micro, micro.flat), batch.targets[micro.slots], torch.ones(len(micro.slots))
    )
    assert logp.dtype == torch.float32
    assert slot_values(value, _usual(batch)).dtype == torch.float32


def _usual(batch):
    return micro_batches(batch, range(len(batch)), 1000, packed=False)[0]
