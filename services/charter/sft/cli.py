"""`charter sft`: supervised learning on revised answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from charter.errors import ConfigError


def sft(
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint; it must not exist yet.")],
    model: Annotated[
        str, typer.Option(help="Checkpoint to start from: seed, a folder, or a hub id.")
    ] = "seed",
    revisions: Annotated[
        list[Path] | None, typer.Option(help="Parquet of `charter redteam`, or its folder; repeatable.")
    ] = None,
    bus: Annotated[str, typer.Option(help="Bus whose revisions are read as well, e.g. sqlite:<file>.")] = "",
    helpful: Annotated[
        list[str] | None,
        typer.Option(
            help="Helpful prompts, as `charter redteam` reads them (files, seed:COUNT:plain,lookalike)."
        ),
    ] = None,
    answerer: Annotated[
        str, typer.Option(help="URI of the model that answers them; default: the checkpoint itself.")
    ] = "",
    registry: Annotated[
        str, typer.Option(help="Registry of checkpoints that the new one is written to as well.")
    ] = "",
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, e.g. tuning.learning_rate=1e-5."),
    ] = None,
    logs: Annotated[
        Path | None, typer.Option(help="TensorBoard folder; default: OUT with `.logs` behind its name.")
    ] = None,
) -> None:
    """Fine-tunes a checkpoint on revisions mixed with its own helpful answers (SL-CAI)."""
    from charter.config import assignments, load
    from charter.redteam.prompts import collect
    from charter.sft.config import SftConfig
    from charter.sft.pipeline import Sources, id_of, register, run

    if not revisions and not bus:
        raise ConfigError(
            "no revisions are named; give --revisions DIR (made by `charter redteam`) or --bus URI"
        )
    if out.exists():
        raise ConfigError(f"{out} exists already; name another folder with --out")
    loaded = load(SftConfig, file=config, flags=assignments(settings or []))
    prompts = tuple(p.conversation for p in collect(helpful).prompts) if helpful else ()
    sources = Sources(_source(model), tuple(revisions or ()), bus, prompts, answerer)
    with _Bars() as bars:
        outcome = run(sources, loaded, out, logs=logs or out.with_name(f"{out.name}.logs"), note=bars.note)
    if registry:
        manifest = register(outcome, registry, id_of(sources.model))
        typer.echo(f"{manifest.id} is a candidate in {registry}")
    mixture = outcome.mixture
    typer.echo(
        f"{out}: {outcome.trained.steps} steps on {mixture.revisions} revisions ({outcome.changed} changed "
        f"the draft) and {mixture.own} own answers; {mixture.too_long} were too long; "
        f"mean loss {outcome.trained.loss:.3f}"
    )


def _source(model: str) -> str:
    if model == "seed":
        from charter.seedmodel import WEIGHTS

        return str(WEIGHTS)
    return model.removeprefix("local:")


class _Bars:
    """A progress bar for each stage, on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, what: str, done: int, total: int, remark: str) -> None:
        """Moves the bar of a stage."""
        from rich.progress import TaskID

        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, remark="")
        self._progress.update(TaskID(self._tasks[what]), completed=done, total=total, remark=remark)
