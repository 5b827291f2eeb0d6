"""Text files as trees whose every node knows its line, so that a mistake can be shown where it stands.

YAML through ruamel's composer, JSON through a small decoder of our own: neither `json` nor ruamel's
constructors keep positions for every key and scalar. Both give the same `Node`. Nothing of what a hostile
file can do (an alias bomb, a gigabyte, a thousand brackets) costs more than a refusal.
"""

from __future__ import annotations

import bisect
import io
import json
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # the decoder's own string scanner
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode

from charter.errors import ConstitutionError

MAX_BYTES = 1 << 20
"""A constitution is read by people: a larger file is not one."""
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset({"str", "int", "float", "bool", "null", "timestamp", "merge"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a file, and what to do about it."""

    file: str
    line: int
    """From 1; 0 when the whole file is meant."""
    field: str
    """A path such as `principles[3].weight`; empty when the whole file is meant."""
    what: str
    remedy: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        field = f" {self.field}:" if self.field else ""
        return f"{place}:{field} {self.what}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class Member:
    """A key of a mapping and its value."""

    line: int
    """Where the key stands."""
    node: Node


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands; lines and columns count from 1."""

    value: bool | int | float | str | list[Node] | dict[str, Member] | None
    line: int
    column: int

    def plain(self) -> Any:
        """The value as ordinary lists, dictionaries and scalars."""
        if isinstance(self.value, list):
            return [n.plain() for n in self.value]
        if isinstance(self.value, dict):
            return {key: member.node.plain() for key, member in self.value.items()}
        return self.value

    def items(self) -> list[Node]:
        """The entries of a list; empty for anything else."""
        return self.value if isinstance(self.value, list) else []

    def members(self) -> dict[str, Member]:
        """The members of a mapping; empty for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    def text(self) -> str | None:
        """The value when it is a string."""
        return self.value if isinstance(self.value, str) else None

    def at(self, path: tuple[str | int, ...]) -> Node:
        """The node at `path`, or the deepest one on the way to it that exists."""
        node = self
        for step in path:
            if isinstance(node.value, dict) and step in node.value:
                node = node.value[str(step)].node
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
            else:
                break
        return node

    def line_of(self, path: tuple[str | int, ...]) -> int:
        """The line of the key (or the list entry) at `path`, where a reader looks for it."""
        parent = self.at(path[:-1])
        if path and isinstance(parent.value, dict) and path[-1] in parent.value:
            return parent.value[str(path[-1])].line
        return self.at(path).line


def field_name(path: tuple[str | int, ...]) -> str:
    """A path as people write it: `principles[3].weight`."""
    name = ""
    for step in path:
        name += f"[{step}]" if isinstance(step, int) else f"{'.' if name else ''}{step}"
    return name


def read_text(path: Path) -> str:
    """The file's text; `ConstitutionError` when it cannot be one (absent, too large, not UTF-8, empty)."""
    try:
        if path.is_dir():
            raise ConstitutionError(f"{path}: is a folder; name the file in it")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConstitutionError(
                f"{path}: has {size:,} bytes, and a constitution has at most {MAX_BYTES:,}; "
                "is this the right file?"
            )
        with path.open("rb") as stream:  # bounded again: a pipe or /dev/zero says 0 bytes
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConstitutionError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(data) > MAX_BYTES:
        raise ConstitutionError(f"{path}: has more than {MAX_BYTES:,} bytes; is this the right file?")
    return _decode(path, data)


def _decode(path: Path, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConstitutionError(f"{path}:1: the file is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConstitutionError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    if not text.strip():
        raise ConstitutionError(f"{path}: the file is empty; start from constitutions/charter.yaml")
    return text


# YAML ----------------------------------------------------------------------------------------------------


def parse_yaml(file: str, text: str) -> tuple[Node | None, list[Problem]]:
    """The tree of a YAML text, and what is wrong with it; no tree when it cannot be parsed at all."""
    try:
        root = YAML(typ="safe", pure=True).compose(io.StringIO(text))
        if root is None:
            remedy = "start from constitutions/charter.yaml"
            return None, [Problem(file, 0, "", "holds only comments", remedy)]
        problems: list[Problem] = []
        return _from_yaml(file, root, (), set(), problems), problems
    except MarkedYAMLError as error:
        return None, _tabs(file, text) or [_syntax_problem(file, error)]
    except RecursionError:
        return None, [Problem(file, 0, "", "is nested too deeply to be a constitution", "flatten it")]
    except (YAMLError, ValueError) as error:  # control characters raise without a mark
        line = _control_line(text)
        what = "has a control character" if line else f"is not YAML ({' '.join(str(error).split())[:120]})"
        return None, [Problem(file, line, "", what, "delete it")]


def _tabs(file: str, text: str) -> list[Problem]:
    """Lines indented with tabs, which YAML forbids; all of them, since one is seldom alone."""
    return [
        Problem(file, number, "", "is indented with a tab", "write instead two spaces for each level")
        for number, line in enumerate(text.split("\n"), 1)
        if re.match(r" *\t\s*\S", line)
    ]


def _control_line(text: str) -> int:
    match = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text)
    return text.count("\n", 0, match.start()) + 1 if match else 0


_SYNTAX_REMEDIES = (
    ("mapping values are not allowed", 'put a text that has ": " in it in quotes, and check the indentation'),
    ("found character", "put the text in quotes"),
    ("expected ',' or", "close the bracket"),
    ("could not find expected ':'", "write `key: value`"),
    ("escape character", "double the backslash, or use single quotes"),
    ("expected a single document", "delete the line `---`: one file holds one constitution"),
    ("undefined alias", "put a text that begins with * in quotes"),
    ("expected <block end>", "give the lines of one level the same indentation"),
    ("while scanning a quoted scalar", "close the quotation mark"),
)


def _syntax_problem(file: str, error: MarkedYAMLError) -> Problem:
    said = "; ".join(part for part in (error.context, error.problem) if part)
    remedy = next((r for start, r in _SYNTAX_REMEDIES if start in said), "check quotes and indentation here")
    mark = error.problem_mark or error.context_mark
    return Problem(file, mark.line + 1 if mark else 0, "", f"is not YAML ({said})", remedy)


def _from_yaml(
    file: str, node: YamlNode, path: tuple[str | int, ...], seen: set[int], problems: list[Problem]
) -> Node:
    line, column = node.start_mark.line + 1, node.start_mark.column + 1
    name = field_name(path)
    if id(node) in seen:  # the composer hands out the same node for every alias: never expand it
        what = f"repeats line {line} through an alias"
        problems.append(Problem(file, line, name, what, "write the text out, without & and *"))
        return Node(None, line, column)
    seen.add(id(node))
    if len(path) > MAX_DEPTH:
        raise RecursionError
    if isinstance(node, SequenceNode):
        entries = [_from_yaml(file, n, (*path, i), seen, problems) for i, n in enumerate(node.value)]
        return Node(entries, line, column)
    if isinstance(node, MappingNode):
        return Node(_mapping(file, node, path, seen, problems), line, column)
    if str(node.tag).removeprefix(_TAG) not in _SCALARS:
        problems.append(Problem(file, line, name, f"has the tag {node.tag}", "delete the tag"))
    return Node(_scalar(node), line, column)


def _mapping(
    file: str, node: MappingNode, path: tuple[str | int, ...], seen: set[int], problems: list[Problem]
) -> dict[str, Member]:
    members: dict[str, Member] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            what = "has a list as a key"
            problems.append(Problem(file, line, field_name(path), what, "write `key: value`"))
            continue
        key = str(key_node.value)
        if key in members:
            what = f"is given twice, here and in line {members[key].line}"
            problems.append(Problem(file, line, field_name((*path, key)), what, "delete one of the two"))
            continue
        members[key] = Member(line, _from_yaml(file, value_node, (*path, key), seen, problems))
    return members


def _scalar(node: YamlNode) -> bool | int | float | str | None:
    kind, text = str(node.tag).removeprefix(_TAG), str(node.value)
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text.replace("_", ""), 10)
        if kind == "float":
            return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:  # 0x10, 0o17, ten thousand digits: a text, which its field will refuse
        pass
    return text  # a date too: `version: 2026-11-01` means the text


# JSON ----------------------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d{0,30})(?:\.\d{1,30})?(?:[eE][-+]?\d{1,3})?")


class _Json:
    """A recursive-descent reader of JSON that keeps positions."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self.repeated: list[tuple[str, int]] = []

    def fail(self, what: str, index: int) -> json.JSONDecodeError:
        return json.JSONDecodeError(what, self.text, index)

    def skip(self, index: int) -> int:
        match = _SPACE.match(self.text, index)
        return match.end() if match else index

    def value(self, index: int, depth: int = 0) -> tuple[Node, int]:
        """The value that begins at `index`, and the index after it."""
        index = self.skip(index)
        if depth > MAX_DEPTH:
            raise self.fail("nested too deeply", index)
        line = bisect.bisect_right(self.starts, index)
        column = index - self.starts[line - 1] + 1
        match self.text[index : index + 1]:
            case '"':
                text, end = scanstring(self.text, index + 1, False)
                return Node(text, line, column), end
            case "[":
                entries, end = self.entries(index + 1, depth)
                return Node(entries, line, column), end
            case "{":
                members, end = self.members(index + 1, depth)
                return Node(members, line, column), end
        scalar = _SCALAR.match(self.text, index)
        if not scalar:
            raise self.fail("Expecting value", index)
        return Node(json.loads(scalar.group()), line, column), scalar.end()

    def entries(self, index: int, depth: int) -> tuple[list[Node], int]:
        entries: list[Node] = []
        index = self.skip(index)
        more = self.text[index : index + 1] != "]"
        while more:
            node, index = self.value(index, depth + 1)
            entries.append(node)
            index, more = self.after_entry(index, "]")
        return entries, index if entries else index + 1

    def members(self, index: int, depth: int) -> tuple[dict[str, Member], int]:
        members: dict[str, Member] = {}
        index = self.skip(index)
        more = self.text[index : index + 1] != "}"
        while more:
            index = self.skip(index)
            if self.text[index : index + 1] != '"':
                raise self.fail("Expecting property name enclosed in double quotes", index)
            line = bisect.bisect_right(self.starts, index)
            key, index = scanstring(self.text, index + 1, False)
            index = self.skip(index)
            if self.text[index : index + 1] != ":":
                raise self.fail("Expecting ':' delimiter", index)
            node, index = self.value(index + 1, depth + 1)
            if key in members:
                self.repeated.append((key, line))
            members[key] = Member(line, node)
            index, more = self.after_entry(index, "}")
        return members, index if members else index + 1

    def after_entry(self, index: int, close: str) -> tuple[int, bool]:
        """The index after a comma or the closing bracket, and whether another entry follows."""
        index = self.skip(index)
        mark = self.text[index : index + 1]
        if not mark or mark not in (",", close):
            raise self.fail(f"Expecting ',' or '{close}'", index)
        return index + 1, mark == ","


def parse_json(file: str, text: str) -> tuple[Node, list[Problem]]:
    """The tree of a JSON text, and its repeated keys; `ConstitutionError` when it is not JSON."""
    reader = _Json(text)
    try:
        node, end = reader.value(0)
        end = reader.skip(end)
        if end != len(text):
            raise reader.fail("Extra data", end)
    except json.JSONDecodeError as error:
        raise ConstitutionError(
            f"{file}:{error.lineno}: column {error.colno}: is not JSON ({error.msg}); "
            "correct it there, or give the file as it was published"
        ) from error
    what = "is given twice; the last one counts"
    return node, [Problem(file, line, key, what, "delete one of the two") for key, line in reader.repeated]
