"""One thread: several test runs share the machine, and sums in one order are the same every time."""

import shutil

import pytest
import torch
from tests.tiny import make_tiny_model
from tests.trainer.circle import run, world
from tests.trainer.lineage import LABELS, STEPS

from charter.registry import Registry, Status
from charter.trainer.service import newest_of_lineage


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), spread=0.1)


@pytest.fixture(scope="package")
def begun(tmp_path_factory, tiny):
    """A lineage of two steps whose checkpoint serves, and nothing left on the log."""
    folder = tmp_path_factory.mktemp("begun")
    world(folder, tiny, labels=STEPS * LABELS)
    run(folder, steps=STEPS)
    registry = Registry(folder / "checkpoints")
    registry.set_status(newest_of_lineage(registry).id, Status.SERVING)
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"
