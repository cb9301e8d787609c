"""Artifact folders: one writer at a time, and never a half-written state.

A writer stages every file beside its name (`model.onnx.new`) and flushes it to disk. Renaming the staged manifest to
`manifest.json.commit` is the moment of commit: from then on, whoever opens the folder finishes the renames. A kill
before that moment leaves the earlier state, a kill after it the later one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from engines.digest import sha256
from export.errors import WorkspaceError

MANIFEST = "manifest.json"
COMMIT = "manifest.json.commit"
NEW = ".new"
ENGINES = "engines"
LOCK = ".lock"


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Workspace]:
    """The folder, made if absent and locked until the end of the block. Raises WorkspaceError."""
    with translated(f"artifact folder {folder}", "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise WorkspaceError(f"artifact folder {folder}", "another enginesmith process is writing to it", "",
                                 "wait for it to end, or give another --out or --name") from None
        try:
            workspace = Workspace(folder)
            workspace.recover()
            try:
                yield workspace
            except Exception:
                workspace.discard()
                raise
        finally:
            lock.release()


@contextlib.contextmanager
def translated(subject: str, option: str) -> Iterator[None]:
    """A disk that is full, or a folder that cannot be written, as a WorkspaceError about `subject`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        name = error.filename2 or error.filename  # of a copy, where to
        where = f" ({name})" if name else ""
        raise WorkspaceError(subject, f"{os.strerror(error.errno)}{where}",
                             "free space" if full else "a folder that can be written",
                             f"free some space, or give another {option}" if full else f"give another {option}"
                             ) from error


def put_text(path: Path, text: str, option: str = "--out") -> None:
    """Makes a file beside its name and renames it into place: a reader finds the earlier one, or this, whole. Raises
    WorkspaceError."""
    with translated(f"file {path}", option):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(path.name + NEW)
        staged.write_text(text, "utf-8")
        staged.replace(path)


class Workspace:
    """An open artifact folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: dict[str, Any] | None = None  # the manifest, once its files were seen to be whole

    def recover(self) -> None:
        """Ends a commit that was interrupted, or drops what an interrupted writer had staged."""
        commit = self.folder / COMMIT
        if commit.exists():
            for name in json.loads(commit.read_bytes())["files"]:
                staged = self.folder / (name + NEW)
                if staged.exists():
                    _remove_folder(self.folder / name)  # a rename puts a file in place of a file, but no folder
                    staged.replace(self.folder / name)
            commit.replace(self.folder / MANIFEST)
            flush_folder(self.folder)
        self.discard()

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if it is there and every file it names is there with the same bytes."""
        if self._whole is not None:
            return self._whole
        try:
            manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_bytes())
            whole = all(sha256(self.folder / name) == digest for name, digest in manifest["files"].items())
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        self._whole = manifest if whole else None
        return self._whole

    def stage(self, name: str, write: Callable[[Path], object]) -> Path:
        """Has `write` make the file that commit() will call `name`; the path of the staged file."""
        path = self.folder / (name + NEW)
        write(path)
        for part in (f for f in (path, *path.rglob("*")) if f.is_file()):
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        return path

    def commit(self, manifest: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        """Puts the staged files `names` and `manifest`, completed by their hashes, in place of the earlier ones.

        Files that `manifest` lists already stay as they are.
        """
        staged = {name: sha256(self.folder / (name + NEW)) for name in names}
        complete = {**manifest, "files": {**manifest.get("files", {}), **staged}}
        text = json.dumps(complete, indent=2) + "\n"
        self.stage(MANIFEST, lambda path: path.write_text(text, "utf-8")).replace(self.folder / COMMIT)
        flush_folder(self.folder)
        self.recover()
        self._whole = complete
        return complete

    def reject(self, name: str) -> Path:
        """Keeps a staged file as `<name>.rejected`."""
        return (self.folder / (name + NEW)).replace(self.folder / f"{name}.rejected")

    def discard(self) -> None:
        """Drops what is staged, here and one folder below."""
        for staged in (*self.folder.glob(f"*{NEW}"), *self.folder.glob(f"*/*{NEW}")):
            _remove_folder(staged)
            staged.unlink(missing_ok=True)


def _remove_folder(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
