"""`charter demo`: the whole circle once, with real parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from charter.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from charter.circle.config import Places
    from charter.demo.report import Target


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
) -> None:
    """Takes the seed model once round: revisions, SL-CAI, AI preferences, PPO, gate, hot reload.

    Leaves summary.json, curves.png and samples.html in the folder; exit status 1 where a target is missed.
    """
    import asyncio

    from rich.console import Console

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
    places = _places(out)
    console = Console()
    with shown(console) as tell:
        record = asyncio.run(run(loaded, places, Held(prompts), tell))
    found = report.write(out, record, loaded, places)
    _summed_up(console, found, record.seconds, out)
    raise typer.Exit(0 if all(t.met for t in found) else 1)


DEMO_STEPS = 60
"""PPO steps of the demo."""


def _fresh(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"{out} is not empty, and the demo starts afresh; name another folder")
    except OSError as error:
        raise ConfigError(f"{out} cannot be used ({error.strerror}); name another folder") from error


def _places(out: Path) -> Places:
    from charter.app.settings import SEED, model_uri
    from charter.circle.config import Places

    uri, state = model_uri(SEED), out.absolute() / "state"
    state.mkdir()
    return Places(state, f"sqlite:{state / 'bus.db'}", uri.removeprefix("local:"), uri, SEED)


def _summed_up(console: Console, found: list[Target], seconds: float, out: Path) -> None:
    from rich.table import Table

    table = Table("figure, held out", "measured", "wanted", "")
    for t in found:
        table.add_row(t.name, f"{t.value:.1%}", t.wanted, "[green]met[/]" if t.met else "[red]missed[/]")
    console.print(table)
    console.print(f"{seconds / 60:.1f} min; {out}/summary.json, curves.png, samples.html", soft_wrap=True)
