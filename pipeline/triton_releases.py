"""Releases of NVIDIA's Triton container (`nvcr.io/nvidia/tritonserver:<container>-py3`) and the TensorRT inside.

Only releases of which a source gives the TensorRT of the `-py3` image are here: the table has gaps, and a release that
is not in it may still exist. Each row has its source, read in stored copies on 2026-11-25. Those of NVIDIA, or with
the server's own message, are sure; those of other projects say what these run in the container.

Left out: https://github.com/triton-inference-server/server/blob/main/docs/introduction/compatibility.md is of the
`-trtllm-python-py3` images, which have another TensorRT than the `-py3` image of the same month (24.10: 10.4.0, not
10.5.0; 26.05: 10.14.1, not 10.16.1). The complete table, SUPPORT_MATRIX below, was not to be had.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from export.errors import UsageError

SUPPORT_MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"
ISSUE = "https://github.com/triton-inference-server/server/issues/"
NOTES = "https://github.com/triton-inference-server/server/blob/main/docs/introduction/release_notes.md as of "
PROJECT = "https://github.com/davidamacey/OpenProcessor/blob/main/docs/"


@dataclass(frozen=True)
class Release:
    """One `-py3` container. `compute_capability`: the lowest that it supports; empty: the source does not say."""

    container: str
    tensorrt: str
    compute_capability: str
    source: str


RELEASES: tuple[Release, ...] = (  # newest first
    Release("26.08", "11.2.1", "", f"{PROJECT}research/dali_gpu_decode_lessons.md"),
    Release("26.06", "11.1.0.106", "7.5", f"{PROJECT}MIGRATION_TRITON_26.md"),
    Release("25.07", "10.11.0.33", "", "https://github.com/dvirbenor/audio-classification-playground, "
                                       "optimization_research/TRITON_BACKFILL_FINDINGS.md"),
    Release("25.01", "10.8.0.43", "7.5", f"{NOTES}25.01"),
    Release("24.10", "10.5.0.18", "6.0", f"{NOTES}24.10"),
    Release("24.08", "10.3.0.26", "6.0", f"{NOTES}24.08 (release_note.md)"),
    Release("24.04", "8.6.3.1", "6.0", f"{ISSUE}7221"),
    Release("24.03", "8.6.3.1", "6.0", f"{ISSUE}7221"),
    Release("24.02", "8.6.3.1", "6.0", f"{ISSUE}6959, {ISSUE}7221"),
    Release("23.05", "8.6.1.2", "6.0", f"{ISSUE}5975, https://github.com/NVIDIA/TensorRT/issues/3071"),
    Release("23.04", "8.6.1.2", "6.0", f"{ISSUE}5812"),
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
    wanted = patch_version(version)
    return tuple(row for row in RELEASES if patch_version(row.tensorrt) == wanted)


def patch_version(version: str) -> tuple[int, int, int]:
    """major.minor.patch of a version of TensorRT. Raises UsageError."""
    found = re.match(r"([0-9]+)\.([0-9]+)\.([0-9]+)(?![0-9])", version)
    if found is None:
        raise UsageError("TensorRT version", f"'{version}'", "major.minor.patch, such as 10.8.0 or 10.8.0.43")
    major, minor, patch = found.groups()
    return int(major), int(minor), int(patch)
