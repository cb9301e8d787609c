"""A KServe `InferenceService` for a Triton model repository, and its check against KServe's published schema.

The storage initializer copies `storageUri` to /mnt/models, which KServe's `kserve-tritonserver` runtime serves: the URI
is that of the repository, and its models keep the names that they have in it (/v2/models/resnet_v2_50), whatever the
service is called. The number of replicas follows the requests in flight. That is the Knative autoscaler, so the service
needs KServe's Knative mode: without Knative, KServe scales by CPU and memory alone.

https://kserve.github.io/website/docs/model-serving/predictive-inference/autoscaling/kpa-autoscaler (0.16)
https://kserve.github.io/website/docs/model-serving/predictive-inference/frameworks/triton/torchscript
https://github.com/kserve/kserve/blob/master/config/runtimes/kserve-tritonserver.yaml
https://knative.dev/docs/serving/autoscaling/concurrency
kserve_schema.json says which source it was cut from; every field was looked up in the `kserve` SDK 0.21.0 too.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.runtime import missing
from export.errors import UsageError

try:
    import jsonschema
except ImportError as error:
    raise missing("jsonschema", "deploy") from error

FILE = "inference_service.json"
SCHEMA = "kserve_schema.json"
API_VERSION, KIND = "serving.kserve.io/v1beta1", "InferenceService"
# the format `triton` is a whole repository with its config.pbtxt; the runtime's `tensorrt` means TensorRT 8
FORMAT, RUNTIME, PROTOCOL = "triton", "kserve-tritonserver", "v2"
GPU = "nvidia.com/gpu"
MEBIBYTE = 2**20
# KServe's webhook wants a letter first; its Knative service is `<name>-predictor`, which has to be a DNS label too
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = 63
LONGEST = LABEL - len("-predictor")
# what the default ClusterStorageContainer and KServe's pod webhook take, but for file://, a path inside of the image;
# Azure's https://<account>.blob.core.windows.net/... is among the https ones
SCHEMES = ("gs", "s3", "hdfs", "webhdfs", "hf", "pvc", "oci", "https", "http")
WEB = re.compile(r"https?://[^\s/]+/\S+")  # a file or an archive, never a bare host
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # of a container image
# https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set
QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LONGEST_PREFIX = 253
# https://kubernetes.io/docs/concepts/overview/working-with-objects/annotations
ANNOTATIONS = 256 * 1024  # bytes of all keys and values
INTEGERS = {"int32": 31, "int64": 63}  # a format of the schema -> bits beside the sign


@dataclass(frozen=True)
class Service:
    """What is to run, in numbers that were measured. `cpu`, `memory_bytes` and `gpus` are of one replica, the server
    included. `concurrency`: requests in flight that one replica answers within the latency limit; a burst may exceed
    it. `hard_limit`: more than these wait in front of the server; None: no limit but Triton's own queue.
    `min_replicas` 0 lets it scale to zero. `runtime_version`: the tag of Triton's container; None: the cluster's, which
    need not be the release that a TensorRT plan was built for."""

    name: str
    storage_uri: str
    cpu: int
    memory_bytes: int
    gpus: int
    concurrency: int
    max_replicas: int = 8
    min_replicas: int = 1
    runtime_version: str | None = None
    hard_limit: int | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


# --- the manifest ----------------------------------------------------------------------------------------------

def service_name(model: str) -> str:
    """`resnet_v2_50` -> `resnet-v2-50`. Raises UsageError where that is not a name that KServe takes."""
    return _name(model.lower().replace("_", "-").replace(".", "-"))


def inference_service(service: Service) -> dict[str, Any]:
    """The manifest, valid. Raises UsageError for a field that Kubernetes or KServe would refuse."""
    _numbers(service)
    resources = _resources(service)
    # Kubernetes wants requests and limits of a GPU to be equal; equal ones of CPU and memory too keep what was measured
    model: dict[str, Any] = {
        "modelFormat": {"name": FORMAT}, "runtime": RUNTIME, "protocolVersion": PROTOCOL,
        "storageUri": _storage(service.storage_uri), "resources": {"requests": resources, "limits": dict(resources)}}
    if service.runtime_version is not None:
        model["runtimeVersion"] = _tag(service.runtime_version)
    predictor: dict[str, Any] = {
        "minReplicas": service.min_replicas, "maxReplicas": service.max_replicas,
        "scaleMetric": "concurrency", "scaleTarget": service.concurrency}
    if service.hard_limit is not None:
        predictor["containerConcurrency"] = service.hard_limit
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": _metadata(service),
                "spec": {"predictor": {**predictor, "model": model}}}
    validate(manifest)
    return manifest


def text(manifest: Mapping[str, Any]) -> str:
    """JSON, which `kubectl apply -f` takes, and which is YAML as well."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def memory_quantity(count: int) -> str:
    """Bytes as a quantity of Kubernetes, rounded up to mebibytes."""
    return f"{-(-count // MEBIBYTE)}Mi"


def _resources(service: Service) -> dict[str, str]:
    found = {"cpu": str(service.cpu), "memory": memory_quantity(service.memory_bytes)}
    return found | {GPU: str(service.gpus)} if service.gpus else found


def _metadata(service: Service) -> dict[str, Any]:
    made: dict[str, Any] = {"name": _name(service.name)}
    if service.labels:
        made["labels"] = _labels(service.labels)
    if service.annotations:
        made["annotations"] = _annotations(service.annotations)
    return made


# --- what the schema cannot say --------------------------------------------------------------------------------

def _name(name: str) -> str:
    if len(name) > LONGEST or not NAME.fullmatch(name):
        raise UsageError(f"service name {name!r}", "KServe takes no such name",
                         f"a-z, 0-9 and -, a letter first, no - at the end, at most {LONGEST} characters",
                         "choose another --name")
    return name


def _numbers(service: Service) -> None:
    """The rules of KServe's webhook for replicas, and numbers that have to be there at all."""
    least = {"cpu": 1, "memory_bytes": 1, "gpus": 0, "concurrency": 1, "min_replicas": 0,
             "max_replicas": max(1, service.min_replicas), "hard_limit": service.concurrency}
    for name, low in least.items():
        value = getattr(service, name)
        if value is not None and value < low:
            raise UsageError(f"service {name}", str(value), f"{low} or more")


def _storage(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES or not re.fullmatch(r"[^\s/]\S*", rest):
        raise UsageError(f"storage URI {uri!r}", "KServe's storage initializer cannot fetch it",
                         f"one that starts with {', '.join(f'{s}://' for s in SCHEMES)}",
                         "copy the model repository there")
    if scheme in ("https", "http") and not WEB.fullmatch(uri):
        raise UsageError(f"storage URI {uri!r}", "no path after the host", f"{scheme}://HOST/PATH")
    return uri


def _tag(version: str) -> str:
    if not TAG.fullmatch(version):
        raise UsageError(f"runtime version {version!r}", "not a tag of a container image", "such as 25.10-py3")
    return version


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        _key("label", key)
        if value and (len(value) > LABEL or not QUALIFIED.fullmatch(value)):
            raise UsageError(f"label {key}", repr(value), f"at most {LABEL} letters, digits, _, - and ., letters or "
                             "digits at both ends", "a longer text, such as a SHA-256, goes into an annotation")
    return dict(labels)


def _annotations(annotations: Mapping[str, str]) -> dict[str, str]:
    for key in annotations:
        _key("annotation", key)
    size = sum(len(part.encode()) for pair in annotations.items() for part in pair)
    if size > ANNOTATIONS:
        raise UsageError("annotations", f"{size} bytes", f"at most {ANNOTATIONS}")
    return dict(annotations)


def _key(kind: str, key: str) -> None:
    prefix, slash, name = key.rpartition("/")
    right = len(name) <= LABEL and QUALIFIED.fullmatch(name)
    if not right or (slash and (len(prefix) > LONGEST_PREFIX or not PREFIX.fullmatch(prefix))):
        raise UsageError(f"{kind} {key!r}", "not a key of Kubernetes",
                         f"NAME or DOMAIN/NAME; NAME is at most {LABEL} letters, digits, _, - and .")


# --- the schema ------------------------------------------------------------------------------------------------

def validate(manifest: Mapping[str, Any]) -> None:
    """Against KServe's schema, cut to what is written here. Raises UsageError that names the first wrong field."""
    wrong = sorted(_validator().iter_errors(manifest), key=lambda e: (_path(e.absolute_path), e.validator))
    if wrong:
        raise _refused(wrong[0])


@functools.cache
def _validator() -> Any:
    schema = json.loads(Path(__file__).with_name(SCHEMA).read_text("utf-8"))
    formats = jsonschema.FormatChecker(formats=())
    for name, bits in INTEGERS.items():
        formats.checks(name)(functools.partial(_fits, bits))
    return jsonschema.Draft202012Validator(schema, format_checker=formats)


def _fits(bits: int, value: object) -> bool:
    return not isinstance(value, int) or -(2**bits) <= value < 2**bits


def _refused(error: Any) -> UsageError:
    """The error of one field: its JSON path, what was found and what the schema wants there."""
    path, value, rule = list(error.absolute_path), error.instance, error.validator_value
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        name = next(key for key in value if key not in known)
        close = difflib.get_close_matches(str(name), known, 1)
        return _usage([*path, name], "unknown field", f"one of {', '.join(known)}",
                      f"did you mean {close[0]}?" if close else "")
    if error.validator == "required":
        return _usage([*path, next(key for key in rule if key not in value)], "missing", "it, since it is required")
    wanted = {"type": lambda: f"{rule}", "enum": lambda: f"one of {', '.join(map(str, rule))}", "const": lambda: rule,
              "format": lambda: f"a number of format {rule}", "pattern": lambda: f"a text that matches {rule}",
              "anyOf": lambda: " or ".join(choice["type"] for choice in rule)}
    return _usage(path, f"{value!r}", wanted[error.validator]())


def _usage(path: list[Any], found: str, expected: str, remedy: str = "") -> UsageError:
    return UsageError(f"{KIND} {_path(path)}", found, expected, remedy)


def _path(parts: Any) -> str:
    """`$.spec.predictor`, and `['nvidia.com/gpu']` for a key that is no identifier."""
    return "$" + "".join(f".{part}" if str(part).isidentifier() else f"[{part!r}]" for part in parts)
