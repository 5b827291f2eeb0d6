"""`charter preferences`: labels that people gave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

from charter.errors import ConfigError

app = typer.Typer(help="Labels that people gave.", no_args_is_help=True)

_BATCH = 200
_SHOWN = 5


@app.callback()
def _root() -> None:
    """Labels that people gave."""


@app.command("import")
def import_(
    files: Annotated[
        list[Path], typer.Argument(help="JSON lines with `chosen` and `rejected`, plain or .gz.")
    ],
    bus: Annotated[
        str, typer.Option(envvar="CHARTER_BUS", help="sqlite:<file> or kafka://host:port")
    ] = "sqlite:.charter/bus.db",
    certainty: Annotated[
        float, typer.Option(help="Probability that the chosen answer really is better; people err.")
    ] = 1.0,
    limit: Annotated[int, typer.Option(help="Most pairs of each file; 0: all.")] = 0,
) -> None:
    """Publishes people's preferences beside the judge's labels; a pair that is imported twice counts once."""
    import time

    from rich.progress import track

    from charter.bus import open_bus
    from charter.bus.messages import encode
    from charter.reward.human import HumanPair, Unusable, read

    if not 0.5 < certainty <= 1:
        raise ConfigError(f"--certainty {certainty}: give a probability above 0.5 and at most 1")
    now = int(time.time() * 1000)
    with open_bus(bus) as opened:
        for path in files:
            entries = list(read(path))
            pairs = [e for e in entries if isinstance(e, HumanPair)][: limit or None]
            messages = [pair.to_proto(certainty, now) for pair in pairs]
            starts = range(0, len(messages), _BATCH)
            for start in track(starts, description=path.name, console=_console(), transient=True):
                batch = messages[start : start + _BATCH]
                opened.publish([encode("preferences", m.prompt_id, m) for m in batch])
            unusable = [e for e in entries if isinstance(e, Unusable)]
            typer.echo(f"{path}: {len(messages)} pairs published, {len(unusable)} lines unusable")
            for bad in unusable[:_SHOWN]:
                typer.echo(f"  line {bad.line}: {bad.reason}")
            if not messages:
                raise ConfigError(f"{path} holds no pair of `chosen` and `rejected` that can be used")


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)
