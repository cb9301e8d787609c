"""What every result file begins with: date, machine, versions, command."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    import psutil

    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]
    return {"cpu": names[0], "cores": psutil.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}


def described(script: str) -> dict[str, Any]:
    from pipeline.export import tool_versions

    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": tool_versions(),
            "command": " ".join([f"python -m benchmarks.{script}", *sys.argv[1:]])}


def save(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
