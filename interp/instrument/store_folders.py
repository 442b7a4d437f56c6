"""Folders that hold a store: a local one, or any that fsspec knows by URL (`memory://runs/a`, `s3://bucket/a`).

A local file is written under a temporary name, synced to the disk and renamed, so that a name stands for a whole file
after a kill or a power cut. Elsewhere a file counts once its sidecar does: object stores show a file when it is closed.
Trap: a lock against a second writer is taken on local folders only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fsspec
from fsspec.core import url_to_fs

from interp.core.errors import ArtefactError

TEMPORARY = ".tmp"
Blocks = Sequence[bytes | memoryview]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A file under a temporary name."""

    commit: Callable[[], None]
    """Wait for the disk, then give it its name."""
    discard: Callable[[], None]

    @contextmanager
    def discarded_on_error(self) -> Generator[None, None, None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise


@runtime_checkable
class Folder(Protocol):
    """A place for named files. `OSError` where it does not let us."""

    @property
    def local(self) -> Path | None:
        """Its path where files can be mapped."""
        ...

    def __truediv__(self, name: str) -> str: ...
    def child(self, name: str) -> Folder: ...
    def make(self) -> None: ...
    def exists(self, name: str = "") -> bool: ...
    def size(self, name: str) -> int | None: ...
    def names(self) -> list[str]: ...
    def link(self, name: str) -> str | None:
        """Where a symbolic link points; None for what is none."""
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes: ...
    def sha256(self, name: str) -> str: ...
    def begin(self, name: str, blocks: Blocks) -> Draft:
        """Write a file that does not count yet."""
        ...

    def write(self, name: str, blocks: Blocks) -> None: ...
    def sync(self) -> None:
        """Make names last through a power cut."""
        ...

    def remove(self, name: str) -> None: ...
    def take(self, source: Folder, name: str, new_name: str) -> None:
        """The file `name` of another folder under a new name here: linked where that is possible, else copied."""
        ...


def open_folder(where: Folder | Path | str) -> Folder:
    """A path, a `file://` URL, or another URL that fsspec knows."""
    if isinstance(where, Path):
        return LocalFolder(where)
    if not isinstance(where, str):
        return where
    if "://" not in where:
        return LocalFolder(Path(where))
    if where.startswith("file://"):
        return LocalFolder(Path(where.removeprefix("file://")))
    try:
        filesystem, path = url_to_fs(where)
    except (ValueError, ImportError, OSError) as error:
        known = ", ".join(sorted(fsspec.available_protocols())[:8])
        raise ArtefactError(f"cannot open {where}: {error}; known kinds are {known}, ...") from error
    return RemoteFolder(filesystem, path, where.split("://")[0])


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def local(self) -> Path:
        return self.path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> str:
        return str(self.path / name)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def exists(self, name: str = "") -> bool:
        return (self.path / name).exists()

    def size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def link(self, name: str) -> str | None:
        path = self.path / name
        return str(path.readlink()) if path.is_symlink() else None

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def sha256(self, name: str) -> str:
        with (self.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def begin(self, name: str, blocks: Blocks) -> Draft:
        path = self.path / f".{name}.{os.getpid()}{TEMPORARY}"
        file = path.open("wb", buffering=0)

        def commit() -> None:
            with file:
                os.fsync(file.fileno())
            path.rename(self.path / name)

        def discard() -> None:
            file.close()
            path.unlink(missing_ok=True)

        draft = Draft(commit=commit, discard=discard)
        with draft.discarded_on_error():
            for block in blocks:
                rest = memoryview(block)
                while rest:  # a nearly full disk takes a part
                    rest = rest[file.write(rest) :]
        return draft

    def write(self, name: str, blocks: Blocks) -> None:
        draft = self.begin(name, blocks)
        with draft.discarded_on_error():
            draft.commit()

    def sync(self) -> None:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def take(self, source: Folder, name: str, new_name: str) -> None:
        if source.local is None:
            self.write(new_name, [source.read(name)])
            return
        target = self.path / new_name
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source.local / name)
        except OSError:  # another disk, or a file system without links
            draft = self.path / f".{new_name}.{os.getpid()}{TEMPORARY}"
            shutil.copyfile(source.local / name, draft)
            draft.rename(target)


class RemoteFolder:
    """A folder of an fsspec file system."""

    def __init__(self, filesystem: Any, path: str, protocol: str) -> None:
        self.fs, self.path, self.protocol = filesystem, path.rstrip("/"), protocol

    @property
    def local(self) -> None:
        return None

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path.lstrip('/')}"

    def __truediv__(self, name: str) -> str:
        return f"{self}/{name}"

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(self.fs, self._at(name), self.protocol)

    def make(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self._at(name)))

    def size(self, name: str) -> int | None:
        path = self._at(name)
        return int(self.fs.size(path)) if self.fs.isfile(path) else None

    def link(self, name: str) -> None:
        return None

    def names(self) -> list[str]:
        if not self.fs.isdir(self.path):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.path, detail=False))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        return bytes(self.fs.cat_file(self._at(name), start=start, end=end))

    def sha256(self, name: str) -> str:
        with self.fs.open(self._at(name), "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(8 << 20):
                digest.update(block)
            return digest.hexdigest()

    def begin(self, name: str, blocks: Blocks) -> Draft:
        with self.fs.open(self._at(name), "wb") as file:
            for block in blocks:
                file.write(block)
        return Draft(commit=lambda: None, discard=lambda: self.remove(name))

    def write(self, name: str, blocks: Blocks) -> None:
        self.begin(name, blocks).commit()

    def sync(self) -> None:
        pass

    def remove(self, name: str) -> None:
        if self.fs.exists(self._at(name)):
            self.fs.rm_file(self._at(name))

    def take(self, source: Folder, name: str, new_name: str) -> None:
        if isinstance(source, RemoteFolder) and source.fs is self.fs:
            self.fs.cp_file(source._at(name), self._at(new_name))
        else:
            self.write(new_name, [source.read(name)])
