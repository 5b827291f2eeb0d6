"""A round of training, from its job to its report. Runs in the learner's process.

A job says everything that the round depends on, and is written down before the round begins, so that a round
that was killed is done again with the same result.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charter.errors import ConfigError
from charter.feedback.scores import Normalisation, ended, normalisation
from charter.finetune.checkpoints import Vocabulary, load_vocabulary, whole_folder
from charter.registry import Labels
from charter.reward import measure, network
from charter.reward.augment import Answered, augment
from charter.reward.config import RewardConfig
from charter.reward.labels import LabelStore
from charter.reward.measure import Quality
from charter.reward.pairs import Pair, read_whole
from charter.reward.window import choose

if TYPE_CHECKING:
    from charter.finetune.run import Report
    from charter.reward.objective import SoftPair

RECORD = "reward.json"
"""Beside a reward model's weights: its scale, its quality, and where it comes from."""
FINDINGS = "findings.json"


@dataclass(frozen=True, slots=True)
class Job:
    """What a round depends on, beside the configuration."""

    number: int
    upto: int
    """Labels that the round sees: the first so many."""
    base: str
    """Folder that it starts from: the model in force, or the checkpoint `init`."""
    base_in_force: bool
    """Whether `base` is a reward model that scores now, which the round's model must beat."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A model on the held-out labels of a round."""

    quality: Quality
    scale: Normalisation
    drift: float
    """Of the newest held-out answers' scores against the reference's: W₁ in deviations."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a round found."""

    job: Job
    candidate: Measured
    in_force: Measured | None
    learned: Labels
    """The labels that were trained on."""
    replayed: int
    """Those of them that are older than the window."""
    augmented: int
    """Pairs that nobody labelled, beside them."""
    seconds: float
    error: float = 0.0
    """Standard error of the difference of their accuracies; 0 where there is no model in force."""

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def loads(cls, text: str) -> Findings:
        """From JSON."""
        record = json.loads(text)

        def measured(part: dict[str, Any] | None) -> Measured | None:
            if part is None:
                return None
            return Measured(Quality(**part["quality"]), Normalisation(**part["scale"]), part["drift"])

        candidate = measured(record.pop("candidate"))
        assert candidate is not None
        in_force, job = measured(record.pop("in_force")), Job(**record.pop("job"))
        learned = Labels(**record.pop("learned"))
        return cls(job=job, candidate=candidate, in_force=in_force, learned=learned, **record)


def run(
    job: Job,
    config: RewardConfig,
    target: Path,
    *,
    report: Report = lambda progress: None,
    evaluating: Callable[[], None] = lambda: None,
) -> None:
    """Trains and measures a candidate: `target` gets `findings.json` and `model/`, whole or not at all."""
    started = time.monotonic()
    vocabulary = load_vocabulary(job.base)
    with LabelStore(config.folder / "labels.db") as labels:
        training, heldout = (labels.numbers(split, job.upto) for split in (False, True))
        chosen = choose(training, heldout, config.window, seed=config.tuning.seed, number=job.number)
        pairs = labels.read((*chosen.replay, *chosen.newest))
        examples, augmented = _examples(pairs, vocabulary, config, job)
        held = labels.read(chosen.heldout), labels.read(chosen.reference)
    before, error = None, 0.0
    if job.base_in_force:
        before, margins = _measured(network.load(vocabulary.folder, vocabulary), vocabulary, held, config)
    model = _train(job, vocabulary, examples, config, target, report)
    evaluating()
    after, gained = _measured(model, vocabulary, held, config)
    if before is not None:
        error = measure.difference_error(gained, margins, [p.probability for p in held[0]])
    found = Findings(
        job=job,
        candidate=after,
        in_force=before,
        error=error,
        learned=_learned(pairs),
        replayed=len(chosen.replay),
        augmented=augmented,
        seconds=time.monotonic() - started,
    )
    _write(target, model, vocabulary, found)
    shutil.rmtree(_work(target), ignore_errors=True)


def _learned(pairs: Sequence[Pair]) -> Labels:
    """Which principles, judges and constitutions made the labels."""

    def counted(names: Iterable[str]) -> dict[str, int]:
        return dict(Counter(name for name in names if name))

    return Labels(
        count=len(pairs),
        by_principle=counted(principle for pair in pairs for principle in pair.principles),
        by_judge=counted(pair.judge_digest for pair in pairs),
        by_constitution=counted(pair.constitution_digest for pair in pairs),
    )


def _work(target: Path) -> Path:
    return target.with_name(f"{target.name}.work")


def _examples(
    pairs: Sequence[Pair], vocabulary: Vocabulary, config: RewardConfig, job: Job
) -> tuple[list[SoftPair], int]:
    """What the round trains on: the labels and the pairs that nobody labelled, in a random order."""
    from charter.reward.objective import SoftPair

    seed = config.tuning.seed * 1_000_003 + job.number
    examples = [_soft(pair) for pair in pairs]
    text = vocabulary.codec.detokeniser.text
    answered = [
        Answered(p.prompt_id, p.prompt_ids, text(_content(p.preferred, vocabulary)), p.confidence)
        for p in pairs
    ]
    spoilt = augment(answered, config.augment, labels=len(pairs), seed=seed)
    for pair in spoilt:
        better, worse = (_ids(pair.prompt_ids, answer, vocabulary) for answer in (pair.better, pair.worse))
        if max(len(better), len(worse)) <= vocabulary.context_length:
            examples.append(SoftPair(better, worse, config.augment.target))
    random.Random(f"{seed}/order").shuffle(examples)
    return examples, len(examples) - len(pairs)


def _soft(pair: Pair) -> SoftPair:
    from charter.reward.objective import SoftPair

    a, b = read_whole(pair)
    if pair.probability >= 0.5:
        return SoftPair(tuple(a), tuple(b), pair.probability)
    return SoftPair(tuple(b), tuple(a), 1.0 - pair.probability)


def _content(answer: tuple[int, ...], vocabulary: Vocabulary) -> tuple[int, ...]:
    return tuple(i for i in ended(answer, vocabulary.codec.stop_ids)[0] if i not in vocabulary.codec.stop_ids)


def _ids(prompt: tuple[int, ...], answer: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    return (*prompt, *vocabulary.codec.plain_ids(answer), vocabulary.end_id)


def _measured(
    model: Any, vocabulary: Vocabulary, held: tuple[list[Pair], list[Pair]], config: RewardConfig
) -> tuple[Measured, list[float]]:
    """Quality on the first list, scale on the answers of the second, drift from the second to the first.

    Beside it, by how much the model puts the first answer of each pair of the first list before the second.
    """
    import torch

    heldout, reference = held
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    raw = [_raw(model, pairs, vocabulary, config) for pairs in (heldout, reference)]
    margins = [a - b for a, b in raw[0]]
    scale = normalisation([r for pair in raw[1] for r in pair])
    scores = [[scale(r) for pair in part for r in pair] for part in raw]
    quality = measure.quality(margins, [p.probability for p in heldout])
    return Measured(quality, scale, measure.drift(scores[0], scores[1])), margins


def _raw(
    model: Any, pairs: Sequence[Pair], vocabulary: Vocabulary, config: RewardConfig
) -> list[tuple[float, float]]:
    sequences = [sequence for pair in pairs for sequence in read_whole(pair)]
    scores = network.raw_scores(model, sequences, vocabulary, config.batch_tokens)
    return list(zip(scores[::2], scores[1::2], strict=True))


def _train(
    job: Job,
    vocabulary: Vocabulary,
    examples: Sequence[SoftPair],
    config: RewardConfig,
    target: Path,
    report: Report,
) -> Any:
    from trl import RewardConfig as TrlRewardConfig

    from charter.finetune import run as runs
    from charter.reward.objective import SoftPairCollator, SoftRewardTrainer, dataset

    if not examples:
        raise ConfigError("a round has no label to train on; raise schedule.first")
    work = _work(target)
    tuning = config.tuning
    if job.base_in_force:
        tuning = replace(tuning, epochs=config.schedule.renewal_epochs)
    with runs.quiet(config.tuning.seed):
        watch = runs.Watch(report)
        model = network.load(vocabulary.folder, vocabulary, seed=config.tuning.seed)
        if vocabulary.tokenizer.pad_token_id is None:
            vocabulary.tokenizer.pad_token = vocabulary.tokenizer.convert_ids_to_tokens(vocabulary.end_id)
        trainer = SoftRewardTrainer(
            model=model,
            args=TrlRewardConfig(**runs.arguments(tuning, work)),
            train_dataset=dataset(examples),
            processing_class=vocabulary.tokenizer,
            data_collator=SoftPairCollator(pad_token_id=vocabulary.pad_id),
            peft_config=runs.adapters(config.tuning, "SEQ_CLS", keep=("score",)),
            callbacks=[watch, *runs.tensorboard(config.folder / "logs" / f"round-{job.number:06d}")],
        )
        runs.train(trainer, watch, work)
        return runs.merged(trainer)


def _write(target: Path, model: Any, vocabulary: Vocabulary, found: Findings) -> None:
    from charter.finetune import run as runs

    with whole_folder(target) as folder:
        (folder / "model").mkdir()
        runs.save(model, vocabulary, folder / "model")
        record = {
            "round": found.job.number,
            "labels": found.job.upto,
            "base": Path(found.job.base).name,
            "mean": found.candidate.scale.mean,
            "deviation": found.candidate.scale.deviation,
            **asdict(found.candidate.quality),
            "drift": found.candidate.drift,
        }
        (folder / "model" / RECORD).write_text(json.dumps(record, indent=1))
        (folder / FINDINGS).write_text(found.dumps())
