"""Releases of NVIDIA's Triton container (`nvcr.io/nvidia/tritonserver:<container>-py3`) and the TensorRT inside.

Only releases of which a source gives the TensorRT of the `-py3` image are here: the table has gaps, and a release that
is not in it may still exist. Read on 2026-11-25, in stored copies of:

- TensorRT, CUDA and compute capability of 24.08, 24.10 and 25.01: Triton's own release notes as the repository held
  them, https://github.com/triton-inference-server/server/blob/main/docs/introduction/release_notes.md (24.08 in
  release_note.md beside it, commit 798e4f18). Later versions of that file only link to GitHub's release page.
- TensorRT of 24.02: a maintainer's answer, https://github.com/triton-inference-server/server/issues/6959. Its CUDA and
  compute capability: https://docs.nvidia.com/deeplearning/sdk/inference-release-notes/rel-24-02.html
- server versions: 2.43.0 is 24.02 in https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes; the
  others follow from one minor version a month between 2.44.0, which is 24.03
  (https://github.com/triton-inference-server/server/pull/6971), 2.50.0, which is 24.09 (a public README), and 2.56.0,
  which is 25.03 (DEFAULT_TRITON_VERSION_MAP in build.py).

https://github.com/triton-inference-server/server/blob/main/docs/introduction/compatibility.md is left out: it is of the
`-trtllm-python-py3` images, which have another TensorRT than the `-py3` image of the same month (24.10: 10.4.0, not
10.5.0). The complete table, SUPPORT_MATRIX below, was not to be had.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from export.errors import UsageError

SUPPORT_MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"


@dataclass(frozen=True)
class Release:
    """One `-py3` container. Versions are as precise as their source."""

    container: str
    server: str
    tensorrt: str
    cuda: str
    compute_capability: str  # the lowest that the release supports


RELEASES: tuple[Release, ...] = (  # newest first
    Release("25.01", "2.54.0", "10.8.0.43", "12.8.0.038", "7.5"),
    Release("24.10", "2.51.0", "10.5.0.18", "12.6.2", "6.0"),
    Release("24.08", "2.49.0", "10.3.0.26", "12.6", "6.0"),
    Release("24.02", "2.43.0", "8.6.3", "12.3.2", "6.0"),
)


def find(container: str) -> Release | None:
    """The row of a container release such as `25.01`; None where the table has none. Raises UsageError."""
    if not re.fullmatch(r"[0-9]{2}\.(0[1-9]|1[0-2])", container):
        raise UsageError(f"Triton release {container!r}", "not a release", "YY.MM, the tag of its container, as 25.01")
    return next((row for row in RELEASES if row.container == container), None)


def for_tensorrt(version: str) -> tuple[Release, ...]:
    """The releases with the same major.minor.patch of TensorRT, newest first; empty where the table has none.

    A plan loads only in the version of TensorRT that built it, unless it was built as version compatible:
    https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/version-compatibility.html
    The fourth number, the build, is not compared, though TensorRT 8.6.1.2 refused plans of 8.6.1.6
    (https://github.com/triton-inference-server/server/issues/5975): a row is necessary, and not a proof.
    """
    wanted = _patch_version(version)
    return tuple(row for row in RELEASES if _patch_version(row.tensorrt) == wanted)


def _patch_version(version: str) -> tuple[int, int, int]:
    found = re.match(r"([0-9]+)\.([0-9]+)\.([0-9]+)(?![0-9])", version)
    if found is None:
        raise UsageError("TensorRT version", f"'{version}'", "major.minor.patch, such as 10.8.0 or 10.8.0.43")
    major, minor, patch = found.groups()
    return int(major), int(minor), int(patch)
