from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import catalog
from export.errors import UsageError


@pytest.mark.parametrize(("typo", "meant"), [
    ("resnet_v2_51", "resnet_v2_50"), ("resnet152", "resnet_v2_152"), ("vgg16", "vgg_16"),
    ("Inception-V3", "inception_v3"), ("alex_net", "alexnet")])
def test_unknown_network_suggests_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean {meant}") as caught:
        catalog.find(typo)
    assert "\n" not in str(caught.value)


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="output_stride, global_pool, include_root_block"):
        catalog.configure("resnet_v2_50", options={"stride": "8"})


@pytest.mark.parametrize("value", ["4", "true", "", "8.0"])
def test_option_value_outside_of_its_choices(value: str) -> None:
    with pytest.raises(UsageError, match="one of none, 8, 16, 32"):
        catalog.configure("resnet_v2_50", options={"output_stride": value})


@pytest.mark.parametrize(("name", "size", "smallest"), [
    ("vgg_16", (200, 300), "224x224"), ("inception_v3", (299, 100), "107x107"), ("alexnet", (56, 224), "57x57"),
    ("inception_resnet_v1", (74, 160), "75x75")])
def test_size_too_small_names_the_smallest(name: str, size: tuple[int, int], smallest: str) -> None:
    with pytest.raises(UsageError, match=f"at least {smallest}"):
        catalog.configure(name, size)


def test_classes_below_one() -> None:
    with pytest.raises(UsageError, match="1 or more"):
        catalog.configure("vgg_16", classes=0)


def test_dropping_the_background_leaves_one_class_less() -> None:
    assert catalog.configure("resnet_v2_50", options={"drop_background": "true"}).classes == 1000


def test_shapes_of_resnet_50_in_figure_3_of_its_paper() -> None:
    shapes = catalog.declared_shapes(catalog.configure("resnet_v2_50"))
    assert shapes["conv1"] == (None, 112, 112, 64)
    assert shapes["block1/unit_2/bottleneck_v2"] == (None, 56, 56, 256)
    assert shapes["block1"] == (None, 28, 28, 256)  # TF-Slim: the stride stands in the last unit
    assert shapes["block4"] == (None, 7, 7, 2048)
    assert shapes["logits"] == (None, 1001)


@given(height=st.integers(1, 700), width=st.integers(1, 700), stride=st.sampled_from([8, 16, 32]))
def test_output_stride_divides_the_input(height: int, width: int, stride: int) -> None:
    config = catalog.configure("resnet_v2_50", (height, width), options={"output_stride": str(stride)})
    shape = catalog.declared_shapes(config)["block4"]
    assert shape[1:3] == (-(-height // stride), -(-width // stride))


@given(name=st.sampled_from(sorted(catalog.NETWORKS)), extra=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_every_size_from_the_smallest_up_is_legal(name: str, extra: tuple[int, int]) -> None:
    height, width = catalog.smallest_size(catalog.configure(name))
    config = catalog.configure(name, (height + extra[0], width + extra[1]))
    assert all(n is None or n > 0 for shape in catalog.declared_shapes(config).values() for n in shape)
