"""`charter topics` and `charter dead-letters`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from charter.bus.dead_letters import BuriedMessage, Wanted

topics_app = typer.Typer(help="The topics of the bus.", no_args_is_help=True)
dead_letters_app = typer.Typer(help="Messages that could not be used.", no_args_is_help=True)

_Bus = Annotated[
    str,
    typer.Option("--bus", envvar="CHARTER_BUS", help="sqlite:<file> or kafka://host:port", show_default=True),
]
_File = Annotated[
    Path | None, typer.Option("--file", help="A topics file; default: the one that Charter ships.")
]
_Topic = Annotated[str | None, typer.Option("--topic", help="Only letters from this topic.")]
_Group = Annotated[str | None, typer.Option("--group", help="Only letters of this group.")]
_Ids = Annotated[
    list[str] | None, typer.Argument(help="Ids as `list` shows them; default: all.", show_default=False)
]

DEFAULT_BUS = "sqlite:.charter/bus.db"


@topics_app.command("apply")
def apply_topics(
    bus: _Bus = DEFAULT_BUS,
    file: _File = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would change.")] = False,
) -> None:
    """Creates and adjusts topics; shows a plan first. Safe to repeat."""
    from charter.bus import open_bus
    from charter.bus.topics import DEFAULT_FILE, load_topics

    specs = load_topics(file or DEFAULT_FILE)
    console = Console()
    with open_bus(bus) as opened:
        changes = opened.plan_topics(specs)
        for change in changes:
            console.print(f"{change.action:16} {change.topic}: {change.detail}", highlight=False)
        if not changes:
            console.print(f"{len(specs)} topics are as they should be; nothing to do.", highlight=False)
            return
        refused = [change for change in changes if change.action == "refuse"]
        if not plan and len(refused) < len(changes):
            if not yes:
                typer.confirm(f"Apply {len(changes) - len(refused)} changes?", abort=True)
            done = opened.apply_topics(specs)
            console.print(f"{len(done) - len(refused)} changes applied.", highlight=False)
        if refused:
            console.print("What was refused needs a new topic, or another topics file.", highlight=False)
            raise typer.Exit(1)


@topics_app.command("show")
def show_topics(
    bus: _Bus = DEFAULT_BUS,
    group: Annotated[str | None, typer.Option("--group", help="Also this group's lag.")] = None,
) -> None:
    """Topics, partitions and messages, and how far a group is behind."""
    from charter.bus import open_bus

    table = Table("topic", "partitions", "offsets", "cleanup", "retention", *(["lag"] if group else []))
    with open_bus(bus) as opened:
        for name, spec in opened.topics().items():
            bounds = opened.bounds(name)
            offsets = sum(bound.end - bound.first for bound in bounds.values())
            kept = (
                "forever"
                if spec.retention_ms is None
                else str(datetime.timedelta(milliseconds=spec.retention_ms))
            )
            row = [name, str(spec.partitions), str(offsets), spec.cleanup.value, kept]
            if group:
                row.append(str(sum(lag.records for lag in opened.lag(group, [name]))))
            table.add_row(*row)
    Console().print(table)


@dead_letters_app.command("list")
def list_letters(bus: _Bus = DEFAULT_BUS, topic: _Topic = None, group: _Group = None) -> None:
    """What is buried, and why."""
    from charter.bus import open_bus
    from charter.bus.dead_letters import buried

    table = Table("id", "when", "attempts", "error")
    with open_bus(bus) as opened:
        for letter in buried(opened, _wanted(topic, group, None)):
            table.add_row(letter.id, _time(letter.buried_unix_ms), str(letter.attempts), letter.error)
    Console().print(table if table.row_count else "No dead letters.")


@dead_letters_app.command("show")
def show_letter(
    ids: Annotated[list[str], typer.Argument(help="Ids as `list` shows them.")], bus: _Bus = DEFAULT_BUS
) -> None:
    """One letter whole: origin, error, headers and the message."""
    from charter.bus import open_bus
    from charter.bus.dead_letters import buried

    with open_bus(bus) as opened:
        letters = buried(opened, _wanted(None, None, ids))
    for letter in letters:
        typer.echo(
            f"id:       {letter.id}\ngroup:    {letter.group}\nburied:   {_time(letter.buried_unix_ms)}"
        )
        typer.echo(f"attempts: {letter.attempts}\nerror:    {letter.error}\nkey:      {letter.key!r}")
        for name, value in letter.headers:
            typer.echo(f"header:   {name} = {value!r}")
        typer.echo(_message_text(letter.headers, letter.value))
    _complain_about_missing(ids, {letter.id for letter in letters})


@dead_letters_app.command("replay")
def replay_letters(
    ids: _Ids = None, bus: _Bus = DEFAULT_BUS, topic: _Topic = None, group: _Group = None
) -> None:
    """Publishes letters to their origin again, for the group that failed, and removes them: one act."""
    from charter.bus import open_bus
    from charter.bus.dead_letters import replay

    with open_bus(bus) as opened:
        letters = replay(opened, _wanted(topic, group, ids))
    for letter in letters:
        typer.echo(f"replayed {letter.id}")
    typer.echo(f"{len(letters)} replayed.")
    _complain_about_missing(ids or [], {letter.id for letter in letters})


def _wanted(topic: str | None, group: str | None, ids: list[str] | None) -> Wanted:
    def wanted(letter: BuriedMessage) -> bool:
        right_place = topic in (None, letter.topic) and group in (None, letter.group)
        return right_place and (not ids or letter.id in ids)

    return wanted


def _message_text(headers: tuple[tuple[str, bytes], ...], value: bytes) -> str:
    """The message in protobuf's text form, or its bytes when it cannot be read."""
    from google.protobuf.message import DecodeError

    from charter.bus.messages import TYPE_HEADER
    from charter.v1 import events_pb2

    name = dict(headers).get(TYPE_HEADER, b"").decode(errors="replace").rpartition(".")[2]
    try:
        return str(getattr(events_pb2, name).FromString(value)) if name else repr(value)
    except (AttributeError, DecodeError):
        return repr(value)


def _complain_about_missing(ids: list[str], found: set[str]) -> None:
    missing = [id_ for id_ in ids if id_ not in found]
    if missing:
        typer.echo(
            f"No dead letter has the id {missing[0]!r}; `charter dead-letters list` shows them.", err=True
        )
        raise typer.Exit(1)


def _time(unix_ms: int) -> str:
    return datetime.datetime.fromtimestamp(unix_ms / 1000, datetime.UTC).isoformat(timespec="seconds")
