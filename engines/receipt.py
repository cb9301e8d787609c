"""What an engine was built from, for, and by; and why one that is there may not be used.

    engines/<runtime>-<precision>-<first 12 digits of the key>.<suffix>      the engine
    engines/<same>.json                                                      its receipt, written last

The key is a hash of everything that decides the engine. An engine file is loaded only if its bytes have the hash that
the receipt gives: a plan is code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engines.digest import sha256
from engines.errors import StaleEngine
from engines.runtime import BuildRequest, Built, Identity, Options, Profile, fields

FORMAT = 1
NONE_YET = "none was built yet"


@dataclass(frozen=True)
class Receipt:
    """`key` decides the engine; the rest says what came of it. `layers`: precision -> number of compute layers."""

    key: Mapping[str, Any]
    file: str
    sha256: str
    size_bytes: int
    build_seconds: float
    date: str
    layers: Mapping[str, int]
    layers_from: str
    tf32: bool | None
    details: Mapping[str, Any]
    format: int = FORMAT

    @property
    def name(self) -> str:
        return f"{self.key['runtime']} {self.key['precision']}"


def key(request: BuildRequest, identity: Identity, model_sha256: str) -> dict[str, Any]:
    """Everything that decides an engine, JSON-ready."""
    return {"model_sha256": model_sha256, **fields(identity), "precision": request.precision,
            "profiles": [fields(p) for p in request.profiles], "options": fields(request.options),
            "target": request.device}


def engine_id(wanted: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    return f"{wanted['runtime']}-{wanted['precision']}-{digest[:12]}"


def make(wanted: Mapping[str, Any], engine: Path, name: str, built: Built, seconds: float) -> Receipt:
    """The receipt of the engine that was just written to `engine`, and will be called `name`."""
    return Receipt(wanted, name, sha256(engine), engine.stat().st_size, round(seconds, 3),
                   datetime.now(UTC).isoformat(timespec="seconds"), dict(built.layers), built.source, built.tf32,
                   dict(built.details))


def read(path: Path) -> Receipt:
    """Raises StaleEngine for a file that is no receipt of this version."""
    try:
        found = json.loads(path.read_bytes())
        receipt = Receipt(**found)
        well = (receipt.format == FORMAT and Path(receipt.file).name == receipt.file != ""
                and isinstance(receipt.sha256, str) and isinstance(receipt.layers, dict)
                and {"runtime", "precision", "model_sha256", "version", "device", "profiles", "options",
                     "target"} <= set(receipt.key))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StaleEngine(f"receipt {path.name}", f"not readable ({type(error).__name__})", "a receipt",
                          "build the engine again") from error
    if not well:
        raise StaleEngine(f"receipt {path.name}", "fields are missing or of another format", f"format {FORMAT}",
                          "build the engine again")
    return receipt


def every(folder: Path) -> list[Receipt]:
    """The receipts of a folder, in order of their files' names; what cannot be read is not one."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(read(path))
        except StaleEngine:
            continue
    return found


def find(folder: Path, wanted: Mapping[str, Any]) -> Receipt | str:
    """The receipt of an engine with this key and intact bytes, or the reason why there is none."""
    path = folder / f"{engine_id(wanted)}.json"
    if path.exists():
        try:
            receipt = read(path)
            check(folder, receipt)
            return receipt
        except StaleEngine as error:
            return str(error)
    near = [r for r in every(folder) if r.key["runtime"] == wanted["runtime"]
            and r.key["precision"] == wanted["precision"]]
    return _difference(near[-1].key, wanted) if near else NONE_YET


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    changed = [f"{name} was {_short(found.get(name))}, is {_short(wanted.get(name))}"
               for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    return "; ".join(changed)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] + "..." if len(text) == 64 else text


def check(folder: Path, receipt: Receipt) -> Path:
    """The engine file, once its bytes are seen to be the receipt's. Raises StaleEngine."""
    path = folder / receipt.file
    if not path.is_file():
        raise StaleEngine(f"engine {receipt.file}", "the file is gone", "the file beside its receipt", "build it again")
    found = sha256(path)
    if found != receipt.sha256:
        raise StaleEngine(f"engine {receipt.file}", f"sha256 {found[:12]}...",
                          f"{receipt.sha256[:12]}... of its receipt", "it was changed since: build it again")
    return path


def check_machine(receipt: Receipt, identity: Identity) -> None:
    """Raises StaleEngine, before the runtime meets it, for an engine of another version, device or driver."""
    here = fields(identity)
    changed = [f"{name} {receipt.key.get(name)!r} (here {value!r})" for name, value in here.items()
               if receipt.key.get(name) != value]
    if changed:
        raise StaleEngine(f"engine {receipt.file}", f"built for {', '.join(changed)}", "this machine", "build it again")


def request_of(receipt: Receipt, model: Path) -> BuildRequest:
    """The request that the engine was built from. Raises StaleEngine for values that no request has."""
    try:
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in receipt.key["options"].items()}
        profiles = tuple(Profile(**p) for p in receipt.key["profiles"])
        return BuildRequest(model, receipt.key["runtime"], receipt.key["precision"], receipt.key["target"], profiles,
                            Options(**options))
    except (TypeError, KeyError, AttributeError) as error:
        raise StaleEngine(f"engine {receipt.file}", "its receipt names options of another version", "",
                          "build it again") from error
