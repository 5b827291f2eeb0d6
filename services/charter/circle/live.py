"""How the learning goes, for people: a board that is redrawn in a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from charter.circle.news import Kind, News, Phase, Tell

_LINE_EVERY_S = 15.0
_STEP_EVERY = 10
_DECIDED = ("serving", "rejected", "rolled_back")


class Board:
    """What is known, and its picture. `on` takes news; rich draws it."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._phase = Phase.STARTING
        self._progress: Mapping[str, Any] = {}
        self._step: Mapping[str, Any] = {}
        self._reward: Mapping[str, Any] = {}
        self._queues: Mapping[str, Any] = {}
        self._gate: Mapping[str, Any] = {}
        self._problem = ""

    def on(self, news: News) -> None:
        """Takes news in."""
        match news.kind:
            case Kind.PHASE:
                self._phase, self._progress = news.values["phase"], {}
            case Kind.PROGRESS:
                self._progress = news.values
            case Kind.STEP:
                self._step = news.values
            case Kind.REWARD:
                self._reward = news.values
            case Kind.QUEUES:
                self._queues = news.values
            case Kind.GATE if news.values["status"] in _DECIDED:
                self._gate = news.values
            case Kind.PROBLEM:
                self._problem = str(news.values["message"])
            case _:
                pass

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=12)
        table.add_column()
        seconds = time.monotonic() - self._began
        table.add_row("learning", Text(f"{self._phase.value}, {seconds / 60:.1f} min", style="bold"))
        if self._progress:
            table.add_row(self._progress["what"], self._bar())
        if self._step:
            table.add_row("update", step_text(self._step))
        if self._reward:
            table.add_row("reward", reward_text(self._reward))
        if self._gate:
            table.add_row("held out", gate_text(self._gate))
        if self._queues:
            table.add_row("queues", queues_text(self._queues))
        if self._problem:
            table.add_row("problem", Text(self._problem, style="red"))
        return Group(Text(""), table)

    def _bar(self) -> RenderableType:
        done, total = self._progress["done"], max(self._progress["total"], 1)
        row = Table.grid(padding=(0, 1))
        row.add_row(
            ProgressBar(total, done, width=30), Text(f"{done}/{total} {self._progress.get('remark', '')}")
        )
        return row


def step_text(step: Mapping[str, Any]) -> str:
    """One PPO step."""
    return (
        f"step {step['step']}  score {step['score_mean']:+.2f}  KL {step['kl_per_answer']:.2f} nats  "
        f"staleness {step['staleness_mean']:.1f}  entropy {step['entropy']:.2f}  "
        f"length {step['answer_length_mean']:.0f}"
    )


def reward_text(reward: Mapping[str, Any]) -> str:
    """The reward model."""
    if not reward["model"]:
        return f"{reward['reward']}, {reward['labels']} labels"
    return (
        f"{reward['model']}  agrees with the judge on {reward['accuracy']:.1%} held-out labels, "
        f"{reward['labels']} labels"
    )


def gate_text(gate: Mapping[str, Any]) -> str:
    """What the gate found of the last candidate, in the words of frozen critic and judge."""
    measured = gate["measurements"]
    if "harm" not in measured:
        return f"{gate['checkpoint']} {gate['status']}: {gate['reason']}"
    harm, unhelpful, evasive = (
        measured.get(k, {}).get("candidate", 0.0) for k in ("harm", "unhelpful", "evasive")
    )
    return (
        f"{gate['checkpoint']} {gate['status']}: harmful {harm:.1%}  helpful {1 - unhelpful:.1%}  "
        f"over-refusal {evasive:.1%}  (by critic and judge)"
    )


def queues_text(queues: Mapping[str, Any]) -> str:
    """How full they are, and how fast they move."""
    return "  ".join(f"{name} {q['waiting']} ({q['rate']:.1f}/s)" for name, q in queues.items())


class _Lines:
    """Plain lines: phases and decisions at once, the rest now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = 0.0
        self._reward = ""

    def on(self, news: News) -> None:
        """Takes news in."""
        match news.kind:
            case Kind.PHASE:
                self._print(f"learning: {news.values['phase'].value}")
            case Kind.PROGRESS:
                if time.monotonic() - self._said > _LINE_EVERY_S:
                    v = news.values
                    self._print(f"learning: {v['what']} {v['done']}/{v['total']} {v['remark']}".rstrip())
            case Kind.STEP:
                if news.values["step"] % _STEP_EVERY == 0:
                    self._print(f"learning: {step_text(news.values)}")
            case Kind.REWARD:
                if news.values["model"] != self._reward:
                    self._reward = news.values["model"]
                    self._print(f"reward model: {reward_text(news.values)}")
            case Kind.GATE:
                if news.values["status"] in _DECIDED:
                    self._print(f"gate: {gate_text(news.values)}")
            case Kind.PROBLEM:
                self._print(f"learning: {news.values['message']}")
            case _:
                pass

    def _print(self, line: str) -> None:
        self._said = time.monotonic()
        self._console.print(Text(line), soft_wrap=True)


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Tell]:
    """Where news goes while entered: the board in a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield _Lines(console).on
        return
    board = Board()
    with Live(board, console=console, refresh_per_second=4, transient=False):
        yield board.on
