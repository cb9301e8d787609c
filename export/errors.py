"""Every error that a user of the exporter can meet.

    EnginesmithError
    ├── UsageError            an option or a name that cannot be right
    │   └── MissingPackage    an optional package that what was asked for needs
    ├── WeightsError          weights that are missing, damaged, or of another network
    ├── ModelError            a model that cannot be loaded or converted
    ├── WorkspaceError        an artifact folder that cannot be read, written or locked
    └── CheckFailed           the export ran, and a check of its result did not hold

The text is one line: subject, what was found, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

NAMES_SHOWN = 6


class EnginesmithError(Exception):
    """One line of text: `subject: found; expected ...; remedy`."""

    exit_code = 1

    def __init__(self, subject: str, found: str, expected: str = "", remedy: str = "") -> None:
        self.subject, self.found, self.expected, self.remedy = subject, found, expected, remedy
        parts = [found, f"expected {expected}" if expected else "", remedy]
        text = f"{subject}: " + "; ".join(part for part in parts if part)
        super().__init__(" ".join(text.split()))


class UsageError(EnginesmithError):
    """An option, a name or a size that cannot be right."""


class MissingPackage(UsageError):
    """An optional package that what was asked for needs."""


class WeightsError(EnginesmithError):
    """Weights that are missing, damaged, not finite, or of another network."""


class ModelError(EnginesmithError):
    """A model that cannot be loaded, or that has a layer ONNX cannot express."""


class WorkspaceError(EnginesmithError):
    """An artifact folder that cannot be read, written or locked."""


class CheckFailed(EnginesmithError):
    """A check of the exported model did not hold."""

    exit_code = 3


def listed(names: Sequence[str]) -> str:
    """`a, b, c and 4 more`: every name up to NAMES_SHOWN, then a count."""
    shown = ", ".join(names[:NAMES_SHOWN])
    rest = len(names) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
