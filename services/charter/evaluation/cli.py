"""`charter eval`: measures a model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(help="Measures a model on held-out prompts.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `eval seed` a sub-command while it is the only one."""


@app.command()
def seed(
    model: Annotated[str, typer.Option(help="URI of the model to measure.")] = "local:seed",
    constitution: Annotated[
        str, typer.Option(help="The constitution that its feedback is asked by.")
    ] = "seed",
    json_file: Annotated[Path | None, typer.Option("--json", help="Writes all figures to this file.")] = None,
    share: Annotated[
        float, typer.Option(min=0.01, max=10, help="Measures this share of the usual number of cases.")
    ] = 1.0,
) -> None:
    """The seed model's five tasks, on held-out combinations, against their targets."""
    record, met = asyncio.run(_measure(model, constitution, share))
    if json_file:
        json_file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if not met:
        raise typer.Exit(1)


async def _measure(uri: str, name: str, share: float) -> tuple[dict[str, Any], bool]:
    from charter.constitution import load
    from charter.evaluation.seed import Plan, measure, targets
    from charter.lm import open_model

    usual = Plan()
    plan = Plan(
        prompts=max(int(usual.prompts * share), 1),
        pairs=max(int(usual.pairs * share), 1),
        feedback=max(int(usual.feedback * share), 1),
        drafts=max(int(usual.drafts * share), 1),
    )
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    language_model = open_model(uri)
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bars: dict[str, Any] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in bars:
                    bars[stage] = progress.add_task(stage, total=total)
                progress.update(bars[stage], completed=done)

            record = await measure(language_model, load(name), plan, show)
    finally:
        await language_model.close()
    found = targets(record)
    record["targets"] = [
        {"name": t.name, "value": t.value, "low": t.low, "high": t.high, "met": t.met} for t in found
    ]
    table = Table("figure", "measured", "wanted", "")
    for t in found:
        wanted = (
            f"{t.low:.0%} – {t.high:.0%}"
            if t.low and t.high < 1
            else (f"≥ {t.low:.0%}" if t.low else f"≤ {t.high:.0%}")
        )
        table.add_row(t.name, f"{t.value:.1%}", wanted, "[green]met[/]" if t.met else "[red]missed[/]")
    console.print(table)
    return record, all(t.met for t in found)
