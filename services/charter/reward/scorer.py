"""The model in force, ready to score."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from charter.errors import RequestError
from charter.feedback.scores import Normalisation, ScoreRule, ended, score
from charter.finetune.checkpoints import Vocabulary, load_vocabulary
from charter.lm.base import ModelVersion
from charter.lm.checkpoint import weights_digest
from charter.reward import network, store


@dataclass(frozen=True, slots=True)
class Answer:
    """What is scored."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


class Scorer:
    """A reward model, made by `open_scorer`. Any thread may call `score`; one call works at a time."""

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        version: ModelVersion,
        scale: Normalisation,
        rule: ScoreRule,
        batch_tokens: int,
    ) -> None:
        self.version = version
        self.vocabulary = vocabulary
        self._model = model
        self._scale = scale
        self._rule = rule
        self._batch_tokens = batch_tokens
        self._lock = threading.Lock()

    def rename(self, version: str) -> None:
        """Names the model, once it is registered."""
        self.version = replace(self.version, version=version)

    def score(self, answers: Sequence[Answer], tokenizer_digest: str) -> list[float]:
        """The normalised score of each answer. Raises `RequestError` for what cannot be scored."""
        self._check(answers, tokenizer_digest)
        cut = [ended(a.answer_ids, self.vocabulary.codec.stop_ids) for a in answers]
        finished = [i for i, (_, whole) in enumerate(cut) if whole]
        sequences = [(*answers[i].prompt_ids, *cut[i][0]) for i in finished]
        with self._lock:
            raw = network.raw_scores(self._model, sequences, self.vocabulary, self._batch_tokens)
        scores = [self._rule.unfinished] * len(answers)
        for i, value in zip(finished, raw, strict=True):
            scores[i] = score(value, True, self._scale, self._rule)
        return scores

    def _check(self, answers: Sequence[Answer], tokenizer_digest: str) -> None:
        ours = self.version.tokenizer_digest
        if tokenizer_digest != ours:
            said = (
                f"the tokenizer {tokenizer_digest[:12]}"
                if tokenizer_digest
                else "a tokenizer that is not named"
            )
            raise RequestError(
                f"the answers are token ids of {said}, and the reward model reads those of {ours[:12]}; send "
                "the policy's tokenizer_digest, and use a reward model that was started from the same family"
            )
        limit, width = self.vocabulary.context_length, self.vocabulary.codec.vocabulary_size
        for i, answer in enumerate(answers):
            ids = (*answer.prompt_ids, *answer.answer_ids)
            if not answer.prompt_ids:
                raise RequestError(f"answer {i} has no prompt; send the token ids that the policy read")
            if len(ids) > limit:
                raise RequestError(
                    f"answer {i} has {len(ids)} tokens with its prompt; the reward model reads {limit}"
                )
            if not 0 <= min(ids) <= max(ids) < width:
                raise RequestError(f"answer {i} has token ids outside the vocabulary of {width}")


def open_scorer(folder: Path, rule: ScoreRule, batch_tokens: int) -> Scorer:
    """Loads a reward model that this service made. Takes seconds; raises `CheckpointError`."""
    import torch

    vocabulary = load_vocabulary(folder)
    model = network.load(vocabulary.folder, vocabulary).eval().requires_grad_(False)
    if torch.cuda.is_available():
        model = model.to("cuda")
    version = ModelVersion(folder.resolve().name, weights_digest(folder), vocabulary.digest)
    return Scorer(model, vocabulary, version, store.scale_of(folder), rule, batch_tokens)
