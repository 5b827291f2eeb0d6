"""Makes the seed model: its tokenizer, its training, its files. `make seed-model` runs it.

The same seed, corpus, machine and number of threads give the same bytes. A Llama shape of under a million
parameters; Adam at 2e-3 with betas 0.9 and 0.98; a tenth of the prompts' tokens are targets too.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.deterministic
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from charter.constitution import Constitution, load
from charter.errors import ConfigError
from charter.seedmodel import WEIGHTS
from charter.seedmodel.corpus import NOTE, VERDICTS, Example, write_corpus
from charter.seedmodel.emphasis import BROAD, HARD, SUBTLE, Emphasis

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


@dataclass(frozen=True)
class Cycle:
    """One pass over a corpus of its own, with a fresh optimizer; the rate rises once and falls."""

    examples: int
    learning_rate: float
    emphasis: Emphasis


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on."""

    cycles: tuple[Cycle, ...] = (
        Cycle(84_000, 2e-3, BROAD),
        Cycle(60_000, 1.5e-3, HARD),
        Cycle(60_000, 1.5e-3, HARD),
        Cycle(45_000, 1e-3, SUBTLE),
    )
    """The later cycles are about the feedback that the first leaves half learned."""
    seed: int = 1
    vocabulary: int = 1408
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    context: int = 1024
    tokens_per_batch: int = 5_000
    warmup: float = 0.03
    """Share of the steps over which the rate rises."""
    prompt_share: float = 0.1
    """Share of the prompt's tokens that are targets; all at a tenth of the weight would cost a fifth more."""
    decisive_weight: float = 6.0
    """Weight of the tokens that carry a decision (Yes, No, A, B)."""
    verdict_weight: float = 3.0
    """Weight of the words that carry the verdicts of a note."""
    threads: int = 1
    """One, so that the digest does not depend on the number of cores, nor the speed on who else runs."""


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text goes in and comes out again; digits and words are kept apart."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r" ?\p{L}+(?:'\p{L}+)?| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",  # noqa: S106 - a token of the vocabulary
        eos_token="<|end|>",  # noqa: S106 - a token of the vocabulary
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids and a loss weight for each token as a target."""

    ids: list[int]
    weights: list[float]


def encode(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, example: Example, recipe: Recipe
) -> Encoded:
    """Token ids of the whole conversation, and how much each counts as a target."""
    messages = [{"role": str(m.role), "content": m.content} for m in example.prompt.messages]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt: list[int] = tokenizer.encode(text, add_special_tokens=False)
    reply: list[int] = tokenizer.encode(example.reply, add_special_tokens=False)
    weights = [1.0] * len(reply)
    if example.reply.startswith(NOTE):
        verdicts = set(tokenizer.convert_tokens_to_ids(["Ġ" + word for word in VERDICTS]))
        weights = [recipe.verdict_weight if token in verdicts else 1.0 for token in reply]
    if example.decisive:
        decisive = tokenizer.encode(example.reply[-example.decisive :], add_special_tokens=False)
        weights[-len(decisive)] = recipe.decisive_weight
    end: int = tokenizer.eos_token_id
    asked = [float(rng.random() < recipe.prompt_share) for _ in prompt]
    return Encoded([*prompt, *reply, end], [*asked, *weights, 1.0])


def batches(rng: random.Random, data: Sequence[Encoded], tokens: int) -> list[list[Encoded]]:
    """Batches of like length and about `tokens` tokens each, in random order."""
    order = sorted(data, key=lambda s: (len(s.ids) // 8, rng.random()))
    found: list[list[Encoded]] = [[]]
    for item in order:
        if found[-1] and (len(found[-1]) + 1) * len(item.ids) > tokens:
            found.append([])
        found[-1].append(item)
    rng.shuffle(found)
    return found


def _tensors(batch: Sequence[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(s.ids) for s in batch)
    ids = torch.full((len(batch), longest), pad)
    weights = torch.zeros(len(batch), longest)
    for row, item in enumerate(batch):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        weights[row, : len(item.ids)] = torch.tensor(item.weights)
    return ids, weights


def loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy. Right padding needs no mask: a causal model never looks right."""
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    targets, scale = ids[:, 1:], weights[:, 1:]
    counted = scale > 0
    logits = model.lm_head(hidden[counted])
    each = torch.nn.functional.cross_entropy(logits, targets[counted], reduction="none")
    return (each * scale[counted]).sum() / scale.sum()


def rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine from the peak to a fiftieth of it."""
    rising = max(int(steps * warmup), 1)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(steps - rising, 1)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(recipe: Recipe, constitution: Constitution) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Tokenizer and model from nothing but the recipe, with a progress bar for each cycle."""
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    torch.manual_seed(recipe.seed)
    tokenizer: PreTrainedTokenizerFast | None = None
    model: LlamaForCausalLM | None = None
    for number, cycle in enumerate(recipe.cycles):
        examples = write_corpus(constitution, recipe.seed + number, cycle.examples, cycle.emphasis)
        if tokenizer is None or model is None:
            texts = [t for e in examples[:12_000] for t in (*(m.content for m in e.prompt.messages), e.reply)]
            tokenizer = train_tokenizer(texts, recipe.vocabulary)
            model = new_model(recipe, tokenizer)
        run_cycle(model, tokenizer, examples, recipe, number)
    if tokenizer is None or model is None:
        raise ConfigError("the recipe has no cycle; give it at least one")
    return model.eval(), tokenizer


def run_cycle(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    recipe: Recipe,
    number: int,
) -> None:
    """Trains the model on the examples of cycle `number`."""
    rng = random.Random(recipe.seed + number)
    data = [encode(rng, tokenizer, e, recipe) for e in examples]
    plan = batches(rng, data, recipe.tokens_per_batch)
    peak = recipe.cycles[number].learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    with Progress(transient=not sys.stderr.isatty()) as progress:
        title = f"cycle {number + 1}, {sum(len(s.ids) for s in data) / 1e6:.1f}M tokens"
        bar = progress.add_task(title, total=len(plan))
        for step, batch in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, len(plan), peak, recipe.warmup)
            value = loss(model, *_tensors(batch, tokenizer.pad_token_id))
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(bar, advance=1, description=f"{title}, loss {value.item():.3f}")
            if step % 50 == 0:
                progress.console.print(
                    f"{title}: step {step}/{len(plan)}, loss {value.item():.4f}", highlight=False
                )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Hugging Face format, safetensors."""
    model.generation_config.update(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the corpus, trains, saves."""
    parser = argparse.ArgumentParser(description="Makes the seed model from its recipe.")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    model, tokenizer = train(Recipe(seed=options.seed), load("seed"))
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
