"""How far annotators agree, who missed attention checks, and whether one side was preferred.

Krippendorff's alpha is 1 - D_o / D_e, observed over expected disagreement (Krippendorff 2011, "Computing
Krippendorff's Alpha-Reliability"), for nominal data from any number of annotators with any missing; 1 is agreement, 0
what chance gives. The categories are: the first clip, the second, neither ("tie" and "both bad" together, since both
prefer none).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_mel.annotate.labelling import Labelling, is_check
from rlhf_mel.annotate.store import Answer

PREFERENCE = {"a": 0, "b": 1, "tie": 2, "both_bad": 2}
"""Category of an answer."""


@dataclass(frozen=True, kw_only=True)
class AxisAgreement:
    """Agreement on one axis."""

    axis: str
    alpha: float
    """NaN where fewer than two annotators answered a pair, or all answers are the same."""
    shared_pairs: int
    """Pairs that at least two annotators answered."""


@dataclass(frozen=True, kw_only=True)
class AnnotatorSummary:
    """What one annotator did."""

    annotator: str
    answers: int
    """On pairs, over all axes."""
    ties: int
    both_bad: int
    left: int
    """Of the answers that prefer a clip, those that prefer the left one."""
    checks: int
    """Attention checks, answered on all axes."""
    failed_checks: int

    @property
    def failed_share(self) -> float:
        """Share of the checks that failed; 0 without checks."""
        return self.failed_checks / self.checks if self.checks else 0.0


def agreement(answers: Iterable[Answer], axes: Sequence[str]) -> list[AxisAgreement]:
    """Krippendorff's alpha on each axis; attention checks do not count.

    Raises:
        ImportError: the package `krippendorff` is not installed.
    """
    given = [answer for answer in answers if not is_check(answer.task)]
    return [_axis_agreement(axis, [answer for answer in given if answer.axis == axis]) for axis in axes]


def _axis_agreement(axis: str, answers: Sequence[Answer]) -> AxisAgreement:
    annotators = sorted({answer.annotator for answer in answers})
    tasks = sorted({answer.task for answer in answers})
    table = np.full((len(annotators), len(tasks)), np.nan)
    for answer in answers:
        table[annotators.index(answer.annotator), tasks.index(answer.task)] = PREFERENCE[answer.answer]
    shared = table[:, (~np.isnan(table)).sum(0) >= 2]
    # Where all say the same, observed and expected disagreement are 0, and alpha is not defined.
    defined = shared.size > 0 and len(np.unique(shared[~np.isnan(shared)])) > 1
    return AxisAgreement(axis=axis, alpha=_alpha(shared) if defined else math.nan, shared_pairs=shared.shape[1])


def _alpha(table: np.ndarray) -> float:
    try:
        import krippendorff
    except ImportError as error:
        raise ImportError(
            "Krippendorff's alpha: expected the package krippendorff, found none; pip install 'rlhf-mel[annotate]'"
        ) from error
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))


def annotators(answers: Iterable[Answer], axes: Sequence[str]) -> list[AnnotatorSummary]:
    """A summary of each annotator, by name."""
    given: dict[str, list[Answer]] = {}
    for answer in answers:
        given.setdefault(answer.annotator, []).append(answer)
    return [_summary(name, given[name], axes) for name in sorted(given)]


def _summary(name: str, given: Sequence[Answer], axes: Sequence[str]) -> AnnotatorSummary:
    on_pairs = [answer for answer in given if not is_check(answer.task)]
    kinds = Counter(answer.answer for answer in on_pairs)
    checks: dict[str, dict[str, str]] = {}
    for answer in given:
        if is_check(answer.task):
            checks.setdefault(answer.task, {})[answer.axis] = answer.answer
    finished = [check for check in checks.values() if set(check) >= set(axes)]
    return AnnotatorSummary(
        annotator=name,
        answers=len(on_pairs),
        ties=kinds["tie"],
        both_bad=kinds["both_bad"],
        left=sum(answer.answer == answer.left_clip for answer in on_pairs),
        checks=len(finished),
        failed_checks=sum(check[axes[0]] != "a" or "b" in check.values() for check in finished),
    )


def report(labelling: Labelling) -> str:
    """Progress, agreement, checks and sides, for a terminal.

    A check is failed where the degraded copy was preferred on any axis, or the clip itself was not on the first.
    """
    answers, axes = labelling.answers.all(), labelling.axes
    lines = [f"{len(labelling.pairs)} pairs, axes {', '.join(axes)}, {labelling.answers.undone()} answers taken back"]
    for row in annotators(answers, axes):
        decided = row.answers - row.ties - row.both_bad
        left = f"{row.left} of {decided} for the left clip" if decided else "none for one clip"
        lines.append(
            f"  {row.annotator}: {row.answers} of {len(labelling.pairs) * len(axes)} answers ({row.ties} ties, "
            f"{row.both_bad} both bad, {left}), failed {row.failed_checks} of {row.checks} attention checks"
        )
    for found in agreement(answers, axes):
        alpha = "not defined" if math.isnan(found.alpha) else f"{found.alpha:.3f}"
        lines.append(
            f"  {found.axis}: Krippendorff's alpha {alpha}, {found.shared_pairs} pairs answered by two or more"
        )
    return "\n".join(lines)
