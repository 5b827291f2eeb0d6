"""Where checkpoints lie: a folder of this machine, or any file system that fsspec knows.

Both promise the same: a checkpoint appears whole or not at all. On a disk it is written beside its place,
flushed, and renamed. Where there is no rename, the manifest is written last, and a folder without one is no
checkpoint.

    <root>/<id>/…            the checkpoint, with manifest.json
    <root>/.pruned/…         manifests of checkpoints whose files were removed
    <root>/.history/…        what became of the checkpoints (see `charter.registry.status`)
    <root>/.partial-…        being written, or left over from a writer that was killed
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from charter.errors import CheckpointError
from charter.registry.manifest import MANIFEST

HISTORY = ".history"
PRUNED = ".pruned"
_PARTIAL = ".partial-"


class Storage(Protocol):
    """What the registry needs of a file system."""

    @property
    def root(self) -> str:
        """Where it is, for messages."""
        ...

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """A local folder to write a checkpoint into; what is left there at the end is removed."""
        ...

    def publish(self, folder: Path, checkpoint_id: str) -> None:
        """Makes the staged folder the checkpoint, whole or not at all."""
        ...

    def checkpoints(self) -> list[str]:
        """Ids of the whole checkpoints, sorted."""
        ...

    def manifest(self, checkpoint_id: str) -> bytes | None:
        """The manifest's text; None where there is no such checkpoint."""
        ...

    def fetch(self, checkpoint_id: str, digest: str) -> Path:
        """A local folder with the checkpoint's files."""
        ...

    def prune(self, checkpoint_id: str) -> None:
        """Removes the files; from then on `pruned` has the manifest and `manifest` has none."""
        ...

    def pruned(self, checkpoint_id: str) -> bytes | None:
        """The manifest of a checkpoint that was pruned."""
        ...

    def entries(self) -> list[str]:
        """Names of the history's entries, in their order."""
        ...

    def read_entry(self, name: str) -> bytes:
        """One entry."""
        ...

    def add_entry(self, name: str, content: bytes) -> None:
        """Adds one, whole or not at all."""
        ...


def open_storage(root: str | Path) -> Storage:
    """The storage at a folder, a `file://` URI, or any other URI that fsspec knows."""
    text = str(root)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemoteStorage(text) if "://" in text else LocalStorage(Path(text).expanduser().absolute())


class LocalStorage:
    """A folder on a disk of this machine, or on one that it has mounted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def root(self) -> str:
        """The folder."""
        return str(self._folder)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Beside the checkpoints, so that a rename suffices; held by a lock while its writer lives."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._remove_leftovers()
            folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._folder))
            folder.chmod(0o755)
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, checkpoint_id: str) -> None:
        """One rename; everything is on the disk before it."""
        for path in folder.rglob("*"):
            _flush(path)
        _flush(folder)
        try:
            folder.rename(self._folder / checkpoint_id)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another writer was quicker with the same files: ids derive from content.
        _flush(self._folder)

    def checkpoints(self) -> list[str]:
        """Folders with a manifest."""
        if not self._folder.is_dir():
            return []
        return sorted(p.parent.name for p in self._folder.glob(f"*/{MANIFEST}") if p.parent.name[0] != ".")

    def manifest(self, checkpoint_id: str) -> bytes | None:
        """From the checkpoint's folder."""
        try:
            return (self._folder / checkpoint_id / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def fetch(self, checkpoint_id: str, digest: str) -> Path:
        """The folder itself."""
        return self._folder / checkpoint_id

    def prune(self, checkpoint_id: str) -> None:
        """The manifest is copied first; then one rename takes the checkpoint away."""
        text = self.manifest(checkpoint_id)
        if text is not None:
            self._write_whole(self._folder / PRUNED / f"{checkpoint_id}.json", text)
            with self.staging() as folder:
                (self._folder / checkpoint_id).rename(folder / checkpoint_id)

    def pruned(self, checkpoint_id: str) -> bytes | None:
        """From its file."""
        try:
            return (self._folder / PRUNED / f"{checkpoint_id}.json").read_bytes()
        except FileNotFoundError:
            return None

    def entries(self) -> list[str]:
        """The files of the history."""
        folder = self._folder / HISTORY
        return sorted(p.name for p in folder.glob("[0-9]*.json")) if folder.is_dir() else []

    def read_entry(self, name: str) -> bytes:
        """From its file."""
        return (self._folder / HISTORY / name).read_bytes()

    def add_entry(self, name: str, content: bytes) -> None:
        """Written beside its place, flushed, renamed."""
        self._write_whole(self._folder / HISTORY / name, content)

    def _write_whole(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        try:
            partial.write_bytes(content)
            _flush(partial)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        _flush(path.parent)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = os.open(self._folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _remove_leftovers(self) -> None:
        """Removes what killed writers left: the operating system let go of their locks."""
        for folder in self._folder.glob(f"{_PARTIAL}*"):
            try:
                lock = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                pass  # its writer is at work
            finally:
                os.close(lock)


class RemoteStorage:
    """Any file system of fsspec's (`s3://`, `gs://`, `memory://` …). Fetched checkpoints are kept locally."""

    def __init__(self, root: str, cache: Path | None = None) -> None:
        """`cache` keeps fetched checkpoints; a folder of this user's by default."""
        try:
            import fsspec

            self._files, self._base = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"the registry {root} cannot be opened ({error}); install fsspec and the package that it "
                "names for this kind of address, or give a folder"
            ) from error
        self._root = root.rstrip("/")
        self._base = self._base.rstrip("/")
        self._cache = cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "charter"

    @property
    def root(self) -> str:
        """The address."""
        return self._root

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """In the machine's temporary folder."""
        with tempfile.TemporaryDirectory(prefix="charter-checkpoint-") as folder:
            yield Path(folder)

    def publish(self, folder: Path, checkpoint_id: str) -> None:
        """Uploads all files, the manifest last."""
        if self.manifest(checkpoint_id) is not None:
            return  # the same files already: ids derive from content
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
            self._put(path, f"{checkpoint_id}/{path.relative_to(folder).as_posix()}")
        self._put(folder / MANIFEST, f"{checkpoint_id}/{MANIFEST}")

    def _put(self, path: Path, name: str) -> None:
        target = f"{self._base}/{name}"
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(path), target)

    def checkpoints(self) -> list[str]:
        """Folders with a manifest."""
        self._files.invalidate_cache()
        found = self._files.glob(f"{self._base}/*/{MANIFEST}")
        return sorted(name.split("/")[-2] for name in found)

    def manifest(self, checkpoint_id: str) -> bytes | None:
        """From the remote file."""
        try:
            return bytes(self._files.cat_file(f"{self._base}/{checkpoint_id}/{MANIFEST}"))
        except FileNotFoundError:
            return None

    def fetch(self, checkpoint_id: str, digest: str) -> Path:
        """From the cache, where the same digest lies already; else downloaded, whole or not at all."""
        kept = LocalStorage(self._cache / digest[:16])
        if kept.manifest(checkpoint_id) is None:
            with kept.staging() as folder:
                self._files.get(f"{self._base}/{checkpoint_id}/", f"{folder}/", recursive=True)
                kept.publish(folder, checkpoint_id)
        return kept.fetch(checkpoint_id, digest)

    def prune(self, checkpoint_id: str) -> None:
        """The manifest is copied first and removed second; without it there is no checkpoint."""
        text = self.manifest(checkpoint_id)
        if text is not None:
            self._files.makedirs(f"{self._base}/{PRUNED}", exist_ok=True)
            self._files.pipe_file(f"{self._base}/{PRUNED}/{checkpoint_id}.json", text)
            self._files.rm_file(f"{self._base}/{checkpoint_id}/{MANIFEST}")
            self._files.rm(f"{self._base}/{checkpoint_id}", recursive=True)

    def pruned(self, checkpoint_id: str) -> bytes | None:
        """From its file."""
        try:
            return bytes(self._files.cat_file(f"{self._base}/{PRUNED}/{checkpoint_id}.json"))
        except FileNotFoundError:
            return None

    def entries(self) -> list[str]:
        """The files of the history."""
        self._files.invalidate_cache()
        return sorted(n.rpartition("/")[2] for n in self._files.glob(f"{self._base}/{HISTORY}/[0-9]*.json"))

    def read_entry(self, name: str) -> bytes:
        """From its file."""
        return bytes(self._files.cat_file(f"{self._base}/{HISTORY}/{name}"))

    def add_entry(self, name: str, content: bytes) -> None:
        """One object."""
        self._files.makedirs(f"{self._base}/{HISTORY}", exist_ok=True)
        self._files.pipe_file(f"{self._base}/{HISTORY}/{name}", content)


def _flush(path: Path) -> None:
    descriptor: Any = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
