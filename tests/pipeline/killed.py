"""`python -m tests.pipeline.killed MODEL OUT ACTION`: kills a deploy (`first`: into an empty repository), or a
rollback, before its first change of a file in the repository, before its second, and so on, and looks at the repository
after each. Prints how many kills there were.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from pipeline import deploy, model_repository, triton_lint
from pipeline.model_repository import DEPLOYMENT, PROOF

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.utime", "shutil.copyfile", "shutil.move", "shutil.rmtree"}
FILES = {"model.onnx", "config.pbtxt", DEPLOYMENT, PROOF}


def kill_before(number: int, repository: Path) -> None:
    """Has this process end itself before change `number` of the repository, or of what is staged for it."""
    seen, prefix = 0, str(repository.resolve())  # also of `<repository>.staging`

    def hook(event: str, values: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and any(
                os.path.abspath(os.fsdecode(v)).startswith(prefix) for v in values  # noqa: PTH100 - in an audit hook
                if isinstance(v, str | bytes | os.PathLike)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(request: deploy.Request, action: str, number: int, repository: Path) -> bool:
    """Whether the child was killed; else it ended well."""
    child = os.fork()
    if not child:
        try:
            kill_before(number, repository)
            (deploy.rollback if action == "rollback" else deploy.deploy)(request)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, f"{action} failed before kill {number}"
    return os.WIFSIGNALED(status)


def look(folder: Path, model: bytes, allowed: set[int | None]) -> int | None:
    """The live version, once it is seen to be whole."""
    live = model_repository.live(folder)
    assert live in allowed, f"version {live} is live, of {allowed}"
    if live is None:
        assert not folder.exists()
        return None
    inner = folder / str(live)
    assert {path.name for path in inner.iterdir()} == FILES
    assert (inner / "model.onnx").read_bytes() == model
    assert json.loads((inner / DEPLOYMENT).read_bytes())["format"] == 1
    with np.load(inner / PROOF) as proof:
        assert sum(proof[name].size for name in proof.files)
    assert triton_lint.lint(folder, live, triton_lint.Target()) == ()
    return live


def main(model: str, out: str, action: str) -> None:
    source = next(Path(out).glob("*/model.onnx"))
    repository = source.parent / deploy.REPOSITORY
    request, folder, number, states = deploy.Request(model, Path(out)), repository / source.parent.name, 0, []
    killed = True
    while killed:
        number += 1
        if action == "first":
            for left in (repository, repository.with_name(repository.name + ".staging")):
                shutil.rmtree(left, ignore_errors=True)
        before = model_repository.live(folder)
        there = model_repository.versions(folder)
        after = max(v for v in there if v < (before or 0)) if action == "rollback" else max([0, *there]) + 1
        killed = forked(request, action, number, repository)
        states.append(look(folder, source.read_bytes(), {before, after} if killed else {after}) == after)
    made = deploy.deploy(request).models[folder.name]
    look(folder, source.read_bytes(), {made})
    assert [path.name for path in repository.with_name(repository.name + ".staging").iterdir()] == [".lock"]
    print(json.dumps({"kills": number - 1, "after": sum(states[:-1])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
