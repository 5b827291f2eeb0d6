"""`charter keys`: API keys of the endpoint."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from charter.gateway.guard import GuardMode
from charter.gateway.keys import KeyRecord, add_key, read_keys, revoke_key

app = typer.Typer(help="API keys of the endpoint: add, list, revoke.", no_args_is_help=True)

KeysFile = Annotated[
    Path, typer.Option("--file", envvar="CHARTER_KEYS", help="File of hashed keys that the gateway reads.")
]
DEFAULT_FILE = Path(".charter/keys.json")


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people.")],
    file: KeysFile = DEFAULT_FILE,
    guard: Annotated[GuardMode | None, typer.Option(help="Guard mode of its requests.")] = None,
    weakest_guard: Annotated[
        GuardMode | None,
        typer.Option(help="Weakest mode that a request may ask for; none weaker than its own."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=0, help="0: unlimited.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=0, help="0: unlimited.")] = None,
) -> None:
    """Makes a key and prints it, once: the file keeps only a hash."""
    record, key = add_key(
        file,
        name,
        guard=guard,
        weakest_guard=weakest_guard,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    typer.echo(key)
    typer.echo(f"Key {record.id} for {name} is in {file}. It is shown only now; keep it well.", err=True)


@app.command("list")
def list_(file: KeysFile = DEFAULT_FILE) -> None:
    """Shows the keys of a file, without secrets."""
    records = read_keys(file)
    if not records:
        typer.echo(f"{file} has no keys; `charter keys add NAME` makes one.", err=True)
    for record in records:
        typer.echo(_line(record))


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `charter keys list` shows it.")],
    file: KeysFile = DEFAULT_FILE,
) -> None:
    """Makes a key useless; gateways that run notice within a second."""
    record = revoke_key(file, key_id)
    typer.echo(f"Key {record.id} of {record.name} is revoked.")


def _line(record: KeyRecord) -> str:
    created = datetime.datetime.fromtimestamp(record.created_unix, datetime.UTC).date()
    state = "revoked" if record.revoked_unix is not None else "active"
    limits = [
        f"guard={record.guard.value}" if record.guard else "",
        f"weakest={record.weakest_guard.value}" if record.weakest_guard else "",
        f"requests/min={record.requests_per_minute}" if record.requests_per_minute is not None else "",
        f"tokens/min={record.tokens_per_minute}" if record.tokens_per_minute is not None else "",
    ]
    return "  ".join([record.id, state, str(created), record.name, *filter(None, limits)])
