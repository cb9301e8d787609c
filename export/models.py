"""A user's own Keras model: `.keras`, `.h5`, a SavedModel folder, or `package.module:function`.

Loading never runs code from the file unless the user asks with `--unsafe`.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ModelError, UsageError, listed

if TYPE_CHECKING:
    import keras

IMAGES = "images"
NO_SCOPE = re.compile(r"[^A-Za-z0-9_.\\/>-]")  # what TensorFlow allows in no name of a scope


def is_user_model(name: str) -> bool:
    """Whether MODEL names a file, a folder or a function, and not a network of the catalog."""
    return ":" in name or name.endswith((".keras", ".h5", ".hdf5")) or os.sep in name or Path(name).is_dir()


def artifact_name(model: str) -> str:
    """The folder's name for a model from outside: the file's stem, or the function's name."""
    return model.rsplit(":", 1)[1] if ":" in model else Path(model).resolve().stem


def load(model: str, unsafe: bool, seed: int, outputs: Sequence[str], size: tuple[int, int] | None) -> keras.Model:
    """The model, wrapped so that it returns a dict of output name -> tensor, its only input called `images`.

    `outputs` may name outputs, or layers whose output becomes an end point. `size` (height, width) settles an
    image input that leaves them open. Raises ModelError, and UsageError for an output or a size it cannot have.
    """
    loaded = _load(model, unsafe, seed)
    return named(loaded, artifact_name(model), outputs, size)


def _load(model: str, unsafe: bool, seed: int) -> Any:
    if ":" in model:
        return _call(model, seed)
    path = Path(model)
    if not path.exists():
        raise ModelError(f"model {model}", "no such file", "a .keras or .h5 file, or a SavedModel folder")
    return _saved_model(path) if path.is_dir() else _keras_file(path, unsafe)


def _keras_file(path: Path, unsafe: bool) -> Any:
    import keras

    try:
        return keras.saving.load_model(path, compile=False, safe_mode=not unsafe)
    except Exception as error:  # a wrong file raises ValueError, TypeError, OSError, KeyError, BadZipFile and more
        reason = " ".join(str(error).split())
        if not unsafe and ("Lambda" in reason or "unsafe" in reason.lower()):
            raise ModelError(f"model {path}", "has a Lambda layer, whose Python code is stored in the file",
                             "a model without code", "if you trust its author, load it with --unsafe") from error
        raise ModelError(f"model {path}", f"not loadable ({reason[:200]})", "a whole model saved by Keras") from error


def _saved_model(path: Path) -> Any:
    import keras
    import tensorflow as tf

    try:
        signature = tf.saved_model.load(str(path)).signatures["serving_default"]
        specs = list(signature.structured_input_signature[1].values())
        layer = keras.layers.TFSMLayer(str(path), call_endpoint="serving_default")
        inputs = [keras.Input(batch_shape=spec.shape, dtype=spec.dtype.name, name=spec.name) for spec in specs]
        found = layer(*inputs) if len(inputs) == 1 else layer(**{v.name: v for v in inputs})
        return keras.Model(inputs, found)
    except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
        raise ModelError(f"model {path}", f"not loadable ({' '.join(str(error).split())[:200]})",
                         "a SavedModel folder with the signature serving_default") from error


def _call(model: str, seed: int) -> Any:
    import keras

    module_name, function_name = model.rsplit(":", 1)
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does for the console command too
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"model {model}", str(error), "package.module:function that returns a Keras model") from error
    finally:
        sys.path.pop(0)
    keras.utils.set_random_seed(seed)  # a function that initialises weights then gives the same ones again
    built = function()
    if not isinstance(built, keras.Model):
        raise ModelError(f"model {model}", f"returned {type(built).__name__}", "a keras.Model")
    return built


def named(model: Any, name: str, outputs: Sequence[str], size: tuple[int, int] | None) -> keras.Model:
    import keras

    if not model.built or not getattr(model, "inputs", None):
        raise ModelError(f"model {name}", "its input shape is not known",
                         "a functional or Sequential model, or one that was built by a call",
                         "call it once on an example, or wrap it by keras.Input and keras.Model")
    inputs = [_input(v, len(model.inputs) == 1, size) for v in model.inputs]
    found = _outputs(model)
    inner = {layer.name: layer.output for layer in model.layers if _has_output(layer)}
    unknown = [o for o in outputs if o not in found and o not in inner]
    if unknown:
        raise UsageError(f"output {unknown[0]!r}", f"{name} has no such output or layer",
                         f"one of {listed([*found, *inner])}")
    found.update({o: inner[o] for o in outputs if o not in found})
    tapped = keras.Model(model.inputs, found, name="model")  # an automatic name counts up, and names the ONNX nodes
    for layer in tapped._flatten_layers(include_self=False):
        layer.name = NO_SCOPE.sub("_", layer.name)  # only other backends than TensorFlow's can run it by such a name
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], tapped(inputs if len(inputs) > 1 else inputs[0]),
                       name=name)


def _input(value: Any, only: bool, size: tuple[int, int] | None) -> Any:
    """A fresh input like `value`, with `size` where it leaves height and width open; an image alone is `images`."""
    import keras

    shape = tuple(value.shape[1:])
    image = only and len(shape) == 3
    if image and size is not None:
        if any(own not in (None, wished) for own, wished in zip(shape, size, strict=False)):
            raise UsageError(f"size {size[0]}x{size[1]}", f"the model's input is {shape[0]}x{shape[1]}",
                             "the same size")
        shape = (*size, shape[2])
    if None in shape:
        raise ModelError(f"input {value.name}", f"shape {value.shape}", "every size known but the batch",
                         "give --size HxW" if image else "build the model with a fixed input shape")
    return keras.Input(shape, dtype=value.dtype, name=IMAGES if image else value.name)


def _outputs(model: Any) -> dict[str, Any]:
    """Output name -> tensor: the dict's keys, or the names of the layers that end the model."""
    structure = getattr(model, "output", None)  # a Sequential model has none, but has outputs
    if isinstance(structure, dict):
        return dict(structure)
    tensors = list(model.outputs)
    names = [tensor._keras_history.operation.name for tensor in tensors]
    if len(set(names)) != len(tensors):
        names = [f"output_{i}" for i in range(len(tensors))]
    return dict(zip(names, tensors, strict=True))


def _has_output(layer: Any) -> bool:
    try:
        return layer.output is not None and not isinstance(layer.output, (list, dict, tuple))
    except (AttributeError, ValueError):  # Keras raises for a layer with no or several calls
        return False
