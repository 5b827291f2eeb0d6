"""`charter constitution`: check, show, compare and import constitutions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from charter.constitution import diff as diffs
from charter.constitution.dump import dumps
from charter.constitution.loader import MAX_SHOWN, Report, check, check_text, folders, load, resolve
from charter.constitution.model import Constitution, Phase, Principle
from charter.constitution.source import Problem, read_text
from charter.errors import CharterError, ConstitutionError

app = typer.Typer(help="Check, show, compare and import constitutions.", no_args_is_help=True)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

NAME = "A path, or the name of a constitution that came with Charter: seed, charter, charter.zh."


def _stop(error: CharterError) -> typer.Exit:
    err.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
    return typer.Exit(1)


def _print_problems(console: Console, problems: tuple[Problem, ...], colour: str) -> None:
    for p in problems[:MAX_SHOWN]:
        place = f"{p.file}:{p.line}" if p.line else p.file
        named = f" [bold]{escape(p.field)}:[/]" if p.field else ""
        line = f"[{colour}]{escape(place)}:[/]{named} {escape(p.what)}; [green]{escape(p.remedy)}[/]"
        console.print(line, soft_wrap=True)
    if len(problems) > MAX_SHOWN:
        console.print(f"… and {len(problems) - MAX_SHOWN} more", soft_wrap=True)


@app.command()
def lint(
    files: Annotated[list[str] | None, typer.Argument(help=NAME + " If none is named, all.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on remarks too.")] = False,
) -> None:
    """Says all that is wrong, each with file, line, field and what to write instead."""
    names = files or sorted({str(f) for folder in folders()[:1] for f in folder.glob("*.yaml")})
    if not names:
        err.print("no constitution was found; name a file")
        raise typer.Exit(2)
    failed = False
    for name in names:
        try:
            report = check(name)
        except ConstitutionError as error:
            err.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
            failed = True
            continue
        failed |= bool(report.problems) or (strict and bool(report.remarks))
        _print_report(name, report)
    raise typer.Exit(1 if failed else 0)


def _print_report(name: str, report: Report) -> None:
    _print_problems(err, report.problems, "red")
    _print_problems(out, report.remarks, "yellow")
    if report.constitution is None:
        count = len(report.problems)
        err.print(f"[red]✗[/] {escape(name)}: {count} problem{'s' * (count != 1)}", soft_wrap=True)
        return
    c = report.constitution
    remarks = f", {len(report.remarks)} remark{'s' * (len(report.remarks) != 1)}" if report.remarks else ""
    out.print(f"[green]✓[/] {escape(str(resolve(name)))}: {_summary(c)}{remarks}", soft_wrap=True)


def _summary(c: Constitution) -> str:
    revise, prefer = len(c.serving(Phase.CRITIQUE)), len(c.serving(Phase.PREFERENCE))
    return (
        f"{escape(c.name)} {escape(c.version)} ({escape(c.language)}), {len(c.principles)} principles, "
        f"{revise} for revision, {prefer} for preference, "
        f"{len(c.critique_examples)} + {len(c.preference_examples)} examples, digest {c.digest[:12]}"
    )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help=NAME)] = "charter",
    principle: Annotated[str | None, typer.Option("--principle", "-p", help="One of them, in full.")] = None,
    digest: Annotated[bool, typer.Option("--digest", help="Only the digest, for scripts.")] = False,
) -> None:
    """Shows a constitution, or one principle of it."""
    try:
        constitution = load(name)
        chosen = constitution.principle(principle) if principle else None
    except CharterError as error:
        raise _stop(error) from error
    if digest:
        out.print(constitution.digest, soft_wrap=True)
    elif chosen:
        _print_principle(chosen)
    else:
        _print_constitution(constitution)


def _print_constitution(c: Constitution) -> None:
    title = f"{escape(c.name)} {escape(c.version)} ({escape(c.language)})"
    out.print(Panel(escape(c.description), title=title))
    table = Table(row_styles=("", "dim"))
    table.add_column("id", no_wrap=True)
    table.add_column("title", ratio=1)
    for column in ("category", "priority", "weight", "serves"):
        table.add_column(column)
    for p in sorted(c.principles, key=lambda p: p.priority):
        serves = "both" if len(p.phases) == len(Phase) else next(iter(p.phases))
        row = (escape(p.id), escape(p.title), escape(p.category), str(p.priority), f"{p.weight:g}", serves)
        table.add_row(*row)
    out.print(table)
    out.print(f"{_summary(c)}\ndigest {c.digest}", soft_wrap=True)


def _print_principle(p: Principle) -> None:
    table = Table.grid(padding=(0, 2))
    rows = {
        "title": p.title,
        "rationale": p.rationale,
        "category": p.category,
        "priority": str(p.priority),
        "weight": f"{p.weight:g}",
        "serves": ", ".join(phase for phase in Phase if phase in p.phases),
        "critique request": p.critique_request,
        "revision request": p.revision_request,
        "preference question": p.preference_question,
    }
    for key, value in rows.items():
        if value:
            table.add_row(f"[bold]{key}[/]", escape(value))
    out.print(Panel(table, title=escape(p.id)))


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help=NAME)],
    new: Annotated[str, typer.Argument(help=NAME)],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 when they differ.")] = False,
) -> None:
    """Says what changed by meaning; formatting and comments do not count."""
    try:
        before, after = load(old), load(new)
    except CharterError as error:
        raise _stop(error) from error
    changes = diffs.compare(before, after)
    if not changes:
        out.print(f"no difference; both have the digest {before.digest[:12]}", soft_wrap=True)
        return
    colours = {diffs.Kind.ADDED: "green", diffs.Kind.REMOVED: "red", diffs.Kind.CHANGED: "yellow"}
    for change in changes:
        out.print(f"[{colours[change.kind]}]{change.kind}[/] [bold]{escape(change.field)}[/]", soft_wrap=True)
        if change.before:
            out.print(f"  [red]- {escape(change.before)}[/]", soft_wrap=True)
        if change.after:
            out.print(f"  [green]+ {escape(change.after)}[/]", soft_wrap=True)
    out.print(f"{len(changes)} changes; digest {before.digest[:12]} → {after.digest[:12]}", soft_wrap=True)
    raise typer.Exit(1 if exit_code else 0)


@app.command(name="import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="JSON files as the paper's authors published them.")],
    to: Annotated[Path, typer.Option("--out", help="The YAML file to write.")],
    name: Annotated[str, typer.Option(help="The constitution's name.")] = "imported",
    version: Annotated[str, typer.Option(help="Its version.")] = "0.1.0",
    language: Annotated[str, typer.Option(help="Its language, as a BCP 47 tag.")] = "en",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Makes a constitution of the JSON files that the authors of Constitutional AI published."""
    from charter.constitution.importer import import_files

    try:
        if to.exists() and not force:
            raise ConstitutionError(f"{to} exists; name another file, or add --force to replace it")
        imported = import_files(files, name=name, version=version, language=language)
        text = dumps(imported.constitution)
        report = check_text(str(to), text)
        if report.constitution is None:  # a bad --name, say: nothing is written that would not load
            _print_problems(err, report.problems, "red")
            raise ConstitutionError("nothing was written")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text, encoding="utf-8")
    except CharterError as error:
        raise _stop(error) from error
    except OSError as error:
        reason = f"{to}: cannot be written ({error.strerror}); check the path"
        raise _stop(ConstitutionError(reason)) from error
    for file, counts in imported.counts.items():
        took = ", ".join(f"{n} {form}" for form, n in counts.items())
        out.print(f"[green]✓[/] {escape(file)}: {took}", soft_wrap=True)
    if imported.unread:
        err.print(f"[yellow]{len(imported.unread)} not understood:[/]", soft_wrap=True)
        _print_problems(err, imported.unread, "yellow")
    out.print(f"wrote {escape(str(to))}: {_summary(imported.constitution)}", soft_wrap=True)
    out.print("titles, categories and priorities are drafts: read them through", soft_wrap=True)


@app.command(name="format")
def format_(
    name: Annotated[str, typer.Argument(help=NAME)],
) -> None:
    """Prints a constitution in Charter's own layout (comments are not kept); its digest stays the same."""
    try:
        read_text(resolve(name))
        typer.echo(dumps(load(name)), nl=False)
    except CharterError as error:
        raise _stop(error) from error
