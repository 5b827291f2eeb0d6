"""The command line: `charter run`, `charter chat`, and a sub-command for each part.

Thin and quick: a part is imported only when its command is used, so that `charter --help` needs no torch and
no broker. A failure of ours is one sentence and exit status 2 (the caller can repair it) or 1 (it cannot).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from charter import __version__
from charter.errors import CharterError, ConfigError, RequestError


@dataclass(frozen=True, slots=True)
class _Part:
    """A sub-command that lives in its own folder: `module` has `attribute`, a typer app or a function."""

    module: str
    summary: str
    attribute: str = "app"


_PARTS = {
    "constitution": _Part("charter.constitution.cli", "Checks, shows, compares and imports constitutions."),
    "redteam": _Part("charter.redteam.cli", "Makes the revisions data set from prompts."),
    "keys": _Part("charter.gateway.cli", "Makes and lists API keys."),
    "topics": _Part("charter.bus.cli", "Plans and creates the topics of the bus.", "topics_app"),
    "dead-letters": _Part(
        "charter.bus.cli", "Lists, shows and replays what could not be processed.", "dead_letters_app"
    ),
    "checkpoints": _Part("charter.registry.cli", "Lists, shows and compares checkpoints."),
    "sft": _Part("charter.sft.cli", "First phase: learns from revised answers.", "sft"),
    "preferences": _Part("charter.reward.cli", "Imports preferences that people gave."),
    "train": _Part("charter.trainer.cli", "Trains by a configuration file."),
    "promote": _Part("charter.publisher.cli", "Puts a checkpoint in force.", "promote"),
    "rollback": _Part("charter.publisher.cli", "Takes the checkpoint that serves out of force.", "rollback"),
    "demo": _Part("charter.demo.cli", "Takes the seed model once round the whole circle.", "demo"),
    "eval": _Part("charter.evaluation.cli", "Measures a model on held-out prompts."),
}

_EXTRAS = {
    "local": {"torch", "transformers", "safetensors", "tokenizers"},
    "tgi": {"huggingface_hub"},
    "train": {"trl", "datasets", "accelerate", "peft", "fsspec", "matplotlib", "tensorboard"},
    "kafka": {"kafka", "lz4"},
    "kserve": {"kserve"},
}


class _LazyGroup(TyperGroup):
    """Loads a part when its name is the command; `--help` shows its summary without loading it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in _PARTS and args[0] in self.commands:
            self.commands[args[0]] = _loaded(args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_LazyGroup,
    help="Makes a language model follow a written constitution, and keeps it following it in production.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _loaded(name: str) -> Any:
    part = _PARTS[name]
    command = getattr(import_module(part.module), part.attribute)
    if not isinstance(command, typer.Typer):
        function, command = command, typer.Typer()
        command.command(name)(function)
    command._add_completion = False  # it would offer --install-completion below every sub-command
    click_command = typer.main.get_command(command)
    click_command.name = name
    return click_command


def _exists(module: str) -> bool:
    return (Path(__file__).parents[1] / f"{module.replace('.', '/')}.py").is_file()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"charter {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Shows the version.")
    ] = False,
) -> None:
    """See `charter COMMAND --help`."""


@app.command()
def run(
    target: Annotated[
        str, typer.Option(help="Services to run, with commas: all, or of gateway, policy, critic, judge.")
    ] = "all",
    host: Annotated[
        str | None, typer.Option(help="Where the endpoint listens; beyond loopback it needs keys.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the endpoint; 0 takes a free one. (default: 8080)")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of everything that is kept. (default: .charter)")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model that answers: `seed`, a folder, a hub id, or a URI. (default: seed)"),
    ] = None,
    critic_model: Annotated[
        str | None, typer.Option(help="Frozen model that assesses, revises and judges. (default: seed)")
    ] = None,
    constitution: Annotated[
        str | None, typer.Option(help="Name in constitutions/, or a YAML file. (default: seed)")
    ] = None,
    guard: Annotated[
        str | None, typer.Option(help="Default guard mode: off, observe, gated, always. (default: gated)")
    ] = None,
    bus: Annotated[
        str | None,
        typer.Option(
            help="sqlite, kafka (starts a broker), or a URI such as kafka://host:port. (default: sqlite)"
        ),
    ] = None,
    learn: Annotated[
        bool | None,
        typer.Option(help="Learns beside the endpoint. (default: with the seed model and --target all)"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings.")] = None,
    log_level: Annotated[
        str | None,
        typer.Option(help="DEBUG, INFO, WARNING or ERROR. (default: WARNING in a terminal, else INFO)"),
    ] = None,
    log_json: Annotated[bool | None, typer.Option(help="Logs as JSON, one object a line.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any other setting, e.g. gateway.requests_per_minute=60."
        ),
    ] = None,
    show_settings: Annotated[
        bool, typer.Option("--settings", help="Prints every setting with its meaning, and runs nothing.")
    ] = False,
) -> None:
    """Runs the chat endpoint and the services behind it, all in this process, until Ctrl-C."""
    from charter.app.main import run_from_flags, show

    flags: dict[str, object] = {
        "target": target,
        "gateway.host": host,
        "gateway.port": port,
        "state": state,
        "model": model,
        "critic_model": critic_model,
        "constitution": constitution,
        "gateway.guard": guard,
        "bus": bus,
        "learn": learn,
        "log.level": log_level,
        "log.json": log_json,
    }
    if show_settings:
        typer.echo(show(flags, settings or [], config), nl=False)
        return
    raise typer.Exit(run_from_flags(flags, settings or [], config))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Where the endpoint answers.")] = "http://127.0.0.1:8080",
    key: Annotated[
        str, typer.Option(envvar="CHARTER_API_KEY", help="API key, where the endpoint wants one.")
    ] = "",
    model: Annotated[str, typer.Option(help="Name of the model to ask.")] = "charter",
    guard: Annotated[
        str | None, typer.Option(help="Guard mode of this conversation: off, observe, gated, always.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is always the same answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
) -> None:
    """Talks to a running endpoint from this terminal."""
    from charter.app.chat import ChatOptions, run_chat

    options = ChatOptions(url, key, model, guard, system, temperature, max_tokens)
    raise typer.Exit(run_chat(options))


for _name, _part in _PARTS.items():
    if _exists(_part.module):
        # Only for the list of commands; `_LazyGroup` puts the real one in its place.
        app.command(_name, help=_part.summary)(lambda: None)


def main() -> None:
    """Entry point of the `charter` program."""
    try:
        app()
    except (ConfigError, RequestError) as error:
        _fail(error, 2)
    except CharterError as error:
        _fail(error, 1)
    except ModuleNotFoundError as error:
        _fail(_missing(error), 1)
    except KeyboardInterrupt:
        # Before the services' own handlers are in place, and in short commands.
        raise SystemExit(130) from None


def _missing(error: ModuleNotFoundError) -> CharterError:
    """A part whose extra is not installed, as in a gateway's image; anything else is a fault of ours."""
    for extra, modules in _EXTRAS.items():
        if (error.name or "").partition(".")[0] in modules:
            return ConfigError(
                f"this command needs the package '{error.name}', which is not installed; "
                f"install Charter with its extra: pip install 'charter[{extra}]'"
            )
    raise error


def _fail(error: CharterError, status: int) -> None:
    print(f"charter: {error}", file=sys.stderr)  # noqa: T201 - the command line speaks here
    raise SystemExit(status)


if __name__ == "__main__":
    main()
