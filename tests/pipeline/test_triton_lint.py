"""What the lint finds in models that were deployed right, and then spoiled; TensorRT-RTX plans built without a GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.runtime import Profile, TensorSpec
from export.errors import CheckFailed, UsageError
from pipeline import deploy, kserve, model_repository, triton_config, triton_lint
from pipeline.triton_config import model_config_pb2
from pipeline.triton_lint import Target
from tests.pipeline.servers import small

CPU = model_config_pb2.ModelInstanceGroup.KIND_CPU
HERE, GPU = Target(), Target(True)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plan in a repository."""
    folder = tmp_path_factory.mktemp("plan")
    made = deploy.deploy(deploy.Request(str(small(folder / "small.onnx")), folder, runtime="tensorrt-rtx"))
    assert made.choice is not None and "not measured" in made.choice.why[0]
    assert ["tensorrt-rtx" in note.lower() for note in made.notes] == [True]
    return made.repository / "small"


def spoiled(folder: Path, to: Path, change: Callable[[Any], object]) -> Path:
    """A copy with another configuration."""
    shutil.copytree(folder, to / folder.name)
    config = triton_config.read(to / folder.name / "config.pbtxt")
    change(config)
    (to / folder.name / "config.pbtxt").write_text(triton_config.text(config), "utf-8")
    return to / folder.name


def found(folder: Path, target: Target = HERE) -> dict[str, str]:
    return {one.field: one.level for one in triton_lint.lint(folder, 1, target)}


def set_dims(config: Any, *dims: int) -> None:
    config.input[0].dims[:] = dims


WRONG: Mapping[str, tuple[Callable[[Any], object], str]] = {
    "a name that is not the folder's": (lambda c: setattr(c, "name", "other"), "name"),
    "a version that is not served": (lambda c: c.version_policy.specific.versions.__setitem__(0, 7), "version_policy"),
    "an unknown input": (lambda c: setattr(c.input[0], "name", "z"), "input"),
    "an unknown output": (lambda c: setattr(c.output[0], "name", "z"), "output"),
    "another type": (lambda c: setattr(c.input[0], "data_type", model_config_pb2.TYPE_INT8), "input[x].data_type"),
    "dims with the batch": (lambda c: set_dims(c, -1, 4), "input[x].dims"),
    "other dims": (lambda c: set_dims(c, 5), "input[x].dims"),
    "a preferred batch above the largest": (
        lambda c: c.dynamic_batching.preferred_batch_size.append(33), "dynamic_batching.preferred_batch_size"),
    "batching of a fixed batch": (lambda c: setattr(c, "max_batch_size", 0), "dynamic_batching"),
    "no warm-up": (lambda c: c.ClearField("model_warmup"), "model_warmup"),
    "a queue policy": (
        lambda c: setattr(c.dynamic_batching.default_queue_policy, "default_timeout_microseconds", 100),
        "dynamic_batching.default_queue_policy"),
    "a GPU on a server without one": (
        lambda c: setattr(c.instance_group[0], "kind", triton_lint.GPU_KIND), "instance_group.kind"),
    "no instances": (lambda c: setattr(c.instance_group[0], "count", 0), "instance_group.count"),
    "an accelerator of a GPU on a CPU": (
        lambda c: c.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt"),
        "optimization.execution_accelerators"),
    "labels that are not there": (
        lambda c: setattr(c.output[0], "label_filename", "none.txt"), "output[y].label_filename"),
    "an unknown backend": (lambda c: setattr(c, "backend", "fast"), "files"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_fault_has_its_finding(deployed: tuple[deploy.Request, deploy.Result], tmp_path: Path, case: str) -> None:
    change, field = WRONG[case]
    folder = deployed[1].repository / "small"
    assert found(folder) == {}
    assert field in found(spoiled(folder, tmp_path, change))


def test_a_configuration_with_an_unknown_field(deployed: tuple[deploy.Request, deploy.Result], tmp_path: Path) -> None:
    folder = spoiled(deployed[1].repository / "small", tmp_path, lambda c: None)
    with (folder / "config.pbtxt").open("a") as file:
        file.write("max_bath_size: 3\n")
    findings = triton_lint.lint(folder, 1, Target())
    assert len(findings) == 1 and "max_bath_size" in findings[0].found


def test_a_plan_on_a_gpu_is_in_order_but_for_its_kind(plan: Path) -> None:
    assert found(plan, GPU) == {"backend": "warning"}  # Triton's backend was built against TensorRT
    assert "instance_group.kind" in found(plan)  # a server without a GPU


@pytest.mark.parametrize(("case", "change", "field"), [
    ("a batch above the profile", lambda c: setattr(c, "max_batch_size", 64), "max_batch_size"),
    ("on a CPU", lambda c: setattr(c.instance_group[0], "kind", CPU), "instance_group.kind")])
def test_faults_of_a_plan(plan: Path, tmp_path: Path, case: str, change: Callable[[Any], object], field: str) -> None:
    assert field in found(spoiled(plan, tmp_path, change), GPU)


def test_a_plan_larger_than_the_memory(plan: Path) -> None:
    assert found(plan, Target(True, gpu_memory_bytes=1000))["plan"] == "error"


@pytest.mark.parametrize(("target", "level"), [
    (Target(True, "25.01", "9.0"), None), (Target(True, "24.10", "9.0"), "error"), (Target(True, "25.10"), "warning"),
    (Target(True), "warning"), (Target(True, "25.01", "8.6"), "error")])
def test_a_plan_and_the_tensorrt_of_the_server(plan: Path, tmp_path: Path, target: Target, level: str | None) -> None:
    """As a plan of TensorRT 10.8 for compute capability 9.0, which Triton 25.01 has."""
    folder = spoiled(plan, tmp_path, lambda c: None)
    described = json.loads((folder / "1/deployment.json").read_bytes())
    described["engine"]["key"] |= {"runtime": "tensorrt", "version": "10.8.0.43", "compute_capability": "9.0"}
    (folder / "1/deployment.json").write_text(json.dumps(described))
    assert found(folder, target).get("plan") == level


@pytest.mark.parametrize(("release", "level"), [("25.01", None), ("26.06", None), ("24.10", "error")])
def test_a_version_compatible_plan_needs_a_flag_of_the_server_and_no_earlier_one(
        plan: Path, tmp_path: Path, release: str, level: str | None) -> None:
    """A plan of TensorRT 10.8, which 25.01 has; 24.10 has 10.5, 26.06 has 11.1."""
    folder = spoiled(plan, tmp_path, lambda c: None)
    described = json.loads((folder / "1/deployment.json").read_bytes())
    described["engine"]["key"] |= {"runtime": "tensorrt", "version": "10.8.0.43"}
    described["engine"]["key"]["options"]["version_compatible"] = True
    (folder / "1/deployment.json").write_text(json.dumps(described))
    flag, *others = (f for f in triton_lint.lint(folder, 1, Target(True, release)) if f.field == "plan")
    assert flag.level == "warning" and "version-compatible=true" in flag.expected
    assert [f.level for f in others] == ([level] if level else [])


def test_a_latency_limit_that_cannot_be_measured(plan: Path) -> None:
    request = deploy.Request(str(plan.parents[2] / "small.onnx"), plan.parents[2], runtime="tensorrt-rtx",
                             max_latency_ms=5)
    with pytest.raises(UsageError, match="was not measured, as it does not run here"):
        deploy.deploy(request)


@pytest.mark.parametrize(("runtime", "precision", "name", "parameters"), [
    ("onnxruntime", "fp32", "cuda", {"use_tf32": "0"}), ("onnxruntime", "tf32", "cuda", {"use_tf32": "1"}),
    ("onnxruntime-tensorrt", "fp16", "tensorrt", {
        "trt_profile_min_shapes": "images:1x224x224x3", "trt_profile_opt_shapes": "images:8x224x224x3",
        "trt_profile_max_shapes": "images:32x224x224x3", "max_workspace_size_bytes": "1024"})])
def test_on_a_gpu_the_accelerator_gets_what_the_engine_was_built_with(
        runtime: str, precision: str, name: str, parameters: dict[str, str]) -> None:
    images, logits = (TensorSpec(n, np.dtype("float32"), s) for n, s in (("images", (None, 224, 224, 3)),
                                                                         ("logits", (None, 10))))
    asked = triton_config.Served("net", 1, runtime, precision, "cuda:1", "", (images,), (logits,),
                                 triton_config.Batching(32), profiles=(Profile(1, 8, 32),), workspace_bytes=1024)
    config = triton_config.config(asked)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == (name, parameters)
    assert [list(group.gpus) for group in config.instance_group] == [[1]]


def test_for_a_cluster(deployed: tuple[deploy.Request, deploy.Result], tmp_path: Path) -> None:
    request, _ = deployed
    asked = {"server": "kserve", "storage_uri": "s3://models/small"}
    made = deploy.deploy(deploy.Request(request.model, request.out, tmp_path / "models", **asked))  # type: ignore[arg-type]
    assert made.service == tmp_path / kserve.FILE
    predictor = json.loads(made.service.read_bytes())["spec"]["predictor"]
    assert predictor["scaleTarget"] >= 2 and predictor["model"]["storageUri"] == "s3://models/small"
    assert model_repository.live(tmp_path / "models/small") == 1


@pytest.mark.parametrize("asked", [
    {"server": "kserve"}, {"server": "kserve", "storage_uri": "ftp://models"}, {"storage_uri": "s3://models/small"},
    {"server": "torchserve"}])
def test_for_a_cluster_that_cannot_be(deployed: tuple[deploy.Request, deploy.Result], tmp_path: Path,
                                      asked: dict[str, str]) -> None:
    request, _ = deployed
    with pytest.raises(UsageError):
        deploy.deploy(deploy.Request(request.model, request.out, tmp_path / "models", **asked))  # type: ignore[arg-type]
    assert not (tmp_path / "models").exists()


def test_a_plan_was_not_measured_for_a_cluster(plan: Path, tmp_path: Path) -> None:
    folder = plan.parents[1]
    with pytest.raises(UsageError, match="on a machine that runs it"):
        deploy.deploy(deploy.Request(str(folder), folder.parent, tmp_path / "models", runtime="tensorrt-rtx",
                                     server="kserve", storage_uri="s3://models/small"))


def test_what_lint_refuses_is_not_deployed(deployed: tuple[deploy.Request, deploy.Result], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    request, _ = deployed
    right = triton_config.config
    monkeypatch.setattr(triton_config, "config", lambda s: (made := right(s), set_dims(made, 9))[0])
    with pytest.raises(CheckFailed, match=r"\[9\]; expected \[4\]"):
        deploy.deploy(deploy.Request(request.model, request.out, tmp_path / "models"))
    assert list((tmp_path / "models").iterdir()) == []
