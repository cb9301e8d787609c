"""What is said of a run, against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from pipeline import analysis
from pipeline.record import Limit
from tests.pipeline import runs

MS = 1_000_000
FLAT = ((10 * MS,) * 4, (10 * MS,) * 4, (10 * MS,) * 4)
TWICE = tuple(tuple(2 * n for n in r) for r in FLAT)


def test_a_row() -> None:
    one = runs.series("onnxruntime", rounds_ns=FLAT, batch=2, flops=8 * 10 ** 9, min_bytes=10 ** 8)
    base = runs.series("tensorflow", rounds_ns=TWICE, batch=2)
    run = runs.run([base, one], limits=(Limit("fp32", 2e12, "openvino"),), bandwidth_bytes_per_second=1e11)
    row = analysis.rows(run)[1]
    assert row.latency_ms == 10
    assert row.images_per_second == pytest.approx(200)  # two images in 10 ms
    assert row.of_limit == pytest.approx(0.4)  # 8 GFLOP at 2 TFLOP/s are 4 ms; 100 MB at 100 GB/s only 1
    assert row.speedup is not None
    assert (row.speedup.ratio, row.speedup.verdict) == (pytest.approx(2), "faster")
    assert analysis.rows(run)[0].speedup is None
    memory = replace(run, bandwidth_bytes_per_second=1e10)
    assert analysis.rows(memory)[1].of_limit == pytest.approx(1)  # now the bytes take all of the 10 ms
    assert analysis.rows(replace(run, limits=()))[1].of_limit is None


def test_processes_side_by_side_are_counted_by_the_wall() -> None:
    one = runs.series(rounds_ns=FLAT, concurrency=2, wall_ns=(20 * MS,) * 3, batch=1, flops=2 * 10 ** 9, min_bytes=1)
    run = runs.run([one], limits=(Limit("fp32", 1e12, "onnxruntime"),))
    row = analysis.rows(run)[0]
    assert row.images_per_second == pytest.approx(200)  # twelve images in 60 ms
    assert row.of_limit == pytest.approx(0.4)  # a step every 5 ms, which needs 2


@pytest.mark.parametrize(("change", "text"), [
    ({"rounds_ns": ((10 * MS, 20 * MS) * 5,) * 5}, "spread over 67% of"),
    ({"load": (0.3,) * 5}, "other processes took up to 30%"),
    ({"rounds_ns": (*FLAT, TWICE[0])}, "the median of a round is off by 100%"), ({"settled": False}, "settled"),
    ({"status": "failed", "reason": "out of paper"}, "failed: out of paper"),
    ({"rounds_ns": FLAT[:2]}, "fewer than 3 rounds"), ({"gpu": ({"throttle_reasons": ["hot"]},)}, "hot"),
])
def test_a_warning(change: dict[str, object], text: str) -> None:
    assert analysis.warnings(runs.run([runs.series(rounds_ns=FLAT)])) == ()
    assert any(text in said for said in analysis.warnings(runs.run([runs.series(**{"rounds_ns": FLAT, **change})])))


def test_warnings_of_the_machine() -> None:
    run = runs.run([runs.series(rounds_ns=FLAT)], complete=False, environment=runs.environment(governor="powersave"))
    stopped, governor = analysis.warnings(run)
    assert "not complete" in stopped
    assert "powersave" in governor


def test_the_recommended_engine() -> None:
    run = runs.run()
    best = analysis.recommended(run).series
    assert best is not None
    assert (best.runtime, best.precision) == ("onnxruntime", "int8")  # 7.1 ms
    exact = analysis.recommended(run, max_error=1e-5).series
    assert exact is not None
    assert (exact.runtime, exact.precision) == ("openvino", "fp32")  # 14.8 ms
    assert "no engine is within the error limit" in analysis.recommended(run, max_error=1e-9).reason
    assert "answers in 3 ms" in analysis.recommended(run, max_latency_ms=3).reason
    assert "no forward pass" in analysis.recommended(run, batch=64).reason


def test_was_int8_worth_it() -> None:
    assert analysis.int8_worth(runs.run()).startswith("Yes: ONNX Runtime int8 answers in 7.1")
    slow = [runs.series("openvino", "fp32", 5.0, 1), runs.series("openvino", "int8", 9.0, 2, relative_l2=0.01)]
    assert analysis.int8_worth(runs.run(slow)).startswith("No: ")
    assert "No int8 engine was measured" in analysis.int8_worth(runs.run(slow[:1]))


def test_a_regression_is_more_than_tolerance_and_more_than_chance() -> None:
    def one(ms: float, seed: int, spread: float = 0.01) -> analysis.Run:
        return runs.run([runs.series(rounds_ns=runs.rounds(ms, seed, spread=spread))])

    slower, = analysis.regressions(one(11, 1), one(10, 2), 0.05)
    assert slower.ratio == pytest.approx(1.1, abs=0.02)
    assert slower.low < 1.1 < slower.high
    assert analysis.regressions(one(11, 1), one(10, 2), 0.15) == ()
    assert analysis.regressions(one(9, 1), one(10, 2), 0.05) == ()
    other = runs.run([runs.series("openvino")])
    assert analysis.regressions(other, one(1, 2), 0.05) == ()
    told = sum(bool(analysis.regressions(one(10, seed), one(10, seed + 500), 0.0)) for seed in range(100))
    assert told <= 8  # 2.5 in 100 by chance alone


def test_classic_lines() -> None:
    one = runs.series(rounds_ns=((100 * MS,) * 10, (300 * MS,) * 10))
    stamp = datetime(2026, 1, 2, 3, 4, 5)
    assert list(analysis.classic_lines(one, stamp)) == [
        "2026-01-02 03:04:05: step 0, duration = 0.100", "2026-01-02 03:04:05: step 10, duration = 0.300",
        "2026-01-02 03:04:05: Forward across 20 steps, 0.200 +/- 0.100 sec / batch"]
    back = list(analysis.classic_lines(replace(one, mode="forward-backward"), stamp))
    assert back[-1] == "2026-01-02 03:04:05: Forward-backward across 20 steps, 0.200 +/- 0.100 sec / batch"
