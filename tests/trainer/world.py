"""Tiny random models and frozen rollouts for the tests of the update."""

from __future__ import annotations

import random

import torch

from charter.trainer.config import PPOConfig
from charter.trainer.forward import ValueModel
from charter.trainer.rollout import Rollout

VOCABULARY = 61


def llama(seed=0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **options}))


def reward_model(seed=1, **options):
    from transformers import LlamaForSequenceClassification

    policy = llama(seed, **options)
    config = policy.config
    config.num_labels = 1
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(policy.model.state_dict())
    return model


def value_model(seed=1, **options):
    return ValueModel.from_reward_model(reward_model(seed, **options))


@torch.no_grad()
def own_logprobs(model, prompt, answer, temperature=1.0):
    """Log-probs of the answer, the plain way: one sequence, no packing."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
    logp = torch.log_softmax(logits, -1)
    return tuple(logp.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1).tolist())


@torch.no_grad()
def sample(policy, prompts, generator, length):
    """Answers of a policy in training to prompts of one length, and the log-probs of their tokens."""
    ids, logp = torch.tensor(prompts), []
    for _ in range(length):
        segments = (ids.shape[1],) * len(ids)
        positions = torch.arange(ids.shape[1]).repeat(len(ids))[None]
        logits = policy(
            input_ids=ids.reshape(1, -1), position_ids=positions, use_cache=False, segments=segments
        ).logits[0]
        last = logits.reshape(len(ids), ids.shape[1], -1)[:, -1].log_softmax(-1)
        drawn = torch.multinomial(last.exp(), 1, generator=generator)
        ids = torch.cat((ids, drawn), 1)
        logp.append(last.gather(1, drawn))
    return ids[:, len(prompts[0]) :].tolist(), torch.cat(logp, 1).tolist()


def rollouts(model, n=12, seed=0, temperature=1.0, noise=0.0, **fields):
    rng = random.Random(seed)
    made = []
    for i in range(n):
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 12)))
        answer = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20)))
        logprobs = own_logprobs(model, prompt, answer, temperature)
        if noise:
            logprobs = tuple(min(0.0, p + rng.gauss(0, noise)) for p in logprobs)
        made.append(
            Rollout(
                f"r{i}", prompt, answer, logprobs, rng.gauss(0, 1), rng.random() < 0.8, temperature, **fields
            )
        )
    return made


def config(**options):
    return PPOConfig(
        **{"learning_rate": 1e-3, "epochs": 2, "mini_batches": 2, "micro_batch_tokens": 64, **options}
    )


def parameters(updater):
    """All trained parameters, by name."""
    unwrap = updater.accelerator.unwrap_model
    named = {f"policy.{k}": v for k, v in unwrap(updater.policy).state_dict().items()}
    named |= {f"value.{k}": v for k, v in unwrap(updater.value_model).state_dict().items()}
    return {k: v.detach().clone() for k, v in named.items()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)
