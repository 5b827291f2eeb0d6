"""What both sides read: models as Hugging Face folders, rollouts as JSON. Imports neither Charter nor TRL.

An answer that stopped ends with `EOS`; one that was cut off does not contain it. `PAD` occurs nowhere, since
TRL tells padding from text by it. Prompts are unique, since TRL's data loader shuffles them.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

PAD, EOS = 0, 1


@dataclass(frozen=True)
class Shape:
    """A Llama shape, and how many rollouts of what lengths it is given."""

    vocabulary: int = 512
    width: int = 64
    inner: int = 172
    layers: int = 2
    heads: int = 4
    rollouts: int = 32
    prompt: tuple[int, int] = (4, 16)
    answer: tuple[int, int] = (3, 32)
    answer_mean: float | None = None
    """None draws lengths evenly; a mean takes the quantiles of a truncated geometric law that has it."""


def write(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Policy, reference, value model and rollouts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        num_labels=1,
        initializer_range=0.06,
    )
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(config)
    policy.save_pretrained(folder / "policy")
    with torch.no_grad():  # a reference from which the policy has moved, so that the KL reward is not zero
        for p in policy.parameters():
            p.add_(0.01 * torch.randn_like(p))
    policy.save_pretrained(folder / "reference")
    LlamaForSequenceClassification(config).save_pretrained(folder / "value")
    (folder / "rollouts.json").write_text(
        json.dumps({"shape": asdict(shape), "rollouts": _draw(shape, seed)})
    )


def _draw(shape: Shape, seed: int) -> list[dict[str, object]]:
    rng = random.Random(seed)

    def token() -> int:
        return rng.randrange(2, shape.vocabulary)

    drawn: list[dict[str, object]] = []
    for length in _answer_lengths(shape, rng):
        prompt = [token() for _ in range(rng.randint(*shape.prompt))]
        answer = [token() for _ in range(length)]
        stopped = rng.random() < 0.8
        if stopped:
            answer[-1] = EOS
        drawn.append({"prompt": prompt, "answer": answer, "stopped": stopped, "score": rng.gauss(0.0, 1.0)})
    return drawn


def _answer_lengths(shape: Shape, rng: random.Random) -> list[int]:
    low, high = shape.answer
    n = shape.rollouts
    if shape.answer_mean is None:
        return [high, *(rng.randint(low, high) for _ in range(n - 1))]

    def quantiles(scale: float) -> list[int]:
        return [min(high, low + round(-scale * math.log(1.0 - (i + 0.5) / n))) for i in range(n)]

    lengths = min(map(quantiles, range(1, 4 * high)), key=lambda q: abs(sum(q) / n - shape.answer_mean))
    rng.shuffle(lengths)
    return lengths


def read(folder: Path) -> list[dict[str, object]]:
    """The rollouts."""
    rollouts: list[dict[str, object]] = json.loads((folder / "rollouts.json").read_text())["rollouts"]
    return rollouts
