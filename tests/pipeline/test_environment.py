"""What is said of the machine, against the machine itself."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engines.errors import RuntimeUnavailable
from pipeline import environment


def test_the_machine_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment.capture("cpu")
    assert found.host == platform.node()
    assert found.memory_bytes == psutil.virtual_memory().total
    assert set(found.affinity) == os.sched_getaffinity(0)
    assert 0 <= found.load_before <= 1
    assert found.versions["numpy"].count(".") == 2
    assert found.variables["OMP_NUM_THREADS"] == "3"
    assert found.gpu == {}


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("50000 100000", 1), ("max 100000", None),
                                              (None, None)])
def test_cores_of_a_container(quota: str | None, cores: int | None, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(environment, "QUOTA", tmp_path / "cpu.max")
    every = os.sched_getaffinity(0)
    assert environment.usable_cores() == (cores or min(len(every), psutil.cpu_count(logical=False) or 1))
    try:
        os.sched_setaffinity(0, {min(every)})
        assert environment.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, every)


@pytest.mark.parametrize(("limit", "found"), [("1048576", 1 << 20), ("max", None)])
def test_memory_of_a_container(limit: str, found: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    monkeypatch.setattr(environment, "MEMORY_LIMIT", tmp_path / "memory.max")
    assert environment.usable_memory() == (found or psutil.virtual_memory().total)


def test_load_of_others_is_told_from_ours() -> None:
    spin, cores = [sys.executable, "-c", "while True: pass"], psutil.cpu_count() or 1
    with subprocess.Popen(spin) as process:
        try:
            time.sleep(0.3)
            as_other, as_ours = environment.OtherLoad(()), environment.OtherLoad([process.pid])
            spun, start = _cpu_seconds(process.pid), time.monotonic()
            time.sleep(1)
            other, ours = as_other.stop(), as_ours.stop()
            share = (_cpu_seconds(process.pid) - spun) / (time.monotonic() - start) / cores
        finally:
            process.kill()
    assert 0 <= ours < other <= 1
    assert other - ours == pytest.approx(share, abs=0.3 / cores)
    assert share > 0.1 / cores  # what a busy machine leaves it of a core


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(RuntimeUnavailable, match="cuda:99"):
        environment.gpu_state("cuda:99")
