"""What `charter run` can be told, and what follows from it for each service.

The top level says what runs, on which models, by which constitution, and where things are kept. From that
follow the defaults of every service's own section (`gateway`, `policy`, `critic`, `judge`) and of `learning`,
which a file, the environment or `--set` may override key by key.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from charter.app.ports import PortReservations
from charter.circle.config import CircleConfig
from charter.config import Sources
from charter.critic.config import CriticConfig
from charter.errors import ConfigError
from charter.gateway.config import GatewayConfig
from charter.judge.config import JudgeConfig
from charter.policy.config import PolicyConfig
from charter.rpc import ServerConfig

SEED = "seed"
_SCHEMES = ("local:", "grpc:", "tgi+", "openai+")


class Target(enum.StrEnum):
    """What can run in a process."""

    ALL = "all"
    GATEWAY = "gateway"
    POLICY = "policy"
    CRITIC = "critic"
    JUDGE = "judge"


EVERYTHING = (Target.POLICY, Target.CRITIC, Target.JUDGE, Target.GATEWAY)


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How the process logs, on standard error."""

    level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    json: bool = False
    """One JSON object a line, for machines."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The top level of the configuration."""

    target: tuple[Target, ...] = (Target.ALL,)
    """Services of this process."""
    state: Path = Path(".charter")
    """Folder of everything that is kept."""
    model: str = SEED
    """The model that answers: `seed`, a folder, a hub id, or a model URI."""
    critic_model: str = ""
    """The frozen model that assesses, revises and judges; empty: the weights that `model` starts with."""
    constitution: str = ""
    """A constitution's name or file; empty: `seed` for the seed model, `charter` for any other."""
    bus: str = "sqlite"
    """`sqlite` (a file in the state folder), `kafka` (a broker started for this run), or a bus URI."""
    learn: bool | None = None
    """Learning beside the endpoint; null: where the whole system runs here on the seed model."""
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The services to run, in the order in which they start."""
        chosen = EVERYTHING if Target.ALL in self.target else self.target
        return tuple(target for target in EVERYTHING if target in chosen)

    @property
    def model_uri(self) -> str:
        """URI of the model that answers."""
        return model_uri(self.model)

    @property
    def critic_uri(self) -> str:
        """URI of the frozen model."""
        return model_uri(self.critic_model or self.model)

    @property
    def constitution_name(self) -> str:
        """The constitution's name or file."""
        return self.constitution or (SEED if self.model == SEED else "charter")

    @property
    def bus_uri(self) -> str:
        """URI of the bus."""
        return f"sqlite:{self.state.absolute() / 'bus.db'}" if self.bus == "sqlite" else self.bus


SECTIONS: Mapping[str, type] = {
    "gateway": GatewayConfig,
    "policy": PolicyConfig,
    "critic": CriticConfig,
    "judge": JudgeConfig,
    "learning": CircleConfig,
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """Everything that this process is to run; None where a service runs elsewhere or not at all."""

    common: RunSettings
    gateway: GatewayConfig | None
    policy: PolicyConfig | None
    critic: CriticConfig | None
    judge: JudgeConfig | None
    learning: CircleConfig | None = None


# Where services look for each other when they run in processes of their own on one machine.
_PORTS: Mapping[Target, int] = {Target.POLICY: 7001, Target.CRITIC: 7002, Target.JUDGE: 7003}


def read_common(sources: Sources, *, quiet: bool = False) -> RunSettings:
    """The top level; sections are left for `read_deployment`. Raises `ConfigError`.

    `quiet` makes the log's default level WARNING, for a terminal where a person reads.
    """
    defaults = {"log.level": "WARNING"} if quiet else {}
    common = sources.build(RunSettings, defaults=defaults, beside=SECTIONS)
    if not common.target:
        raise ConfigError(f"no target is named; name some of: {', '.join(Target)}")
    return common


def read_deployment(sources: Sources, common: RunSettings, ports: PortReservations | None) -> Deployment:
    """The sections of the services that run here, with the defaults that follow from the top level.

    Beside a gateway, which is told where they are, servers take free ports (kept in `ports` until they
    listen); alone, and where nothing is to run (`ports` is None), they take the well-known ones.
    """
    runs = set(common.targets)
    free = ports is not None and Target.GATEWAY in runs

    def server(target: Target, **defaults: object) -> Mapping[str, object]:
        # Ctrl-C on a laptop should not take half a minute; a pod's configuration gives more.
        return {**defaults, "server.port": 0 if free else _PORTS[target], "server.drain_grace_s": 3.0}

    def settled(server: ServerConfig) -> ServerConfig:
        return ports.settle(server) if ports is not None else server

    def frozen(target: Target) -> Mapping[str, object]:
        return server(target, model=common.critic_uri, constitution=common.constitution_name)

    policy = critic = judge = gateway = None
    if Target.POLICY in runs:
        defaults = server(Target.POLICY, model=common.model_uri, registry=str(common.state / "checkpoints"))
        policy = sources.build(PolicyConfig, "policy", defaults=defaults)
        policy = replace(policy, server=settled(policy.server))
    if Target.CRITIC in runs:
        critic = sources.build(CriticConfig, "critic", defaults=frozen(Target.CRITIC))
        critic = replace(critic, server=settled(critic.server))
    if Target.JUDGE in runs:
        judge = sources.build(JudgeConfig, "judge", defaults=frozen(Target.JUDGE))
        judge = replace(judge, server=settled(judge.server))
    if Target.GATEWAY in runs:
        defaults = {
            "policy": f"grpc://{_address(policy.server if policy else None, Target.POLICY)}",
            "critic": _address(critic.server if critic else None, Target.CRITIC),
            "constitution": common.constitution_name,
            "keys": common.state / "keys.json",
            "bus": common.bus_uri,
            "drain_seconds": 5.0,
        }
        gateway = sources.build(GatewayConfig, "gateway", defaults=defaults)
    learning = None
    if common.learn or (common.learn is None and runs == set(EVERYTHING) and common.model == SEED):
        # The endpoint goes first: learning takes what it leaves over.
        learning = sources.build(CircleConfig, "learning", defaults={"niceness": 10})
    return Deployment(common, gateway, policy, critic, judge, learning)


def _address(server: ServerConfig | None, target: Target) -> str:
    if server is None:
        return f"127.0.0.1:{_PORTS[target]}"
    host = "127.0.0.1" if server.host in ("0.0.0.0", "[::]", "::") else server.host  # noqa: S104 - compared
    return f"{host}:{server.port}"


def model_uri(name: str) -> str:
    """The URI of a model that is named the short way. Raises `ConfigError` where there is none."""
    if name == SEED:
        weights = Path(__file__).parents[1] / "seedmodel" / "weights"
        if not (weights / "config.json").is_file():
            raise ConfigError(
                f"the seed model is not in {weights}; make it with `make seed-model`, or name another model "
                "with --model (make run MODEL=...)"
            )
        return f"local:{weights}"
    if name.startswith(_SCHEMES):
        return name
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "/", "~")):
        if not folder.is_dir():
            raise ConfigError(f"the model folder {name} does not exist; name a folder with config.json in it")
        return f"local:{folder.absolute()}"
    return f"local:{name}"
