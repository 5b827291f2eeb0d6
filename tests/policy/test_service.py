import asyncio

import pytest
from tests.registry.conftest import filler
from tests.scripted import Scripted

from charter.errors import CheckpointError
from charter.lm.base import ChatMessage, Prompt, Role, Sampling
from charter.policy.locate import locate
from charter.policy.service import ModelInService
from charter.registry import Facts, Kind, Registry

PROMPT = Prompt((ChatMessage(Role.USER, "Hi"),))


async def in_service(model: Scripted) -> ModelInService:
    return ModelInService(model, await model.info())


def giving(model):
    async def opener(checkpoint):
        if isinstance(model, Exception):
            raise model
        return model

    return opener


async def test_a_request_keeps_the_model_it_began_with_and_the_old_one_closes_after_it():
    old, new = Scripted(version="old"), Scripted(version="new")
    service = await in_service(old)
    async with service.lease() as leased:
        previous, current = await service.replace("new", giving(new))
        assert (previous.version, current.version) == ("old", "new")
        assert leased is old
        assert not old.closed
        async with service.lease() as later:
            assert later is new
    assert old.closed
    assert not new.closed


async def test_an_idle_model_closes_at_once_when_replaced():
    old = Scripted(version="old")
    service = await in_service(old)
    await service.replace("new", giving(Scripted(version="new")))
    assert old.closed


@pytest.mark.parametrize("error", [CheckpointError("weights.safetensors is cut off"), OSError("disk")])
async def test_a_checkpoint_that_does_not_open_leaves_the_old_one(error):
    old = Scripted(version="old")
    service = await in_service(old)
    with pytest.raises(
        CheckpointError, match=r"cut off|cannot be opened \(OSError: disk\); the old one stays"
    ):
        await service.replace("new", giving(error))
    async with service.lease() as model:
        assert model is old
    assert not old.closed


async def test_a_checkpoint_that_cannot_speak_is_refused_and_closed():
    def write(prompt, sampling):
        raise ValueError("probabilities are not numbers")

    old, new = Scripted(version="old"), Scripted(write, version="new")
    service = await in_service(old)
    with pytest.raises(CheckpointError, match=r"cannot generate a token.*not numbers"):
        await service.replace("new", giving(new))
    assert new.closed
    assert service.info.model.version == "old"


async def test_replacements_at_the_same_time_queue_and_the_last_one_stays():
    models = [Scripted(version=f"v{i}") for i in range(4)]
    service = await in_service(models[0])
    pairs = await asyncio.gather(*(service.replace(m.version.version, giving(m)) for m in models[1:]))
    assert [(a.version, b.version) for a, b in pairs] == [("v0", "v1"), ("v1", "v2"), ("v2", "v3")]
    assert [m.closed for m in models] == [True, True, True, False]


async def test_closing_waits_for_the_last_request():
    model = Scripted()
    service = await in_service(model)
    async with service.lease():
        closing = asyncio.ensure_future(service.close())
        await asyncio.sleep(0)
        assert not model.closed
    await closing
    assert model.closed


async def test_load_counts_the_answers_of_all_versions_at_work():
    gate = asyncio.Event()
    old, new = Scripted(version="old", gate=gate), Scripted(version="new")
    service = await in_service(old)

    async def ask(n):
        async with service.lease(n) as model:
            await model.generate(PROMPT, Sampling(), n)

    asked = asyncio.ensure_future(ask(3))
    await asyncio.sleep(0)
    await service.replace("new", giving(new))
    new.gate = gate
    also = asyncio.ensure_future(ask(2))
    await asyncio.sleep(0)
    assert service.load().running == 5
    gate.set()
    await asyncio.gather(asked, also)
    assert service.load().running == 0


def test_a_checkpoint_is_found_by_id_and_by_folder(tmp_path):
    registry = Registry(tmp_path / "registry")
    written = registry.write(Facts(Kind.SEED), filler())
    found = locate(written.id, registry.root, folders_allowed=False)
    assert found == tmp_path / "registry" / written.id
    assert locate(registry.root, "", folders_allowed=True) == tmp_path / "registry"


def test_a_checkpoint_that_was_damaged_since_it_was_written_is_refused(tmp_path):
    registry = Registry(tmp_path / "registry")
    written = registry.write(Facts(Kind.SEED), filler())
    (tmp_path / "registry" / written.id / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        locate(written.id, registry.root, folders_allowed=False)


@pytest.mark.parametrize(
    ("checkpoint", "registry", "folders", "sentence"),
    [
        ("ck-9", "R", False, "has no checkpoint 'ck-9'"),
        ("../outside", "R", False, "no checkpoint id"),
        ("/etc", "R", False, "no checkpoint id"),
        ("", "", True, "there is no folder ''"),
        ("missing/folder", "", True, "there is no folder"),
    ],
)
def test_a_checkpoint_that_cannot_be_found_is_a_sentence(tmp_path, checkpoint, registry, folders, sentence):
    (tmp_path / "R").mkdir()
    with pytest.raises(CheckpointError, match=sentence):
        locate(checkpoint, registry and str(tmp_path / registry), folders)
