"""`charter redteam`: prompts in, the revisions data set out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from charter.errors import BackendUnavailable, ConfigError
from charter.redteam.config import RedTeamConfig
from charter.redteam.prompts import Collected, RedTeamPrompt, collect

if TYPE_CHECKING:  # the rest is loaded when a run begins, so that --help is quick
    from charter.app.signals import StopSignal
    from charter.lm.base import LanguageModel
    from charter.redteam.critics import Critic
    from charter.redteam.pipeline import Outcome, Run

app = typer.Typer(add_completion=False)

SHOWN = 20
"""Bad lines and failures that are printed one by one."""
_REMOTE = "grpc://"
_DEFAULTS = RedTeamConfig()
_EVERY_S = 10.0
"""Without a terminal, seconds between two lines about the progress."""


@dataclass(frozen=True, slots=True)
class _Places:
    """What works, and where."""

    model: str
    critic: str
    constitution: str
    bus: str
    out: Path


@app.command()
def redteam(
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompts", metavar="FILE...", help="Files or folders with prompts, or seed:COUNT[:CLASS]."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the data set.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE...]", help="More prompts.")] = None,
    field: Annotated[str, typer.Option(help="Field or column of the prompt, where it cannot be told.")] = "",
    model: Annotated[
        str, typer.Option(help="Who drafts: `seed`, a folder, a hub id, or a URI such as grpc://host:port.")
    ] = "seed",
    critic: Annotated[
        str,
        typer.Option(
            help="Who criticises and revises: a critic server (grpc://host:port), or any model as above."
        ),
    ] = "seed",
    constitution: Annotated[
        str, typer.Option(help="Name or file; a critic server has its own. (default: seed, or charter)")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Rounds of critique and revision.")] = _DEFAULTS.rounds,
    temperature: Annotated[float, typer.Option(help="Of the drafts.")] = _DEFAULTS.temperature,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a draft.")] = _DEFAULTS.max_tokens,
    seed: Annotated[int, typer.Option(help="The same seed gives the same rows.")] = _DEFAULTS.seed,
    concurrency: Annotated[int, typer.Option(help="Prompts at once.")] = _DEFAULTS.concurrency,
    give_up: Annotated[
        float,
        typer.Option(help="Seconds without a finished prompt, because a server is away, until it stops."),
    ] = _DEFAULTS.give_up_s,
    state: Annotated[Path, typer.Option(help="Folder of the embedded bus.")] = Path(".charter"),
    bus: Annotated[str, typer.Option(help="sqlite (a file in the state folder), or a bus URI.")] = "sqlite",
) -> None:
    """Drafts, criticises and revises an answer to each prompt; every step goes to the bus and to Parquet.

    Stopped and started again, it goes on where it was.
    """
    config = RedTeamConfig(rounds, temperature, max_tokens, seed, concurrency, give_up_s=give_up)
    collected = collect([*prompts, *(more or [])], field)
    places = _places(model, critic, constitution, state, bus, out)
    raise typer.Exit(asyncio.run(_run(collected, places, config)))


def _places(model: str, critic: str, constitution: str, state: Path, bus: str, out: Path) -> _Places:
    from charter.app.settings import SEED, model_uri

    critic_uri = model_uri(critic)
    if critic_uri.startswith(_REMOTE):
        if constitution:
            raise ConfigError("a critic server has its own constitution; leave --constitution out")
    else:
        constitution = constitution or (SEED if critic == SEED else "charter")
    if bus == "sqlite":
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{state}: cannot be made ({error.strerror}); name another with --state"
            ) from error
        bus = f"sqlite:{state.absolute() / 'bus.db'}"
    return _Places(model_uri(model), critic_uri, constitution, bus, out)


async def _run(collected: Collected, places: _Places, config: RedTeamConfig) -> int:
    from charter.app.signals import StopSignal
    from charter.bus import open_bus
    from charter.redteam.pipeline import Run
    from charter.redteam.store import RunFolder

    console = Console(stderr=True, highlight=False)
    _print_some(console, [str(line) for line in collected.bad], "line could not be read")
    async with contextlib.AsyncExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        bus = stack.enter_context(open_bus(places.bus))
        folder = stack.enter_context(RunFolder(places.out, bus, config))
        model, critic = await _opened(places, stack)
        with _Bar(console, len(collected.prompts)) as bar:
            bar.on_finished(sum(p.prompt_id in folder.done for p in collected.prompts))
            run = Run(model, critic, folder, bar, config)
            stopping = asyncio.create_task(_stop_when_told(stop, run))
            outcome = await run.work(collected.prompts)
            stopping.cancel()
    _print_some(console, bar.failures, "prompt has no row")
    return _summed_up(console, outcome, collected, places.out)


async def _opened(places: _Places, stack: contextlib.AsyncExitStack) -> tuple[LanguageModel, Critic]:
    """Policy and critic, closed with the stack; one model where both are the same."""
    from charter.constitution import load
    from charter.lm import open_model
    from charter.redteam.critics import InProcessCritic
    from charter.rpc.clients import CriticClient

    remote = places.critic.startswith(_REMOTE)
    constitution = (
        None if remote else load(places.constitution)
    )  # a mistake in it shows before the models load
    model = await asyncio.to_thread(open_model, places.model)
    stack.push_async_callback(model.close)
    if constitution is None:
        client = CriticClient(places.critic.removeprefix(_REMOTE))
        stack.push_async_callback(client.close)
        return model, client
    reviser = model
    if places.critic != places.model:
        reviser = await asyncio.to_thread(open_model, places.critic)
        stack.push_async_callback(reviser.close)
    return model, InProcessCritic(reviser, constitution)


async def _stop_when_told(stop: StopSignal, run: Run) -> None:
    await stop.wait()
    run.stop()


def _summed_up(console: Console, outcome: Outcome, collected: Collected, out: Path) -> int:
    """Says what came of it; the exit status."""
    parts = [f"{outcome.finished} finished"]
    for count, name in (
        (outcome.earlier, "had their row before"),
        (outcome.failed, "failed"),
        (len(collected.bad), "lines unreadable"),
        (collected.repeated, "repeated"),
    ):
        parts += [f"{count} {name}"] if count else []
    console.print(f"{', '.join(parts)}; rows in {escape(str(out / 'data'))}", soft_wrap=True)
    if outcome.gave_up:
        raise BackendUnavailable(f"{outcome.gave_up}; start the same command again to go on")
    if outcome.stopped:
        console.print("stopped; the same command goes on where it was", soft_wrap=True)
        return 130
    return 1 if outcome.failed and not outcome.finished and not outcome.earlier else 0


def _print_some(console: Console, lines: Sequence[str], what: str) -> None:
    for line in lines[:SHOWN]:
        console.print(f"[yellow]{what}:[/] {escape(line)}", soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(f"[yellow]… and {len(lines) - SHOWN} more[/]", soft_wrap=True)


class _Bar:
    """The progress bar; without a terminal, a line now and then."""

    def __init__(self, console: Console, total: int) -> None:
        self.failures: list[str] = []
        """Prompts that get no row, and why."""
        self._console, self._total, self._count = console, total, 0
        self._said = time.monotonic()
        self._progress = Progress(
            TextColumn("revisions"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[yellow]{task.fields[waiting]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, waiting="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_finished(self, count: int) -> None:
        """See `charter.redteam.pipeline.Watcher`."""
        self._count += count
        self._progress.advance(self._task, count)
        self._say(f"{self._count} of {self._total}")

    def on_failed(self, prompt: RedTeamPrompt, reason: str) -> None:
        """See `charter.redteam.pipeline.Watcher`."""
        self.failures.append(f"{prompt.origin}: {reason}")
        self._progress.update(self._task, total=self._total - len(self.failures))

    def on_waiting(self, reason: str) -> None:
        """See `charter.redteam.pipeline.Watcher`."""
        self._progress.update(self._task, waiting=escape(f"waiting: {reason}") if reason else "")
        if reason:
            self._say(f"waiting: {reason}")

    def _say(self, line: str) -> None:
        if not self._console.is_terminal and time.monotonic() - self._said > _EVERY_S:
            self._said = time.monotonic()
            self._console.print(escape(line), soft_wrap=True)
