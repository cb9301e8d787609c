"""A Triton model repository whose every change is one rename.

    <repository>/<model>/config.pbtxt           names the live version: its rename is the commit
                         <version>/             the model file, its labels, what proves it, and a copy of its config
    <file>                                  for who reads the repository, e.g. KServe's manifest
    <repository>.staging/                       where versions are made, and the lock of whoever makes them

A version's folder is put in place whole, beside the live one, and counts for nothing until the configuration names it.
Rolling back puts the copy of an earlier configuration in place. A kill at any moment leaves the old version or the new.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from export.errors import UsageError, WorkspaceError
from pipeline import triton_config, workspace
from pipeline.triton_config import CONFIG

DEPLOYMENT, PROOF = "deployment.json", "proof.npz"
Write = Callable[[Path], object]  # makes the files of a version in a folder


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Repository]:
    """The repository, made if absent, for one writer at a time. Raises WorkspaceError, also for a disk that is full."""
    staging = folder.with_name(folder.name + ".staging")
    with workspace.translated(f"model repository {folder}", "--repository"):
        folder.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        lock = FileLock(staging / workspace.LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise WorkspaceError(f"model repository {folder}", "another enginesmith process is writing to it", "",
                                 "wait for it to end, or give another --repository") from None
        try:
            _clear(staging)
            yield Repository(folder, staging)
        finally:
            _clear(staging)
            lock.release()


def _clear(staging: Path) -> None:
    for left in staging.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != workspace.LOCK:
            left.unlink()


class Repository:
    """An open model repository."""

    def __init__(self, folder: Path, staging: Path) -> None:
        self.folder, self._staging = folder, staging

    def stage(self, name: str, version: int, config: Any, write: Write) -> Path:
        """Makes a version beside the repository, `<returned>/config.pbtxt` and `<returned>/<version>/`, to be looked at
        before put(). Raises UsageError for a version that is there."""
        if (self.folder / name / str(version)).exists():
            raise UsageError(f"model {name}", f"version {version} is in the repository already",
                             "a version that is not there yet", "leave --version out")
        staged = self._staging / name
        inner = staged / str(version)
        inner.mkdir(parents=True)
        write(inner)
        for folder in (staged, inner):
            (folder / CONFIG).write_text(triton_config.text(config), "utf-8")
        for path in (*inner.iterdir(), staged / CONFIG):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        return staged

    def put(self, staged: Path) -> None:
        """Makes the staged version live."""
        target = self.folder / staged.name
        if not target.exists():
            staged.replace(target)
            workspace.flush_folder(self.folder)
            return
        version = next(path for path in staged.iterdir() if path.is_dir())
        version.replace(target / version.name)
        workspace.flush_folder(target)
        (staged / CONFIG).replace(target / CONFIG)
        workspace.flush_folder(target)

    def revert(self, name: str, version: int | None = None) -> tuple[int | None, int]:
        """Makes an earlier version live, the one before if none is named; (what was live, what is). Raises
        UsageError."""
        folder = self.folder / name
        now = live(folder)
        there = versions(folder)
        earlier = [v for v in there if now is None or v < now]
        chosen = version if version is not None else max(earlier, default=None)
        if chosen is None or chosen not in there or not (folder / str(chosen) / CONFIG).exists():
            raise UsageError(f"model {name}", f"no version {chosen or 'before ' + str(now)} to go back to",
                             f"one of {', '.join(map(str, there)) or 'none'}", "deploy it again")
        copy = self._staging / f"{name}.{CONFIG}"
        shutil.copyfile(folder / str(chosen) / CONFIG, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
        copy.replace(folder / CONFIG)
        workspace.flush_folder(folder)
        return now, chosen


def models(repository: Path) -> tuple[str, ...]:
    """The names of the models. Raises UsageError where there are none."""
    names = tuple(sorted(path.parent.name for path in repository.glob(f"*/{CONFIG}")))
    if not names:
        raise UsageError(f"model repository {repository}", "no models in it", "MODEL/config.pbtxt",
                         "python -m pipeline.deploy MODEL")
    return names


def versions(folder: Path) -> list[int]:
    """What is there of a model, live or not."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def live(folder: Path) -> int | None:
    """The version that the configuration of a model names. Raises UsageError for an unreadable configuration."""
    if not (folder / CONFIG).exists():
        return None
    named = triton_config.read(folder / CONFIG).version_policy.specific.versions
    return max(named) if named else max(versions(folder), default=None)


def configurations(folder: Path) -> tuple[Path, ...]:
    """The live configuration of a model, and the copies in the versions before it, newest first. Before one that cannot
    be read is every version."""
    try:
        now = live(folder)
    except UsageError:
        now = None
    earlier = [folder / str(v) / CONFIG for v in reversed(versions(folder)) if now is None or v < now]
    return folder / CONFIG, *(path for path in earlier if path.exists())
