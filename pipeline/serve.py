"""Serve stage: a real Triton Inference Server on a model repository, kept healthy until it is told to stop.

Read downward: the server's own environment is made once; the repository is rendered for this machine; the server is
started on loopback and is ready when every model has answered a real request with the right numbers. Then it is
watched: a new version is loaded, a backend that died is noticed by the same requests, and the server is started again.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil
from filelock import FileLock, Timeout

from engines.errors import EngineError, RuntimeUnavailable, ServerError, ServerTimeout
from export.errors import EnginesmithError, UsageError
from pipeline import model_repository, served, triton_config, workspace
from pipeline.export import Progress
from pipeline.model_repository import DEPLOYMENT
from pipeline.served import LOAD_SECONDS, Endpoint
from pipeline.triton_config import CONFIG

PYTRITON = "0.7.0"  # nvidia-pytriton, which carries tritonserver 2.51
NUMPY = "1.26.4"  # with NumPy 2 this server's Python backend returns empty outputs
EXIT_SECONDS = 10
REPOSITORY = "model_repository"
CONTAINER = ("docker run --rm --gpus all --shm-size 1g -p 8000-8002:8000-8002 -v DIR:/models nvcr.io/nvidia/"
             "tritonserver:YY.MM-py3 tritonserver --model-repository=/models --model-control-mode=explicit "
             "--load-model=*")
Told = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What a user asks for. `folder`: a model repository, or an artifact folder. `listen`: the address that the ports
    are opened on. `health_seconds`: how often a real request is sent. `tritonserver`: an installed server's binary."""

    folder: Path
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    listen: str = "127.0.0.1"
    tritonserver: Path | None = None
    health_seconds: float = 5.0
    home: Path = field(default_factory=lambda: cache_folder())


def serve(request: Request, progress: Progress = lambda step: None, told: Told = lambda line: None) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises UsageError, RuntimeUnavailable, ServerError, or VerifyFailed."""
    ended = suppress(_Stopped, Timeout)  # while its environment was made, or made by another command
    with _signals() as stopped, ended, started(request, progress, told, stopped) as server:
        while not stopped():
            server.watch()
            deadline = time.monotonic() + request.health_seconds
            while time.monotonic() < deadline and not stopped() and not server.changed():
                time.sleep(0.2)
        told("stopping: requests in flight are finished")
    told("stopped")


class _Stopped(Exception):
    """The server's environment was not there yet."""


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came; they interrupt nothing, so that the server can drain."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    earlier = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def started(request: Request, progress: Progress = lambda step: None, told: Told = lambda line: None,
            stopped: Callable[[], bool] = lambda: False) -> Iterator[Server]:
    """A server that is ready, unless `stopped` before; it is stopped at the end of the block. Raises what serve()
    raises."""
    repository = _repository(request.folder)
    for port in (request.http_port, request.grpc_port, request.metrics_port):
        _check_free(request.listen, port)
    with tempfile.TemporaryDirectory(prefix="enginesmith-serve-") as folder:
        install = installed(request, Path(folder), progress, stopped)
        server = Server(request, repository, Path(folder), install, told, stopped)
        try:
            progress("start the server")
            server.start()
            yield server
        finally:
            server.stop()


def _repository(folder: Path) -> Path:
    inner = folder / REPOSITORY
    repository = inner if inner.is_dir() else folder
    model_repository.models(repository)
    return repository


def _check_free(address: str, port: int) -> None:
    if ":" in address:
        raise UsageError(f"listen {address}", "an IPv6 address", "an IPv4 address, e.g. 0.0.0.0 for all")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port} on {address}", str(getattr(error, "strerror", None) or error), "a free port",
                             "give another --http-port, --grpc-port or --metrics-port") from error


# --- the server's own environment ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Install:
    """`command` starts the server; `own`: the one of a package, with the CPU backend, and not an installed one."""

    command: tuple[str, ...]
    variables: dict[str, str]
    own: bool


def cache_folder() -> Path:
    """Where the server's environment is kept: `$XDG_CACHE_HOME/enginesmith`, or `~/.cache/enginesmith`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "enginesmith"


def installed(request: Request, folder: Path, progress: Progress, stopped: Callable[[], bool] = lambda: False
              ) -> Install:
    """The server that is asked for. Raises UsageError or RuntimeUnavailable."""
    if request.tritonserver is not None:
        if not os.access(request.tritonserver, os.X_OK) or request.tritonserver.is_dir():
            raise UsageError(f"tritonserver {request.tritonserver}", "no program", "the server's binary",
                             f"or use its container: {CONTAINER}")
        return Install((str(request.tritonserver.resolve()),), dict(os.environ), own=False)
    if not sys.platform.startswith("linux"):
        raise RuntimeUnavailable("tritonserver", f"none for {sys.platform}", "Linux", CONTAINER)
    environment = _environment(request.home, progress, stopped)
    site = environment / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    server = site / "pytriton/tritonserver"
    backends = _backends(server, folder / "backends")
    libraries = (sysconfig.get_config_var("LIBDIR") or "", str(site / "nvidia_pytriton.libs"))
    variables = dict(os.environ) | {
        "PATH": os.pathsep.join((str(environment / "bin"), os.environ.get("PATH", ""))),
        "LD_LIBRARY_PATH": os.pathsep.join((*libraries, os.environ.get("LD_LIBRARY_PATH", "")))}
    variables.pop("PYTHONPATH", None)  # what is on it is for another NumPy
    return Install((str(server / "bin/tritonserver"), f"--backend-directory={backends}",
                    f"--cache-directory={server / 'caches'}"), variables, own=True)


def _environment(home: Path, progress: Progress, stopped: Callable[[], bool]) -> Path:
    """Made once; a marker that is written last says that it is whole."""
    import onnxruntime  # whichever package it came from

    wanted = (f"numpy=={NUMPY}", f"onnxruntime=={onnxruntime.__version__}")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = home / "-".join(("triton", PYTRITON, "ort", wanted[1].partition("==")[2], "python", python))
    home.mkdir(parents=True, exist_ok=True)
    progress("look for tritonserver")  # which another command may be installing
    with FileLock(place.with_name(place.name + ".lock")).acquire(cancel_check=stopped):
        if (place / ".ready").exists():
            return place
        progress("install tritonserver (once, 330 MB)")
        shutil.rmtree(place, ignore_errors=True)
        pip = (str(place / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        for command in ((sys.executable, "-m", "venv", str(place)), (*pip, *wanted),
                        (*pip, "--no-deps", f"nvidia-pytriton=={PYTRITON}")):
            code, said = _ran(command, stopped)
            if code:
                raise RuntimeUnavailable("tritonserver", f"{command[-1]} could not be installed: "
                                         f"{said.strip().splitlines()[-1:] or ['no message']}"[:300], "",
                                         "see that pip reaches its index, or give --tritonserver PATH")
        (place / ".ready").touch()
    return place


def _ran(command: Sequence[str], stopped: Callable[[], bool]) -> tuple[int, str]:
    """The exit code and stderr of a command that is ended with this one. Ctrl-C is not for it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          start_new_session=True, preexec_fn=_die_with_parent) as process:
        try:
            while not stopped():
                with suppress(subprocess.TimeoutExpired):
                    said = process.communicate(timeout=0.1)[1]
                    return process.returncode, said
            raise _Stopped
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def _backends(server: Path, folder: Path) -> Path:
    """Copies: the backend looks for its stub beside itself, at the real path."""
    python = folder / "python"
    python.mkdir(parents=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for path in (server / "backends/python/libtriton_python.so",
                 server / "backends/python/triton_python_backend_utils.py",
                 server / f"python_backend_stubs/{version}/triton_python_backend_stub"):
        shutil.copy(path, python)
    (folder / "onnxruntime").mkdir()
    shutil.copyfile(Path(__file__).with_name("onnxruntime_backend.py"), folder / "onnxruntime/model.py")
    return folder


# --- the server ------------------------------------------------------------------------------------------------

class Server:
    """One tritonserver process and the repository rendered for it."""

    def __init__(self, request: Request, repository: Path, folder: Path, install: Install, told: Told,
                 stopped: Callable[[], bool]) -> None:
        self.request, self.repository, self.install = request, repository, install
        self.told, self.stopped = told, stopped
        self.rendered, self.log = folder / "models", folder / "server.log"
        self._empty = folder / "empty"  # a model.py in the working folder would shadow the backend's
        self._empty.mkdir()
        self.endpoint = Endpoint(request.listen if request.listen != "0.0.0.0" else "127.0.0.1",
                                 request.http_port, request.grpc_port, request.metrics_port)
        self._prefix = f"enginesmith_{os.getpid()}_{secrets.token_hex(4)}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[str, bytes] = {}  # configurations that were loaded, or refused
        self._serving: dict[str, int] = {}  # the version of each model
        self._answered: dict[str, int] = {}
        self._ended: set[int] = set()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Starts the process and waits until every model has answered rightly. Raises what was wrong with the first
        where none does."""
        self._seen.clear()
        self._serving.clear()
        names = []
        for name in model_repository.models(self.repository):
            with suppress(UsageError, RuntimeUnavailable):  # _take() says it
                self._render(name, self.repository / name / CONFIG)
                names.append(name)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command(names), cwd=self._empty, env=self.install.variables,
                                             stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                             start_new_session=True, preexec_fn=_die_with_parent)
        deadline = time.monotonic() + LOAD_SECONDS
        while not self.endpoint.ready():
            if self.stopped():
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError("tritonserver", self._complaint(), "a server that is ready")
            time.sleep(0.05)
        refused = self._follow()
        if not self._serving and not self.stopped():
            raise refused[0]

    def _command(self, names: list[str]) -> list[str]:
        request, own = self.request, self.install.own
        cached = any(triton_config.read(self.rendered / name / CONFIG).response_cache.enable for name in names)
        return [
            *self.install.command, f"--model-repository={self.rendered}",
            f"--http-address={request.listen}", f"--grpc-address={request.listen}",
            f"--metrics-address={request.listen}", f"--http-port={request.http_port}",
            f"--grpc-port={request.grpc_port}", f"--metrics-port={request.metrics_port}",
            f"--exit-timeout-secs={EXIT_SECONDS}", "--model-control-mode=explicit", "--disable-auto-complete-config",
            # strict, a server stays unready for ever after a version that it refused, though the earlier one serves
            "--strict-readiness=false", "--exit-on-error=false", *(f"--load-model={name}" for name in names),
            *(["--cache-config=local,size=268435456"] if own or cached else []),  # a later version may want it
            *(["--allow-gpu-metrics=false",
               f"--backend-config=python,shm-region-prefix-name={self._prefix}"] if own else [])]

    def _render(self, name: str, source: Path) -> int:
        """Puts the configuration `source`, for this machine, where the server reads it; the version that it names.

        A server with a GPU gets it unchanged; the CPU's differs in the instance kind alone. Raises UsageError, or
        RuntimeUnavailable for a model that needs a GPU.
        """
        made = triton_config.read(source)
        kind = made.backend or made.platform
        if self.install.own and kind not in ("onnxruntime", "onnxruntime_onnx", "ensemble"):
            raise RuntimeUnavailable(f"model {name}", f"its {kind} backend needs a GPU", "one that a CPU serves",
                                     f"on a machine with a GPU, --tritonserver PATH or {CONTAINER}")
        if self.install.own:
            for group in made.instance_group:
                group.kind = triton_config.model_config_pb2.ModelInstanceGroup.KIND_CPU
                del group.gpus[:]
        target = self.rendered / name
        target.mkdir(parents=True, exist_ok=True)
        for left in target.iterdir():
            if left.is_symlink() and not left.exists():  # a version that was taken out; Triton loads nothing beside it
                left.unlink()
        for version in model_repository.versions(self.repository / name):
            link = target / str(version)
            if not link.is_symlink():
                link.symlink_to((self.repository / name / str(version)).resolve(), target_is_directory=True)
        text = triton_config.text(made)
        if not (target / CONFIG).exists() or (target / CONFIG).read_text("utf-8") != text:  # a newer one is loaded anew
            workspace.put_text(target / CONFIG, text, "TMPDIR")
        return max(made.version_policy.specific.versions, default=1)

    def _complaint(self) -> str:
        lines = self.log.read_text("utf-8", "replace").splitlines() if self.log.exists() else []
        told = [line.partition("] ")[2].strip('"') for line in lines if line.startswith("E")]
        return told[-1][:400] if told else f"not ready in {LOAD_SECONDS:.0f} s, or ended: {' '.join(lines[-1:])[:300]}"

    # --- watching ----------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """One look: loads what was deployed since, and starts the server again if a model does not answer rightly."""
        if self._process is None or self._process.poll() is not None:
            self._again("tritonserver ended")
            return
        self._follow()
        for name in tuple(self._serving):
            try:
                self._proven(name)
            except (EngineError, EnginesmithError) as error:
                if isinstance(error, ServerTimeout) and self._answers(name):
                    continue  # busy, not dead: others got their answers meanwhile
                self._again(str(error))
                return
        if self._lost():
            self._again("a backend process ended")

    def changed(self) -> bool:
        """Whether something was deployed, or taken out, since the last look."""
        found = self._deployed()
        return bool(found) and found != self._seen

    def _deployed(self) -> dict[str, bytes]:
        """The configuration of each model. Empty, the folder is rather not mounted than without models."""
        found = {}
        for path in self.repository.glob(f"*/{CONFIG}"):
            with suppress(FileNotFoundError):  # taken out just now
                found[path.parent.name] = path.read_bytes()
        return found

    def _turn(self, name: str) -> int:
        """When a model is loaded: an ensemble after what it runs, unless it has come to take fewer images at a time,
        which it has to before what it runs does."""
        with suppress(UsageError):
            now, rendered = triton_config.read(self.repository / name / CONFIG), self.rendered / name / CONFIG
            if now.platform == "ensemble":
                shrinks = rendered.exists() and triton_config.read(rendered).max_batch_size > now.max_batch_size
                return -1 if shrinks else 1
        return 0  # also what cannot be read, with which whoever loads it deals

    def _again(self, reason: str) -> None:
        if self.stopped():  # the server was told to stop as well, and lets its requests finish
            return
        self.told(f"{reason}; the server is started again")
        self._kill()
        self.start()

    def _lost(self) -> bool:
        """Whether a backend process has ended since the last look and was not missed: of a model with several instances
        the others go on answering. The server itself waits for those that it ends."""
        earlier, self._ended = self._ended, _zombies(self.pid)
        return bool(earlier & self._ended)

    def _follow(self) -> list[Exception]:
        """Takes each model whose configuration changed, and lets go of those that are gone; what was wrong with those
        that are not served."""
        refused = []
        found = self._deployed()
        for name in self._seen.keys() - found.keys() if found else ():
            del self._seen[name]
            self._let_go(name)
            self.told(f"{name}: was taken out of the repository, and is not served any more")
        new = [name for name, data in found.items() if data != self._seen.get(name)]
        for name in sorted(new, key=lambda name: (self._turn(name), name)):
            if self.stopped():
                break
            self._seen[name] = found[name]
            refused += self._take(name)
        return refused

    def _take(self, name: str) -> list[Exception]:
        """Has the server load the live version of a model. Where it does not load, or answers wrongly, the newest one
        before it that does is served. What was wrong, if none is."""
        refused: list[Exception] = []
        for source in model_repository.configurations(self.repository / name):
            try:
                version = self._render(name, source)
                goes_on = refused and self.endpoint.has(f"{name}/versions/{version}")
                complaint = None if goes_on else self.endpoint.load(name)
                if complaint is not None:
                    raise ServerError(f"model {name}", complaint)
                self._serving[name] = version
                self.told(f"{name}: {self._loaded(name)}")
                return []
            except (EngineError, EnginesmithError) as error:
                self.told(f"{source.relative_to(self.repository)} is not served: {error}")
                refused.append(error)
        self._let_go(name)
        return refused

    def _let_go(self, name: str) -> None:
        self._serving.pop(name, None)
        shutil.rmtree(self.rendered / name, ignore_errors=True)
        self.endpoint.unload(name)

    def _loaded(self, name: str) -> str:
        """What the version that was just loaded answers; a server that is busy with others is not wrong."""
        self._answers(name)
        try:
            return self._proven(name)
        except ServerTimeout:
            if not self._answers(name):
                raise
            return f"version {self._serving[name]} is served; the server was busy with others' requests"

    def _answers(self, name: str) -> bool:
        """Whether the model has answered anyone since the last look."""
        try:
            count = self.endpoint.successes(name)
        except ServerError:  # no server any more
            return False
        earlier, self._answered[name] = self._answered.get(name, 0), count
        return count > earlier

    def _proven(self, name: str) -> str:
        """A real request, compared with the numbers that the version carries. Raises ServerError or VerifyFailed."""
        steps = triton_config.read(self.rendered / name / CONFIG).ensemble_scheduling.step
        network = steps[-1].model_name if steps else name  # an ensemble is proven as its network is
        folder = self.rendered / network / str(self._serving.get(network, 0))
        if not (folder / DEPLOYMENT).exists():
            return f"version {self._serving[name]} is served; it carries no reference"
        error, limit = served.proof(self.endpoint, name, folder, max(5.0, self.request.health_seconds))
        self._answered[name] = self.endpoint.successes(name)
        return f"version {self._serving[name]} answers, relative L2 error {error:.1e} (limit {limit:.0e})"

    # --- the end -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Lets requests in flight finish, and leaves nothing behind."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_SECONDS + 5)
        self._kill()

    def _kill(self) -> None:
        """The server, its backends, and their shared memory."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        for left in Path("/dev/shm").glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)


def _zombies(parent: int) -> set[int]:
    """The children that have ended and were not waited for."""
    found = set()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(parent).children():
            with suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_ZOMBIE:
                    found.add(child.pid)
    return found


def _die_with_parent() -> None:
    """A server whose `serve` was killed would hold its ports for ever. prctl(2), PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    from pipeline.cli import run_stage

    run_stage("serve")
