"""The table of Triton's containers: well formed, and looked up by release and by TensorRT."""

from __future__ import annotations

import re

import pytest

from export.errors import UsageError
from pipeline.triton_releases import RELEASES, find, for_tensorrt


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_rows_run_from_the_newest_and_no_release_is_there_twice() -> None:
    for column in ("container", "tensorrt"):
        versions = [numbers(getattr(row, column)) for row in RELEASES]
        assert versions == sorted(versions, reverse=True), column
    assert len({row.container for row in RELEASES}) == len(RELEASES)


@pytest.mark.parametrize("row", RELEASES, ids=lambda row: row.container)
def test_versions_have_the_shape_of_their_kind(row) -> None:
    assert re.fullmatch(r"\d\d\.(0[1-9]|1[0-2])", row.container)
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\d+)?", row.tensorrt)
    assert re.fullmatch(r"(\d+\.\d)?", row.compute_capability)
    assert row.source.startswith("https://")


def test_a_release_is_found_by_its_container() -> None:
    found = find("25.01")
    assert found is not None and found.tensorrt == "10.8.0.43"
    assert find("19.01") is None


@pytest.mark.parametrize("text", ["25", "25.1", "25.13", "2.54.0", "25.01-py3", ""])
def test_what_is_no_release(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected YY\.MM"):
        find(text)


@pytest.mark.parametrize("version", ["10.8.0", "10.8.0.43", "10.8.0.1", "10.8.0.post1"])
def test_tensorrt_is_compared_by_its_first_three_numbers(version: str) -> None:
    assert [row.container for row in for_tensorrt(version)] == ["25.01"]


def test_a_row_without_a_build_number_is_found_with_one() -> None:
    assert [row.container for row in for_tensorrt("11.2.1.2")] == ["26.08"]


def test_several_releases_may_have_the_same() -> None:
    assert [row.container for row in for_tensorrt("8.6.3")] == ["24.04", "24.03", "24.02"]


@pytest.mark.parametrize("version", ["10.8.1", "10.80.0", "10.8.01234", "7.0.0"])
def test_a_tensorrt_that_no_row_has_finds_nothing(version: str) -> None:
    assert for_tensorrt(version) == ()


@pytest.mark.parametrize("version", ["", "10.8", "ten", "v10.8.0"])
def test_what_is_no_tensorrt_version_is_refused(version: str) -> None:
    with pytest.raises(UsageError, match=r"expected major\.minor\.patch"):
        for_tensorrt(version)
