"""MODEL of every stage after export: a catalog network, a user's model, an ONNX file, or an artifact folder.

A network that has no artifact yet is exported first; an ONNX file from elsewhere gets an artifact of its own, whose
reference outputs are ONNX Runtime's in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engines import model_file
from engines.model_file import ModelFile
from export.errors import UsageError
from pipeline import export as export_stage
from pipeline import workspace
from pipeline.export import MODEL, REFERENCE, ExportRequest, Progress
from pipeline.workspace import Workspace


def folder_of(model: str, out: Path, progress: Progress) -> Path:
    """The artifact folder of MODEL, made if there is none. Raises what export raises, and ModelFileError."""
    path = Path(model)
    if path.is_dir() and (path / workspace.MANIFEST).exists():
        return path
    if model.endswith(".onnx"):
        return _imported(path, out, progress)
    from export import models

    name = models.artifact_name(model) if models.is_user_model(model) else model
    if (out / name / workspace.MANIFEST).exists():
        return out / name
    return export_stage.export(ExportRequest(model, out), progress).folder


def manifest_of(held: Workspace) -> dict[str, Any]:
    """Raises UsageError where a file is missing or was changed."""
    found = held.manifest()
    if found is None:
        raise UsageError(f"artifact {held.folder}", "its files are not those of its manifest", "an intact artifact",
                         "export it again")
    return found


# --- an ONNX file from elsewhere -------------------------------------------------------------------------------

def _imported(path: Path, out: Path, progress: Progress) -> Path:
    source = model_file.read(path)
    with workspace.opened(out / path.stem) as held:
        earlier = held.manifest()
        if earlier is not None and earlier.get("recipe") == {"onnx": source.sha256}:
            return held.folder
        progress("import")
        held.stage(MODEL, lambda target: _copy(source, target))
        reference = _reference(source)
        held.stage(REFERENCE, lambda target: export_stage.save_arrays(target, reference))
        held.commit({"format": 1, "name": path.stem, "network": path.stem, "recipe": {"onnx": source.sha256},
                     "reference_from": "onnxruntime", "preprocess": "none",
                     "inputs": [spec.described() for spec in source.inputs],
                     "outputs": [spec.described() for spec in source.outputs],
                     "tools": export_stage.tool_versions()}, (MODEL, REFERENCE))
    return out / path.stem


def _copy(source: ModelFile, target: Path) -> None:
    """One file, with the external data inside of it. Old files list weights as inputs that a caller may override,
    which keeps runtimes from folding them: here they are constants."""
    import onnx

    model = onnx.load(source.path)
    fed = [v for v in model.graph.input if v.name in {s.name for s in source.inputs}]
    del model.graph.input[:]
    model.graph.input.extend(fed)
    model.ir_version = max(model.ir_version, 4)
    try:
        target.write_bytes(model.SerializeToString())
    except ValueError as error:  # protobuf's limit
        raise UsageError(f"model {source.path}", "larger than 2 GB", "a smaller model") from error


def _reference(source: ModelFile) -> dict[str, np.ndarray]:
    from engines import ort
    from engines.runtime import BuildRequest
    from export.checks import BATCHES, seeded

    cases = []
    with ort.load(BuildRequest(source.path, "onnxruntime"), source.path) as engine:
        for batch in BATCHES if source.batch is None else (source.batch,):
            feeds = {s.name: seeded(tuple(batch if n is None else n for n in s.shape), s.dtype, 0)
                     for s in source.inputs}
            cases.append((feeds, engine.run(feeds)))
    return export_stage.reference_arrays(cases)
