"""The InferenceService: what is written holds KServe's schema, and what does not is refused by name."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.errors import UsageError
from pipeline import kserve
from pipeline.kserve import Service

CPU = Service("resnet-v2-50", "s3://models/resnet_v2_50", 4, 1_500_000_000, 0, 16)
GPU = replace(CPU, storage_uri="pvc://models/resnet_v2_50", gpus=1, runtime_version="25.10-py3",
              hard_limit=32, min_replicas=0, labels={"enginesmith/precision": "fp16"},
              annotations={"enginesmith/engine-sha256": "0" * 64})
MODEL = ("spec", "predictor", "model")


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The manifest of CPU with another value, or, for None, without the field."""
    manifest = copy.deepcopy(kserve.inference_service(CPU))
    at: Any = manifest
    for part in path[:-1]:
        at = at[part]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return manifest


def test_cpu() -> None:
    manifest = kserve.inference_service(CPU)
    predictor = manifest["spec"]["predictor"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert manifest["metadata"] == {"name": "resnet-v2-50"}
    assert (predictor["scaleMetric"], predictor["scaleTarget"]) == ("concurrency", 16)
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (1, 8)
    assert predictor["model"] == {
        "modelFormat": {"name": "triton"}, "runtime": "kserve-tritonserver", "protocolVersion": "v2",
        "storageUri": "s3://models/resnet_v2_50",
        "resources": {"requests": {"cpu": "4", "memory": "1431Mi"}, "limits": {"cpu": "4", "memory": "1431Mi"}}}
    assert "containerConcurrency" not in predictor


def test_gpu() -> None:
    manifest = kserve.inference_service(GPU)
    predictor = manifest["spec"]["predictor"]
    for kind in ("requests", "limits"):
        assert predictor["model"]["resources"][kind]["nvidia.com/gpu"] == "1"
    assert predictor["model"]["runtimeVersion"] == "25.10-py3"
    assert (predictor["containerConcurrency"], predictor["minReplicas"]) == (32, 0)
    assert manifest["metadata"]["labels"] == {"enginesmith/precision": "fp16"}
    assert manifest["metadata"]["annotations"] == {"enginesmith/engine-sha256": "0" * 64}


def test_schema_is_one() -> None:
    schema = kserve._validator().schema
    jsonschema.Draft202012Validator.check_schema(schema)

    def closed(part: Any) -> bool:
        if isinstance(part, dict):
            return ("properties" not in part or part.get("additionalProperties") is False
                    or not isinstance(part["properties"], dict)) and all(map(closed, part.values()))
        return True

    assert closed(schema)


@pytest.mark.parametrize(("path", "value", "told"), [
    (("spec", "predictor", "scaleTargets"), 1, ["$.spec.predictor.scaleTargets", "unknown", "mean scaleTarget"]),
    ((*MODEL, "storageURI"), "s3://a/b", ["$.spec.predictor.model.storageURI", "did you mean storageUri"]),
    (("spec", "predictor", "scaleTarget"), "16", ["$.spec.predictor.scaleTarget", "'16'", "integer"]),
    (("spec", "predictor", "scaleTarget"), True, ["$.spec.predictor.scaleTarget", "True", "integer"]),
    (("spec", "predictor", "maxReplicas"), 2**31, ["$.spec.predictor.maxReplicas", "2147483648", "int32"]),
    (("spec", "predictor", "scaleMetric"), "qps", ["$.spec.predictor.scaleMetric", "'qps'", "cpu, memory"]),
    ((*MODEL, "resources", "limits", "nvidia.com/gpu"), "one",
     ["$.spec.predictor.model.resources.limits['nvidia.com/gpu']", "'one'", "matches"]),
    ((*MODEL, "resources", "limits", "cpu"), [], ["$.spec.predictor.model.resources.limits.cpu", "integer or string"]),
    ((*MODEL, "modelFormat"), None, ["$.spec.predictor.model.modelFormat", "missing", "required"]),
    (("spec", "predictor"), None, ["$.spec.predictor", "missing"]),
    (("apiVersion",), "serving.kserve.io/v1", ["$.apiVersion", "serving.kserve.io/v1beta1"]),
    (("metadata", "labels"), {"a": 1}, ["$.metadata.labels.a", "1", "string"]),
])
def test_refused(path: tuple[str, ...], value: Any, told: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        kserve.validate(changed(path, value))
    for part in told:
        assert part in str(raised.value)


@pytest.mark.parametrize(("change", "told"), [
    ({"cpu": 0}, "cpu"), ({"memory_bytes": 0}, "memory_bytes"), ({"gpus": -1}, "gpus"), ({"concurrency": 0}, "concurr"),
    ({"min_replicas": -1}, "min_replicas"), ({"max_replicas": 0}, "max_replicas"),
    ({"min_replicas": 3, "max_replicas": 2}, "max_replicas"), ({"hard_limit": 15}, "hard_limit"),
    ({"runtime_version": "25.10 py3"}, "runtime version"),
    ({"name": "resnet_v2_50"}, "service name"), ({"name": "a" * 54}, "53"), ({"name": "resnet\n"}, "service name"),
    ({"labels": {"sha": "0" * 64}}, "annotation"), ({"labels": {"-a": "b"}}, "label '-a'"),
    ({"annotations": {"A.B/c": "d"}}, "annotation 'A.B/c'"), ({"annotations": {"a": "b" * 2**18}}, "bytes"),
])
def test_refused_service(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        kserve.inference_service(replace(CPU, **change))


@pytest.mark.parametrize("uri", [
    "gs://b/m", "s3://b/m", "hdfs://n/m", "webhdfs://n/m", "hf://owner/model", "pvc://claim/m", "pvc://claim",
    "oci://registry/image:1", "https://a.blob.core.windows.net/c/m", "http://host/m.tar.gz"])
def test_storage(uri: str) -> None:
    manifest = kserve.inference_service(replace(CPU, storage_uri=uri))
    assert manifest["spec"]["predictor"]["model"]["storageUri"] == uri


@pytest.mark.parametrize("uri", ["", "models", "/srv/models", "file:///srv/models", "ftp://host/m", "S3://b/m", "s3://",
                                 "s3:///m", "s3://b/ m", "https://host", "https://host/", "s3://b/m\n"])
def test_storage_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="storage URI"):
        kserve.inference_service(replace(CPU, storage_uri=uri))


def test_names() -> None:
    assert kserve.service_name("resnet_v2_50") == "resnet-v2-50"
    assert kserve.service_name("Inception_V3.1") == "inception-v3-1"


@given(st.text() | st.from_regex(r"[a-zA-Z0-9_.-]{1,70}", fullmatch=True))
def test_every_name(model: str) -> None:
    try:
        name = kserve.service_name(model)
    except UsageError:
        return
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) and len(f"{name}-predictor") <= 63
    assert kserve.inference_service(replace(CPU, name=name))["metadata"]["name"] == name


@given(st.integers(1, 2**45))
def test_memory(count: int) -> None:
    quantity = kserve.memory_quantity(count)
    assert quantity.endswith("Mi")
    assert count <= int(quantity[:-2]) * 2**20 < count + 2**20


@pytest.mark.parametrize("service", [CPU, GPU, replace(CPU, annotations={"note": "größer ☃ \"x\"\n"})])
def test_text(service: Service) -> None:
    manifest = kserve.inference_service(service)
    parsed = json.loads(kserve.text(manifest))
    assert parsed == manifest
    kserve.validate(parsed)
