"""`charter checkpoints`: which there are, what became of them, and what made them."""

from __future__ import annotations

import datetime
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from charter.registry import Change, Manifest, Registry

app = typer.Typer(help="Checkpoints: which there are and what made them.", no_args_is_help=True)

Root = Annotated[
    str,
    typer.Option("--registry", envvar="CHARTER_REGISTRY", help="Folder or address of the checkpoints."),
]
DEFAULT_ROOT = ".charter/checkpoints"
_Id = Annotated[str, typer.Argument(help="A checkpoint id, or an unambiguous beginning of one; `serving`.")]


@app.command("list")
def list_(registry: Root = DEFAULT_ROOT) -> None:
    """All checkpoints, the oldest first, and what became of each."""
    from rich.table import Table

    found = _open(registry)
    table = Table("checkpoint", "step", "parent", "labels", "status", "since", "reason")
    for manifest in found.list():
        change, facts = found.status(manifest.id), manifest.facts
        table.add_row(
            manifest.id,
            str(facts.step),
            facts.parent or "–",
            str(facts.labels.count),
            _status(change),
            _time(change.at_unix_ms if change else manifest.created_unix_ms),
            change.reason if change else "",
        )
    _console().print(table if table.row_count else f"{found.root} has no checkpoints yet.")


@app.command()
def show(checkpoint: _Id, registry: Root = DEFAULT_ROOT) -> None:
    """One checkpoint: its manifest, the labels that made it, and its history."""
    from rich.table import Table

    found, console = _open(registry), _console()
    manifest = find(found, checkpoint)
    table = Table(show_header=False, box=None)
    for name, value in _described(manifest):
        table.add_row(name, value)
    console.print(table)
    _print_labels(console, found.lineage(manifest.id))
    history = Table("when", "status", "reason", "measured", title="history")
    for change in found.history(manifest.id):
        history.add_row(_time(change.at_unix_ms), change.status, change.reason, _flat(change.measurements))
    console.print(history)


@app.command()
def lineage(checkpoint: _Id, registry: Root = DEFAULT_ROOT) -> None:
    """From a checkpoint (a served answer's policy version) back to the first, with the labels between."""
    from rich.tree import Tree

    found, console = _open(registry), _console()
    chain = found.lineage(find(found, checkpoint).id)
    tree = branch = Tree(_headline(chain[0], found))
    for child, parent in itertools.pairwise(chain):
        branch = branch.add(f"{_learned(child)}\n{_headline(parent, found)}")
    missing = chain[-1].facts.parent
    if missing:
        branch.add(f"{missing} (no longer in {found.root})")
    console.print(tree)
    _print_labels(console, chain)


@app.command()
def diff(old: _Id, new: _Id, registry: Root = DEFAULT_ROOT) -> None:
    """What two checkpoints have in common, and in what they differ."""
    from rich.table import Table

    found, console = _open(registry), _console()
    one, two = find(found, old), find(found, new)
    table = Table("", one.id, two.id)
    for (name, a), (_, b) in zip(_described(one), _described(two), strict=True):
        if a != b:
            table.add_row(name, a, b)
    for name in sorted({*one.files, *two.files}):
        a, b = (m.files[name].sha256[:12] if name in m.files else "–" for m in (one, two))
        if a != b:
            table.add_row(name, a, b)
    console.print(table if table.row_count else "They are the same.")
    if same := [n for n in one.files if one.files[n] == two.files.get(n)]:
        console.print(f"The same in both: {', '.join(sorted(same))}", highlight=False)


@app.command()
def prune(
    keep: Annotated[
        int, typer.Option(min=1, help="Newest checkpoints, and newest that served, to keep.")
    ] = 20,
    registry: Root = DEFAULT_ROOT,
) -> None:
    """Removes the weights of old checkpoints; their manifests stay, and so do the lineages."""
    gone = _open(registry).prune(keep)
    _console().print(f"{len(gone)} checkpoints pruned.", *gone, sep="\n", highlight=False)


def find(registry: Registry, name: str) -> Manifest:
    """The checkpoint that a person means: an id, a unique beginning of one, or `serving`.

    Raises `ConfigError` when there is none or more than one.
    """
    from charter.errors import ConfigError

    if name == "serving":
        manifest = registry.serving()
        if manifest is None:
            raise ConfigError(
                f"no checkpoint of {registry.root} serves; promote one with `charter promote ID`"
            )
        return manifest
    found = [m for m in registry.list() if m.id.startswith(name)]
    exact = [m for m in found if m.id == name]
    if len(exact or found) != 1:
        some = ", ".join(m.id for m in found[:5])
        raise ConfigError(
            f"{registry.root} has {len(found)} checkpoints that begin with {name!r}"
            f"{f' ({some})' if some else ''}; `charter checkpoints list` shows all ids"
        )
    return (exact or found)[0]


def _open(root: str) -> Registry:
    from charter.registry import Registry

    return Registry(root)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _described(manifest: Manifest) -> Iterator[tuple[str, str]]:
    facts = manifest.facts
    yield "id", manifest.id
    yield "kind", facts.kind
    yield "parent", facts.parent or "–"
    yield "step", str(facts.step)
    yield "created", _time(manifest.created_unix_ms)
    yield "code version", manifest.code_version
    yield "digest", manifest.digest
    yield "weights digest", manifest.weights_digest
    yield "tokenizer digest", manifest.tokenizer_digest
    yield "constitution digest", facts.constitution_digest or "–"
    yield "judge digest", facts.judge_digest or "–"
    yield "reward model digest", facts.reward_model_digest or "–"
    yield "labels", str(facts.labels.count)
    yield "label positions", _flat({k: f"{a}–{b}" for k, (a, b) in facts.labels.positions.items()}) or "–"
    yield "training goes on at", _flat(facts.positions) or "–"
    yield "size", f"{manifest.size / 1e6:.1f} MB in {len(manifest.files)} files"
    yield "evaluation", _flat(facts.evaluation) or "–"
    yield "note", facts.note or "–"


def _headline(manifest: Manifest, registry: Registry) -> str:
    change = registry.status(manifest.id)
    return f"[bold]{manifest.id}[/] {_status(change)} {_time(manifest.created_unix_ms)}"


def _learned(manifest: Manifest) -> str:
    labels = manifest.facts.labels
    if not labels.count:
        return "learned from its parent without labels"
    where = _flat({k: f"{a}–{b}" for k, (a, b) in labels.positions.items()})
    principles = _flat(dict(Counter(labels.by_principle).most_common()))
    return f"learned from {labels.count} labels ({where})\n  principles: {principles}"


def _print_labels(console: Console, chain: Sequence[Manifest]) -> None:
    """All labels on the way from the first checkpoint to this one."""
    from rich.table import Table

    columns = ("principle", "judge", "constitution")
    totals: dict[str, Counter[str]] = {c: Counter() for c in columns}
    for manifest in chain:
        labels = manifest.facts.labels
        for column, counts in zip(
            columns, (labels.by_principle, labels.by_judge, labels.by_constitution), strict=True
        ):
            totals[column].update(counts)
    count = sum(m.facts.labels.count for m in chain)
    if not count:
        console.print("No labels made it.")
        return
    table = Table("by", "", "labels", title=f"{count} labels over {len(chain)} checkpoints")
    for column in columns:
        for name, number in totals[column].most_common():
            table.add_row(column, name, str(number))
    console.print(table)


_COLOURS = {"serving": "green", "rejected": "red", "rolled_back": "red", "candidate": "yellow"}


def _status(change: Change | None) -> str:
    if change is None:
        return "–"
    colour = _COLOURS.get(change.status)
    return f"[{colour}]{change.status}[/]" if colour else str(change.status)


def _time(unix_ms: int) -> str:
    return datetime.datetime.fromtimestamp(unix_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _flat(record: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            parts.append(_flat(value, f"{prefix}{name}."))
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{prefix}{name} {shown}")
    return ", ".join(p for p in parts if p)
