"""Every error that a user of engines can meet.

    EngineError
    ├── RuntimeUnavailable    a runtime, a provider or a device that this machine lacks
    ├── ModelFileError        an ONNX file that cannot be read
    ├── FeedError             arrays that the engine does not take
    ├── BuildError            a model that the runtime cannot build, or a wish it cannot fulfil
    ├── PrecisionError        an engine whose compute layers are not in the precision asked for
    ├── StaleEngine           an engine file that does not belong to its receipt, or to this machine
    ├── ServerError           an inference server that does not start, does not answer, or refuses
    │   └── ServerTimeout     one that does not answer in time: it may be busy
    └── VerifyFailed          the engine runs, and its outputs are not the reference's

The text is one line: subject, what was found, what was expected, what to do. (engines/ knows nothing of export/, so
the one-line form stands here a second time.)
"""

from __future__ import annotations


class EngineError(Exception):
    """One line of text: `subject: found; expected ...; remedy`."""

    exit_code = 1

    def __init__(self, subject: str, found: str, expected: str = "", remedy: str = "") -> None:
        parts = [found, expected and f"expected {expected}", remedy]
        super().__init__(" ".join(f"{subject}: {'; '.join(part for part in parts if part)}".split()))


class RuntimeUnavailable(EngineError):
    """A runtime, a provider or a device that this machine lacks."""


class ModelFileError(EngineError):
    """An ONNX file that cannot be read."""


class FeedError(EngineError):
    """Arrays whose name, type, rank or size the engine does not take."""


class BuildError(EngineError):
    """A model that the runtime cannot build, or a wish that it cannot fulfil."""


class PrecisionError(EngineError):
    """An engine whose compute layers do not run in the precision asked for."""


class StaleEngine(EngineError):
    """An engine file that does not belong to its receipt, or was built for another machine or version."""


class ServerError(EngineError):
    """An inference server that does not start, does not answer, or refuses."""


class ServerTimeout(ServerError):
    """An inference server that does not answer in time."""


class VerifyFailed(EngineError):
    """The engine runs, and its outputs are further from the reference than its precision allows."""

    exit_code = 3
