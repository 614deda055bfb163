"""Intervals of a paired mean: scipy's where clusters are trivial, the definition by matrices where they are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_mel.evaluation.intervals import mean_interval, needed


def test_prompts_for_themselves_are_a_paired_t_interval() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 17))
    expected = stats.ttest_rel(after, before).confidence_interval(0.95)
    found = mean_interval(after - before)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert (found.prompts, found.clusters) == (17, 17)
    assert mean_interval(after - before, ["one voice"] * 17) == found


def test_equal_clusters_are_an_interval_of_their_means() -> None:
    differences = np.random.default_rng(1).normal(size=(4, 6))
    expected = stats.ttest_1samp(differences.mean(1), 0).confidence_interval(0.95)
    found = mean_interval(differences.ravel(), [voice for voice in "abcd" for _ in range(6)])
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert (found.prompts, found.clusters) == (24, 4)


def test_unequal_clusters_are_cr2_with_satterthwaites_degrees_of_freedom() -> None:
    """Bell & McCaffrey by their matrices: X = 1, A_g = (I - H_gg)^(-1/2), df of y' G G' y for y of unit variance."""
    sizes = [1, 3, 7, 5]
    n = sum(sizes)
    y = np.random.default_rng(2).normal(size=n)
    hat = np.full((n, n), 1 / n)
    columns, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        values, vectors = np.linalg.eigh(np.eye(size) - hat[rows, rows])
        adjust = vectors @ np.diag(values**-0.5) @ vectors.T
        columns.append((np.eye(n) - hat)[:, rows] @ adjust @ np.ones(size) / n)
        start += size
    g = np.stack(columns, 1)
    variance = float(((g.T @ y) ** 2).sum())
    gram = g.T @ g
    df = np.trace(gram) ** 2 / np.trace(gram @ gram)
    found = mean_interval(y, [name for name, size in zip("abcd", sizes, strict=True) for _ in range(size)])
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    margin = stats.t.ppf(0.975, df) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((y.mean() - margin, y.mean() + margin))


def test_voices_that_move_together_are_no_evidence_by_their_prompts() -> None:
    # Three voices whose means are drawn around 0, with 17 prompts each: prompts for themselves would find a change in
    # most draws. Of 4,000 draws 2.5 % must lie above 0; the standard error of that share is 0.25 %.
    rng = np.random.default_rng(3)
    voices = [voice for voice in "abc" for _ in range(17)]
    draws = np.repeat(rng.normal(size=(4_000, 3)), 17, axis=1) + rng.normal(size=(4_000, 51))
    above = np.mean([mean_interval(draw, voices).low > 0 for draw in draws])
    naive = np.mean([mean_interval(draw).low > 0 for draw in draws[:500]])
    assert above == pytest.approx(0.025, abs=0.0075) and naive > 0.2


def test_what_is_not_finite_does_not_count() -> None:
    assert mean_interval([1.0, 2.0], ["1", 1]) == mean_interval([1.0, 2.0])  # one voice, whatever its type
    found = mean_interval([1.0, math.nan, 2.0, 3.0], ["a", "b", "b", "c"])
    assert found == mean_interval([1.0, 2.0, 3.0], ["a", "b", "c"]) and found.prompts == 3


def test_one_prompt_and_none_have_no_interval() -> None:
    one, none = mean_interval([0.5]), mean_interval([math.nan])
    assert (one.change, one.low, one.high) == (0.5, -math.inf, math.inf)
    assert math.isnan(none.change) and none.prompts == 0


def test_a_cluster_a_difference() -> None:
    with pytest.raises(ValueError, match="got 2 differences and 3 clusters"):
        mean_interval([1.0, 2.0], ["a", "b", "c"])


def test_how_many_would_do() -> None:
    # Deviation 1: t(n - 1) / sqrt(n) falls below 0.2 at n = 99 (1.98447 / 9.94987 = 0.19945); not at 98 (0.20048).
    rng = np.random.default_rng(4)
    values = rng.normal(size=16)
    values = (values - values.mean()) / values.std(ddof=1)
    prompts, clusters = needed(mean_interval(values), 0.2) or (0, 0)
    assert prompts == clusters and 98 < prompts <= 100  # the search goes in steps of half a percent
    assert needed(mean_interval(values), 0.0) is None
    # Two prompts a voice: twice as many prompts as voices.
    voices = [voice for voice in "abcdefgh" for _ in range(2)]
    prompts, clusters = needed(mean_interval(values, voices), 0.1) or (0, 0)
    assert prompts == 2 * clusters
