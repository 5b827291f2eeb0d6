"""`charter demo`: the whole circle once, with real parts."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from charter.errors import ConfigError


class DemoBus(enum.StrEnum):
    """A fresh log of the demo's own."""

    SQLITE = "sqlite"
    KAFKA = "kafka"


if TYPE_CHECKING:
    from rich.console import Console

    from charter.circle.config import Places
    from charter.demo.report import Target
    from charter.demo.run import Record


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results; it must not exist yet, or be empty.")],
    seed: Annotated[int, typer.Option(min=0, help="Draws of prompts, answers and batches.")] = 0,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, e.g. steps=20.")
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Held-out prompts of each class that are measured.")
    ] = 500,
    bus: Annotated[
        DemoBus, typer.Option(help="The log: a file, or a Kafka broker started for it (Java and Maven).")
    ] = DemoBus.SQLITE,
) -> None:
    """Takes the seed model once round: revisions, SL-CAI, AI preferences, PPO, gate, hot reload.

    Leaves summary.json, curves.png and samples.html in the folder; exit status 1 where a target is missed.
    """
    import asyncio

    from rich.console import Console

    from charter.app.broker import bus_of
    from charter.circle.config import CircleConfig
    from charter.circle.live import shown
    from charter.config import assignments, load
    from charter.demo import report
    from charter.demo.measuring import Held
    from charter.demo.run import run
    from charter.telemetry import logs

    _fresh(out)
    logs.configure("WARNING", False)
    defaults: dict[str, object] = {"steps": DEMO_STEPS, "seed": seed}
    loaded = load(CircleConfig, file=config, flags={**defaults, **assignments(settings or [])})
    state = out.absolute() / "state"
    state.mkdir()
    console = Console()
    with bus_of(bus.value, state) as uri:
        places = _places(state, uri)
        with shown(console) as tell:
            record = asyncio.run(run(loaded, places, Held(prompts), tell))
    found = report.write(out, record, loaded, places)
    _summed_up(console, found, record, out)
    raise typer.Exit(0 if all(t.met for t in found) else 1)


DEMO_STEPS = 48
"""PPO steps of the demo."""


def _fresh(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"{out} is not empty, and the demo starts afresh; name another folder")
    except OSError as error:
        raise ConfigError(f"{out} cannot be used ({error.strerror}); name another folder") from error


def _places(state: Path, bus: str) -> Places:
    from charter.app.settings import SEED, model_uri
    from charter.circle.config import Places

    uri = model_uri(SEED)
    where = f"sqlite:{state / 'bus.db'}" if bus == DemoBus.SQLITE else bus
    return Places(state, where, uri.removeprefix("local:"), uri, SEED)


def _summed_up(console: Console, found: list[Target], record: Record, out: Path) -> None:
    from rich.table import Table

    from charter.demo.report import bus_share

    table = Table("figure, held out", "measured", "wanted", "")
    for t in found:
        table.add_row(t.name, f"{t.value:.1%}", t.wanted, "[green]met[/]" if t.met else "[red]missed[/]")
    console.print(table)
    console.print(f"the bus took {bus_share(record.bus):.1%} of the time that a rollout is worked on")
    console.print(
        f"{record.seconds / 60:.1f} min; {out}/summary.json, curves.png, samples.html", soft_wrap=True
    )
