"""Small checkpoints: real safetensors, real tokenizer files, no network."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from charter.registry import Registry


def filler(value: float = 0.0) -> Callable[[Path], None]:
    """Writes weights of this value, a tokenizer, and a trainer's state."""

    def fill(folder: Path) -> None:
        save_file({"w": numpy.full(8, value, numpy.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"value": value}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "trainer").mkdir()
        save_file({"m": numpy.full(8, -value, numpy.float32)}, folder / "trainer" / "policy.safetensors")
        (folder / "trainer" / "state.json").write_text("{}")

    return fill


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "checkpoints")
