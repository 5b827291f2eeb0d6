"""Imported by a fork server: runs a trainer once, so that lives forked from it begin with all loaded."""

import tempfile
from pathlib import Path

from tests.tiny import make_tiny_model
from tests.trainer.circle import run, world

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    world(folder, make_tiny_model(folder / "tiny", spread=0.1), labels=6)
    run(folder, steps=1)
