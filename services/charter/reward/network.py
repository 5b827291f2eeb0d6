"""A reward model as a network: read from a folder, made of a language model, run over token ids.

The folder format is Hugging Face's `AutoModelForSequenceClassification` with `num_labels` 1 and safetensors;
whatever reads that can use it, a value model for PPO first of all. Imports torch when something is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from charter.errors import CheckpointError
from charter.finetune.checkpoints import Vocabulary, quiet_loading
from charter.lm.checkpoint import LOADING


def is_reward_model(folder: Path) -> bool:
    """Whether a folder holds a sequence classifier rather than a language model."""
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(folder, local_files_only=True).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def load(folder: Path, vocabulary: Vocabulary, *, seed: int = 0) -> Any:
    """The network in float32. A language model's backbone gets a new head, small and drawn with `seed`.

    Small, so that the first steps teach the backbone what to look at rather than undo a random opinion.
    Raises `CheckpointError`.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        with LOADING, quiet_loading():  # a language model has no reward head, which is no news
            network, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=1,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(f"{folder}: no reward model can be made of it: {error}") from error
    missing = set(report.get("missing_keys", ()))
    head = getattr(network, "score", None)
    if head is None or missing - {"score.weight"}:
        raise CheckpointError(f"{folder}: the weights do not fit config.json; missing {sorted(missing)[:5]}")
    if missing:
        width = head.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (width + 1))
    # The network reads the score where the last token that is no padding stands.
    network.config.get_text_config().pad_token_id = vocabulary.pad_id
    return network


def raw_scores(
    network: Any, sequences: Sequence[Sequence[int]], vocabulary: Vocabulary, batch_tokens: int
) -> list[float]:
    """The raw score of each sequence of ids; how they are batched changes nothing but the speed."""
    import torch

    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = [0.0] * len(sequences)
    device = next(network.parameters()).device
    for batch in _batches([len(sequences[i]) for i in order], batch_tokens):
        chosen = order[batch]
        rows = [torch.tensor(sequences[i]) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=vocabulary.pad_id)
        lengths = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        with torch.inference_mode():
            out = network(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        for i, value in zip(chosen, out.logits[:, 0].float().tolist(), strict=True):
            scores[i] = value
    return scores


def _batches(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Slices of ascending lengths whose padded size stays within the budget, or that hold one sequence."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] * (end + 1 - start) > budget:
            yield slice(start, end)
            start = end
