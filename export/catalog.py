"""The networks that come built in: pure data and integer arithmetic, without Keras.

A network is a row of NETWORKS. `configure` turns a row and a user's wishes into a NetworkConfig, the one value
that builders, weights and checks work from. `declared_shapes` says by arithmetic alone what every end point must
measure; the builders in `export/networks` never read it, so the shape check compares two independent sources.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from export.errors import UsageError

Shape = tuple[int | None, ...]  # None is the batch dimension
OptionValue = bool | int | None


@dataclass(frozen=True)
class Option:
    """One `--option KEY=VALUE`: its default and the values it may take."""

    default: OptionValue
    choices: tuple[OptionValue, ...] = (True, False)

    def parse(self, subject: str, text: str) -> OptionValue:
        words = {str(choice).lower(): choice for choice in self.choices}
        if text.lower() not in words:
            raise UsageError(subject, f"{text!r}", f"one of {', '.join(words)}")
        return words[text.lower()]


@dataclass(frozen=True)
class NetworkSpec:
    """A row of the catalog.

    `row` is what the family's builder and `declared_shapes` read (depths, widths). `classes` is the default
    number of classes, None for a network that ends in an embedding. `preprocess` names the normalisation that
    the network was trained with (see export/preprocess.py). `heads` are the layers, below `scope`, with one output
    a class. `switched` says which scopes of a checkpoint belong to an option that is off. `imagenet` is the
    keras.applications function with the same architecture and the normalisation of its weights; where there is
    none, `imagenet_reason` says why.
    """

    name: str
    family: str
    scope: str
    size: tuple[int, int]
    classes: int | None
    row: tuple[tuple[str, int], ...]
    preprocess: str
    options: Mapping[str, Option]
    heads: tuple[str, ...] = ()
    switched: tuple[tuple[str, str], ...] = ()
    imagenet: tuple[str, str] | None = None
    imagenet_reason: str = "keras.applications has no such network"


@dataclass(frozen=True)
class NetworkConfig:
    """One build of a network: `size` is (height, width) in pixels of the RGB input."""

    spec: NetworkSpec
    size: tuple[int, int]
    classes: int | None
    options: Mapping[str, OptionValue]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def default_output(self) -> str:
        if self.spec.family == "inception_resnet_v1" and self.options["normalize"]:
            return "embeddings"
        if self.options.get("include_top", True):
            return "logits"
        return {"inception_v3": "Mixed_7c"}.get(self.spec.family, "pool5")

    @property
    def switched_off(self) -> tuple[str, ...]:
        """Scopes, below the network's, whose variables the options leave unused."""
        return tuple(scope for option, scope in self.spec.switched if not self.options[option])


# --- the table -------------------------------------------------------------------------------------------------

_ON, _OFF = Option(True), Option(False)
_TOP = {"include_top": _ON, "drop_background": _OFF}
_DENSE_TOP = (("include_top", "fc6"), ("include_top", "fc7"), ("include_top", "fc8"))
_NO_RESNET = ("its ResNet V2 pads the max pool explicitly, takes the stride in the first unit and uses epsilon "
              "1.001e-5; export keras.applications:ResNet{}V2 itself instead")


def _options(**options: Option) -> Mapping[str, Option]:
    return MappingProxyType(options)


def _vgg(name: str, scope: str, convs: tuple[int, ...], keras_name: str | None = None, **row: int) -> NetworkSpec:
    blocks = tuple((f"conv{i}", count) for i, count in enumerate(convs, 1))
    return NetworkSpec(name, "vgg", scope, (224, 224), 1000, blocks + tuple(row.items()), "rgb_mean",
                       _options(**_TOP), ("fc8",), _DENSE_TOP, (keras_name, "caffe") if keras_name else None)


def _resnet(depth: int, units: tuple[int, int, int, int], bottleneck: int = 1) -> NetworkSpec:
    blocks = tuple((f"block{i}", count) for i, count in enumerate(units, 1))
    published = depth in (50, 101, 152)
    return NetworkSpec(
        f"resnet_v2_{depth}", "resnet_v2", f"resnet_v2_{depth}", (224, 224), 1001,
        (*blocks, ("bottleneck", bottleneck)), "tf",
        _options(output_stride=Option(None, (None, 8, 16, 32)), global_pool=_ON, include_root_block=_ON,
                 drop_background=_OFF),
        ("logits",), (("include_root_block", "conv1"),),
        imagenet_reason=_NO_RESNET.format(depth) if published else NetworkSpec.imagenet_reason)


_ROWS = (
    NetworkSpec("alexnet", "alexnet", "alexnet", (224, 224), 1000, (), "rgb_mean", _options(lrn=_ON, **_TOP),
                ("fc8",), _DENSE_TOP),
    _vgg("vgg_11", "vgg_a", (1, 1, 2, 2, 2)),
    _vgg("vgg_11_lrn", "vgg_a_lrn", (1, 1, 2, 2, 2), lrn=1),
    _vgg("vgg_13", "vgg_b", (2, 2, 2, 2, 2)),
    _vgg("vgg_16c", "vgg_c", (2, 2, 3, 3, 3), pointwise=1),
    _vgg("vgg_16", "vgg_16", (2, 2, 3, 3, 3), keras_name="VGG16"),
    _vgg("vgg_19", "vgg_19", (2, 2, 4, 4, 4), keras_name="VGG19"),
    NetworkSpec("inception_v3", "inception_v3", "InceptionV3", (299, 299), 1001, (), "tf",
                _options(aux_logits=_ON, **_TOP), ("Logits/Conv2d_1c_1x1", "AuxLogits/Conv2d_2b_1x1"),
                (("include_top", "Logits"), ("include_top", "AuxLogits"), ("aux_logits", "AuxLogits")),
                imagenet=("InceptionV3", "tf")),
    _resnet(18, (2, 2, 2, 2), bottleneck=0),
    _resnet(34, (3, 4, 6, 3), bottleneck=0),
    _resnet(50, (3, 4, 6, 3)),
    _resnet(101, (3, 4, 23, 3)),
    _resnet(152, (3, 8, 36, 3)),
    _resnet(200, (3, 24, 36, 3)),
    NetworkSpec("inception_resnet_v1", "inception_resnet_v1", "InceptionResnetV1", (160, 160), None,
                (("block35", 5), ("block17", 10), ("block8", 5)), "facenet",
                _options(embedding=Option(128, (128, 512)), normalize=_OFF)),
)
NETWORKS: Mapping[str, NetworkSpec] = MappingProxyType({spec.name: spec for spec in _ROWS})


# --- a user's wishes -------------------------------------------------------------------------------------------

def find(name: str) -> NetworkSpec:
    """The row called `name`. Raises UsageError that suggests the nearest name."""
    if name in NETWORKS:
        return NETWORKS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), NETWORKS, n=1, cutoff=0.4)
    remedy = f"did you mean {near[0]}?" if near else "see `python -m pipeline.export --help` for other model forms"
    raise UsageError(f"network {name!r}", "is not in the catalog", f"one of {', '.join(NETWORKS)}", remedy)


def configure(name: str, size: tuple[int, int] | None = None, classes: int | None = None,
              options: Mapping[str, str] = MappingProxyType({})) -> NetworkConfig:
    """A checked NetworkConfig. Raises UsageError for an unknown name or option, or for an illegal size."""
    spec = find(name)
    for key in options:
        if key not in spec.options:
            raise UsageError(f"option {key!r}", f"{name} has no such option", f"one of {', '.join(spec.options)}")
    values = {key: option.parse(f"option {key}", options[key]) if key in options else option.default
              for key, option in spec.options.items()}
    if classes is None and spec.classes is not None:
        classes = spec.classes - bool(values.get("drop_background"))
    if classes is not None and classes < 1:
        raise UsageError("classes", f"{classes}", "1 or more")
    config = NetworkConfig(spec, size or spec.size, classes, MappingProxyType(values))
    _check_size(config)
    return config


def _check_size(config: NetworkConfig) -> None:
    if _fits(config, config.size):
        return
    height, width = smallest_size(config)
    raise UsageError(f"size {config.size[0]}x{config.size[1]}", f"too small for {config.name}",
                     f"at least {height}x{width}")


def smallest_size(config: NetworkConfig) -> tuple[int, int]:
    """The smallest legal (height, width); the two axes are alike in every network of the catalog."""
    edge = next(n for n in range(1, 1024) if _fits(config, (n, n)))
    return edge, edge


def _fits(config: NetworkConfig, size: tuple[int, int]) -> bool:
    sized = NetworkConfig(config.spec, size, config.classes, config.options)
    return all(n is None or n > 0 for shape in declared_shapes(sized).values() for n in shape)


# --- declared shapes -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Map:
    """Height and width of a feature map."""

    height: int
    width: int

    def same(self, stride: int = 1) -> _Map:
        return _Map(-(-self.height // stride), -(-self.width // stride))

    def valid(self, kernel: int, stride: int = 1) -> _Map:
        """A window that does not fit gives 0, also after a map that is 0 already."""
        def out(n: int) -> int:
            return (n - kernel) // stride + 1 if n >= kernel else 0
        return _Map(out(self.height), out(self.width))

    def shape(self, channels: int) -> Shape:
        return None, self.height, self.width, channels


Declared = Iterator[tuple[str, Shape]]


def declared_shapes(config: NetworkConfig) -> dict[str, Shape]:
    """End point name -> NHWC (or batch, features) shape, batch None, in the order of computation."""
    return dict(_DECLARE[config.spec.family](config, _Map(*config.size)))


def _classifier(config: NetworkConfig) -> Declared:
    yield "logits", (None, config.classes)
    yield "predictions", (None, config.classes)


def _alexnet(config: NetworkConfig, m: _Map) -> Declared:
    yield "conv1", (m := m.same(4)).shape(64)
    yield "pool1", (m := m.valid(3, 2)).shape(64)
    yield "conv2", m.shape(192)
    yield "pool2", (m := m.valid(3, 2)).shape(192)
    for name, channels in (("conv3", 384), ("conv4", 256), ("conv5", 256)):
        yield name, m.shape(channels)
    yield "pool5", m.valid(3, 2).shape(256)
    if config.options["include_top"]:
        yield "fc6", (None, 4096)
        yield "fc7", (None, 4096)
        yield from _classifier(config)


def _vgg_shapes(config: NetworkConfig, m: _Map) -> Declared:
    for (block, count), channels in zip(config.spec.row[:5], (64, 128, 256, 512, 512), strict=True):
        for unit in range(1, count + 1):
            yield f"{block}/{block}_{unit}", m.shape(channels)
        yield f"pool{block[-1]}", (m := m.valid(2, 2)).shape(channels)
    if config.options["include_top"]:
        m = m.valid(7)
        yield "fc6", m.shape(4096)
        yield "fc7", m.shape(4096)
        yield from _classifier(config)


def _inception_v3_shapes(config: NetworkConfig, m: _Map) -> Declared:
    yield "Conv2d_1a_3x3", (m := m.valid(3, 2)).shape(32)
    yield "Conv2d_2a_3x3", (m := m.valid(3)).shape(32)
    yield "Conv2d_2b_3x3", m.shape(64)
    yield "MaxPool_3a_3x3", (m := m.valid(3, 2)).shape(64)
    yield "Conv2d_3b_1x1", m.shape(80)
    yield "Conv2d_4a_3x3", (m := m.valid(3)).shape(192)
    yield "MaxPool_5a_3x3", (m := m.valid(3, 2)).shape(192)
    for name, channels in (("Mixed_5b", 256), ("Mixed_5c", 288), ("Mixed_5d", 288)):
        yield name, m.shape(channels)
    m = m.valid(3, 2)
    for letter in "abcde":
        yield f"Mixed_6{letter}", m.shape(768)
    if config.options["include_top"] and config.options["aux_logits"]:
        aux = m.valid(5, 3)  # the 5x5 convolution after it shrinks with a smaller map, down to 1x1
        aux = _Map(*(min(n, 1) if n < 5 else n - 4 for n in (aux.height, aux.width)))
        yield "AuxLogits", (None, config.classes) if aux == _Map(1, 1) else aux.shape(config.classes or 0)
    m = m.valid(3, 2)
    for name, channels in (("Mixed_7a", 1280), ("Mixed_7b", 2048), ("Mixed_7c", 2048)):
        yield name, m.shape(channels)
    if config.options["include_top"]:
        yield "PreLogits", (None, 1, 1, 2048)
        yield from _classifier(config)


def _resnet_v2_shapes(config: NetworkConfig, m: _Map) -> Declared:
    row, options = dict(config.spec.row), config.options
    stride_left = options["output_stride"] or 32
    if options["include_root_block"]:
        yield "conv1", (m := m.same(2)).shape(64)
        m, stride_left = m.same(2), stride_left // 4
    unit_type, expansion = ("bottleneck_v2", 4) if row["bottleneck"] else ("basic_v2", 1)
    for block, (width, stride) in enumerate(((64, 2), (128, 2), (256, 2), (512, 1)), 1):
        for unit in range(1, row[f"block{block}"] + 1):
            if unit == row[f"block{block}"] and stride == 2 and stride_left > 1:
                m, stride_left = m.same(2), stride_left // 2
            yield f"block{block}/unit_{unit}/{unit_type}", m.shape(width * expansion)
        yield f"block{block}", m.shape(width * expansion)
    if options["global_pool"]:
        yield "global_pool", (None, 1, 1, 512 * expansion)
        yield from _classifier(config)
    else:
        yield "logits", m.shape(config.classes or 0)
        yield "predictions", m.shape(config.classes or 0)


def _inception_resnet_v1_shapes(config: NetworkConfig, m: _Map) -> Declared:
    yield "Conv2d_1a_3x3", (m := m.valid(3, 2)).shape(32)
    yield "Conv2d_2a_3x3", (m := m.valid(3)).shape(32)
    yield "Conv2d_2b_3x3", m.shape(64)
    yield "MaxPool_3a_3x3", (m := m.valid(3, 2)).shape(64)
    yield "Conv2d_3b_1x1", m.shape(80)
    yield "Conv2d_4a_3x3", (m := m.valid(3)).shape(192)
    yield "Conv2d_4b_3x3", (m := m.valid(3, 2)).shape(256)
    yield "Mixed_5a", m.shape(256)
    yield "Mixed_6a", (m := m.valid(3, 2)).shape(896)
    yield "Mixed_6b", m.shape(896)
    yield "Mixed_7a", (m := m.valid(3, 2)).shape(1792)
    yield "Mixed_8a", m.shape(1792)
    yield "Mixed_8b", m.shape(1792)
    yield "PreLogitsFlatten", (None, 1792)
    embedding = config.options["embedding"]
    assert isinstance(embedding, int)
    yield "PreLogits", (None, embedding)
    yield "embeddings", (None, embedding)
    if config.classes:
        yield from _classifier(config)
    else:
        yield "logits", (None, embedding)


_DECLARE: Mapping[str, Callable[[NetworkConfig, _Map], Declared]] = MappingProxyType({
    "alexnet": _alexnet,
    "vgg": _vgg_shapes,
    "inception_v3": _inception_v3_shapes,
    "resnet_v2": _resnet_v2_shapes,
    "inception_resnet_v1": _inception_resnet_v1_shapes,
})
