"""Deploy stage: a verified engine to a model of a Triton repository, looked over before it ships.

Read downward: the engine is found, or built, and verified; how it is to be batched is measured and chosen; its version
is made beside the repository, linted, and put in place by one rename. An export that takes raw pixels also gets an
ensemble that resizes them. `--check` and `--load` prove what is served.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np

from engines import model_file
from engines import receipt as receipts
from engines.errors import ServerError, StaleEngine, VerifyFailed
from engines.receipt import Receipt
from engines.runtime import BuildRequest, TensorSpec
from export.errors import CheckFailed, UsageError
from pipeline import (
    artifact,
    build,
    capacity,
    environment,
    kserve,
    load_record,
    model_repository,
    served,
    triton_config,
    triton_releases,
    verify,
    workspace,
)
from pipeline.capacity import Choice
from pipeline.export import MODEL, REFERENCE, Progress
from pipeline.model_repository import DEPLOYMENT, PROOF, Repository
from pipeline.serve import REPOSITORY
from pipeline.served import Endpoint
from pipeline.triton_config import BACKENDS, LABELS, MODEL_FILES, Served
from pipeline.triton_lint import Finding, Target, lint
from pipeline.workspace import ENGINES

SERVERS = ("triton", "kserve")
CAPACITY = "capacity"
RELOAD_SECONDS = 20
RESIZE, IMAGE = "_resize", "_image"
IN_NAMES = "A-Za-z0-9_.-"  # what a URL takes as it is
RESIZED_AT_ONCE = 1024  # more than any network takes, so that the resizing is the same for all of them


@dataclass(frozen=True)
class Request:
    """What a user asks for. `repository` None: `model_repository` of the artifact. `name` None: the artifact's, with _
    for what a URL does not take. `labels`: a file with a line for each class. `reload`: the URL of a server of this
    repository, which is told, and asked over its `grpc_port` too. `server`: `triton`, or `kserve`, which takes the
    repository from `storage_uri` and runs `min_replicas` (0: none without requests) to `max_replicas` of it.
    `triton_release`: the server's container, such as `25.01`."""

    model: str
    out: Path = Path("artifacts")
    repository: Path | None = None
    name: str | None = None
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    device: str = "cpu"
    max_latency_ms: float | None = None
    version: int | None = None
    labels: Path | None = None
    response_cache: bool = False
    reload: str | None = None
    grpc_port: int | None = None
    server: str = "triton"
    storage_uri: str | None = None
    min_replicas: int = 1
    max_replicas: int = 8
    triton_release: str | None = None


@dataclass(frozen=True)
class Result:
    """`choice` and `engine` None after a rollback. `models`: name -> version that is live. `service`: the file of the
    InferenceService, for KServe."""

    repository: Path
    models: Mapping[str, int]
    engine: Receipt | None = None
    choice: Choice | None = None
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    service: Path | None = None


@dataclass(frozen=True)
class Ready:
    """An engine that may be deployed: `file` is what the server gets, `path` the engine that was verified."""

    folder: Path
    manifest: Mapping[str, Any]
    receipt: Receipt
    wish: BuildRequest
    path: Path
    file: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...]


def deploy(request: Request, progress: Progress = lambda step: None) -> Result:
    """Raises UsageError, WorkspaceError, VerifyFailed, CheckFailed for lint errors, ServerError for a refused reload:
    the repository is then as it was."""
    _check(request)
    at = _server(request)
    ready = _ready(request, progress)
    choice = _chosen(request, ready, progress)
    name = _name(request.name, ready.manifest)
    where = request.repository or ready.folder / REPOSITORY
    service = _service(request, ready, name, choice) if request.server == "kserve" else None
    with model_repository.opened(where) as repository:
        progress("put into the repository")
        there = [*model_repository.versions(repository.folder / name), *(at.states(name) if at else ())]
        version = request.version or max([0, *there]) + 1
        config = triton_config.config(_served(request, ready, name, version, choice))
        staged = repository.stage(config, lambda folder: _write(request, ready, choice, folder))
        findings = lint(staged, version, _target(request)) + _same_interface(repository.folder / name, config)
        _accept(findings)
        before, after = _beside(repository, ready, config)
        manifest = None if service is None else repository.stage_text(kserve.FILE, service)
        _put(repository, (*before, staged, *after), at, progress)
        if manifest is not None:
            manifest = manifest.replace(repository.folder.with_name(kserve.FILE))
        live = {one: model_repository.live(where / one) or 0 for one in (name, f"{name}{RESIZE}", f"{name}{IMAGE}")
                if (where / one).is_dir()}
    return Result(where, live, ready.receipt, choice, findings, ready.notes, manifest)


def _check(request: Request) -> None:
    if request.runtime not in BACKENDS:
        raise UsageError(f"runtime {request.runtime!r}", "Triton has no backend for it here",
                         f"one of {', '.join(BACKENDS)}")
    if request.server not in SERVERS or (request.server == "kserve") != (request.storage_uri is not None):
        raise UsageError(f"server {request.server!r}", "with a storage URI" if request.storage_uri else "without a "
                         "storage URI", "triton, or kserve with the --storage-uri that the cluster reads")
    if request.triton_release is not None:
        triton_releases.find(request.triton_release)
    if request.name is not None and not re.fullmatch(f"[A-Za-z0-9][{IN_NAMES}]*", request.name):
        raise UsageError(f"name {request.name!r}", "not a name of a model", "letters, digits, _, - and ., the first a "
                         "letter or digit")
    if request.labels is not None and not request.labels.is_file():
        raise UsageError(f"labels {request.labels}", "no such file", "a file with a line for each class")


def _name(asked: str | None, manifest: Mapping[str, Any]) -> str:
    """What the server calls the model: Triton's HTTP finds none whose name has to be quoted in a URL."""
    return asked or re.sub(f"[^{IN_NAMES}]", "_", manifest["name"]).lstrip("_.-") or "model"


def _server(request: Request) -> Endpoint | None:
    """The one that is to be told. Raises UsageError."""
    return None if request.reload is None else served.endpoint(request.reload, request.grpc_port)


# --- the engine ------------------------------------------------------------------------------------------------

def _ready(request: Request, progress: Progress) -> Ready:
    folder = artifact.folder_of(request.model, request.out, progress)
    if _engine(request, folder) is None:
        build.build(build.Request(str(folder), request.out, (request.runtime,), (request.precision,), request.device),
                    progress)
    found = _engine(request, folder)
    if found is None:
        raise UsageError(f"engine {request.runtime} {request.precision}", "none of this artifact's model", "one",
                         f"python -m pipeline.build {request.model} --runtime {request.runtime}")
    made, model = found
    notes = _verified(request, folder, made, progress)
    wish = receipts.request_of(made, model)
    path = receipts.check(folder / ENGINES, made)
    with workspace.opened(folder) as held:
        manifest = artifact.manifest_of(held)
    if MODEL_FILES[BACKENDS[request.runtime][0]] == MODEL:  # optimized for this machine, the engine is for no other
        source = model_file.read(model)
        return Ready(folder, manifest, made, wish, path, model, source.inputs, source.outputs, notes)
    inputs, outputs = (tuple(map(TensorSpec.of, made.details.get(kind) or manifest[kind]))
                       for kind in ("inputs", "outputs"))
    return Ready(folder, manifest, made, wish, path, path, inputs, outputs, notes)


def _engine(request: Request, folder: Path) -> tuple[Receipt, Path] | None:
    """The newest intact engine of the runtime, precision and device, and the form of the model it was made of."""
    with workspace.opened(folder) as held:
        models = {digest: folder / name for name, digest in artifact.manifest_of(held)["files"].items()}
    for made in sorted(receipts.every(folder / ENGINES), key=lambda r: r.date, reverse=True):
        wanted = (made.key["runtime"], made.key["precision"]) == (request.runtime, request.precision)
        if wanted and made.key["target"] == request.device and made.key["model_sha256"] in models:
            with contextlib.suppress(StaleEngine):
                receipts.check(folder / ENGINES, made)
                return made, models[made.key["model_sha256"]]
    return None


def _verified(request: Request, folder: Path, made: Receipt, progress: Progress) -> tuple[str, ...]:
    """What is to be said of an engine that cannot run here. Raises VerifyFailed."""
    asked = verify.Request(str(folder), request.out, (request.runtime,), (request.precision,))
    row = next(row for row in verify.verify(asked, progress).rows if row.file == made.file)
    if row.status == "failed":
        raise VerifyFailed(f"{row.runtime} {row.precision}", row.reason, "an engine that verify passes",
                           "it was not deployed")
    return () if row.status == "passed" else (f"not verified here: {row.reason}",)


def _chosen(request: Request, ready: Ready, progress: Progress) -> Choice:
    batched = all(s.shape and s.shape[0] is None for s in (*ready.inputs, *ready.outputs))
    if ready.notes and request.max_latency_ms is not None:
        raise UsageError(f"max-latency-ms {request.max_latency_ms:g}", f"{ready.receipt.file} was not measured, as it "
                         "does not run here", "no limit, or a machine that runs it", "deploy it there")
    if ready.notes:
        profiles = ready.wish.profiles
        return capacity.unmeasured(max(p.max for p in profiles), tuple(sorted({p.opt for p in profiles})), batched)
    cases = verify.load_reference(ready.folder / REFERENCE)
    kept = ready.folder / CAPACITY / f"{Path(ready.receipt.file).stem}.json"
    curve = capacity.measured(ready.wish, ready.path, ready.receipt, cases, kept, progress)
    return capacity.choose(curve, request.max_latency_ms, capacity.machine_memory(request.device), batched)


# --- a version -------------------------------------------------------------------------------------------------

def _served(request: Request, ready: Ready, name: str, version: int, choice: Choice) -> Served:
    return Served(name, version, request.runtime, request.precision, request.device, ready.receipt.sha256, ready.inputs,
                  ready.outputs, choice.batching, request.labels is not None, request.response_cache,
                  ready.wish.profiles, ready.wish.options.workspace_bytes)


def _write(request: Request, ready: Ready, choice: Choice, folder: Path) -> None:
    """The files of a version: the model, its labels, what it was made of, and a request that proves it."""
    shutil.copyfile(ready.file, folder / MODEL_FILES[BACKENDS[request.runtime][0]])
    if request.labels is not None:
        shutil.copyfile(request.labels, folder / LABELS)
    rows = choice.batching.max_batch and 1
    _prove(ready, folder, rows)
    described = {
        "format": 1, "engine": asdict(ready.receipt), "inputs": [spec.described() for spec in ready.inputs],
        "outputs": [spec.described() for spec in ready.outputs], "limit": verify.LIMITS[request.precision],
        "choice": asdict(choice), "max_latency_ms": request.max_latency_ms}
    (folder / DEPLOYMENT).write_text(json.dumps(described, indent=1) + "\n", "utf-8")


def _prove(ready: Ready, folder: Path, rows: int) -> None:
    cases = verify.load_reference(ready.folder / REFERENCE)
    count = rows or (ready.inputs[0].shape[0] if ready.inputs[0].shape else None) or 1
    arrays = {f"{kind}/{name}": array for kind, part in zip(("input", "output"), cases, strict=True)
              for name, array in verify.cycled(part, count).items()}
    with (folder / PROOF).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _target(request: Request) -> Target:
    """The server that it is for: a GPU's memory and kind are read where there is one."""
    if request.device == "cpu":
        return Target(BACKENDS[request.runtime][0] == "tensorrt", request.triton_release)
    from engines.machine import gpu

    return Target(True, request.triton_release, gpu(request.device)[1], capacity.machine_memory(request.device))


def _same_interface(folder: Path, config: Any) -> tuple[Finding, ...]:
    """Clients of the live version, and ensembles over it, go on with the new one."""
    if model_repository.live(folder) is None:
        return ()
    earlier = triton_config.read(folder / triton_config.CONFIG)

    def interface(one: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
        return {f"{kind} {t.name}": (t.data_type, tuple(t.dims)) for kind in ("input", "output")
                for t in getattr(one, kind)}

    was, now = interface(earlier), interface(config)
    return tuple(Finding("error", f"{folder.name}/{triton_config.CONFIG}", name, str(now.get(name)),
                         f"{was.get(name)} of the live version", "deploy it under another --name")
                 for name in sorted({*was, *now}) if was.get(name) != now.get(name))


def _accept(findings: tuple[Finding, ...]) -> None:
    """Raises CheckFailed with the first error."""
    errors = [f for f in findings if f.level == "error"]
    if errors:
        one = errors[0]
        raise CheckFailed(f"{one.file}, {one.field}", one.found, one.expected,
                          f"{one.mend}; {len(errors)} errors in all, nothing was deployed")


# --- a cluster -------------------------------------------------------------------------------------------------

def _service(request: Request, ready: Ready, name: str, choice: Choice) -> str:
    """KServe's manifest of a replica as it was measured. Raises UsageError for an engine that was not measured."""
    if not choice.images_per_second:
        raise UsageError(f"engine {ready.receipt.file}", "was not measured, as it does not run here",
                         "throughput and memory, which a replica is asked for by",
                         "deploy it with --server kserve on a machine that runs it")
    batching = choice.batching
    cores = batching.instances * batching.threads if request.device == "cpu" else environment.usable_cores()
    return kserve.text(kserve.inference_service(kserve.Service(
        name=kserve.service_name(name), storage_uri=request.storage_uri or "", cpu=cores,
        memory_bytes=choice.memory_bytes + capacity.SERVER_BYTES, gpus=0 if request.device == "cpu" else 1,
        concurrency=choice.in_flight, min_replicas=request.min_replicas, max_replicas=request.max_replicas,
        hard_limit=None if request.max_latency_ms is None else choice.in_flight,
        runtime_version=request.triton_release and f"{request.triton_release}-py3",
        labels={"app.kubernetes.io/managed-by": "enginesmith", "enginesmith/precision": request.precision},
        annotations={"enginesmith/engine-sha256": ready.receipt.sha256})))


# --- raw pixels ------------------------------------------------------------------------------------------------

def _beside(repository: Repository, ready: Ready, config: Any) -> tuple[list[Path], list[Path]]:
    """`<name>_image`: uint8 images of any size in, resized, normalised inside of the network. What has to be put before
    the network, and what after it: an ensemble may never take more images at a time than its network."""
    if ready.manifest.get("preprocess", "none") == "none" or not config.max_batch_size:
        return [], []
    from export import resize

    name, spec = config.name, ready.inputs[0]
    height, width = (n for n in spec.shape[1:] if n not in (None, 3))
    nchw = ready.manifest.get("layout") == "nchw"
    image = TensorSpec(spec.name, spec.dtype, (None, None, None, 3))
    resized = TensorSpec(f"{spec.name}_resized", spec.dtype, spec.shape)
    resizing = triton_config.config(Served(f"{name}{RESIZE}", 1, "onnxruntime", "fp32", "cpu", "", (image,), (resized,),
                                           triton_config.Batching(RESIZED_AT_ONCE, threads=1)))
    del resizing.model_warmup[1:]  # of the many that it may take
    whole = triton_config.ensemble(f"{name}{IMAGE}", 1, (resizing, config))
    ensemble = repository.folder / whole.name
    shrinks = model_repository.live(ensemble) is not None and triton_config.read(
        ensemble / triton_config.CONFIG).max_batch_size > whole.max_batch_size
    before = _changed(repository, resizing, lambda folder: resize.write(folder / MODEL, spec.name, height, width, nchw))
    after = _changed(repository, whole, lambda folder: None)
    return (before + after, []) if shrinks else (before, after)


def _changed(repository: Repository, made: Any, write: Callable[[Path], object]) -> list[Path]:
    """A staged version of a model that goes with a network, if it is another than the live one."""
    folder = repository.folder / made.name
    if model_repository.live(folder) is not None:
        last = triton_config.read(folder / triton_config.CONFIG)
        last.parameters.pop(triton_config.BEFORE, None)
        last.version_policy.CopyFrom(made.version_policy)
        if last == made:
            return []
        made.version_policy.specific.versions[:] = [max(model_repository.versions(folder)) + 1]
    return [repository.stage(made, write)]


# --- a server that runs ----------------------------------------------------------------------------------------

def _put(repository: Repository, staged: tuple[Path, ...], at: Endpoint | None, progress: Progress) -> None:
    """Makes staged versions live. What a server `at` refuses, or answers wrongly then, is taken out again, with all
    that came before it. Raises ServerError."""
    done: list[tuple[str, int]] = []
    try:
        for one in staged:
            name, version = one.name, next(int(path.name) for path in one.iterdir() if path.is_dir())
            done.append((name, version))
            _change(repository, at, name, version, partial(repository.put, one), progress)
    except BaseException:  # Ctrl-C too
        for name, version in reversed(done):
            _take_back(repository, name, version, at)
        raise


def _take_back(repository: Repository, name: str, version: int, at: Endpoint | None) -> None:
    """Makes the version before live again."""
    folder = repository.folder / name
    if not (folder / str(version)).exists():  # it did not come to that
        return
    if model_repository.live(folder) == version:
        for copy in model_repository.configurations(folder)[1:2]:
            repository.revert(name, int(copy.parent.name))
    repository.drop(name, version)
    if at is not None and folder.exists():
        at.load(name)
    elif at is not None:
        at.unload(name)


def _change(repository: Repository, at: Endpoint | None, name: str, version: int, change: Callable[[], object],
            progress: Progress) -> None:
    """Has `change` make a version live, and sees that a server `at` serves it. Raises ServerError."""
    known = {} if at is None else _settled(at, name, version)
    change()
    if at is None:
        return
    progress(f"reload {name}")
    refused = _refused(at, name, version, known) or _wrong(at, name, repository.folder / name / str(version))
    if refused is not None:
        raise ServerError(f"model {name}", refused, "a version that loads and answers rightly",
                          "the repository is as it was")


def _settled(at: Endpoint, name: str, version: int) -> dict[int, tuple[str, str]]:
    """What the server says of the versions; not while it unloads this one, whose end would look like a refusal."""
    deadline = monotonic() + RELOAD_SECONDS
    while (found := at.states(name)).get(version, ("", ""))[0] == "UNLOADING" and monotonic() < deadline:
        sleep(0.1)
    return found


def _refused(at: Endpoint, name: str, version: int, known: Mapping[int, tuple[str, str]]) -> str | None:
    """Waits until the server has the version; the reason, if it refuses. A server of `serve` sees by itself what was
    put, at its next look; `known` is what it said before."""
    said, deadline = at.load(name), monotonic() + RELOAD_SECONDS
    while True:
        state, reason = now = at.states(name).get(version, ("", ""))
        if state == "READY":
            return None
        if state == "UNAVAILABLE" and now != known.get(version):
            return reason or said or "it was unloaded"
        if state != "LOADING" and monotonic() > deadline:
            return said or reason or f"version {version} is not there after {RELOAD_SECONDS} s"
        sleep(0.1)


def _wrong(at: Endpoint, name: str, version: Path) -> str | None:
    """What is wrong with the numbers of a version that was just loaded, if it carries a reference. Raises
    ServerError."""
    if (version / PROOF).exists():
        try:
            served.proof(at, name, version, served.TIMEOUT_SECONDS)
        except VerifyFailed as failed:
            return str(failed)
    return None


def rollback(request: Request) -> Result:
    """Makes the version that was live before the live one live again, or `version`. Raises UsageError, ServerError."""
    folder = Path(request.model)
    if not (folder / workspace.MANIFEST).exists():
        folder = artifact.folder_of(request.model, request.out, lambda step: None)
    where = request.repository or folder / REPOSITORY
    name = _name(request.name, json.loads((folder / workspace.MANIFEST).read_bytes()))
    at = _server(request)
    with model_repository.opened(where) as repository:
        was, now = model_repository.live(where / name), model_repository.earlier(where / name, request.version)
        then = triton_config.read(where / name / str(now) / triton_config.CONFIG)
        image = _ensemble_within(where / f"{name}{IMAGE}", then.max_batch_size)
        changes = [(name, now)] if image is None else [(f"{name}{IMAGE}", image), (name, now)]
        before = {one: model_repository.live(where / one) for one, _ in changes}
        try:
            for one, version in changes:
                _change(repository, at, one, version, partial(repository.revert, one, version), lambda step: None)
        except BaseException:
            for one, earlier in before.items():
                if earlier is not None:
                    repository.revert(one, earlier)
                    if at is not None:
                        at.load(one)
            raise
    return Result(where, {name: now}, notes=(f"version {was} stays in the repository",))


def _ensemble_within(folder: Path, largest: int) -> int | None:
    """The newest version of an ensemble that takes no more images at a time than its network; None if the live one does
    or there is none."""
    def fits(config: Path) -> bool:
        return bool(triton_config.read(config).max_batch_size <= largest)

    if model_repository.live(folder) is None or fits(folder / triton_config.CONFIG):
        return None
    copies = ((v, folder / str(v) / triton_config.CONFIG) for v in reversed(model_repository.versions(folder)))
    return next((version for version, copy in copies if fits(copy)), None)


# --- what is served --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CheckRequest:
    """What a user asks for of a server at `url`. `transports` empty: all."""

    model: str
    out: Path
    name: str | None
    url: str
    grpc_port: int | None = None
    max_error: float | None = None
    load: bool = False
    clients: tuple[int, ...] = served.CLIENTS
    transports: tuple[str, ...] = ()
    seconds: float = 3.0


@dataclass(frozen=True)
class Checked:
    """`load` and `path` None where no load test was asked for, or the check failed before."""

    rows: tuple[served.Row, ...]
    load: load_record.Load | None = None
    path: Path | None = None

    def require(self) -> None:
        """Raises VerifyFailed."""
        served.require(self.rows)


def check(request: CheckRequest, progress: Progress = lambda step: None) -> Checked:
    """Compares what a server answers with the reference, then measures it under load. Raises ServerError."""
    wrong = sorted(set(request.transports) - set(served.TRANSPORTS))
    if wrong or min(request.clients) < 1:
        raise UsageError(f"transport {wrong[0]!r}" if wrong else "clients", "unknown" if wrong else "0",
                         f"of {', '.join(served.TRANSPORTS)}" if wrong else "1 and more")
    folder = artifact.folder_of(request.model, request.out, progress)
    with workspace.opened(folder) as held:
        manifest = artifact.manifest_of(held)
    cases = verify.load_reference(folder / REFERENCE)
    name, at = _name(request.name, manifest), served.endpoint(request.url, request.grpc_port)
    config = at.configuration(name)
    limit = served.limit_of(config) if request.max_error is None else request.max_error
    wire = sorted({"grpc" if one == "shared-memory" else one for one in request.transports or served.TRANSPORTS})
    rows = served.check(at, config, cases, limit, wire, progress)
    if manifest.get("preprocess", "none") != "none" and config.max_batch_size:
        rows += served.check(at, at.configuration(f"{name}{IMAGE}"), cases, limit, wire, progress)
    if not request.load or any(row.status == "failed" for row in rows):
        return Checked(rows)
    made, path = served.load(at, request.url, config, manifest, cases, request.clients,
                             request.transports or served.reachable(at), request.seconds, folder / load_record.LOADS,
                             progress)
    return Checked(rows, made, path)


if __name__ == "__main__":
    from pipeline.cli import run_stage

    run_stage("deploy")
