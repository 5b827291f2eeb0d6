"""`charter promote` and `charter rollback`: a person puts a checkpoint in force, or takes one out.

The decision is written to the registry and announced; the running publisher carries it out, as it would one
of its own, and this waits for it. Without a publisher, `--policy` tells the policy servers from here.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

import typer

from charter.registry.cli import DEFAULT_ROOT, Root, find

if TYPE_CHECKING:
    from charter.registry import Change, Manifest, Registry

_Reason = Annotated[str, typer.Option("--reason", help="Why; it stays in the history.", show_default=False)]
_Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="host:port of a policy server to tell directly, where no publisher runs."),
]
_Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait for the publisher.")]


def promote(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint id, or an unambiguous beginning of one.")],
    reason: _Reason = "a person promoted it",
    registry: Root = DEFAULT_ROOT,
    policy: _Policies = None,
    wait: _Wait = 60.0,
) -> None:
    """Puts a checkpoint in force, past the gate."""
    from charter.registry import Registry

    opened = Registry(registry)
    _carry_out(opened, find(opened, checkpoint), reason, "", policy or [], wait)


def rollback(
    checkpoint: Annotated[
        str, typer.Argument(help="The checkpoint to go back to; default: the one that served before.")
    ] = "",
    reason: _Reason = "a person rolled it back",
    registry: Root = DEFAULT_ROOT,
    policy: _Policies = None,
    wait: _Wait = 60.0,
) -> None:
    """Takes the checkpoint that serves out of force, and puts an earlier one back."""
    from charter.errors import ConfigError
    from charter.registry import Registry

    opened = Registry(registry)
    serving = find(opened, "serving")
    target = find(opened, checkpoint) if checkpoint else previous(opened)
    if target.id == serving.id:
        raise ConfigError(f"{serving.id} serves already; name the checkpoint to go back to")
    _carry_out(opened, target, reason, serving.id, policy or [], wait)


def previous(registry: Registry) -> Manifest:
    """The last that served before the one that serves now, was not itself taken out, and has its weights.

    Raises `ConfigError` when there is none.
    """
    from charter.errors import ConfigError
    from charter.registry import Status

    for change in reversed(registry.history()):
        now = registry.status(change.checkpoint_id)
        served = change.status is Status.SERVING and now is not None and now.status is Status.RETIRED
        if served and change.checkpoint_id in registry:
            return registry.get(change.checkpoint_id)
    raise ConfigError(
        f"no checkpoint of {registry.root} served before; name the one to go back to "
        "(`charter checkpoints list`)"
    )


def _carry_out(
    registry: Registry, target: Manifest, reason: str, taken_out: str, policies: list[str], wait: float
) -> None:
    from charter.errors import BackendUnavailable, CheckpointError, ConfigError
    from charter.registry import Kind, Status

    if target.facts.kind is Kind.REWARD:
        raise ConfigError(f"{target.id} is a reward model; it scores answers and cannot serve users")
    registry.resolve(target.id)  # a damaged one is refused here and now
    measurements = {"rolls_back": taken_out} if taken_out else {}
    if policies:
        change = asyncio.run(_tell(registry, target.id, reason, measurements, policies))
    else:
        registry.set_status(target.id, Status.PROMOTING, reason, measurements)
        found = _settled(registry, target.id, wait)
        if found is None:
            raise BackendUnavailable(
                f"the decision is written, and no publisher carried it out within {wait:g} s; it will when "
                "it runs, or tell the policy servers from here with --policy host:port"
            )
        change = found
    if change.status is not Status.SERVING:
        raise CheckpointError(f"{target.id} is not in force: {change.reason}")
    typer.echo(f"{target.id} serves." + (f" {taken_out} was rolled back." if taken_out else ""))


async def _tell(
    registry: Registry, checkpoint_id: str, reason: str, measurements: dict[str, str], targets: list[str]
) -> Change:
    from charter.lm.policy_client import PolicyModel
    from charter.publisher.promotion import Promoter

    policies = [PolicyModel(target) for target in targets]
    try:
        return await Promoter(registry, policies, None).promote(checkpoint_id, reason, measurements)
    finally:
        for policy in policies:
            await policy.close()


def _settled(registry: Registry, checkpoint_id: str, wait: float) -> Change | None:
    from charter.registry import Status

    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        change = registry.status(checkpoint_id)
        if change is not None and change.status is not Status.PROMOTING:
            return change
        time.sleep(0.2)
    return None
