"""The benchmark by the command line, on a small model in real runtimes: what is kept, resumed and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import record
from pipeline.benchmark import BURN_IN_LEAST, BURN_IN_MOST, REWARM
from tests.engines.models import convolution
from tests.pipeline.test_build_verify import failed, printed, run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """With engines of two runtimes."""
    source = convolution(tmp_path / "small.onnx", channels=64)
    assert run("build", source, "--out", tmp_path, "--runtime", "onnxruntime", "--runtime", "openvino",
               "--precision", "fp32", "--precision", "int8") == 0
    return source


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = printed(capsys, "benchmark", *arguments)  # type: ignore[assignment]
    return found


def test_every_sample_of_every_engine_is_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    found = measured(capsys, model, "--out", tmp_path, "--steps", 20, "--rounds", 4, "--batch", "1,3")
    assert [(s["runtime"], s["precision"], s["batch"]) for s in found["series"]] == [
        (runtime, precision, batch) for batch in (1, 3) for runtime in ("onnxruntime", "openvino")
        for precision in ("fp32", "int8")]
    for one in found["series"]:
        assert one["status"] == "measured", one["reason"]
        assert [len(r) for r in one["rounds_ns"]] == [5, 5, 5, 5]
        assert [len(r) for r in one["rewarm_ns"]] == [REWARM] * 4
        assert BURN_IN_LEAST <= len(one["burn_in_ns"]) <= BURN_IN_MOST
        assert all(sum(r) <= wall for r, wall in zip(one["rounds_ns"], one["wall_ns"], strict=True))
        assert one["relative_l2"] < (1e-5 if one["precision"] == "fp32" else 0.5)
        assert one["peak_bytes"] > 10e6
        assert one["engine"] in found["receipts"]
        # two multiply-adds: 64 maps of 8x8 from 3x3x3, then 64 to 5
        assert one["flops"] == one["batch"] * 2 * (64 * 64 * 27 + 64 * 5)
    assert found["series"][0]["min_bytes"] == 4 * (64 * 27 + 64 + 64 * 5 + 5) + 4 * (3 * 64 + 5)
    assert {limit["precision"] for limit in found["limits"]} == {"fp32", "int8"}
    assert all(limit["flops_per_second"] > 1e9 for limit in found["limits"])
    assert found["bandwidth_bytes_per_second"] > 1e8
    assert found["complete"] is True
    path = tmp_path / "small" / "benchmarks" / f"{found['run_id']}.json"
    assert record.read(path).series[0].rounds_ns[0] == tuple(found["series"][0]["rounds_ns"][0])


def test_what_is_printed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("benchmark", model, "--out", tmp_path, "--runtime", "onnxruntime", "--precision", "fp32", "--steps", 20,
               "--burn-in", 3, "--rounds", 2) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?"
    steps = [line for line in lines if re.fullmatch(rf"{stamp}: step \d+, duration = \d+\.\d{{3}}", line)]
    assert [line.split("step ")[1].split(",")[0] for line in steps] == ["0", "10"]
    assert any(re.fullmatch(rf"{stamp}: Forward across 20 steps, \d\.\d{{3}} \+/- \d\.\d{{3}} sec / batch", line)
               for line in lines)
    assert "round 2 of 2, median so far" in said.err
    assert "fewer than 3 rounds" in said.out


def test_concurrency_and_threads(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    found = measured(capsys, model, "--out", tmp_path, "--runtime", "onnxruntime", "--precision", "fp32", "--steps", 12,
                     "--rounds", 3, "--concurrency", "1,2", "--threads", "1")
    assert [(s["concurrency"], s["threads"], [len(r) for r in s["rounds_ns"]]) for s in found["series"]] == [
        (1, 1, [4, 4, 4]), (2, 1, [4, 4, 4])]


def test_slower_than_a_baseline(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("benchmark", model, "--out", tmp_path, "--runtime", "onnxruntime", "--precision", "fp32", "--steps", 20)
    assert run(*command) == 0
    path, = (tmp_path / "small" / "benchmarks").glob("*.json")
    whole = json.loads(path.read_text())
    for name, factor in (("slow", 100), ("fast", 0.01)):
        one = dict(whole["series"][0])
        one["rounds_ns"] = [[max(1, int(n * factor)) for n in r] for r in one["rounds_ns"]]
        (tmp_path / f"{name}.json").write_text(json.dumps({**whole, "series": [one]}))
    capsys.readouterr()
    assert run(*command, "--baseline", tmp_path / "slow.json") == 0
    capsys.readouterr()
    assert run(*command, "--baseline", tmp_path / "fast.json") == 3
    assert "1 configuration slower than the baseline: ONNX Runtime fp32" in capsys.readouterr().err


def test_gradients_are_tensorflows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path)
    assert run("export", "resnet_v2_18", "--size", "33x33", "--saved-model", *out) == 0
    assert run("build", "resnet_v2_18", *out, "--runtime", "onnxruntime", "--runtime", "tensorflow") == 0
    capsys.readouterr()
    found = measured(capsys, "resnet_v2_18", *out, "--mode", "forward-backward", "--steps", 4, "--rounds", 2,
                     "--burn-in", 2)
    refused, done = found["series"]
    assert (refused["status"], done["status"]) == ("failed", "measured")
    assert "mode forward-backward: onnxruntime has no gradients; expected tensorflow" in refused["reason"]
    plain = measured(capsys, "resnet_v2_18", *out, "--runtime", "tensorflow", "--steps", 4, "--rounds", 2,
                     "--burn-in", 2)["series"][0]
    assert done["flops"] == 3 * plain["flops"]


def test_batch_that_an_engine_does_not_take_is_a_failed_series(tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    source = convolution(tmp_path / "fixed.onnx", batch=2)
    assert run("build", source, "--out", tmp_path) == 0
    capsys.readouterr()
    found = measured(capsys, source, "--out", tmp_path, "--batch", "1,2", "--steps", 2, "--rounds", 2)
    assert [s["status"] for s in found["series"]] == ["failed", "measured"]
    assert "feed images: shape 1x3x8x8; expected 2x3x8x8" in found["series"][0]["reason"]


@pytest.mark.parametrize(("arguments", "text"), [
    (("--batch", "0"), "batch: too small"), (("--batch", "a"), "batch 'a': not a list of numbers"),
    (("--steps", "0"), "steps: too small"), (("--burn-in", "-1"), "burn-in '-1': not a number of steps"),
    (("--mode", "backward"), "mode 'backward': unknown; expected one of forward, forward-backward"),
    (("--runtime", "tensorrt"), "none that run on cpu; expected one or more; python -m pipeline.build"),
    (("--device", "cuda:9"), "none that run on cuda:9"),
    (("--images", "nowhere"), "calibration data nowhere: no such file or folder"),
])
def test_a_users_mistake_is_one_line(arguments: tuple[str, ...], text: str, model: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert text in failed(capsys, "benchmark", model, "--out", tmp_path, *arguments)


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.benchmark", str(model), "--out", str(tmp_path), "--steps", "8",
               "--rounds", "4", "--runtime", "onnxruntime", "--min-seconds", "4"]
    folder = tmp_path / "small" / "benchmarks"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                          start_new_session=True) as process:
        while not any(_rounds(path) for path in folder.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        assert process.wait(30) == 130
    assert last == "interrupted; what was finished is kept, and the same command goes on from there"
    path, = folder.glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["complete"] is False
    assert subprocess.run(command, capture_output=True, check=True).returncode == 0
    assert list(folder.glob("*.json")) == [path]
    whole = record.read(path)
    assert whole.complete
    assert [len(s.rounds_ns) for s in whole.series] == [4, 4]
    for one in kept["series"]:
        again = next(s for s in whole.series if s.precision == one["precision"])
        assert [list(r) for r in again.rounds_ns[:len(one["rounds_ns"])]] == one["rounds_ns"]


def _rounds(path: Path) -> int:
    return sum(len(s["rounds_ns"]) for s in json.loads(path.read_text())["series"])
