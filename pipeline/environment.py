"""The machine while it measures: what is recorded with every run, so that a reader can judge its numbers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import psutil

from engines.machine import cpu_name
from pipeline.record import Environment

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
# of the container; https://docs.kernel.org/admin-guide/cgroup-v2.html
QUOTA, MEMORY_LIMIT = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/memory.max")
PACKAGES = ("enginesmith", "numpy", "tensorflow-cpu", "tensorflow", "keras", "onnx", "onnxruntime", "onnxruntime-gpu",
            "openvino", "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-python")
VARIABLES = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS", "MKL_NUM_THREADS",
             "KMP_AFFINITY", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "LD_PRELOAD")
THROTTLES = {"0x8": "hardware slowdown", "0x20": "software thermal slowdown", "0x40": "hardware thermal slowdown",
             "0x80": "hardware power brake", "0x4": "software power cap"}  # nvml.h, nvmlClocksEventReasons


def capture(device: str) -> Environment:
    """As it is now; the load is that of half a second before anything is started."""
    load = psutil.cpu_percent(0.5) / 100
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return Environment(
        date=datetime.now().astimezone().isoformat(timespec="seconds"), host=platform.node(),
        system=platform.platform(), python=platform.python_version(), cpu=cpu_name(),
        cores=psutil.cpu_count(logical=False) or 1, affinity=affinity(),
        memory_bytes=psutil.virtual_memory().total, governor=_governor(),
        frequency_mhz=float(frequency.current) if frequency and frequency.current else None, load_before=round(load, 3),
        versions=_versions(), variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        gpu=gpu_state(device))


def affinity() -> tuple[int, ...]:
    """The logical cores that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)))


def usable_cores() -> int:
    """Physical cores, less those that the affinity of this process or the quota of its container leave out."""
    found = min(psutil.cpu_count(logical=False) or 1, len(affinity()))
    with suppress(OSError, ValueError):  # no such file, or `max`
        quota, period = map(int, QUOTA.read_text("utf-8").split())
        found = min(found, max(1, quota // period))
    return found


def usable_memory() -> int:
    """Bytes of the machine, or of the container where those are fewer."""
    found = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        found = min(found, int(MEMORY_LIMIT.read_text("utf-8")))
    return found


def command() -> str:
    """The command line that is running, as one would type it."""
    stage = Path(sys.argv[0])
    name = f"python -m pipeline.{stage.stem}" if stage.parent.name == "pipeline" else stage.name
    return shlex.join([*name.split(), *sys.argv[1:]])


def _governor() -> str | None:
    with suppress(OSError):
        return GOVERNOR.read_text("utf-8").strip()
    return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gpu_state(device: str) -> dict[str, Any]:
    """Name, driver, clocks (MHz), power (W), temperature (C) and throttle reasons of `cuda:N`; empty for `cpu`."""
    if device == "cpu":
        return {}
    from engines.machine import gpu

    name, capability, driver = gpu(device)
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.removeprefix("cuda:")))
    state: dict[str, Any] = {"name": name, "compute_capability": capability, "driver": driver}
    readings = {"sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
                "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
                "throttle_reasons": lambda: _reasons(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))}
    for key, reading in readings.items():
        with suppress(pynvml.NVMLError):  # not every board tells everything
            state[key] = reading()
    return state


def gpu_memory(device: str, used: bool = False) -> int:
    """Bytes of memory of `cuda:N`, or of what all processes use of it. Raises RuntimeUnavailable."""
    from engines.machine import gpu

    gpu(device)
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.removeprefix("cuda:")))
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.used if used else memory.total)


def _reasons(bits: int) -> list[str]:
    return [name for mask, name in THROTTLES.items() if bits & int(mask, 16)]


class OtherLoad:
    """The share of all cores that processes other than ours use between start and stop()."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._ours = [psutil.Process(pid) for pid in (*pids, os.getpid())]
        self._start, self._busy, self._own = monotonic(), _busy(), self._used()

    def stop(self) -> float:
        passed = (monotonic() - self._start) * (psutil.cpu_count() or 1)
        other = (_busy() - self._busy) - (self._used() - self._own)
        return round(min(1.0, max(0.0, other / passed)), 3) if passed > 0 else 0.0

    def _used(self) -> float:
        times = [process.cpu_times() for process in self._ours if process.is_running()]
        return float(sum(t.user + t.system for t in times))


def _busy() -> float:
    t = psutil.cpu_times()
    return float(sum(t) - t.idle - getattr(t, "iowait", 0.0) - getattr(t, "guest", 0.0) - getattr(t, "guest_nice", 0.0))
