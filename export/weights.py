"""Weights into a built model, by variable name.

Sources: TF-Slim / TF1 checkpoints (V2: prefix or its .index file; V1: one file), Keras `.weights.h5` and `.keras`
files, keras.applications' ImageNet weights where the architecture is the same, and seeded random values.

A layer called `resnet_v2_50.conv1` holds the TF-Slim variables `resnet_v2_50/conv1/weights` and `/biases`.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.catalog import NetworkConfig, NetworkSpec
from export.errors import UsageError, WeightsError, listed

if TYPE_CHECKING:
    import keras

LEAVES = {"kernel": "weights", "bias": "biases"}  # Keras's name -> TF-Slim's; gamma, beta, moving_* are alike
# what a training checkpoint holds beside the network: optimizer slots, averages, counters, facenet's centers
NOT_WEIGHTS = re.compile(
    r"(^|/)(global_step|centers|mean_rgb|beta[12]_power(_\d+)?|save_counter|local_step|biased)$"
    r"|/(Momentum|RMSProp|Adam|Adagrad|Adadelta|Ftrl|ExponentialMovingAverage)(_\d+)?$"
    r"|^_CHECKPOINTABLE_OBJECT_GRAPH$")


@dataclass(frozen=True)
class Variables:
    """A set of named arrays, each read when asked for."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def slim_variables(model: keras.Model) -> dict[str, Any]:
    """TF-Slim variable name -> Keras variable, in the order of the layers."""
    return {f"{layer.name.replace('.', '/')}/{LEAVES.get(v.name, v.name)}": v
            for layer in model.layers for v in layer.weights}


# --- loading ---------------------------------------------------------------------------------------------------

def load(model: keras.Model, config: NetworkConfig, source: str, seed: int) -> None:
    """Fills `model` from `random`, `imagenet` or a file. Raises WeightsError, with `model` then unusable."""
    if source == "random":
        assign(model, config, random_variables(model, config, seed))
    elif source == "imagenet":
        assign(model, config, imagenet_variables(model, config))
    elif source.endswith((".h5", ".keras")):
        load_keras_file(model, source)
    else:
        assign(model, config, read_checkpoint(source))
    check_finite(model, source)


def assign(model: keras.Model, config: NetworkConfig, variables: Variables) -> None:
    """Every variable of `model` from `variables`, by name, whatever scope they stand under.

    Raises WeightsError that lists what is missing, unused or of another shape, before anything is changed.
    """
    targets = slim_variables(model)
    scope = find_scope(variables, targets, config)
    source_name = {name: _rescope(name, config.spec.scope, scope) for name in targets}
    expected = {name: _stored_shape(name, tuple(v.shape), config) for name, v in targets.items()}
    found = variables.shapes
    missing = [n for n in source_name.values() if n not in found]
    reshaped = [f"{source_name[n]} {_by(found[source_name[n]])} instead of {_by(shape)}"
                for n, shape in expected.items() if source_name[n] in found and found[source_name[n]] != shape]
    off = tuple(_join(scope, part) + "/" for part in config.switched_off)
    off += () if config.spec.classes or config.classes else ("Logits/",)  # facenet's classifier
    unused = [n for n in found if n not in set(source_name.values())
              and not NOT_WEIGHTS.search(n) and not n.startswith(off)]
    problems = [f"{kind} {len(names)}: {listed(sorted(names))}" for kind, names in
                (("missing", missing), ("of another shape", reshaped), ("unused", unused)) if names]
    if problems:
        raise WeightsError(f"weights {variables.source}", ", ".join(problems),
                           f"exactly the variables of {config.name}",
                           "check the network's name, --classes and --option")
    for name, variable in targets.items():
        value = variables.read(source_name[name])
        variable.assign(value[..., 1:] if _is_dropped(name, config) else value)


def find_scope(variables: Variables, targets: Iterable[str], config: NetworkConfig) -> str:
    """The scope under which `variables` hold the network: the one with most of its variables' names."""
    names = [n.removeprefix(config.spec.scope + "/") for n in targets if n.startswith(config.spec.scope + "/")]
    wanted = set(names)
    votes: dict[str, int] = {config.spec.scope: 0}
    for found in variables.shapes:
        parts = found.split("/")
        for cut in range(len(parts)):
            if "/".join(parts[cut:]) in wanted:
                scope = "/".join(parts[:cut])
                votes[scope] = votes.get(scope, 0) + 1
    return max(votes, key=lambda scope: votes[scope])


def _join(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope else name


def _rescope(name: str, old: str, new: str) -> str:
    return _join(new, name.removeprefix(old + "/")) if name.startswith(old + "/") else name


def _is_dropped(name: str, config: NetworkConfig) -> bool:
    """Whether `drop_background` takes class 0 out of this variable."""
    heads = tuple(f"{config.spec.scope}/{head}/" for head in config.spec.heads)
    return bool(config.options.get("drop_background")) and name.startswith(heads)


def _stored_shape(name: str, shape: tuple[int, ...], config: NetworkConfig) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] + 1) if _is_dropped(name, config) else shape


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


# --- checkpoints -----------------------------------------------------------------------------------------------

def read_checkpoint(path: str) -> Variables:
    """A TF1 checkpoint, V2 or V1. Raises WeightsError if it is absent, truncated or something else."""
    import tensorflow as tf

    prefix = path.removesuffix(".index")
    if not (Path(prefix).is_file() or Path(prefix + ".index").is_file()):
        raise WeightsError(f"weights {path}", "no such checkpoint", "a file, or a prefix with an .index file beside it",
                           "give --weights random, imagenet, a .weights.h5 or .keras file, or a checkpoint")
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from error

    def read(name: str) -> np.ndarray:
        try:
            return np.asarray(reader.get_tensor(name))
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            raise _unreadable(path, error) from error

    return Variables(path, dict(sorted(shapes.items())), read)


def _unreadable(path: str, error: Exception) -> WeightsError:
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return WeightsError(f"weights {path}", f"not readable as a checkpoint ({reason})", "a whole TensorFlow checkpoint",
                        "download or copy it again, with its .data file where it has one")


def checkpoint_classes(path: str, spec: NetworkSpec) -> int | None:
    """The number of classes that a checkpoint's head has; None where the head is not found."""
    heads = [f"{head}/biases" for head in spec.heads]
    shapes = read_checkpoint(path).shapes
    return next((shape[0] for head in heads for name, shape in shapes.items()
                 if (name == head or name.endswith("/" + head)) and len(shape) == 1), None)


# --- Keras files and applications ------------------------------------------------------------------------------

def load_keras_file(model: keras.Model, path: str) -> None:
    """A `.weights.h5` or `.keras` file that was saved from the same architecture."""
    if not Path(path).is_file():
        raise WeightsError(f"weights {path}", "no such file")
    try:
        model.load_weights(path)
    except Exception as error:  # Keras raises ValueError, KeyError, OSError, BadZipFile and more for a wrong file
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"weights {path}", f"do not fit ({reason})", f"weights saved from {model.name}",
                           "check the network's name, --classes and --option") from error


def imagenet_variables(model: keras.Model, config: NetworkConfig) -> Variables:
    """keras.applications' ImageNet weights under TF-Slim names. Raises WeightsError where the network differs."""
    import keras

    if config.spec.imagenet is None:
        raise WeightsError(f"weights imagenet for {config.name}", config.spec.imagenet_reason)
    if config.options.get("drop_background"):
        raise UsageError("option drop_background", "ImageNet weights of keras.applications have no background class")
    application = getattr(keras.applications, config.spec.imagenet[0])
    try:
        source = application(weights="imagenet", include_top=config.options["include_top"])
    except Exception as error:  # what urllib and Keras raise for a failed download is not one type
        raise WeightsError("weights imagenet", f"download failed ({str(error)[:160]})", "",
                           "check the network, or give the file by --weights") from error
    return application_variables(model, source, config.spec)


def application_variables(model: keras.Model, source: keras.Model, spec: NetworkSpec) -> Variables:
    """The weights of `source`, a keras.applications model, matched to `model` in the order of creation.

    Both build the same architecture in the same order, which TF-Slim's names tell when sorted, heads last; a dense
    kernel takes the shape of the equal convolution.
    """
    heads = tuple(f"{spec.scope}/{head}/" for head in spec.heads)
    values = [v for layer in sorted(source.layers, key=_creation) for v in layer.weights]
    targets = sorted(slim_variables(model).items(),
                     key=lambda item: (_kind_first(item[0]), item[0].startswith(heads), item[0]))
    values.sort(key=lambda v: _kind_first(LEAVES.get(v.name, v.name)))
    if len(values) != len(targets):
        raise WeightsError(f"weights of {source.name}", f"{len(values)} variables", f"{len(targets)} of {model.name}")
    paired = {name: (value, tuple(v.shape)) for (name, v), value in zip(targets, values, strict=True)}
    return Variables(f"keras.applications {source.name}", {n: shape for n, (_, shape) in paired.items()},
                     lambda name: np.asarray(paired[name][0]).reshape(paired[name][1]))


def _creation(layer: keras.Layer) -> tuple[int, int]:
    """Keras numbers unnamed layers (`conv2d`, `conv2d_1`, ...); a named layer keeps its place (sorting is stable)."""
    number = re.fullmatch(r"(?:conv2d|batch_normalization)(?:_(\d+))?", layer.name)
    return (0, int(number.group(1) or 0)) if number else (1, 0)


def _kind_first(name: str) -> int:
    return ("weights", "biases", "gamma", "beta", "moving_mean", "moving_variance").index(name.rsplit("/", 1)[-1])


# --- random values ---------------------------------------------------------------------------------------------

def random_variables(model: keras.Model, config: NetworkConfig, seed: int) -> Variables:
    """Seeded values that keep the variance of activations, the same bytes on every machine.

    Convolution and dense weights are uniform with variance 2 / fan_in (He et al., arXiv:1502.01852); the last
    convolution of a residual unit is divided by the square root of the number of units, so that the sum over
    them stays in range (Zhang et al., arXiv:1901.09321). Only float32 draws, sqrt and products are used, which
    IEEE 754 fixes to the last bit.
    """
    shapes = {name: _stored_shape(name, tuple(v.shape), config) for name, v in slim_variables(model).items()}
    units = max(1, sum(_ends_unit(name) for name in shapes))

    def read(name: str) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
        unit = rng.random(shapes[name], np.float32) * np.float32(2) - np.float32(1)
        leaf = name.rsplit("/", 1)[-1]
        if leaf == "weights":
            fan_in = int(np.prod(shapes[name][:-1]))
            return unit * np.float32(np.sqrt(6 / fan_in / (units if _ends_unit(name) else 1)))
        centre = np.float32(1 if leaf in ("gamma", "moving_variance") else 0)
        return centre + unit * np.float32(0.1)

    return Variables("random", shapes, read)


def _ends_unit(name: str) -> bool:
    """Whether this is the last convolution of a residual unit."""
    return bool(re.search(r"(bottleneck_v2/conv3|basic_v2/conv2|[bB]lock\d+(_\d+)?/Conv2d_1x1)/weights$", name))


# --- what was loaded -------------------------------------------------------------------------------------------

def check_finite(model: keras.Model, source: str) -> None:
    """Raises WeightsError that names the variables with NaN or infinite values."""
    bad = [v.path for v in model.weights if not np.isfinite(np.asarray(v)).all()]
    if bad:
        raise WeightsError(f"weights {source}", f"NaN or infinite values in {listed(bad)}", "finite numbers",
                           "use an earlier checkpoint")


def fingerprint(model: keras.Model) -> str:
    """sha256 over path, shape and bytes of every weight, in the order of the model."""
    digest = hashlib.sha256()
    for variable in model.weights:
        value = np.ascontiguousarray(np.asarray(variable))
        digest.update(f"{variable.path} {value.dtype} {value.shape}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()
