"""The file of a run: what is written comes back, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.errors import UsageError
from pipeline import record
from tests.pipeline import runs

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=12)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("run", [runs.run(), runs.on_gpu()], ids=["cpu", "gpu"])
def test_what_is_written_comes_back(run: record.Run, tmp_path: Path) -> None:
    record.write(run, tmp_path / "r.json")
    found = record.read(tmp_path / "r.json")
    assert (found.series, found.settings, found.environment) == (run.series, run.settings, run.environment)
    assert found == run
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@FUZZ
@given(data=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_are_taken_for_a_run(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(UsageError) as caught:
        record.read(tmp_path / "r.json")
    assert "\n" not in str(caught.value)


def _paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in inner for path in _paths(item, (*here, key)))][:400]


@FUZZ
@given(data=st.data())
def test_a_changed_run_is_read_or_refused_in_one_line(data: st.DataObject, tmp_path: Path) -> None:
    record.write(runs.run(runs.every_engine()[:2]), tmp_path / "r.json")
    whole = json.loads((tmp_path / "r.json").read_text())
    *way, last = data.draw(st.sampled_from([path for path in _paths(whole) if path]))
    holder = whole
    for key in way:
        holder = holder[key]
    if data.draw(st.booleans()) and isinstance(holder, dict):
        del holder[last]
    else:
        holder[last] = data.draw(JSON)
    (tmp_path / "r.json").write_text(json.dumps(whole))
    try:
        found = record.read(tmp_path / "r.json")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert all(n > 0 for one in found.series for r in one.rounds_ns for n in r)


@pytest.mark.parametrize(("change", "text"), [
    ({"schema": 2}, "schema 2; expected 1; measure again"), ({"series": {}}, "run.series is no list"),
    ({"colour": 1}, "run has an unknown colour"), ({"complete": 1}, "run.complete is int 1, not bool"),
    ({"bandwidth_bytes_per_second": float("inf")}, "run.bandwidth_bytes_per_second is float inf, not float"),
])
def test_the_field_that_is_wrong_is_named(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    record.write(runs.run(), tmp_path / "r.json")
    whole = json.loads((tmp_path / "r.json").read_text()) | change
    (tmp_path / "r.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError) as caught:
        record.read(tmp_path / "r.json")
    assert text in str(caught.value)


def test_samples_that_no_clock_gives(tmp_path: Path) -> None:
    for change in ({"rounds_ns": ((5, 0),)}, {"rounds_ns": ((),)}, {"batch": 0}, {"mode": "sideways"}):
        record.write(runs.run([runs.series(**change)]), tmp_path / "r.json")
        with pytest.raises(UsageError, match="holds what no measurement gives"):
            record.read(tmp_path / "r.json")
