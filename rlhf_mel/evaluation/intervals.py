"""How sure one can be of a mean change over prompts: paired 95 % intervals, clustered where prompts share a voice.

Two evaluations of the same prompts give one difference d_i a prompt. Prompts that share a voice move together (here
DNSMOS falls by 0.1 in one voice and rises by 0.15 in another, in the same run), so voices, not prompts, are what was
drawn. With clusters g of n_g prompts, n = sum n_g, residuals r_i = d_i - mean(d) and s_g their sum in a cluster, the
variance of the mean is the cluster-robust CR2 estimate of a regression on a constant,

    V = 1/n^2 sum_g s_g^2 / (1 - n_g / n),

unbiased if the d_i are independent with one variance. Its degrees of freedom are Satterthwaite's under that model,

    df = (sum_g M_gg)^2 / sum_gh M_gh^2,    M_gh = (n_g delta_gh - n_g n_h / n) / sqrt((1 - n_g / n) (1 - n_h / n)).

The interval is mean +- t(df) sqrt(V): the method for few clusters of Bell & McCaffrey 2002, "Bias reduction in standard
errors for linear regression with multi-stage samples", and Imbens & Kolesar 2016, "Robust standard errors in small
samples". With clusters of one prompt it is Student's paired interval; with equal clusters that of the clusters' means.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


MOST_TIMES = 100
"""How many times what there is may be foreseen to be enough; beyond that an estimate is none."""


@dataclass(frozen=True)
class Interval:
    """A mean change and where it may lie; NaN and infinite ends where there is nothing to tell from."""

    change: float
    low: float
    high: float
    standard_error: float
    prompts: int
    """Pairs that were finite both times."""
    clusters: int
    """Voices, or prompts where every prompt counts for itself."""


def mean_interval(differences: Sequence[float] | np.ndarray, clusters: Sequence[object] = ()) -> Interval:
    """The interval of the mean of finite `differences` [n]; `clusters`: what each belongs to, empty: only to itself.

    All in one cluster is taken as none: one voice says nothing of other voices, and its prompts are what was drawn.
    """
    values = np.asarray(differences, dtype=np.float64)
    names = [str(name) for name in clusters] or [str(row) for row in range(len(values))]
    if len(names) != len(values):
        raise ValueError(f"expected a cluster a difference, got {len(values)} differences and {len(names)} clusters")
    finite = np.isfinite(values)
    values, names = values[finite], [name for name, kept in zip(names, finite, strict=True) if kept]
    if len(set(names)) < 2:
        names = [str(row) for row in range(len(values))]
    if len(values) < 2:
        change = float(values[0]) if len(values) else math.nan
        return Interval(change, -math.inf, math.inf, math.nan, len(values), len(values))
    index = np.unique(np.array(names), return_inverse=True)[1]
    sizes = np.bincount(index).astype(np.float64)
    change = float(values.mean())
    error = _standard_error(np.bincount(index, values - change), sizes)
    margin = _quantile(tuple(sizes)) * error
    return Interval(change, change - margin, change + margin, error, len(values), len(sizes))


def _standard_error(sums: np.ndarray, sizes: np.ndarray) -> float:
    n = sizes.sum()
    return math.sqrt(float((sums**2 / (1 - sizes / n)).sum())) / float(n)


@functools.lru_cache(maxsize=64)
def _quantile(sizes: tuple[float, ...]) -> float:
    """Of Student's t with the degrees of freedom of clusters of these sizes."""
    counts = np.array(sizes)
    n = counts.sum()
    weights = 1 / np.sqrt(1 - counts / n)
    m = (np.diag(counts) - np.outer(counts, counts) / n) * np.outer(weights, weights)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, np.trace(m) ** 2 / (m**2).sum()))


def needed(interval: Interval, margin: float) -> tuple[int, int] | None:
    """Prompts and clusters, as many prompts in each as now, for an interval of +- `margin`; None: not to be foreseen.

    By the variance that this interval saw, which is itself uncertain where clusters are few.
    """
    if not margin > 0 or not math.isfinite(interval.standard_error):
        return None
    per_cluster = interval.standard_error * math.sqrt(interval.clusters)
    counts = np.unique(np.geomspace(2, MOST_TIMES * interval.clusters, 2000).astype(int))
    enough = counts[stats.t.ppf((1 + CONFIDENCE) / 2, counts - 1) * per_cluster / np.sqrt(counts) <= margin]
    if not len(enough):
        return None
    return math.ceil(int(enough[0]) * interval.prompts / interval.clusters), int(enough[0])
