"""Tiny random models, and what transformers itself says of them."""

import functools

import pytest
from tests.tiny import make_tiny_model

from charter.lm.base import ChatMessage, Prompt, Role

ARCHITECTURES = ("llama", "gpt2", "qwen2")


class Reference:
    """The model by transformers alone: one sequence at a time, no cache."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.folder = str(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def prompt_ids(self, prompt):
        turns = [{"role": m.role.value, "content": m.content} for m in prompt.messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text + prompt.prefill, add_special_tokens=False)

    def logits(self, ids):
        import torch

        with torch.no_grad():
            tensor = torch.tensor([ids])
            return self.model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits[0].float()

    def logprobs(self, prompt_ids, answer_ids, *, blocked=(), temperature=1.0):
        """Of each answer token, under the model without the blocked ids."""
        logits = self.logits([*prompt_ids, *answer_ids])[len(prompt_ids) - 1 : -1] / temperature
        logits[:, list(blocked)] = float("-inf")
        logp = logits.log_softmax(-1)
        return [float(logp[i, t]) for i, t in enumerate(answer_ids)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function from architecture and seed to a folder; each is made once."""
    root = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def make(architecture="llama", seed=0, words_only=False):
        folder = root / f"{architecture}-{seed}{'-words' * words_only}"
        return make_tiny_model(folder, seed=seed, architecture=architecture, words_only=words_only)

    return make


@pytest.fixture(scope="session")
def reference(tiny):
    """`Reference` by architecture and seed."""
    return functools.cache(lambda *arguments: Reference(tiny(*arguments)))


def ask(text, *, prefill="", system=None):
    """A prompt of one user turn."""
    turns = [ChatMessage(Role.SYSTEM, system)] if system is not None else []
    return Prompt((*turns, ChatMessage(Role.USER, text)), prefill)


@pytest.fixture(name="ask", scope="session")
def ask_fixture():
    return ask
