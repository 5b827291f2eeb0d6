"""A run of a TRL trainer: its arguments, its callbacks, and where a killed run goes on.

Imports torch, transformers and trl (ten seconds): import this module only when a training starts.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from charter.errors import CheckpointError, ConfigError
from charter.finetune.checkpoints import Vocabulary, copy_tokenizer, quiet_loading, whole_folder
from charter.finetune.config import TuningConfig

_COMPLETE = "charter.complete"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    step: int
    steps: int
    loss: float
    """Of the last logged steps; NaN before the first."""


Report = Callable[[Progress], None]


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The run was asked to stop before its end."""


def arguments(config: TuningConfig, work: Path) -> dict[str, Any]:
    """Keyword arguments for TRL's configurations; `work` keeps the saves of a run under way."""
    import torch

    devices = int(os.environ.get("WORLD_SIZE", "1"))
    micro = config.micro_batch_size or max(config.batch_size // devices, 1)
    on_cpu = not torch.cuda.is_available()
    return {
        "output_dir": str(work),
        "seed": config.seed,
        "data_seed": config.seed,
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(config.batch_size // (micro * devices), 1),
        "warmup_steps": config.warmup_share,  # below 1 it is a share of all steps
        "lr_scheduler_type": config.schedule,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.precision == "bfloat16",
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "activation_checkpointing": config.activation_checkpointing,
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen, and ends the run
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or 500,
        "save_total_limit": 2,  # the older one is complete while the newer is being written
        "report_to": [],
        "disable_tqdm": True,
        "max_length": None,  # too long examples were left out; truncation would cut off their end
    }


def adapters(config: TuningConfig, task: str, keep: tuple[str, ...] = ()) -> Any:
    """PEFT's configuration, or None where all weights are tuned; `keep`: heads that are trained whole."""
    lora = config.lora
    if not lora.rank:
        return None
    from peft import LoraConfig as PeftLora

    targets = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    return PeftLora(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=list(keep) or None,
        task_type=task,
    )


@contextmanager
def quiet(seed: int) -> Iterator[None]:
    """Seeds everything, and keeps what is no news out of the log."""
    set_seed(seed)
    with quiet_loading(), warnings.catch_warnings():
        # peft asks transformers 5.23 for a property by its old name; nothing of ours can change that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


class Watch(TrainerCallback):  # type: ignore[misc]
    """Reports progress, stops when asked, ends a run whose loss is not finite, marks saves as complete."""

    def __init__(self, report: Report, stop: Callable[[], bool] = lambda: False) -> None:
        self._report = report
        self._stop = stop
        self._loss = math.nan
        self.stopped = False
        self.broken_at: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer after each optimizer step."""
        self._report(Progress(state.global_step, state.max_steps, self._loss))
        if self._stop():
            self.stopped = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the trainer with the averages since the last entry."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self._loss = float(loss)
        if not math.isfinite(self._loss):
            self.broken_at = state.global_step
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer when a save has been written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _COMPLETE).touch()


def resume_from(work: Path) -> str | None:
    """The newest complete save in `work`; half-written ones are removed."""
    found: list[tuple[int, Path]] = []
    for folder in work.glob("checkpoint-*"):
        if (folder / _COMPLETE).is_file():
            found.append((int(folder.name.rpartition("-")[2]), folder))
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return str(max(found)[1]) if found else None


def tensorboard(folder: Path | None) -> list[Any]:
    """The callback that writes TensorBoard's files, where a folder is given."""
    if folder is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder)))]


def train(trainer: Any, watch: Watch, work: Path) -> None:
    """Trains to the end. Raises `Stopped`, `ConfigError` for a run that diverged, `CheckpointError`."""
    trainer.remove_callback(PrinterCallback)  # standard output is the caller's
    try:
        trainer.train(resume_from_checkpoint=resume_from(work))
    except OSError as error:
        raise CheckpointError(
            f"{work}: training could not save its state ({error.strerror or error}); make room on the disk "
            "and start again, it goes on from the last whole save"
        ) from error
    if watch.broken_at is not None:
        raise ConfigError(
            f"the loss was not finite at step {watch.broken_at}; nothing was saved; lower learning_rate, or "
            "look for weights that are broken already"
        )
    if watch.stopped:
        raise Stopped


def merged(trainer: Any) -> Any:
    """The trained model as one set of weights, adapters merged. Raises `ConfigError` if it is not finite."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ConfigError(f"weight {name} is not finite after training; lower learning_rate")
    return model


def save(model: Any, vocabulary: Vocabulary, folder: Path) -> None:
    """Writes a Hugging Face folder into an existing one: config, safetensors, and the tokenizer as it was."""
    with quiet_loading():
        model.save_pretrained(folder, safe_serialization=True)
    copy_tokenizer(vocabulary.folder, folder)


def save_whole(model: Any, vocabulary: Vocabulary, target: Path) -> None:
    """The same as a new folder, whole or not at all."""
    with whole_folder(target) as folder:
        save(model, vocabulary, folder)
