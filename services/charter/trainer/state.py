"""A trainer's whole state as files: continuing from them is bit for bit the run that was not interrupted.

    FOLDER/                      the policy, as a Hugging Face folder that any server loads
    FOLDER/trainer/state.json    step, price of a nat, seed
    FOLDER/trainer/policy.safetensors    the trained parameters (all of them, or the adapters)
    FOLDER/trainer/value.safetensors     the value model
    FOLDER/trainer/*-optimizer.safetensors   Adam's moments, by parameter

There is no random state: orders follow from the seed and the step, and there is no dropout. Weights are
safetensors only; nothing that can run code is ever read. With several devices every process calls these
functions, and the first one writes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charter.errors import CheckpointError
from charter.trainer.algorithm.controller import AdaptiveKL
from charter.trainer.forward import PACKED_ATTENTION, select_attention
from charter.trainer.update import Updater

TRAINER_FOLDER = "trainer"
_FORMAT = 1


def save(updater: Updater, folder: Path, *, merged: bool = True) -> None:
    """Writes the state into an existing folder.

    Args:
        updater: between two steps.
        folder: empty; `charter.registry` makes it appear whole or not at all.
        merged: write the policy itself, adapters merged, so that servers can load it. Without, only what
            training needs is written.
    """
    inner = folder / TRAINER_FOLDER
    models = {
        "policy": (updater.policy, updater.policy_optimizer),
        "value": (updater.value_model, updater.value_optimizer),
    }
    files: dict[str, dict[str, Tensor]] = {}
    for name, (model, optimizer) in models.items():
        files[name] = _trained(updater, model)
        files[f"{name}-optimizer"] = _moments(updater, model, optimizer)
    whole = _whole_policy(updater) if merged else None
    if not updater.accelerator.is_main_process:
        return
    from safetensors.torch import save_file

    inner.mkdir()
    for name, tensors in files.items():
        save_file(tensors, inner / f"{name}.safetensors")
    state = {
        "format": _FORMAT,
        "step": updater.step,
        "seed": updater.config.seed,
        "beta": updater.controller.beta,
        "config": asdict(updater.config),
    }
    (inner / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    if whole is not None:
        whole.save_pretrained(folder)


def load(updater: Updater, folder: Path) -> None:
    """Puts a saved state into a fresh updater of the same models. Raises `CheckpointError`."""
    inner = folder / TRAINER_FOLDER
    try:
        state = json.loads((inner / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{inner}/state.json cannot be read ({error}); this checkpoint is for serving only: start from "
            "it as a model instead of resuming it"
        ) from error
    if state.get("format") != _FORMAT:
        raise CheckpointError(f"{inner} has format {state.get('format')}; this version reads {_FORMAT}")
    if state["seed"] != updater.config.seed:
        raise CheckpointError(
            f"{inner} was made with seed {state['seed']}, and the configuration says {updater.config.seed}; "
            "set ppo.seed back, or start a new lineage from the checkpoint's weights"
        )
    _restore(updater, updater.policy, updater.policy_optimizer, inner, "policy")
    _restore(updater, updater.value_model, updater.value_optimizer, inner, "value")
    updater.step = int(state["step"])
    controller = updater.controller
    if isinstance(controller, AdaptiveKL):  # a fixed price is the configuration's, also when it changed
        updater.controller = replace(controller, beta=float(state["beta"]))


def _options(updater: Updater) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    several = updater.accelerator.num_processes > 1
    return StateDictOptions(full_state_dict=several, cpu_offload=several, ignore_frozen_params=True)


def _trained(updater: Updater, model: Any) -> dict[str, Tensor]:
    """Trained parameters by name, whole, on the CPU; a tied parameter once."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    trained = {name.removeprefix("module.") for name, p in model.named_parameters() if p.requires_grad}
    whole: dict[str, Any] = get_model_state_dict(model, options=_options(updater))
    return {k: v.detach().cpu().contiguous().clone() for k, v in whole.items() if k in trained}


def _moments(updater: Updater, model: Any, optimizer: Any) -> dict[str, Tensor]:
    """Adam's state, keyed kind/parameter; empty before the first step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    inner = getattr(optimizer, "optimizer", optimizer)
    if not inner.state:  # asking would make torch take a step of size zero to find out its shape
        return {}
    whole: dict[str, Any] = get_optimizer_state_dict(model, inner, options=_options(updater))
    return {
        f"{kind}/{name}": value.detach().cpu().contiguous().clone()
        for name, kinds in whole.get("state", {}).items()  # empty but on the first process
        for kind, value in kinds.items()
    }


def _restore(updater: Updater, model: Any, optimizer: Any, inner: Path, name: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    try:
        trained = load_file(inner / f"{name}.safetensors")
        moments = load_file(inner / f"{name}-optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{inner} is damaged: the state of the {name} cannot be read ({error}); resume from its parent"
        ) from error
    options = _options(updater)
    known = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    strange = sorted(k for k, v in trained.items() if k not in known or known[k].shape != v.shape)
    if strange:
        raise CheckpointError(
            f"{inner}: the {name} has other parameters than the configured one, for example {strange[0]}; "
            "resume with the configuration that made the checkpoint"
        )
    several = updater.accelerator.num_processes > 1
    set_model_state_dict(model, trained, options=StateDictOptions(full_state_dict=several, strict=False))
    if moments:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            kind, _, parameter = key.partition("/")
            by_name.setdefault(parameter, {})[kind] = value
        raw = getattr(optimizer, "optimizer", optimizer)
        groups = [
            {**{k: v for k, v in g.items() if k != "params"}, "params": sorted(by_name)}
            for g in raw.param_groups
        ]
        whole: dict[str, Any] = {"state": by_name, "param_groups": groups}
        set_optimizer_state_dict(model, raw, whole, options=options)


def _whole_policy(updater: Updater) -> Any:
    """The policy as one set of weights that servers load; adapters merged into a copy."""
    import copy

    model = updater.accelerator.unwrap_model(updater.policy)
    if updater.accelerator.num_processes > 1 and updater.accelerator.distributed_type.value == "FSDP":
        from transformers import AutoModelForCausalLM

        weights = updater.accelerator.get_state_dict(updater.policy)
        if not updater.accelerator.is_main_process:
            return None
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(model.config)
        empty.load_state_dict(weights, assign=True)
        return empty
    if not updater.accelerator.is_main_process:
        return None
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
        if getattr(model.config, "_attn_implementation", "") == PACKED_ATTENTION:
            select_attention(model, packed=False)
    return model
