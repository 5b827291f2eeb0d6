"""The same registry on a file system of fsspec's: the manifest comes last."""

import uuid

import fsspec
import pytest
from tests.registry.conftest import filler

from charter.errors import CheckpointError
from charter.registry import Facts, Kind, Registry, Status


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return f"memory://{uuid.uuid4().hex}/checkpoints"


def test_a_checkpoint_goes_there_and_comes_back(root):
    written = Registry(root).write(Facts(Kind.RL, step=2), filler(1.0))
    elsewhere = Registry(root)
    assert elsewhere.list() == (written,)
    folder = elsewhere.resolve(written.id)
    assert (folder / "trainer" / "policy.safetensors").is_file()
    assert elsewhere.resolve(written.id) == folder
    elsewhere.set_status(written.id, Status.SERVING, "first")
    assert Registry(root).serving() == written
    assert Registry(root).status(written.id).reason == "first"


def test_an_upload_that_broke_off_is_no_checkpoint(root):
    registry = Registry(root)
    written = registry.write(Facts(Kind.RL, step=2), filler(1.0))
    fsspec.filesystem("memory").rm(f"{root.removeprefix('memory:/')}/{written.id}/manifest.json")
    fresh = Registry(root)
    assert fresh.list() == ()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        fresh.resolve(written.id)
    assert fresh.write(Facts(Kind.RL, step=2), filler(1.0)).id == written.id


def test_an_object_that_was_changed_is_not_given_out(root):
    registry = Registry(root)
    written = registry.write(Facts(Kind.RL), filler(1.0))
    fsspec.filesystem("memory").pipe_file(f"{root.removeprefix('memory:/')}/{written.id}/config.json", b"{}")
    with pytest.raises(CheckpointError, match=r"config\.json is not what was written"):
        registry.resolve(written.id)


def test_a_pruned_checkpoint_leaves_its_manifest(root):
    registry = Registry(root)
    made = [registry.write(Facts(Kind.RL, step=i), filler(i)) for i in range(3)]
    assert registry.prune(keep=1) == (made[0].id, made[1].id)
    assert Registry(root).list() == (made[2],)
    assert Registry(root).get(made[0].id) == made[0]
    with pytest.raises(CheckpointError, match="were pruned"):
        Registry(root).resolve(made[0].id)


def test_an_address_that_nothing_knows_is_a_sentence():
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Registry("nowhere://bucket/x")
