"""What a file or a folder is known by."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Of a file's bytes, or of the names and bytes of all files below a folder."""
    if path.is_dir():
        files = (f"{f.relative_to(path).as_posix()} {sha256(f)}" for f in sorted(path.rglob("*")) if f.is_file())
        return hashlib.sha256("\n".join(files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
