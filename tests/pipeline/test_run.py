"""From a model to a report with a recommended engine, by one command, and what a second start takes from the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engines.models import convolution
from tests.pipeline.test_build_verify import failed, run

SHORT = ("--steps", "6", "--rounds", "3")


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run("run", *arguments, *SHORT, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_keras_model_against_tensorflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "tests.pipeline.test_build_verify:mobilenet"
    found = outcome(capsys, model, "--out", tmp_path, "--runtime", "onnxruntime", "--runtime", "tensorflow",
                    "--precision", "fp32")
    folder = Path(found["folder"])
    assert found["engine"] and (folder / "engines" / found["engine"]).is_file()
    assert found["latency_ms"] > 0
    assert found["ratio_to_tensorflow"] is None or found["ratio_to_tensorflow"] > 0
    assert Path(found["report"]).read_text("utf-8").lstrip().lower().startswith("<!doctype html>")
    assert {path.name for path in (folder / "report").iterdir()} >= {"index.html", "report.md", "report.csv"}


def test_a_second_start_measures_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (convolution(tmp_path / "small.onnx"), "--out", tmp_path, "--runtime", "onnxruntime")
    first = outcome(capsys, *command)
    runs = list((tmp_path / "small" / "benchmarks").iterdir())
    assert outcome(capsys, *command) == first
    assert list((tmp_path / "small" / "benchmarks").iterdir()) == runs
    outcome(capsys, *command, "--batch", "2")
    assert len(list((tmp_path / "small" / "benchmarks").iterdir())) == 2
    outcome(capsys, *command, "--force")
    assert len(list((tmp_path / "small" / "benchmarks").iterdir())) == 3


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "run", convolution(tmp_path / "small.onnx"), "--out", tmp_path, "--runtime", "onnxruntime", *SHORT
    assert run(*command, "--precision", "fp32") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("recommended: onnxruntime fp32, batch 1: ")
    assert lines[-1] == str(tmp_path / "small" / "report" / "index.html")
    assert run(*command, "--precision", "fp32", "--max-latency-ms", "0") == 0
    assert "no engine is recommended: no engine within the error limit answers in 0 ms" in capsys.readouterr().out


def test_a_users_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected one of alexnet" in failed(capsys, "run", "alexnot", "--out", tmp_path)
    assert "batch 'x'" in failed(capsys, "run", "alexnet", "--out", tmp_path, "--batch", "x")
