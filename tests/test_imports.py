"""`pipeline -> export`, `pipeline -> engines`, nothing else; and what must stay out of a light import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"export": {"export"}, "engines": {"engines"}, "pipeline": {"pipeline", "export", "engines"}}
HEAVY = ("tensorflow", "keras", "onnx", "onnxruntime", "numpy", "tensorrt", "rich.table")


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", ALLOWED)
def test_import_direction(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) & set(ALLOWED) - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_no_package_imports_tests_or_benchmarks() -> None:
    for path in [p for package in ALLOWED for p in (ROOT / package).rglob("*.py")]:
        assert not imported(path) & {"tests", "benchmarks"}, path


def test_only_convert_knows_tf2onnx() -> None:
    users = [path.name for package in ALLOWED for path in (ROOT / package).rglob("*.py") if "tf2onnx" in imported(path)]
    assert users == ["convert.py"]


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.export", "export.catalog"])
def test_heavy_libraries_load_at_first_use(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
