"""Opens what PPO needs: policy, reference, value model. Imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from charter.errors import CheckpointError, ConfigError
from charter.finetune.config import LoraConfig
from charter.lm.checkpoint import LOADING, checkpoint_folder
from charter.registry import Registry
from charter.registry.registry import REWARD
from charter.trainer.config import TrainerConfig
from charter.trainer.forward import ValueModel


@dataclass(frozen=True, slots=True)
class Origin:
    """What a lineage started from; written into each of its checkpoints."""

    policy: str
    """A checkpoint id, or what the configuration named."""
    value: str
    """The same; empty where the value model began as the policy with a head of zeros."""

    @classmethod
    def of(cls, config: TrainerConfig, registry: Registry) -> Origin:
        """Of a new lineage."""
        policy, value = config.policy, config.value
        if not policy:
            serving = registry.serving()
            if serving is None:
                raise ConfigError(
                    f"the registry {registry.root} has no checkpoint in force; name what to start from with "
                    "the option policy, for example policy: seed"
                )
            policy = serving.id
        if not value and (rewarding := registry.serving(REWARD)) is not None:
            value = rewarding.id
        return cls(policy, value)

    @classmethod
    def read(cls, folder: Path) -> Origin:
        """Of a checkpoint that a trainer wrote."""
        try:
            record = json.loads((folder / "trainer" / "origin.json").read_text())
            return cls(str(record["policy"]), str(record["value"]))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: trainer/origin.json cannot be read ({error}); its lineage cannot go on from it"
            ) from error


def folder_of(source: str, registry: Registry) -> Path:
    """The folder of a checkpoint id, `seed`, a folder, or a hub id. Raises `CheckpointError`."""
    if "/" not in source and source != "seed" and not Path(source).is_dir() and source in registry:
        return registry.resolve(source)
    return checkpoint_folder(source)


def open_models(
    origin: Origin, config: TrainerConfig, registry: Registry
) -> tuple[Any, ValueModel, Any | None, Path]:
    """Policy, value model, reference (None: the policy without its adapters), and the policy's folder."""
    folder = folder_of(origin.policy, registry)
    policy, reference = _causal(folder, config), None
    value = _value_model(origin, config, registry, folder)
    if config.lora.rank:
        torch.manual_seed(config.ppo.seed)  # adapters start at random
        policy = _with_adapters(policy, config.lora, "CAUSAL_LM")
        value.requires_grad_(requires_grad=False)
        value.backbone = _with_adapters(value.backbone, config.lora, "FEATURE_EXTRACTION")
        value.head.requires_grad_(requires_grad=True)
    else:
        reference = _causal(folder, config, frozen=True)
    return policy, value, reference, folder


def _causal(folder: Path, config: TrainerConfig, *, frozen: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    return _loaded(AutoModelForCausalLM, folder, config, frozen=frozen)


def _value_model(origin: Origin, config: TrainerConfig, registry: Registry, policy: Path) -> ValueModel:
    from transformers import AutoModelForSequenceClassification

    if not origin.value:
        return ValueModel.from_causal_model(_causal(policy, config))
    folder = folder_of(origin.value, registry)
    model = _loaded(AutoModelForSequenceClassification, folder, config, num_labels=1)
    if not hasattr(model, "score"):
        raise CheckpointError(f"{folder} is no reward model: it has no head named score")
    return ValueModel.from_reward_model(model)


def _loaded(auto: Any, folder: Path, config: TrainerConfig, *, frozen: bool = False, **options: Any) -> Any:
    """Frozen weights may be stored in bfloat16; weights that learn stay in float32."""
    small = config.precision == "bfloat16" and (frozen or config.lora.rank)
    try:
        with LOADING:
            return auto.from_pretrained(
                folder,
                dtype=torch.bfloat16 if small else torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
    except Exception as error:
        raise CheckpointError(f"{folder}: the model cannot be loaded: {error}") from error


def _with_adapters(model: Any, lora: LoraConfig, task: str) -> Any:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    targets = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    return get_peft_model(
        model,
        PeftLora(
            r=lora.rank,
            lora_alpha=lora.alpha or 2 * lora.rank,
            lora_dropout=0.0,  # dropout would make two log-probs of one answer differ
            target_modules=targets,
            task_type=task,
        ),
    )
