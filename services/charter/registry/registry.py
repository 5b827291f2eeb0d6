"""The registry: writes checkpoints, finds them, checks them, and keeps who serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from charter.errors import CheckpointError
from charter.registry.manifest import MANIFEST, Facts, Kind, Manifest, checked_id, describe, digest_of
from charter.registry.pruning import expendable
from charter.registry.status import POLICY, REWARD, Change, Status, current, entry_name, serving
from charter.registry.storage import Storage, open_storage

__all__ = ["POLICY", "REWARD", "Fill", "Registry", "verify"]

Fill = Callable[[Path], None]
"""Writes a checkpoint's files into an empty folder."""


class Registry:
    """Checkpoints below one root. Any number of processes may read and write it at once."""

    def __init__(self, root: str | Path) -> None:
        """`root` is a folder, or an address that fsspec knows; it need not exist yet."""
        self._storage: Storage = open_storage(root)
        self._manifests: dict[str, Manifest] = {}  # they never change
        self._entries: dict[str, Change] = {}  # nor do these
        self._verified: set[str] = set()

    @property
    def root(self) -> str:
        """Where it is."""
        return self._storage.root

    def write(self, facts: Facts, fill: Fill) -> Manifest:
        """Writes a checkpoint, whole or not at all, and returns its manifest.

        Its id derives from kind, step and content, so writing the same again changes nothing. Raises
        `CheckpointError` when the disk refuses or a file could run code; what was there before stays.
        """
        try:
            with self._storage.staging() as folder:
                fill(folder)
                (folder / MANIFEST).unlink(missing_ok=True)  # one that came along with copied files
                files = describe(folder)
                name = f"{facts.kind}-{facts.step:06d}-{digest_of(files)[:10]}"
                manifest = Manifest(name, facts, time.time_ns() // 1_000_000, files)
                known = self._find(name)
                if known is not None:
                    return known
                (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
                self._storage.publish(folder, name)
        except Exception as error:
            # safetensors has an error class of its own for a full disk.
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise CheckpointError(
                    f"a checkpoint of step {facts.step} cannot be written to {self.root} ({_cause(error)}); "
                    "nothing there was changed and the last good one stays in force; make room, and go on"
                ) from error
            raise
        return self.get(name)

    def get(self, checkpoint_id: str) -> Manifest:
        """The manifest, also of one that was pruned. Raises `CheckpointError` where there is none."""
        found = self._find(checked_id(checkpoint_id)) or self._find_pruned(checkpoint_id)
        if found is None:
            raise CheckpointError(
                f"the registry {self.root} has no checkpoint {checkpoint_id!r}; "
                "see `charter checkpoints list`"
            )
        return found

    def __contains__(self, checkpoint_id: str) -> bool:
        return self._find(checked_id(checkpoint_id)) is not None

    def list(self) -> tuple[Manifest, ...]:
        """All checkpoints, the oldest first."""
        found = [self.get(name) for name in self._storage.checkpoints()]
        return tuple(sorted(found, key=lambda m: (m.created_unix_ms, m.id)))

    def lineage(self, checkpoint_id: str) -> tuple[Manifest, ...]:
        """The checkpoint, its parent, and so on up to the first, or to one that is here no more."""
        chain = [self.get(checkpoint_id)]
        while parent := chain[-1].facts.parent:
            found = self._find(parent) or self._find_pruned(parent)
            if found is None:
                break
            if any(m.id == parent for m in chain):
                raise CheckpointError(f"the lineage of {checkpoint_id} in {self.root} runs in a circle")
            chain.append(found)
        return tuple(chain)

    def resolve(self, checkpoint_id: str) -> Path:
        """A local folder with the checkpoint, checked against its digests. Raises `CheckpointError`."""
        manifest = self.get(checkpoint_id)
        if self._storage.manifest(checkpoint_id) is None:
            raise CheckpointError(
                f"the files of {checkpoint_id} were pruned from {self.root}; only its manifest is left; use "
                "another checkpoint (`charter checkpoints list`)"
            )
        folder = self._storage.fetch(manifest.id, manifest.digest)
        if manifest.id not in self._verified:
            verify(folder, manifest)
            self._verified.add(manifest.id)
        return folder

    def prune(self, keep: int) -> tuple[str, ...]:
        """Removes the files of old checkpoints (see `charter.registry.pruning`); returns their ids.

        Their manifests and history stay, so that lineages can be walked.
        """
        if keep < 1:
            raise CheckpointError(f"prune was told to keep {keep} checkpoints; keep at least 1")
        gone = tuple(expendable(self.list(), self.history(), keep))
        for name in gone:
            self._storage.prune(name)
            self._manifests.pop(name, None)
        return gone

    # What became of them ----------------------------------------------------------------------------------

    def set_status(
        self,
        checkpoint_id: str,
        status: Status,
        reason: str = "",
        measurements: Mapping[str, Any] | None = None,
    ) -> Change:
        """Adds an entry to the history. `SERVING` retires whichever of its family served before.

        Raises `CheckpointError` for an unknown checkpoint, or when the entry cannot be written.
        """
        if status is Status.RETIRED:
            raise CheckpointError("a checkpoint retires when another serves; set that one's status")
        kind = self.get(checkpoint_id).facts.kind
        family = REWARD if kind is Kind.REWARD else POLICY
        now = time.time_ns() // 1_000_000
        change = Change(checkpoint_id, status, reason, now, family, dict(measurements or {}))
        entries = self._storage.entries()
        try:
            self._storage.add_entry(entry_name(entries[-1] if entries else ""), change.to_json())
        except OSError as error:
            raise CheckpointError(
                f"the status {status} of {checkpoint_id} cannot be written to {self.root} ({_cause(error)}); "
                "the old one holds; make room and try again"
            ) from error
        return change

    def history(self, checkpoint_id: str = "") -> tuple[Change, ...]:
        """All changes of status, or those of one checkpoint, the oldest first."""
        found = []
        for name in self._storage.entries():
            if name not in self._entries:
                where = f"{self.root}/.history/{name}"
                self._entries[name] = Change.from_json(self._storage.read_entry(name), where)
            found.append(self._entries[name])
        return tuple(c for c in found if checkpoint_id in ("", c.checkpoint_id))

    def status(self, checkpoint_id: str) -> Change | None:
        """What became of it at last; None where nothing did."""
        return current(self.history(), checked_id(checkpoint_id))

    def serving(self, family: str = POLICY) -> Manifest | None:
        """The policy that is in force, or the reward model with `REWARD`; None before the first."""
        name = serving(self.history(), family)
        return None if name is None else self.get(name)

    def _find_pruned(self, checkpoint_id: str) -> Manifest | None:
        text = self._storage.pruned(checkpoint_id)
        where = f"{self.root}/.pruned/{checkpoint_id}.json"
        return None if text is None else Manifest.from_json(text, where)

    def _find(self, checkpoint_id: str) -> Manifest | None:
        if checkpoint_id not in self._manifests:
            text = self._storage.manifest(checkpoint_id)
            if text is None:
                return None
            where = f"{self.root}/{checkpoint_id}/{MANIFEST}"
            manifest = Manifest.from_json(text, where)
            if manifest.id != checkpoint_id:
                raise CheckpointError(
                    f"{where} is the manifest of {manifest.id}; folders must not be renamed"
                )
            self._manifests[checkpoint_id] = manifest
        return self._manifests[checkpoint_id]


def verify(folder: Path, manifest: Manifest) -> None:
    """Compares every file with the manifest. Raises `CheckpointError` naming the first that differs."""
    found = describe(folder)
    wrong = sorted(name for name in {*found, *manifest.files} if found.get(name) != manifest.files.get(name))
    if wrong:
        state = "is missing" if wrong[0] not in found else "is not what was written"
        if wrong[0] not in manifest.files:
            state = "was added later"
        raise CheckpointError(
            f"checkpoint {manifest.id} is damaged: {folder / wrong[0]} {state}; restore the folder from a "
            "copy, or use another checkpoint (`charter checkpoints list`)"
        )


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
