"""The configuration loader: sources, precedence, and what it says when something is wrong."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from charter.circle.config import CircleConfig
from charter.config import Sources, assignments, keys_of, load
from charter.errors import ConfigError


class Mode(enum.StrEnum):
    OFF = "off"
    GATED = "gated"


@dataclass(frozen=True)
class Limits:
    rate: float = 5.0
    burst: int = 10


@dataclass(frozen=True)
class Gateway:
    port: int = 8080
    mode: Mode = Mode.GATED
    tls: bool = False
    keys: Path | None = None
    origins: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port {self.port} does not exist; take one from 0 to 65535")


@dataclass(frozen=True)
class Settings:
    state: Path = Path(".charter")
    gateway: Gateway = field(default_factory=Gateway)
    labels: dict[str, str] = field(default_factory=dict)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "charter.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = _file(tmp_path, "gateway:\n  port: 1\n  limits: {rate: 2, burst: 3}\nstate: from-file\n")
    settings = load(
        Settings,
        file=file,
        environment={"CHARTER__GATEWAY__PORT": "4", "CHARTER__GATEWAY__LIMITS__BURST": "5"},
        flags={"gateway.port": 6, "gateway.tls": None},
    )
    assert settings.gateway == Gateway(port=6, limits=Limits(rate=2.0, burst=5))
    assert settings.state == Path("from-file")


def test_values_are_read_by_the_type_of_their_field(tmp_path: Path) -> None:
    file = _file(
        tmp_path, "gateway: {mode: off, tls: yes, keys: k.json, origins: [a, b]}\nlabels: {team: red}\n"
    )
    settings = load(Settings, file=file)
    assert settings.gateway.mode is Mode.OFF
    assert settings.gateway.tls is True
    assert settings.gateway.keys == Path("k.json")
    assert settings.gateway.origins == ("a", "b")
    assert settings.labels == {"team": "red"}
    flags = load(Settings, flags=assignments(["gateway.origins=a, b", "gateway.keys=none"]))
    assert flags.gateway.origins == ("a", "b")
    assert flags.gateway.keys is None


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[a, b]", ("a", "b")),
        (" [ a,b ] ", ("a", "b")),
        ("[]", ()),
        ("", ()),
        ("a", ("a",)),
        ("a, b,", ("a", "b")),
        ('["a, b", c]', ("a, b", "c")),
        ("[https://x:1, 'https://y']", ("https://x:1", "https://y")),
        ("['[::1]:7001']", ("[::1]:7001",)),
    ],
)
def test_lists_are_written_as_in_the_file_or_between_commas(text: str, items: tuple[str, ...]) -> None:
    by_flag = load(Settings, flags=assignments([f"gateway.origins={text}"]))
    by_environment = load(Settings, environment={"CHARTER__GATEWAY__ORIGINS": text})
    assert by_flag.gateway.origins == by_environment.gateway.origins == items


def test_items_of_lists_are_read_by_their_type(tmp_path: Path) -> None:
    file = _file(tmp_path, "gateway:\n  ports: [1, 2]\n")
    assert load(Settings, file=file).gateway.ports == (1, 2)
    assert load(Settings, flags=assignments(["gateway.ports=[1, 2]"])).gateway.ports == (1, 2)
    assert load(Settings, flags=assignments(["gateway.ports=1,2"])).gateway.ports == (1, 2)
    assert load(Settings, flags={"gateway.ports": (1, 2)}).gateway.ports == (1, 2)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        (
            "gateway.origins=[a, b",
            r"option gateway.origins: .* is '\[a, b'; it must be a list, as in \[a, b\]",
        ),
        ("gateway.origins=[::1]:7001", r"it must be a list, as in \[a, b\]"),
        ("gateway.origins=[a]: b", r"it must be a list, as in \[a, b\]"),
        ("gateway.origins=[a, [b]]", r"option gateway.origins: .* is a list; it must be text"),
        ("gateway.origins=[1, 2]", r"option gateway.origins: .* is 1; it must be text \(put it in quotes\)"),
        ("gateway.ports=[1, x]", r"option gateway.ports: .* is 'x'; it must be a whole number"),
        ("gateway.ports=[1, {a: 2}]", r"option gateway.ports: .* is keys; it must be a number"),
    ],
)
def test_a_wrong_list_is_named_with_what_it_must_be(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(Settings, flags=assignments([assignment]))


def test_what_kubernetes_puts_into_every_pod_is_not_mistaken_for_configuration() -> None:
    environment = {"CHARTER_GATEWAY_PORT": "tcp://10.0.0.7:8080", "CHARTER_PORT": "tcp://10.0.0.8:1"}
    assert load(Settings, environment=environment) == Settings()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "gateway:\n  prot: 1\n",
            r"charter.yaml:2: unknown key 'gateway.prot'; did you mean 'gateway.port'\?",
        ),
        ("port: 1\n", r"charter.yaml:1: unknown key 'port'; did you mean 'gateway.port'\?"),
        ("gateway:\n  port: http\n", r"charter.yaml:2: gateway.port is 'http'; it must be a whole number"),
        ("gateway:\n  port: 1.5\n", r"charter.yaml:2: gateway.port is 1.5; it must be a whole number"),
        ("gateway:\n  port: true\n", r"charter.yaml:2: gateway.port is True; it must be a number"),
        (
            "gateway:\n  mode: gatd\n",
            r"charter.yaml:2: gateway.mode is 'gatd'; did you mean 'gated'\? one of",
        ),
        ("gateway:\n  port: 70000\n", r"charter.yaml:1: port 70000 does not exist"),
        ("gateway: 5\n", r"charter.yaml:1: gateway is a section; give its fields, not 5"),
        ("gateway:\n  origins: a\n", r"charter.yaml:2: gateway.origins is 'a'; it must be a list"),
        ("state: 7\n", r"charter.yaml:1: state is 7; it must be text"),
        ("- a\n", r"charter.yaml:1: must hold keys and values"),
        ("gateway: [\n", r"charter.yaml:\d: is not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_line_key_and_remedy(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(Settings, file=_file(tmp_path, text))


def test_wrong_environment_and_flags_are_named_as_such() -> None:
    with pytest.raises(
        ConfigError, match=r"\$CHARTER__GATEWAY__PRT: unknown key 'gateway.prt'; did you mean"
    ):
        load(Settings, environment={"CHARTER__GATEWAY__PRT": "1"})
    with pytest.raises(ConfigError, match=r"option gateway.limits.rate: gateway.limits.rate is 'x'"):
        load(Settings, flags={"gateway.limits.rate": "x"})
    with pytest.raises(ConfigError, match=r"write it as section\.field=value"):
        assignments(["gateway.port"])


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read"):
        load(Settings, file=tmp_path / "none.yaml")


def test_every_key_can_be_listed() -> None:
    assert [name for name, _ in keys_of(Settings)] == [
        "state", "gateway.port", "gateway.mode", "gateway.tls", "gateway.keys", "gateway.origins",
        "gateway.ports", "gateway.limits.rate", "gateway.limits.burst", "labels",
    ]  # fmt: skip


@dataclass(frozen=True)
class Common:
    state: Path = Path(".charter")


def test_a_sections_defaults_may_follow_from_the_top_level() -> None:
    sources = Sources(flags={"state": "s", "gateway.port": 5})
    common = sources.build(Common, beside={"gateway": Gateway})
    defaults = {"keys": common.state / "keys", "port": 9}
    assert sources.build(Gateway, "gateway", defaults=defaults) == Gateway(port=5, keys=Path("s/keys"))


def test_a_key_at_the_wrong_level_is_refused_with_its_right_place() -> None:
    sources = Sources(flags={"port": 5})
    with pytest.raises(ConfigError, match=r"unknown key 'port'; did you mean 'gateway\.port'\?"):
        sources.build(Common, beside={"gateway": Gateway})
    with pytest.raises(ConfigError, match=r"unknown key 'gatway'; did you mean 'gateway'\?"):
        Sources(flags={"gatway.port": 5}).build(Common, beside={"gateway": Gateway})


@dataclass(frozen=True)
class Tight:
    limits: Limits = field(default_factory=lambda: Limits(rate=1.0, burst=2))
    gateway: Gateway = field(default_factory=lambda: Gateway(port=7, limits=Limits(burst=4)))
    spare: Limits | None = None


def test_what_is_not_given_stays_as_the_section_is_by_default() -> None:
    given = {"limits.rate": 9, "gateway.limits.rate": 8, "spare.burst": 1}
    assert load(Tight, flags=given) == Tight(
        limits=Limits(rate=9.0, burst=2),
        gateway=Gateway(port=7, limits=Limits(rate=8.0, burst=4)),
        spare=Limits(rate=5.0, burst=1),
    )


def test_one_setting_of_ppo_leaves_the_circles_others() -> None:
    usual = CircleConfig()
    assert load(CircleConfig, flags={"ppo.beta": 0.1}) == replace(usual, ppo=replace(usual.ppo, beta=0.1))
