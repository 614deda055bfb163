"""Agreement, attention checks and sides."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pair_tables import answer_all, labelling_of

from rlhf_mel.annotate.agreement import agreement, annotators, report
from rlhf_mel.annotate.store import Answer


def answers(annotator: str, said: str, axis: str = "overall", left: str = "a") -> list[Answer]:
    """One letter a pair: a, b, t(ie), x (both bad), or a space for none."""
    words = {"a": "a", "b": "b", "t": "tie", "x": "both_bad"}
    return [
        Answer(annotator=annotator, task=f"t{n}", axis=axis, answer=words[letter], left_clip=left)
        for n, letter in enumerate(said)
        if letter != " "
    ]


def alpha(*said: str) -> float:
    given = [answer for n, letters in enumerate(said) for answer in answers(f"annotator {n}", letters)]
    return agreement(given, ["overall"])[0].alpha


def test_alpha_of_krippendorffs_own_example() -> None:
    # Krippendorff 2011, A: ten units, two observers, binary. o_01 = 4, n_0 = 14, n_1 = 6:
    # alpha = 1 - (20 - 1) 4 / (14 * 6) = 0.095
    assert alpha("abaaaaaaba", "bbbaabaaaa") == pytest.approx(1 - 19 * 4 / (14 * 6))


def test_both_ways_to_prefer_neither_agree() -> None:
    assert alpha("abtx", "abxt") == 1.0
    # a against tie, one unit: n = 4 values, n_a = 3, n_t = 1, o_at = 1: alpha = 1 - 3 * 1 / 3 = 0
    assert alpha("aa", "at") == pytest.approx(0.0)


def test_pairs_of_one_annotator_and_attention_checks_do_not_count() -> None:
    assert alpha("abaaaaaabab", "bbbaabaaaa ") == pytest.approx(1 - 19 * 4 / (14 * 6))
    check = [
        Answer(annotator=f"annotator {n}", task="check-t0-a", axis="overall", answer="ab"[n], left_clip="a")
        for n in (0, 1)
    ]
    (found,) = agreement([*answers("annotator 0", "ab"), *answers("annotator 1", "ab"), *check], ["overall"])
    assert (found.alpha, found.shared_pairs) == (1.0, 2)


def test_alpha_is_not_defined_without_two_answers_or_two_kinds() -> None:
    assert math.isnan(alpha("abab")) and math.isnan(alpha("aaa", "aaa")) and math.isnan(alpha("ab  ", "  ab"))
    assert math.isnan(alpha())


def test_each_axis_has_its_own() -> None:
    given = [
        *answers("ann", "abab", "x"),
        *answers("ben", "abab", "x"),
        *answers("ann", "ab", "y"),
        *answers("ben", "ba", "y"),
    ]
    by_axis = {found.axis: found.alpha for found in agreement(given, ["x", "y"])}
    # y: o_ab = 4, n_a = n_b = 2 of n = 4 values: alpha = 1 - 3 * 2 / (2 * 2) with both units discordant
    assert by_axis == {"x": 1.0, "y": pytest.approx(1 - 3 * 2 / 4)}


def test_a_summary_counts_sides_ties_and_failed_checks() -> None:
    def check(number: int, natural: str, similar: str) -> list[Answer]:
        said = {"naturalness": natural, "similarity": similar}
        return [
            Answer(annotator="ann", task=f"check-t{number}-a", axis=axis, answer=answer, left_clip="b")
            for axis, answer in said.items()
        ]

    axes = ["naturalness", "similarity"]
    checks = [
        *check(0, "a", "a"),
        *check(1, "a", "tie"),  # passed: the degraded copy was not preferred
        *check(2, "a", "b"),
        *check(3, "tie", "a"),
        *check(4, "both_bad", "tie"),
        *check(5, "a", "a")[:1],  # not finished
    ]
    given = [*answers("ann", "aabtx", "naturalness"), *answers("ann", "bb", "similarity", left="b"), *checks]
    (found,) = annotators(given, axes)
    assert (found.answers, found.ties, found.both_bad, found.left) == (7, 1, 1, 4)
    assert (found.checks, found.failed_checks, found.failed_share) == (5, 3, 0.6)


def test_the_report_has_it_in_words(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 10, check_share=0.2)
    answer_all(labelling, "ann", "a"), answer_all(labelling, "ben", "a")
    labelling.undo("ben")
    said = report(labelling)
    assert said.startswith("10 pairs, axes overall, 1 answers taken back")
    assert "ann: 10 of 10 answers (0 ties, 0 both bad, " in said and "failed 0 of 2 attention checks" in said
    assert "overall: Krippendorff's alpha not defined" in said  # all say the same
