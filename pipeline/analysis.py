"""What a benchmark run says: pure functions from the samples of a Run to numbers and plain sentences.

The table of the benchmark command and the report stand on these alone, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

import numpy as np

from pipeline import statistics
from pipeline.record import Rounds, Run, Series
from pipeline.statistics import Comparison, Summary
from pipeline.verify import LIMITS

BASELINE = "tensorflow"
UNSTEADY = 0.05  # spread, or drift between rounds, that a reader has to know of
BUSY = 0.1  # share of all cores that other processes took
FEWEST_ROUNDS = 3
BLOCKS = 5  # that a round is cut into where there are too few rounds to compare runs by
TITLES = MappingProxyType({
    "tensorflow": "TensorFlow", "tensorflow-xla": "TensorFlow XLA", "onnxruntime": "ONNX Runtime",
    "onnxruntime-tensorrt": "ONNX Runtime TensorRT", "onnxruntime-tensorrt-rtx": "ONNX Runtime TensorRT-RTX",
    "openvino": "OpenVINO", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"})


@dataclass(frozen=True)
class Row:
    """One measured configuration. Times of `summary` in ns.

    `of_limit`: the least time that the machine allows, as a share of the time measured; None: not known.
    `speedup`: against TensorFlow on the same batch, concurrency and mode; None: not measured, or this is TensorFlow.
    """

    series: Series
    summary: Summary
    images_per_second: float | None
    of_limit: float | None
    speedup: Comparison | None

    @property
    def latency_ms(self) -> float:
        """Median of a step."""
        return self.summary.median.value / 1e6


@dataclass(frozen=True)
class Choice:
    """The engine to take, or the reason why there is none."""

    row: Row | None
    reason: str = ""

    @property
    def series(self) -> Series | None:
        return None if self.row is None else self.row.series


@dataclass(frozen=True)
class Regression:
    """A configuration that got slower. `ratio`: its time over that of the baseline run, with its 95 % interval."""

    series: Series
    latency_ms: float
    baseline_ms: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return (f"{name(self.series)}: {number(self.latency_ms)} ms, was {number(self.baseline_ms)} ms: "
                f"{self.ratio:.2f} times as long ({self.low:.2f} to {self.high:.2f})")


# --- rows ------------------------------------------------------------------------------------------------------

def rows(run: Run) -> tuple[Row, ...]:
    """One for each configuration that was measured, in the run's order."""
    return tuple(_row(run, one) for one in run.series if one.status == "measured")


def _row(run: Run, one: Series) -> Row:
    samples = _samples(one.rounds_ns)
    summary, slower = statistics.summary(samples), _tensorflow(run, one)
    busy = samples if one.concurrency == 1 else one.wall_ns  # the samples of processes that run together overlap
    step_ns = summary.median.value if one.concurrency == 1 else sum(one.wall_ns) / len(samples)
    least = _least_seconds(run, one)
    return Row(one, summary, statistics.throughput(one.batch * len(samples), busy) if busy else None,
               least * 1e9 / step_ns if least and step_ns else None,
               None if slower is None else statistics.compare(slower.rounds_ns, one.rounds_ns))


def _samples(rounds: Rounds) -> tuple[int, ...]:
    return tuple(n for one in rounds for n in one)


def _least_seconds(run: Run, one: Series) -> float | None:
    """Roofline: no step ends before its operations are done, nor before its bytes have moved (Williams et al. 2009)."""
    rate = max((x.flops_per_second for x in run.limits if x.precision == one.precision), default=0.0)
    if not rate > 0 or not run.bandwidth_bytes_per_second > 0 or not one.flops:
        return None
    return max(one.flops / rate, one.min_bytes / run.bandwidth_bytes_per_second)


def _tensorflow(run: Run, one: Series) -> Series | None:
    """What `one` is compared with: best with the same threads, and in float32."""
    found = [s for s in run.series if s.runtime == BASELINE and s.status == "measured" and _side_by_side(s, one)
             and (s.batch, s.concurrency, s.mode) == (one.batch, one.concurrency, one.mode)]
    best = min(found, key=lambda s: (s.threads != one.threads, s.precision != "fp32"), default=None)
    return None if best is one else best


def _side_by_side(one: Series, other: Series) -> bool:
    """Whether a round has samples of both: a run that was stopped may have none."""
    return any(a and b for a, b in zip(one.rounds_ns, other.rounds_ns, strict=False))


# --- sentences -------------------------------------------------------------------------------------------------

def warnings(run: Run) -> tuple[str, ...]:
    """What makes the numbers of the run worth less, a sentence each."""
    found = [] if run.complete else ["The run is not complete: it was stopped, and configurations are missing."]
    if run.environment.governor not in (None, "performance"):
        found.append(f"The CPU's frequency governor is {run.environment.governor}, not performance: "
                     "clocks change with the load.")
    return (*found, *(text for one in run.series for text in _doubts(one)))


def _doubts(one: Series) -> Iterator[str]:
    if one.status == "failed":
        yield f"{name(one)}: failed: {one.reason}"
        return
    spread, drift = statistics.summary(_samples(one.rounds_ns)).spread, statistics.drift(one.rounds_ns)
    reasons = [state.get("throttle_reasons") for state in one.gpu]
    throttled = sorted({str(why) for found in reasons if isinstance(found, list) for why in found})
    if spread > UNSTEADY:
        yield f"{name(one)}: half of the samples spread over {spread:.0%} of the median."
    if drift > UNSTEADY:
        yield f"{name(one)}: the median of a round is off by {drift:.0%}."
    if max(one.load, default=0.0) > BUSY:
        yield f"{name(one)}: other processes took up to {max(one.load):.0%} of the cores."
    if throttled:
        yield f"{name(one)}: the GPU held back its clocks ({', '.join(throttled)})."
    if not one.settled:
        yield f"{name(one)}: times had not settled after {len(one.burn_in_ns)} steps of burn-in."
    if len(one.rounds_ns) < FEWEST_ROUNDS:
        yield f"{name(one)}: fewer than {FEWEST_ROUNDS} rounds, so that drift between them stays unseen."


def recommended(run: Run, max_error: float | None = None, max_latency_ms: float | None = None,
                batch: int | None = None) -> Choice:
    """The fastest forward pass of one process at `batch` (None: the smallest measured) among engines whose relative L2
    error is known and within `max_error` (None: the limit of their precision)."""
    alone = _alone(run)
    batch = min((s.batch for s in alone), default=None) if batch is None else batch
    asked = [s for s in alone if s.batch == batch]
    exact = [s for s in asked if within(s, max_error)]
    if not asked:
        return Choice(None, "no forward pass was measured" + (f" at batch {batch}" if batch else ""))
    if not exact:
        known = [f"{name(s)} {s.relative_l2:.1e}" for s in asked if s.relative_l2 is not None]
        return Choice(None, "no engine is within the error limit: " + ("; ".join(known) or "no error is known"))
    if max_latency_ms is not None and _median_ms(exact[0]) > max_latency_ms:
        return Choice(None, f"no engine within the error limit answers in {max_latency_ms:g} ms: the fastest, "
                            f"{name(exact[0])}, takes {number(_median_ms(exact[0]))} ms")
    return Choice(_row(run, exact[0]))


def _alone(run: Run) -> list[Series]:
    """Forward passes of one process, the fastest first."""
    return sorted((s for s in run.series if (s.status, s.concurrency, s.mode) == ("measured", 1, "forward")),
                  key=_median_ms)


def within(one: Series, max_error: float | None = None) -> bool:
    """A precision without a limit of its own has that of float32."""
    limit = LIMITS.get(one.precision, LIMITS["fp32"]) if max_error is None else max_error
    return one.relative_l2 is not None and one.relative_l2 <= limit


def int8_worth(run: Run) -> str:
    """Was int8 worth it? The fastest int8 engine against the fastest float32 one, at the smallest batch of both."""
    fastest = {(s.batch, s.precision): s for s in reversed(_alone(run))}
    pairs = [(one, fastest[batch, "fp32"]) for (batch, precision), one in sorted(fastest.items())
             if precision == "int8" and (batch, "fp32") in fastest and _side_by_side(one, fastest[batch, "fp32"])]
    if not pairs:
        return "No int8 engine was measured beside a float32 one."
    small, full = pairs[0]
    return f"{_worth(small, full)} {_price(small, full)}"


def _worth(small: Series, full: Series) -> str:
    ratio = statistics.compare(full.rounds_ns, small.rounds_ns)
    verdict = {"faster": "Yes", "slower": "No"}.get(ratio.verdict, "No difference told apart")
    if ratio.verdict == "faster" and not within(small):
        verdict = "Faster, but not within the error limit"
    return (f"{verdict}: {title(small)} answers in {number(_median_ms(small))} ms, {title(full)} in "
            f"{number(_median_ms(full))} ms at batch {full.batch} ({ratio.ratio:.2f} times the speed, 95 % interval "
            f"{ratio.low:.2f} to {ratio.high:.2f}).")


def _price(small: Series, full: Series) -> str:
    errors = ["unknown" if s.relative_l2 is None else f"{s.relative_l2:.1e}" for s in (small, full)]
    return (f"Its relative error is {errors[0]} against {errors[1]}, its size {small.size_bytes / 1e6:.1f} MB against "
            f"{full.size_bytes / 1e6:.1f} MB.")


# --- two runs --------------------------------------------------------------------------------------------------

def common(run: Run, baseline: Run) -> tuple[tuple[Series, Series], ...]:
    """(now, then) of each configuration that both runs measured."""
    then = {one.key: one for one in baseline.series if one.status == "measured"}
    return tuple((one, then[one.key]) for one in run.series if one.status == "measured" and one.key in then)


def regressions(run: Run, baseline: Run, tolerance: float) -> tuple[Regression, ...]:
    """Configurations that take longer than in `baseline` by more than `tolerance`, and by more than chance."""
    found = (_change(now, then) for now, then in common(run, baseline))
    return tuple(one for one in found if one.ratio > 1 + tolerance and one.low > 1)


def _change(now: Series, then: Series) -> Regression:
    """Welch's interval of the difference of the logarithms of round medians, as a ratio.

    Within a run, round i of every configuration is measured in the same minute, and pairing takes out what the machine
    did then. Round i of two runs has nothing in common: pairs would be arbitrary, and samples of one round are not
    independent, so rounds are the unit, and each run has a variance of its own.
    """
    a, b = (np.log(_medians(one.rounds_ns)) for one in (now, then))
    difference, half = float(a.mean() - b.mean()), _welch(a, b)
    ratio, low, high = (float(np.exp(x)) for x in (difference, difference - half, difference + half))
    return Regression(now, _median_ms(now), _median_ms(then), ratio, low, high)


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    """Half the 95 % interval of the difference of the means, by Welch's t; infinite for a single value."""
    from scipy import stats

    if min(len(a), len(b)) < 2:
        return float("inf")
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1) for x in (a, b)]
    variance, squares = sum(v for v, _ in parts), sum(v * v / degrees for v, degrees in parts)
    return float(stats.t.ppf(0.975, variance ** 2 / squares)) * variance ** 0.5 if squares else 0.0


def _medians(rounds: Rounds) -> np.ndarray:
    """Of each round; of consecutive blocks of each, where rounds are too few (non-overlapping batch means)."""
    measured = [np.array(one) for one in rounds if one]
    if len(measured) < FEWEST_ROUNDS:
        measured = [part for one in measured for part in np.array_split(one, min(BLOCKS, len(one)))]
    return np.array([np.median(one) for one in measured])


def _median_ms(one: Series) -> float:
    return float(np.median(_samples(one.rounds_ns))) / 1e6


# --- text ------------------------------------------------------------------------------------------------------

def title(one: Series) -> str:
    """For people: `ONNX Runtime int8`."""
    return f"{TITLES.get(one.runtime, one.runtime)} {one.precision}"


def name(one: Series) -> str:
    """Series.name with the runtime as people write it: `ONNX Runtime int8, batch 8`."""
    return title(one) + one.name.removeprefix(f"{one.runtime} {one.precision}")


def number(value: float) -> str:
    """Three digits, never an exponent: 0.412, 7.13, 24.1, 1234."""
    digits = 2 - int(np.floor(np.log10(abs(value)))) if value else 2
    return f"{value:.{max(0, digits)}f}"


def classic_lines(one: Series, created: datetime) -> Iterable[str]:
    """The lines of the classic convnet benchmark, in their form: every tenth step, then mean and population std."""
    seconds = np.array(_samples(one.rounds_ns)) / 1e9
    for step in range(0, len(seconds), 10):
        yield f"{created}: step {step}, duration = {seconds[step]:.3f}"
    yield (f"{created}: {one.mode.capitalize()} across {len(seconds)} steps, "
           f"{seconds.mean():.3f} +/- {seconds.std():.3f} sec / batch")
