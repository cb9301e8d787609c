"""The benchmark's estimators against closed forms, NumPy, SciPy, the standard library, and seeded simulations.

Expectations come from somewhere else than the module under test: exact fractions, a bootstrap drawn the long way, or a
machine that is simulated, of which the truth is known.
"""

from __future__ import annotations

import math
import statistics as standard
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.statistics import (
    Comparison,
    Percentile,
    Samples,
    compare,
    drift,
    percentile,
    samples_needed,
    settled,
    summary,
    throughput,
)

fixed = settings(derandomize=True, deadline=None, max_examples=60)
latencies = st.integers(1, 10**12)  # nanoseconds
series = st.lists(latencies, min_size=1, max_size=150)
several = st.lists(st.lists(latencies, min_size=1, max_size=12), min_size=1, max_size=6)
BASE_NS = 10_000_000


def machine(ratio: float, seed: int, rounds: int = 5, samples: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Latencies [round][sample] of a baseline and of a candidate that is `ratio` times as fast. A round has a drift of
    3 % that both share and a jitter of 0.5 % of its own; a sample has noise of 1.5 %, and 2 % of them are outliers."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 0.03, (rounds, 1))

    def one(latency: float) -> np.ndarray:
        private, noise = rng.normal(0, 0.005, (rounds, 1)), rng.normal(0, 0.015, (rounds, samples))
        slow = np.where(rng.random(noise.shape) < 0.02, rng.uniform(1.2, 2, noise.shape), 1)
        return np.rint(latency * np.exp(common + private + noise) * slow)

    return one(BASE_NS * ratio), one(BASE_NS)


def verdicts(ratio: float) -> list[str]:
    return [compare(*machine(ratio, seed), seed=seed).verdict for seed in range(100)]


def burn_in(seed: int, count: int, excess: float = 0.0, length: float = 1.0, noise: float = 0.015) -> np.ndarray:
    """Latencies that start at 1 + `excess` times the last ones and decay to those over `length` samples."""
    rng = np.random.default_rng(seed)
    slow = np.where(rng.random(count) < 0.02, rng.uniform(1.2, 2, count), 1)
    return BASE_NS * (1 + excess * np.exp(-np.arange(count) / length)) * np.exp(rng.normal(0, noise, count)) * slow


def relatives(one: Comparison) -> tuple[float, float, float]:
    return one.ratio, one.low, one.high


# samples_needed

@pytest.mark.parametrize(("q", "count"), [(50, 11), (90, 64), (95, 130), (99, 662)])
def test_counts_of_mlperf(q: int, count: int) -> None:
    assert samples_needed(q) == count


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99, 0.999])
def test_samples_needed_is_the_smallest_by_the_binomial_distribution(confidence: float) -> None:
    for q in range(1, 100):
        counts = np.arange(1, samples_needed(q, confidence) + 1)
        chance = stats.binom.cdf(1, counts, (100 - q) / 100)
        assert chance[-1] <= 1 - confidence + 1e-12
        assert (chance[:-1] > 1 - confidence - 1e-12).all()


def test_more_samples_for_a_higher_percentile_and_a_higher_confidence() -> None:
    counts = [samples_needed(q) for q in range(1, 100)]
    assert counts == sorted(counts)
    assert samples_needed(90, 0.9) < samples_needed(90, 0.99) < samples_needed(90, 0.999)


@pytest.mark.parametrize(("q", "confidence"), [(0, 0.99), (100, 0.99), (-1, 0.99), (50, 0.0), (50, 1.0)])
def test_no_count_for_what_no_sample_tells(q: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=f"percentile {q}"):
        samples_needed(q, confidence)


# percentile

@fixed
@given(st.lists(latencies, min_size=64, max_size=300), st.sampled_from([10, 25, 50, 75, 90]))
def test_percentile_is_numpys_within_its_interval(samples: list[int], q: int) -> None:
    found = percentile(samples, q)
    assert found is not None
    assert found.value == pytest.approx(np.percentile(samples, q), rel=1e-12)
    assert found.low <= found.value <= found.high
    assert {found.low, found.high} <= set(samples)


@pytest.mark.parametrize(("q", "count"), [(90, 64), (95, 130), (99, 662), (10, 64), (1, 662)])
def test_no_percentile_of_too_few_samples(q: int, count: int) -> None:
    samples = np.random.default_rng(q).permutation(count)
    assert percentile(samples[1:], q) is None
    found = percentile(samples, q)
    assert found is not None
    assert found.value == pytest.approx((count - 1) * q / 100)


@pytest.mark.parametrize(("q", "count", "confidence"), [
    (50, 12, 0.99), (50, 20, 0.99), (50, 100, 0.99), (50, 101, 0.9), (90, 100, 0.99), (90, 500, 0.95), (95, 130, 0.99),
    (99, 700, 0.99), (25, 150, 0.99), (10, 90, 0.9)])
def test_interval_is_the_shortest_that_holds_the_percentile_often_enough(q: int, count: int, confidence: float) -> None:
    """By exact fractions. Samples are their own ranks, so that an end of the interval is the index of a sample. With
    B samples below the percentile, the one of index i is below it if B > i."""
    found = percentile(range(count), q, confidence)
    assert found is not None
    first, last, p = int(found.low), int(found.high), Fraction(q, 100)
    chance = [math.comb(count, b) * p**b * (1 - p) ** (count - b) for b in range(count + 1)]
    below, above, half = sum(chance[:first + 1]), sum(chance[last + 1:]), (1 - Fraction(str(confidence))) / 2
    assert below <= half < below + chance[first + 1]
    assert above <= half < above + chance[last]


@pytest.mark.parametrize(("q", "count", "confidence"), [(95, 130, 0.99), (50, 40, 0.99), (90, 300, 0.8)])
def test_interval_holds_the_true_percentile_as_often_as_it_says(q: int, count: int, confidence: float) -> None:
    rng = np.random.default_rng(20)
    truth = -math.log(1 - q / 100)  # of the exponential distribution
    found = [percentile(rng.exponential(size=count), q, confidence) for _ in range(1000)]
    held = np.mean([one is not None and one.low <= truth <= one.high for one in found])
    assert held >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / 1000)


@fixed
@given(st.lists(latencies, min_size=1, max_size=7))
def test_interval_of_the_median_of_few_samples_is_their_range(samples: list[int]) -> None:
    assert percentile(samples, 50) == Percentile(standard.median(samples), min(samples), max(samples))


# summary

@fixed
@given(series)
def test_summary_agrees_with_the_standard_library(samples: list[int]) -> None:
    found = summary(samples)
    assert found.count == len(samples)
    assert found.mean == pytest.approx(standard.fmean(samples), rel=1e-12)
    assert found.std == pytest.approx(standard.pstdev(samples), rel=1e-9, abs=1e-12 * max(samples))
    assert found.median.value == pytest.approx(standard.median(samples), rel=1e-12)
    assert found.spread == pytest.approx(stats.iqr(samples) / np.median(samples), rel=1e-9, abs=1e-12)
    assert {q: one is not None for q, one in found.percentiles.items()} == {
        90: len(samples) >= 64, 95: len(samples) >= 130, 99: False}


def test_std_is_the_classic_loops_where_that_one_still_has_digits() -> None:
    samples = np.random.default_rng(1).uniform(1, 3, 500)
    assert summary(samples).std == pytest.approx(math.sqrt(np.mean(samples**2) - np.mean(samples) ** 2), rel=1e-9)


def test_std_does_not_cancel() -> None:
    """Squares of 1e24 leave their difference no digit."""
    assert summary([10**12, 10**12 + 2] * 10).std == 1


def test_an_outlier_does_not_move_the_spread() -> None:
    samples = [*range(1000, 1101)]
    assert summary(samples).spread == pytest.approx(50 / 1050)
    assert summary([*samples[:-1], 10**9]).spread == summary(samples).spread


@fixed
@given(st.lists(latencies, min_size=130, max_size=140), st.integers(1, 20))
def test_summary_scales_and_knows_no_order(samples: list[int], power: int) -> None:
    found, factor = summary(samples), 2.0**power  # exact in binary
    scaled = summary(np.random.default_rng(power).permutation(samples) * factor)
    assert scaled.spread == found.spread
    assert (scaled.mean, scaled.std) == (found.mean * factor, found.std * factor)
    for one, other in ((scaled.median, found.median), (scaled.percentiles[90], found.percentiles[90]),
                       (scaled.percentiles[95], found.percentiles[95])):
        assert one is not None
        assert other is not None
        assert (one.value, one.low, one.high) == (other.value * factor, other.low * factor, other.high * factor)


def test_spread_of_a_median_of_nothing() -> None:
    assert summary([0, 0, 0, 5, 9]).spread == math.inf
    assert summary([0, 0, 0]).spread == 0


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0], [3.0, 4.0]]])
def test_no_summary_of_what_are_no_samples(samples: Samples) -> None:
    with pytest.raises(ValueError, match="no samples"):
        summary(samples)
    with pytest.raises(ValueError, match="no samples"):
        percentile(samples, 50)


# throughput, drift

@fixed
@given(st.integers(1, 10**6), st.lists(latencies, min_size=1, max_size=9))
def test_throughput(images: int, wall_ns: list[int]) -> None:
    assert throughput(images, wall_ns) == pytest.approx(float(Fraction(images * 10**9, sum(wall_ns))))


def test_throughput_of_two_rounds_is_not_the_mean_of_theirs() -> None:
    assert throughput(400, (500_000_000, 1_500_000_000)) == 200.0


@pytest.mark.parametrize("wall_ns", [(), (0,)])
def test_no_throughput_in_no_time(wall_ns: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no time"):
        throughput(1, wall_ns)


def test_drift_is_that_of_the_round_farthest_off() -> None:
    assert drift([[99, 100, 900], [110], [95, 95]]) == pytest.approx(0.1)  # medians 100, 110, 95
    assert drift([[99, 100, 900], [104], [90, 90]]) == pytest.approx(0.1)
    assert drift([[5, 7, 900]]) == 0
    assert drift([[100], [], [103], [100]]) == pytest.approx(0.03)


@fixed
@given(several, st.integers(1, 20))
def test_drift_scales_away_and_knows_no_order(rounds: list[list[int]], power: int) -> None:
    changed = [[n * 2**power for n in reversed(one)] for one in reversed(rounds)]
    assert drift(changed) == drift(rounds)


@pytest.mark.parametrize("rounds", [[], [[]], [[], []]])
def test_no_drift_without_samples(rounds: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="no samples"):
        drift(rounds)


# settled

@pytest.mark.parametrize("count", [0, 1, 9])
def test_few_samples_are_not_settled(count: int) -> None:
    assert not settled([BASE_NS] * count)


@pytest.mark.parametrize("count", [10, 11, 20, 100])
def test_what_does_not_change_is_settled(count: int) -> None:
    assert settled([BASE_NS] * count)


@pytest.mark.parametrize("count", [10, 20, 50, 200])
@pytest.mark.parametrize("noise", [0.0001, 0.015, 0.1])
def test_stationary_noise_is_settled(count: int, noise: float) -> None:
    assert sum(settled(burn_in(seed, count, noise=noise)) for seed in range(200)) >= 180


def test_stationary_noise_without_a_mean_is_settled() -> None:
    rng = np.random.default_rng(4)
    assert sum(settled(1 + 0.01 * np.abs(rng.standard_cauchy(60))) for _ in range(200)) >= 180


def test_stationary_noise_is_settled_soon_as_samples_go_on() -> None:
    every = [burn_in(seed, 30) for seed in range(200)]
    assert all(any(settled(one[:n]) for n in range(20, 31)) for one in every)


@pytest.mark.parametrize(("excess", "length", "count"), [
    (1, 10, 10), (1, 10, 20), (1, 10, 40), (0.2, 10, 20), (5, 3, 10), (5, 3, 20), (1, 30, 20), (1, 30, 100),
    (0.2, 30, 20), (1, 100, 30), (1, 100, 200)])
def test_a_warm_up_that_still_decays_is_not_settled(excess: float, length: float, count: int) -> None:
    assert sum(settled(burn_in(seed, count, excess, length)) for seed in range(100)) <= 5


@pytest.mark.parametrize(("excess", "length", "most"), [(0.2, 10, 60), (1, 10, 110), (5, 3, 60), (1, 30, 330)])
def test_a_warm_up_is_settled_once_it_is_over_and_not_before(excess: float, length: float, most: int) -> None:
    """Looking at every fifth: what is left of the excess is less than the noise of one sample."""
    for seed in range(30):
        samples = burn_in(seed, most, excess, length)
        over = next(n for n in range(20, most + 1, 5) if settled(samples[:n]))
        assert excess * math.exp(-over / length) < 0.015


@pytest.mark.parametrize("change", [0.955, 1.045])
def test_a_change_of_three_times_the_noise_is_seen(change: float) -> None:
    trend = np.linspace(1, change, 20)
    assert sum(settled(burn_in(seed, 20) * trend) for seed in range(200)) <= 20


def test_a_trend_too_small_to_matter_is_settled() -> None:
    """Both rise without any noise."""
    assert settled(np.linspace(1, 1.003, 40) * BASE_NS)
    assert not settled(np.linspace(1, 1.01, 40) * BASE_NS)


@pytest.mark.parametrize("place", range(20))
def test_one_outlier_changes_nothing(place: int) -> None:
    steady, falling = 1000 + np.tile([4.0, -3, 2, -4], 5), 1000 - 10 * np.arange(20.0)
    for huge in (10.0, 1e6):
        slow = np.where(np.arange(20) == place, huge, 1)
        assert settled(steady * slow)
        assert not settled(falling * slow)


def test_a_few_slow_samples_at_the_start_of_the_window_change_no_half() -> None:
    assert settled([1.5 * BASE_NS] * 4 + [BASE_NS] * 16)
    assert not settled([1.5 * BASE_NS] * 7 + [BASE_NS] * 13)


def test_a_start_is_left_behind() -> None:
    """A hundred times slower, then steady: settled only when that is before the later half."""
    samples = np.concatenate([np.full(15, 100.0 * BASE_NS), burn_in(5, 60)])
    assert not settled(samples[:20])
    assert not settled(samples[:25])
    assert settled(samples[:40])


@fixed
@given(st.lists(latencies, min_size=10, max_size=60), st.integers(1, 20))
def test_settled_has_no_unit(samples: list[int], power: int) -> None:
    assert settled(samples) == settled([n * 2**power for n in samples])


def test_what_is_no_number_is_not_settled_nor_unsettled() -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        settled([1.0] * 20 + [math.nan])


# compare

def test_identical_configurations_are_not_told_apart() -> None:
    assert verdicts(1).count("not told apart") >= 98


def test_five_percent_is_found() -> None:
    assert verdicts(1.05).count("faster") >= 98
    assert verdicts(1 / 1.05).count("slower") >= 98


def test_two_percent_is_mostly_found_and_never_turned_around() -> None:
    found = verdicts(1.02)
    assert found.count("faster") >= 70
    assert "slower" not in found


@pytest.mark.parametrize(("rounds", "samples"), [(3, 20), (5, 20), (10, 10), (5, 5)])
def test_interval_of_a_comparison_holds_the_truth(rounds: int, samples: int) -> None:
    found = [compare(*machine(1.3, seed, rounds, samples), seed=seed) for seed in range(200)]
    assert sum(one.low <= 1.3 <= one.high for one in found) >= 190


def test_interval_narrows_with_rounds() -> None:
    widths = {count: np.mean([one.high - one.low for one in (compare(*machine(1, seed, count)) for seed in range(20))])
              for count in (3, 5, 10, 20)}
    assert widths[3] > 1.2 * widths[5] > 1.2**2 * widths[10] > 1.2**3 * widths[20]


def test_ratio_is_that_of_the_medians() -> None:
    assert compare([[200, 1, 900]], [[100, 100, 100]]).ratio == pytest.approx(2)
    assert compare([[200, 210], [400, 440]], [[100, 105], [50, 55]]).ratio == pytest.approx(4)  # of 2 and 8


def test_a_round_that_went_wrong_is_left_out() -> None:
    """And the one at the other end; what is left of 2, 4 and 16 is their geometric mean."""
    assert compare([[10**9], [4], [16], [2], [1]], [[1]] * 5).ratio == pytest.approx(128 ** (1 / 3))


def test_constant_rounds_are_told_apart() -> None:
    found = compare([[300] * 4] * 5, [[100] * 4] * 5)
    assert relatives(found) == pytest.approx((3, 3, 3))
    assert found.verdict == "faster"
    assert compare([[100] * 4] * 5, [[300] * 4] * 5).verdict == "slower"
    assert compare([[300] * 4] * 5, [[300] * 4] * 5) == Comparison(1, 1, 1, "not told apart")
    uneven = compare([[391293757]] * 7, [[42878779]] * 7)  # a ratio that rounds differently on two ways to it
    assert uneven.low <= uneven.ratio <= uneven.high


def test_what_the_machine_does_to_both_cancels() -> None:
    """Rounds a thousand times as slow, for the two alike, change no bit of the result."""
    baseline, candidate = machine(1.02, 11)
    factor = 2.0 ** np.arange(0, 15, 3)[:, None]
    assert compare(baseline * factor, candidate * factor) == compare(baseline, candidate)
    assert relatives(compare(baseline * factor, candidate)) != relatives(compare(baseline, candidate))


@fixed
@given(several, several, st.integers(1, 20))
def test_comparison_has_no_unit_and_no_order_in_a_round(
        baseline: list[list[int]], candidate: list[list[int]], power: int) -> None:
    found = compare(baseline, candidate)
    assert found.low <= found.ratio <= found.high
    changed = [[[n * 2**power for n in reversed(one)] for one in rounds] for rounds in (baseline, candidate)]
    assert compare(changed[0], changed[1]) == found
    assert compare(candidate, baseline).ratio == pytest.approx(1 / found.ratio)


def test_deterministic_by_seed() -> None:
    rounds = machine(1.02, 12)
    assert compare(*rounds, seed=3) == compare(*rounds, seed=3)
    assert compare(*rounds, seed=3).low != compare(*rounds, seed=4).low
    assert relatives(compare(*rounds, seed=3)) == pytest.approx(relatives(compare(*rounds, seed=4)), abs=2e-3)


def test_rounds_that_only_one_has_are_left_out() -> None:
    baseline, candidate = (rounds.tolist() for rounds in machine(1.05, 13))
    expected = compare(baseline[:3], candidate[:3])
    assert compare(baseline[:3], candidate) == expected
    assert compare([*baseline[:3], [1]], [*candidate[:3], []]) == expected


def expected_interval(drawn: np.ndarray, units: int) -> np.ndarray:
    """The expanded percentiles of 95 %, as Hesterberg states them."""
    tail = stats.norm.cdf(-math.sqrt(units / (units - 1)) * stats.t.isf(0.025, units - 1))
    return np.quantile(drawn, (tail, 1 - tail))


def mean_interval(baseline: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Of 20 seeds, so that what is left of chance is well under a part in fifty of the width."""
    return np.mean([relatives(compare(baseline, candidate, seed))[1:] for seed in range(20)], axis=0)


@pytest.mark.parametrize(("count", "more"), [(8, 8), (8, 60), (60, 8), (21, 21), (40, 40)])
def test_one_round_is_a_bootstrap_of_its_samples(count: int, more: int) -> None:
    """Against resampling the long way, for an even and for an odd number."""
    rng = np.random.default_rng(count)
    baseline, candidate = rng.normal(1000, 30, (1, count)), rng.normal(800, 20, (1, more))
    b, c = (np.median(rng.choice(one[0], (40_000, one.size)), axis=1) for one in (baseline, candidate))
    low, high = expected_interval(b / c, min(count, more))
    assert mean_interval(baseline, candidate) == pytest.approx((low, high), abs=0.02 * (high - low))
    assert compare(baseline, candidate).ratio == pytest.approx(np.median(baseline) / np.median(candidate))


def test_rounds_of_one_sample_are_a_bootstrap_of_rounds() -> None:
    """Nothing is drawn within a round: against drawing the ten rounds the long way."""
    rng = np.random.default_rng(5)
    baseline, candidate = rng.normal(1000, 30, (10, 1)), rng.normal(800, 20, (10, 1))
    drawn = rng.choice(np.log(baseline / candidate).ravel(), (200_000, 10))
    low, high = np.exp(expected_interval(np.sort(drawn, axis=1)[:, 2:8].mean(axis=1), 10))
    assert mean_interval(baseline, candidate) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_rounds_of_samples_are_a_bootstrap_of_both() -> None:
    """Rounds, then samples anew in each round drawn, the same round drawn twice among them: the long way."""
    rng = np.random.default_rng(6)
    baseline, candidate = rng.normal(1000, 30, (8, 9)), rng.normal(800, 20, (8, 9))
    rounds = rng.integers(8, size=(40_000, 8, 1))
    b, c = (np.median(one[rounds, rng.integers(9, size=(40_000, 8, 9))], axis=2) for one in (baseline, candidate))
    low, high = np.exp(expected_interval(np.sort(np.log(b / c), axis=1)[:, 1:7].mean(axis=1), 8))
    assert mean_interval(baseline, candidate) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_one_sample_tells_nothing() -> None:
    found = compare([[500]], [[100]])
    assert relatives(found) == pytest.approx((5, 0, math.inf))
    assert found.verdict == "not told apart"


@pytest.mark.parametrize(("baseline", "candidate"), [([], []), ([[1]], []), ([[]], [[1]]), ([[1], []], [[], [1]]),
                                                     ([[0, 1]], [[1, 1]]), ([[1]], [[-1]])])
def test_nothing_to_compare(baseline: list[list[int]], candidate: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="no round of both"):
        compare(baseline, candidate)
