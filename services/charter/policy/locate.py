"""Finds the folder of a checkpoint that `Reload` names."""

from __future__ import annotations

import re
from pathlib import Path

from charter.errors import CheckpointError
from charter.registry import Registry

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def locate(checkpoint: str, registry: str, folders_allowed: bool) -> Path:
    """The folder of a registry id, its digests checked, or of a path where those are allowed.

    Raises `CheckpointError`.
    """
    if registry and _ID.fullmatch(checkpoint):
        checkpoints = Registry(registry)
        if checkpoint in checkpoints:
            return checkpoints.resolve(checkpoint)
        beside = Path(registry) / checkpoint
        if folders_allowed and beside.is_dir():
            return beside
        if not (folders_allowed and Path(checkpoint).is_dir()):
            raise CheckpointError(
                f"the registry {registry} has no checkpoint {checkpoint!r}; see `charter checkpoints list`"
            )
    if not folders_allowed:
        raise CheckpointError(f"{checkpoint!r} is no checkpoint id, and folders_allowed is off; give an id")
    folder = Path(checkpoint)
    if not checkpoint or not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {checkpoint!r} here; give a folder, or set `registry` and give an id"
        )
    return folder
