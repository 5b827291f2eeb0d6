"""The run: TRL's SFTTrainer over examples that are tokenised already, from any checkpoint to a folder.

Torch and TRL are imported when `train` is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charter.errors import ConfigError
from charter.finetune.checkpoints import Vocabulary
from charter.lm.checkpoint import LOADING
from charter.sft.config import SftConfig
from charter.sft.examples import Mixture

if TYPE_CHECKING:
    from charter.finetune.run import Report


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run made."""

    folder: Path
    loss: float
    """Mean over the run, nats per answer token."""
    steps: int


def train(
    vocabulary: Vocabulary,
    mixture: Mixture,
    config: SftConfig,
    target: Path,
    *,
    work: Path,
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    logs: Path | None = None,
) -> Trained:
    """Fine-tunes the checkpoint that `vocabulary` belongs to and writes a Hugging Face folder to `target`.

    `work` keeps the saves of a run under way (`TuningConfig.save_every`): a killed run goes on from there.
    Raises `ConfigError` for a run that diverges, `CheckpointError`, and `finetune.run.Stopped`.
    """
    if not mixture.examples:
        raise ConfigError(
            f"there is nothing to learn from: no revision and no own answer fits ({mixture.too_long} were "
            "too long); give revisions of `charter redteam`, or a larger max_length"
        )
    from charter.finetune import run

    with run.quiet(config.tuning.seed):
        watch = run.Watch(report, stop)
        trainer = _trainer(vocabulary, mixture, config, work, [watch, *run.tensorboard(logs)])
        run.train(trainer, watch, work)
        model = run.merged(trainer)
        if trainer.is_world_process_zero():
            run.save_whole(model, vocabulary, target)
        trainer.accelerator.wait_for_everyone()
    return Trained(target, _mean_loss(trainer), int(trainer.state.global_step))


def _trainer(
    vocabulary: Vocabulary, mixture: Mixture, config: SftConfig, work: Path, callbacks: list[Any]
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from charter.finetune import run

    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(
            vocabulary.folder,
            dtype="float32",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    data = Dataset.from_dict(
        {
            "input_ids": [e.input_ids for e in mixture.examples],
            "labels": [e.labels for e in mixture.examples],
        }
    )
    if vocabulary.tokenizer.pad_token_id is None:
        vocabulary.tokenizer.pad_token = vocabulary.tokenizer.convert_ids_to_tokens(vocabulary.end_id)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**run.arguments(config.tuning, work)),
        train_dataset=data,
        processing_class=vocabulary.tokenizer,
        peft_config=run.adapters(config.tuning, "CAUSAL_LM"),
        callbacks=callbacks,
    )


def _mean_loss(trainer: Any) -> float:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(losses) / len(losses) if losses else math.nan
