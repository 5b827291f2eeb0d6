"""What follows from the top level of the configuration for each service."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from charter.app.explain import as_yaml
from charter.app.ports import PortReservations
from charter.app.settings import Deployment, Target, model_uri, read_common, read_deployment
from charter.config import Sources
from charter.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def _read(flags: dict[str, object], file: Path | None = None) -> Deployment:
    sources = Sources(file=file, flags=flags)
    with closing(PortReservations()) as ports:
        return read_deployment(sources, read_common(sources), ports)


def test_in_one_process_the_gateway_is_told_the_free_ports_of_the_others(model: Path) -> None:
    whole = _read({"model": str(model)})
    assert whole.gateway is not None
    assert whole.policy is not None
    assert whole.critic is not None
    assert whole.judge is not None
    assert whole.gateway.policy == f"grpc://127.0.0.1:{whole.policy.server.port}"
    assert whole.gateway.critic == f"127.0.0.1:{whole.critic.server.port}"
    ports = {whole.policy.server.port, whole.critic.server.port, whole.judge.server.port}
    assert len(ports - {0}) == 3


def test_apart_they_find_each_other_on_well_known_ports(model: Path) -> None:
    flags: dict[str, object] = {"model": str(model)}
    gateway = _read(flags | {"target": "gateway"}).gateway
    policy = _read(flags | {"target": "policy"}).policy
    assert gateway is not None
    assert policy is not None
    assert gateway.policy == f"grpc://127.0.0.1:{policy.server.port}" == "grpc://127.0.0.1:7001"


def test_what_is_configured_for_a_service_wins_over_what_follows(model: Path) -> None:
    whole = _read(
        {"model": str(model), "policy.server.port": 7777, "critic.model": "grpc://elsewhere:1"}
        | {"gateway.fail_open": "true"}
    )
    assert whole.gateway is not None
    assert whole.critic is not None
    assert whole.gateway.policy == "grpc://127.0.0.1:7777"
    assert whole.gateway.fail_open
    assert whole.critic.model == "grpc://elsewhere:1"


def test_targets_are_put_into_the_order_in_which_they_start() -> None:
    assert read_common(Sources(flags={"target": "gateway,policy"})).targets == (Target.POLICY, Target.GATEWAY)
    assert len(read_common(Sources(flags={"target": "all"})).targets) == 4


@pytest.mark.parametrize(
    ("flags", "learns"),
    [
        ({}, True),
        ({"learn": False}, False),
        ({"target": "policy,critic,gateway"}, False),
        ({"model": "own"}, False),
        ({"model": "own", "learn": True}, True),
    ],
)
def test_the_whole_system_learns_on_the_seed_model_and_others_when_told(
    model: Path, flags: dict[str, object], learns: bool
) -> None:
    own = {"model": str(model)} if "model" in flags else {}
    assert (_read({**flags, **own}).learning is not None) is learns


def test_another_model_is_held_to_the_general_constitution_by_its_own_first_weights(model: Path) -> None:
    common = read_common(Sources(flags={"model": str(model)}))
    assert common.constitution_name == "charter"
    assert common.critic_uri == common.model_uri == f"local:{model}"
    assert read_common(Sources()).constitution_name == "seed"


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("org/name", "local:org/name"),
        ("grpc://host:1", "grpc://host:1"),
        ("openai+http://host:1/v1#m", "openai+http://host:1/v1#m"),
        ("local:/x", "local:/x"),
    ],
)
def test_models_are_named_the_short_way_or_by_uri(name: str, uri: str) -> None:
    assert model_uri(name) == uri


def test_a_model_folder_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"the model folder \./nowhere does not exist"):
        model_uri("./nowhere")


def test_the_printed_settings_have_their_meaning_and_can_be_given_back(model: Path, tmp_path: Path) -> None:
    whole = _read({"model": str(model), "target": "all", "gateway.guard": "always"})
    printed = as_yaml(whole)
    assert '  # Mode where neither key nor request says otherwise.\n  guard: "always"\n' in printed
    (tmp_path / "charter.yaml").write_text(printed)
    assert _read({}, tmp_path / "charter.yaml") == whole
