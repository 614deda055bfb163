"""Whether probabilities mean what they say: reliability diagram and expected calibration error.

Pairs are put into bins by the confidence p = max(P, 1 - P) in [0.5, 1] of the answer that the model gives:

    ECE = sum over bins of (pairs in the bin / all pairs) |share of right answers - mean confidence|

Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015; Guo et al., "On calibration
of modern neural networks", ICML 2017 (Eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram of k bins of equal width, without the empty ones."""

    confidence: Values
    """Mean confidence of each bin [k]."""
    accuracy: Values
    """Share of right answers in each bin [k]."""
    count: npt.NDArray[np.int64]
    """Pairs in each bin [k]."""

    @property
    def expected_calibration_error(self) -> float:
        """See the module; in [0, 1], 0 is best."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def reliability(probabilities: Values, labels: Values, bins: int = 10) -> Reliability:
    """Reliability of `probabilities` [n] that the first clip of a pair wins, given the share of votes for it [n].

    Raises:
        ValueError: no pair, shapes that differ, or values outside [0, 1].
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    if probabilities.shape != labels.shape or probabilities.ndim != 1 or not len(labels):
        raise ValueError(f"reliability: expected two equal shapes [n], got {probabilities.shape} and {labels.shape}")
    if not all(bool(((values >= 0) & (values <= 1)).all()) for values in (probabilities, labels)):
        raise ValueError("reliability: expected probabilities and labels in [0, 1], got others or NaN")
    first = probabilities >= 0.5
    confidence = np.where(first, probabilities, 1 - probabilities)
    right = np.where(first, labels, 1 - labels)
    places = np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    count = np.bincount(places, minlength=bins)
    kept = count > 0
    means = [np.bincount(places, values, minlength=bins)[kept] / count[kept] for values in (confidence, right)]
    return Reliability(means[0], means[1], count[kept])
