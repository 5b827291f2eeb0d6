"""What `charter run` says in the terminal: where it answers, with what, how to talk to it, how to stop it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from charter import __version__
from charter.app.settings import SEED, Deployment, Target
from charter.constitution import load


class Screen:
    """Writes to standard output, calmly; logs go to standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)

    @property
    def console(self) -> Console:
        """For what is drawn live below the lines."""
        return self._console

    def starting(self, deployment: Deployment, address: str) -> None:
        """Before anything slow begins."""
        common = deployment.common
        self._line(Text(f"Charter {__version__}", style="bold"))
        if deployment.gateway is not None:
            keys = "" if deployment.gateway.keys and deployment.gateway.keys.exists() else "  (no key needed)"
            self._row("endpoint", f"{address}{keys}")
            self._row("guard", deployment.gateway.guard.value)
        else:
            self._row("services", ", ".join(common.targets))
        if Target.POLICY in common.targets:
            self._row("model", _shown(common.model))
        if {Target.CRITIC, Target.JUDGE} & set(common.targets):
            self._row("critic", f"{_shown(common.critic_model or common.model)}, frozen")
        if common.targets != (Target.POLICY,):
            self._row("constitution", _about(common.constitution_name))
        self._row("kept in", str(_short(common.state)))
        alone = common.targets == (Target.GATEWAY,)
        self._line(Text("\nlistening ..." if alone else "\nloading the models ...", style="dim"))

    def ready(self, seconds: float, address: str) -> None:
        """When requests are answered."""
        self._line(Text(f"ready after {seconds:.0f} s\n", style="green"))
        if address:
            port = address.removesuffix("/v1").rpartition(":")[2]
            self._row("talk to it", "make chat" if port == "8080" else f"make chat PORT={port}")
            ask = '{"model":"charter","messages":[{"role":"user","content":"Hello"}]}'
            self._row("or", f"curl {address}/chat/completions -H 'content-type: application/json' -d '{ask}'")
        self._row("stop it", "Ctrl-C")

    def stopping(self) -> None:
        """When a signal came."""
        self._line(Text("\nstopping ...", style="dim"))

    def stopped(self) -> None:
        """When all is closed."""
        self._line(Text("stopped; everything is kept for the next start", style="dim"))

    def _row(self, name: str, value: str) -> None:
        self._line(Text.assemble((f"  {name:<14}", "dim"), value))

    def _line(self, text: Text) -> None:
        self._console.print(text)


def _about(name: str) -> str:
    constitution = load(name)
    count = len(constitution.principles)
    return (
        f"{constitution.name} {constitution.version}, {count} principles, digest {constitution.digest[:12]}"
    )


def _shown(model: str) -> str:
    return "seed (shipped with Charter)" if model == SEED else model


def _short(path: Path) -> Path | str:
    absolute = path.expanduser().absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute
