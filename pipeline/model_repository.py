"""A Triton model repository whose every change is one rename.

    <repository>/<model>/config.pbtxt           names the live version: its rename is the commit
                         <version>/             the model file, its labels, what proves it, and a copy of its config
    <file>                                  for who reads the repository, e.g. KServe's manifest
    <repository>.staging/                       where versions are made, and the lock of whoever makes them

A version's folder is put in place whole, beside the live one, and counts for nothing until the configuration names it.
Rolling back puts the copy of an earlier configuration in place: each notes which one was live before it. A kill at any
moment leaves the old version or the new.
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
from pipeline.triton_config import BEFORE, CONFIG

DEPLOYMENT, PROOF = "deployment.json", "proof.npz"
Write = Callable[[Path], object]  # makes the files of a version in a folder


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Repository]:
    """The repository, made if absent, for one writer at a time. Raises WorkspaceError, also for a disk that is full."""
    folder = folder.resolve()  # of which "." has no name
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

    def stage(self, config: Any, write: Write) -> Path:
        """Makes the version that `config` names beside the repository, `<returned>/config.pbtxt` and
        `<returned>/<version>/`, to be looked at before put(). It notes there which version it comes after. Raises
        UsageError for a version that is there."""
        name, (version,) = config.name, config.version_policy.specific.versions
        if (self.folder / name / str(version)).exists():
            raise UsageError(f"model {name}", f"version {version} is in the repository already",
                             "a version that is not there yet", "leave --version out")
        before = live(self.folder / name)
        if before is not None:
            config.parameters[BEFORE].string_value = str(before)
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

    def stage_text(self, name: str, text: str) -> Path:
        """A text file for who reads the repository, to be renamed to its place beside it."""
        staged = self._staging / name
        staged.write_text(text, "utf-8")
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

    def revert(self, name: str, version: int) -> None:
        """Makes an earlier version live."""
        folder = self.folder / name
        copy = self._staging / f"{name}.{CONFIG}"
        shutil.copyfile(folder / str(version) / CONFIG, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
        copy.replace(folder / CONFIG)
        workspace.flush_folder(folder)

    def drop(self, name: str, version: int) -> None:
        """Takes a version out; the model with it, if it was live, or no other is there."""
        folder = self.folder / name
        if live(folder) == version:
            (folder / CONFIG).unlink()  # from here on the model counts for nothing
        shutil.rmtree(folder / str(version))
        if not versions(folder):
            shutil.rmtree(folder)


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
    """The version that the configuration of a model names; None without one that can be read."""
    if not (folder / CONFIG).exists():
        return None
    try:
        named = triton_config.read(folder / CONFIG).version_policy.specific.versions
    except UsageError:
        return None
    return max(named) if named else max(versions(folder), default=None)


def configurations(folder: Path) -> tuple[Path, ...]:
    """The live configuration of a model, and those of the versions that were live before it, last first. Of one that
    cannot be read nothing is known: then those of all versions, newest first."""
    found = [folder / CONFIG]
    try:
        before = _before(folder, found[-1])
        while before is not None and before not in found:
            found.append(before)
            before = _before(folder, before)
    except UsageError:
        found = [folder / CONFIG, *(folder / str(v) / CONFIG for v in reversed(versions(folder)))]
    return tuple(path for path in found if path.exists())


def earlier(folder: Path, version: int | None) -> int:
    """`version`, or the one that was live before the live one. Raises UsageError if it cannot be gone back to."""
    before = _before(folder, folder / CONFIG) if version is None else folder / str(version) / CONFIG
    if before is None or not before.exists():
        there = ", ".join(map(str, versions(folder))) or "none"
        raise UsageError(f"model {folder.name}", f"no version {version or f'before {live(folder)}'} to go back to",
                         f"--version with one of {there}", "or deploy it again")
    return int(before.parent.name)


def _before(folder: Path, config: Path) -> Path | None:
    """The configuration that was live when that of `config` was deployed, if it is there still."""
    if not config.exists():
        return None
    noted = triton_config.read(config).parameters
    before = folder / noted[BEFORE].string_value / CONFIG if BEFORE in noted else None
    return before if before is not None and before.exists() else None
