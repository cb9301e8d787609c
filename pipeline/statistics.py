"""The estimators of the benchmark: pure functions on samples, each after the paper or document that it names.

Samples are latencies in nanoseconds, though any unit will do: values come back in it, and ratios have none. A
configuration is measured in rounds. Round i of every configuration was taken side by side, so what the machine did to
one it did to the others: `compare` pairs the rounds, and `drift` says how far they wander.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Samples = Sequence[float] | np.ndarray  # (n,), in the order of time
Rounds = Sequence[Samples] | np.ndarray  # [round][sample]; rounds may differ in length, an empty one counts for nothing

PERCENTILES = (90, 95, 99)
CONFIDENCE = 0.99  # of a percentile's interval
SHORTEST = 10  # fewer samples than this are never settled
WINDOW = 20  # samples that a test for a trend looks at, where there are so many
SIGNIFICANT = 0.05  # a trend this improbable without drift is one
NEGLIGIBLE = 0.002  # a drift too small to matter, relative
INTERVAL = 0.95  # nominal confidence of a comparison; in simulations it holds the truth about as often, or more
TRIMMED = 0.2  # share of the rounds that a comparison leaves out at either end
RESAMPLES = 5000


@dataclass(frozen=True)
class Percentile:
    """A percentile and its order-statistic confidence interval, in the unit of the samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One series, in the unit of its samples. `std` is that of the population; `percentiles` is None where the samples
    are too few for one; `spread` is the interquartile range over the median, which no outlier moves."""

    count: int
    mean: float
    std: float
    median: Percentile
    percentiles: Mapping[int, Percentile | None]
    spread: float


@dataclass(frozen=True)
class Comparison:
    """How many times as fast the candidate is, `low` to `high`. `verdict`: `faster`, `slower` or `not told apart`."""

    ratio: float
    low: float
    high: float
    verdict: str


def samples_needed(q: int, confidence: float = CONFIDENCE) -> int:
    """The fewest samples from which percentile `q`, 1 to 99, can be told: 64 for the 90th, 130 for the 95th, 662 for
    the 99th at 99 % confidence.

    The smallest n with P(Binomial(n, 1 - q/100) <= 1) <= 1 - confidence, so that two samples or more lie beyond the
    percentile: early stopping in the MLPerf inference rules, loadgen/early_stopping.cc. Raises ValueError.
    """
    if not (0 < q < 100 and 0 < confidence < 1):
        raise ValueError(f"percentile {q} at confidence {confidence} is not between 0 and 100, and 0 and 1")
    beyond, within = (100 - q) / 100, q / 100
    return next(n for n in itertools.count(2) if within**n + n * beyond * within ** (n - 1) <= 1 - confidence)


def percentile(samples: Samples, q: int, confidence: float = CONFIDENCE) -> Percentile | None:
    """Percentile `q`, 1 to 99, interpolated linearly as NumPy does (Hyndman and Fan 1996, type 7); None if the samples
    are too few to tell it or its mirror image, 100 - q. The median always has a value.

    The interval runs from one order statistic to another, by the binomial distribution of how many samples lie below
    the percentile (David and Nagaraja, Order Statistics, 2003): no assumption but independence, and not less than
    `confidence`. Where no order statistic goes so far, it ends at the smallest or largest. Raises ValueError.
    """
    ordered, needed = _ordered(samples), samples_needed(max(q, 100 - q), confidence)
    return None if q != 50 and len(ordered) < needed else _percentile(ordered, q, confidence)


def _percentile(ordered: np.ndarray, q: int, confidence: float) -> Percentile:
    count, beyond = len(ordered), (1 - confidence) / 2
    first = max(int(stats.binom.ppf(beyond, count, q / 100)) - 1, 0)
    last = min(int(stats.binom.isf(beyond, count, q / 100)), count - 1)
    return Percentile(float(np.percentile(ordered, q)), float(ordered[first]), float(ordered[last]))


def summary(samples: Samples) -> Summary:
    """Of the samples (n,), in their unit. The standard deviation is sqrt(mean of squares - square of mean), as the
    classic benchmark loop prints it, computed from the deviations, which do not cancel. Raises ValueError for none."""
    ordered = _ordered(samples)
    low, middle, high = np.percentile(ordered, (25, 50, 75))
    return Summary(len(ordered), float(np.mean(ordered)), float(np.std(ordered)), _percentile(ordered, 50, CONFIDENCE),
                   {q: percentile(ordered, q) for q in PERCENTILES}, _relative(high - low, middle))


def throughput(images: int, wall_ns: Sequence[int]) -> float:
    """Images per second: all images of all rounds, over the nanoseconds of all rounds. Raises ValueError for none."""
    if not sum(wall_ns) > 0:
        raise ValueError("no time was measured")
    return images * 1e9 / sum(wall_ns)


def drift(rounds: Rounds) -> float:
    """The largest distance of a round's median from the median of these medians, relative to that. Raises ValueError
    for no samples."""
    medians = [float(np.median(_ordered(one))) for one in rounds if len(one)]
    middle = float(np.median(_ordered(medians)))
    return _relative(max(abs(one - middle) for one in medians), middle)


def settled(samples: Samples) -> bool:
    """Whether a burn-in is over: the latency has stopped drifting, as far as its noise lets anyone see.

    Looks at the later half of the samples, or the last 20 if those are more, so that any start is left behind in the
    end. Settled is a window without a monotone trend by the test of Mann (1945) and Kendall (1975), two-sided at 5 %,
    or one whose first and second half have medians within 0.2 % of each other. The test is of ranks: an outlier counts
    as one sample, and noise of any distribution passes 95 times in 100. It sees a fall over 20 samples once that is
    about three times the noise. Fewer than 10 samples are not settled. Whoever adds samples until these are should
    first ask at 20 or more: of many looks at a short window, one is sure to be lucky. Raises ValueError.
    """
    if len(samples) < SHORTEST:
        return False
    _ordered(samples)
    window = np.asarray(samples, np.float64)[-max(WINDOW, len(samples) // 2):]
    before, after = (float(np.median(half)) for half in np.array_split(window, 2))
    if _relative(abs(after - before), before) <= NEGLIGIBLE:
        return True
    return bool(stats.kendalltau(np.arange(len(window)), window).pvalue >= SIGNIFICANT)


def compare(baseline_rounds: Rounds, candidate_rounds: Rounds, seed: int = 0) -> Comparison:
    """How many times as fast the candidate is: median(baseline) / median(candidate) in each round that both have,
    averaged over the rounds in the logarithm, without the highest and the lowest fifth of them (of 5, one each).

    The interval is a hierarchical bootstrap: rounds are drawn with replacement, then samples within each, for the two
    alike (Kalibera and Jones 2013, "Rigorous Benchmarking in Reasonable Time"). Its percentiles are those of 95 %,
    expanded for the few rounds (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", 5.3). Drawing at both
    levels counts the noise of samples twice, which errs towards `not told apart`. Of one round only its samples are
    drawn: that cannot see what differs between rounds. Deterministic by `seed`. Raises ValueError where no round has
    samples of both, or a sample is not positive.
    """
    pairs = [(_ordered(b), _ordered(c)) for b, c in zip(baseline_rounds, candidate_rounds, strict=False)
             if len(b) and len(c)]
    if not pairs or min(min(b[0], c[0]) for b, c in pairs) <= 0:
        raise ValueError("there is no round of both, or a sample is not positive")
    rng = np.random.default_rng(seed)
    ratio = math.exp(stats.trim_mean([math.log(np.median(b) / np.median(c)) for b, c in pairs], TRIMMED))
    drawn = np.log([_medians(b, rng) / _medians(c, rng) for b, c in pairs])
    if len(pairs) > 1:
        drawn = drawn[rng.integers(len(pairs), size=drawn.shape), rng.integers(RESAMPLES, size=drawn.shape)]
    units = len(pairs) if len(pairs) > 1 else min(map(len, pairs[0]))
    low, high = _expanded(np.exp(stats.trim_mean(drawn, TRIMMED)), units)
    verdict = "faster" if low > 1 else "slower" if high < 1 else "not told apart"
    return Comparison(ratio, min(low, ratio), max(high, ratio), verdict)


def _medians(ordered: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of RESAMPLES bootstrap samples. The k-th smallest of n uniform numbers is Beta(k, n + 1 - k), and the
    next one above it the least of n - k in what is left: drawing those is drawing all n (Maritz and Jarrett 1978)."""
    count, k = len(ordered), (len(ordered) + 1) // 2
    place = rng.beta(k, count + 1 - k, RESAMPLES)
    above = place if count % 2 else place + (1 - place) * rng.beta(1, count - k, RESAMPLES)
    low, high = (ordered[np.minimum((count * u).astype(int), count - 1)] for u in (place, above))
    return (low + high) / 2


def _expanded(drawn: np.ndarray, units: int) -> tuple[float, float]:
    """The interval between the percentiles that make up for few units: t for z, and n - 1 for n. One tells nothing."""
    if units == 1:
        return 0.0, math.inf
    reach = stats.t.ppf((1 + INTERVAL) / 2, units - 1) * math.sqrt(units / (units - 1))
    low, high = np.quantile(drawn, (stats.norm.cdf(-reach), stats.norm.cdf(reach)))
    return float(low), float(high)


def _ordered(samples: Samples) -> np.ndarray:
    """Sorted, so that no result depends on the order of a sum. Raises ValueError for none and for one not finite."""
    ordered = np.sort(np.asarray(samples, np.float64))
    if ordered.ndim != 1 or not ordered.size or not np.isfinite(ordered).all():
        raise ValueError("there are no samples, or one is not a finite number")
    return ordered


def _relative(part: float, whole: float) -> float:
    """Of a whole that is 0, nothing is 0 and anything else infinite."""
    return float(part / whole) if whole else math.inf if part else 0.0
