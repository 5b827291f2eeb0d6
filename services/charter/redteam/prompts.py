"""Prompts from files as they are: JSON lines, CSV, plain text, folders of these, and the seed world.

    prompts.jsonl  prompts.csv  prompts.tsv  prompts.json  prompts.txt  (each also as .gz)
    folder/                     every such file in it
    seed:1000                   training requests of the seed world, the classes in turn
    seed:1000:harmful           of one class, or several with commas

Which field or column holds the prompt is found by its name (`FIELDS`), or told. A line that cannot be read is
a `BadLine` with its place and never stops the others.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charter.errors import ConfigError
from charter.lm.base import ChatMessage, Conversation, Role

FIELDS = (
    "prompt", "prompts_final", "question", "instruction", "query", "request", "user_prompt", "input", "goal",
    "behavior", "text", "content", "messages", "conversation",
)  # fmt: skip
"""Names of the field that holds the prompt, the likeliest first; capitals do not matter."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
SEED = "seed:"
MAX_SEED = 20_000
"""Requests of the seed world; far beyond, distinct ones become rare and drawing slow."""
_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "human": Role.USER, "assistant": Role.ASSISTANT}


@dataclass(frozen=True, slots=True)
class RedTeamPrompt:
    """One prompt and where it came from."""

    prompt_id: str
    """Made from the conversation alone: the same prompt has the same id wherever it comes from."""
    conversation: Conversation
    """Ends with the user's turn."""
    origin: str
    """`file:line`, or `seed:`."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that holds no prompt, and why."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass(frozen=True)
class Collected:
    """What was read."""

    prompts: tuple[RedTeamPrompt, ...]
    """Each once, in the order of the sources."""
    bad: tuple[BadLine, ...]
    repeated: int
    """Prompts that were left out because an equal one came before."""


def collect(sources: Sequence[str], field: str = "") -> Collected:
    """Reads all sources.

    Raises `ConfigError` when a source is absent, when no field looks like a prompt, or when no line at all
    can be used.
    """
    prompts: dict[str, RedTeamPrompt] = {}
    bad: list[BadLine] = []
    repeated = 0
    for source in sources:
        for entry in _read(source, field):
            if isinstance(entry, BadLine):
                bad.append(entry)
            elif entry.prompt_id in prompts:
                repeated += 1
            else:
                prompts[entry.prompt_id] = entry
    if not prompts:
        reasons = "".join(f"\n{line}" for line in bad[:10])
        raise ConfigError(f"no prompt could be read from {', '.join(sources)}{reasons or '; it is empty'}")
    return Collected(tuple(prompts.values()), tuple(bad), repeated)


def prompt_id(conversation: Conversation) -> str:
    """SHA-256 of the conversation, shortened to 96 bits."""
    record = [[m.role.value, m.content] for m in conversation]
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return f"prompt-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


def _read(source: str, field: str) -> Iterator[RedTeamPrompt | BadLine]:
    if source.startswith(SEED):
        yield from _seed(source)
        return
    for path in _files(Path(source)):
        text = _text(path)
        kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        match kind:
            case ".csv" | ".tsv":
                rows = _csv_rows(text)
            case ".txt":
                rows = ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())
            case ".json":
                rows = _json_rows(path, text)
            case _:
                rows = _json_lines(text)
        yield from _prompts(path, list(rows), field)


def _seed(source: str) -> Iterator[RedTeamPrompt]:
    from charter.seedmodel.world import RequestClass, prompts

    count, _, names = source.removeprefix(SEED).partition(":")
    try:
        classes = [RequestClass(name) for name in names.split(",")] if names else list(RequestClass)
        if int(count) > MAX_SEED:
            raise ValueError(f"it is a small world; ask for {MAX_SEED:,} at most")
        texts = prompts(0, int(count), classes)
    except ValueError as error:
        raise ConfigError(
            f"{source!r} cannot be drawn ({error}); write seed:COUNT, or seed:COUNT:CLASS with one or "
            f"more of {', '.join(RequestClass)}"
        ) from None
    for text in texts:
        yield _prompt((ChatMessage(Role.USER, text),), SEED)


# Files ---------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if _readable(p))
        if not found:
            raise ConfigError(f"{path}: holds no file that ends with {', '.join(SUFFIXES)}")
        return found
    if not path.exists():
        raise ConfigError(f"{path}: is not there; name a file, a folder, or {SEED}COUNT")
    if not _readable(path):
        raise ConfigError(f"{path}: is of no known kind; its name must end with {', '.join(SUFFIXES)}")
    return [path]


def _readable(path: Path) -> bool:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return name.suffix.lower() in SUFFIXES and path.is_file()


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); check the file") from error


Row = tuple[int, Any]
"""Line, from 1, and what stands there; a `BadLine`'s reason as a `ValueError`."""


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(f"is not JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return ValueError("is nested too deeply")


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """A list of records, or JSON lines under another name."""
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        yield from _json_lines(text)
        return
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else [whole]
    if not isinstance(whole, list):
        raise ConfigError(f"{path}: is JSON, and not a list of prompts; give a list, or JSON lines")
    yield from enumerate(whole, 1)


def _csv_rows(text: str) -> Iterator[Row]:
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(1 << 27)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        line = reader.line_num + 1  # a record may span lines; this is its first
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, ValueError(f"is not CSV ({error})")
            continue
        if columns is None:
            columns = [c.strip() for c in cells]
        elif len(cells) != len(columns):
            if any(cells):
                yield line, ValueError(f"has {len(cells)} cells where the header has {len(columns)}")
        else:
            yield line, dict(zip(columns, cells, strict=True))


# Rows to prompts -----------------------------------------------------------------------------------------


def _prompts(path: Path, rows: list[Row], field: str) -> Iterator[RedTeamPrompt | BadLine]:
    name = _field(path, [value for _, value in rows if isinstance(value, dict)], field)
    for line, value in rows:
        origin = f"{path}:{line}"
        try:
            if isinstance(value, ValueError):
                raise value
            yield _prompt(_conversation(value, name), origin)
        except ValueError as reason:
            yield BadLine(origin, str(reason))


def _field(path: Path, records: list[dict[str, Any]], field: str) -> str:
    """The field's name as the file spells it; empty where no record has fields."""
    seen = Counter(key for record in records for key in record)
    if not seen:
        return ""
    wanted = [field] if field else list(FIELDS)
    for name in wanted:
        spelled = [key for key in seen if key.lower() == name.lower()]
        if spelled:
            return max(spelled, key=lambda key: seen[key])
    known = ", ".join(key for key, _ in seen.most_common(12))
    if field:
        raise ConfigError(f"{path}: has no field {field!r}; it has {known}; name one of them with --field")
    raise ConfigError(
        f"{path}: none of its fields looks like a prompt: {known}; say with --field which one holds it"
    )


def _conversation(value: Any, name: str) -> Conversation:
    if isinstance(value, dict):
        if name not in value:
            raise ValueError(f"has no field {name!r}")
        value = value[name]
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("the prompt is empty")
        return (ChatMessage(Role.USER, _clean(value)),)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return _turns(value)
    raise ValueError(f"the prompt is {type(value).__name__}, where a text or a list of turns is expected")


def _turns(turns: Iterable[dict[str, Any]]) -> Conversation:
    """`[{"role": …, "content": …}, …]` up to the last user's turn; the answer after it is drafted anew."""
    messages = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("role", turn.get("from", ""))).lower())
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str) or not content.strip():
            raise ValueError('a turn has no known "role", or no "content"')
        messages.append(ChatMessage(role, _clean(content)))
    while messages and messages[-1].role is not Role.USER:
        messages.pop()
    if not messages:
        raise ValueError("the conversation has no turn of a user")
    return tuple(messages)


def _clean(text: str) -> str:
    """The text without white space around it; lone surrogates, which nothing can store, are refused."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt has half of a surrogate pair") from None
    return text.strip()


def _prompt(conversation: Conversation, origin: str) -> RedTeamPrompt:
    return RedTeamPrompt(prompt_id(conversation), conversation, origin)
