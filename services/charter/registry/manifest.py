"""What a checkpoint's `manifest.json` says: what it is, what it comes from, and the digest of every file.

From a manifest one can say which labels, under which principles, made the model (`labels`), and continue its
training where it stopped, each label counted once (`positions`).
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from charter import __version__
from charter.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1

TOKENIZER_FILES = frozenset(
    (
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
)
"""The files that `lm.checkpoint.tokenizer_digest` reads; a test holds the two digests equal."""

_SAFE = frozenset((".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".md", ".yaml"))
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Kind(enum.StrEnum):
    """How a checkpoint came about."""

    SEED = "seed"
    """Brought from outside: the shipped model, or one from a hub."""
    SFT = "sft"
    """Supervised learning on revisions."""
    RL = "rl"
    """Reinforcement learning from AI feedback."""
    REWARD = "reward"
    """A reward model; it scores answers and never gives any."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels that a checkpoint learned from since its parent."""

    count: int = 0
    by_principle: Mapping[str, int] = field(default_factory=dict)
    """Principle id: labels in which it had a say."""
    by_judge: Mapping[str, int] = field(default_factory=dict)
    """Digest of the judge's model: labels."""
    by_constitution: Mapping[str, int] = field(default_factory=dict)
    """Digest of the constitution that was in force: labels."""
    positions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """`topic/partition`: offset of the first label, and the offset behind the last one."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the writer of a checkpoint knows; the rest of the manifest is read off the files."""

    kind: Kind
    parent: str = ""
    """Id of the checkpoint that the training started from; empty for a seed."""
    step: int = 0
    """Trainer updates behind the weights."""
    positions: Mapping[str, int] = field(default_factory=dict)
    """`topic/partition`: the offset at which training goes on."""
    constitution_digest: str = ""
    reward_model_digest: str = ""
    judge_digest: str = ""
    labels: Labels = field(default_factory=Labels)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Results known when it was written; later ones stand in the status history."""
    needs: tuple[str, ...] = ()
    """Other checkpoints whose weights are read when training goes on from this one; they are not pruned."""
    note: str = ""
    """One sentence for people."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of a checkpoint, never changed after it was written."""

    id: str
    facts: Facts
    created_unix_ms: int
    files: Mapping[str, File]
    """Relative path: size and digest; all files but the manifest itself."""
    code_version: str = __version__

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all files."""
        return digest_of(self.files)

    @property
    def weights_digest(self) -> str:
        """What policy servers tell as their digest; equal to `lm.checkpoint.weights_digest`."""
        return _top_level(self.files, lambda name: name.endswith(".safetensors"))

    @property
    def tokenizer_digest(self) -> str:
        """Equal to `lm.checkpoint.tokenizer_digest`."""
        return _top_level(self.files, lambda name: name in TOKENIZER_FILES)

    @property
    def size(self) -> int:
        """Size of all files."""
        return sum(f.size for f in self.files.values())

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        record = {
            "format": FORMAT,
            "id": self.id,
            **dataclasses.asdict(self.facts),
            "created_unix_ms": self.created_unix_ms,
            "code_version": self.code_version,
            "digest": self.digest,
            "weights_digest": self.weights_digest,
            "tokenizer_digest": self.tokenizer_digest,
            "files": {name: dataclasses.asdict(f) for name, f in sorted(self.files.items())},
        }
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Reads `manifest.json`. Raises `CheckpointError` naming `where` when it is not one."""
        try:
            record = json.loads(text)
            if record["format"] != FORMAT:
                raise CheckpointError(
                    f"{where} has format {record['format']}, and this version of Charter reads {FORMAT}; "
                    "read it with the version that wrote it"
                )
            manifest = cls(
                id=checked_id(record["id"]),
                facts=_facts(record),
                created_unix_ms=int(record["created_unix_ms"]),
                files={
                    _inside(n): File(int(f["size"]), str(f["sha256"])) for n, f in record["files"].items()
                },
                code_version=str(record["code_version"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{where} is no manifest ({type(error).__name__}: {error}); the checkpoint cannot be used"
            ) from error
        if manifest.digest != record.get("digest"):
            raise CheckpointError(f"{where}: its digest does not fit its list of files; it was tampered with")
        return manifest


def _facts(record: Mapping[str, Any]) -> Facts:
    labels = record["labels"]
    return Facts(
        kind=Kind(record["kind"]),
        parent=checked_id(record["parent"]) if record["parent"] else "",
        step=int(record["step"]),
        positions={str(k): int(v) for k, v in record["positions"].items()},
        constitution_digest=str(record["constitution_digest"]),
        reward_model_digest=str(record["reward_model_digest"]),
        judge_digest=str(record["judge_digest"]),
        labels=Labels(
            count=int(labels["count"]),
            by_principle={str(k): int(v) for k, v in labels["by_principle"].items()},
            by_judge={str(k): int(v) for k, v in labels["by_judge"].items()},
            by_constitution={str(k): int(v) for k, v in labels["by_constitution"].items()},
            positions={str(k): (int(a), int(b)) for k, (a, b) in labels["positions"].items()},
        ),
        evaluation=dict(record["evaluation"]),
        needs=tuple(checked_id(name) for name in record.get("needs", ())),
        note=str(record["note"]),
    )


def checked_id(name: str) -> str:
    """The id, if it can be one and nothing else (a path, say). Raises `CheckpointError`."""
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise CheckpointError(
            f"{str(name)[:140]!r} is no checkpoint id; ids are up to 128 letters, digits, '.', '_' and '-'; "
            "see `charter checkpoints list`"
        )
    return name


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or str(path) != name:
        raise CheckpointError(f"a manifest lists the file {name!r}, which is not inside its checkpoint")
    return name


def describe(folder: Path) -> dict[str, File]:
    """Size and digest of every file below `folder` but its manifest.

    Raises `CheckpointError` for anything that could run code when loaded, for links, and for no weights.
    """
    files: dict[str, File] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is a link or a special file; a checkpoint holds plain files only")
        if path.is_dir() or name == MANIFEST:
            continue
        if path.suffix not in _SAFE:
            raise CheckpointError(
                f"{path} is not a kind of file that a checkpoint may hold, since loading it could run code; "
                "write weights and optimizer states as safetensors, all else as JSON or text"
            )
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        files[name] = File(path.stat().st_size, found)
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{folder} has no *.safetensors file: a checkpoint without weights is none")
    return files


def digest_of(files: Mapping[str, File]) -> str:
    """SHA-256 over names and digests, in the order of the names."""
    total = hashlib.sha256()
    for name, file in sorted(files.items()):
        total.update(f"{name}\0{file.sha256}\n".encode())
    return total.hexdigest()


def _top_level(files: Mapping[str, File], wanted: Any) -> str:
    chosen = {name: f for name, f in files.items() if "/" not in name and wanted(name)}
    return digest_of(chosen) if chosen else ""
