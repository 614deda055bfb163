"""The course of the labelling: question by question, undo, resume; what is stored is the clip and not the side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pair_tables import answer_all, labelling_of, pair_rows
from torch.testing import assert_close

from rlhf_mel.annotate.labelling import Labelling
from rlhf_mel.annotate.store import Answers
from rlhf_mel.annotate.tasks import Pairs


def test_a_pair_is_asked_about_on_each_axis_then_the_next(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 3, axes=["naturalness", "similarity"], check_share=0)
    seen = []
    while (step := labelling.next_step("ann")) is not None:
        seen.append((step.task.id, step.axis, step.number, step.total))
        assert labelling.answer(step, "tie")
    order = [task.id for task in labelling.plan("ann")]
    assert seen == [(order[n // 2], ("naturalness", "similarity")[n % 2], n // 2 + 1, 3) for n in range(6)]
    assert labelling.next_step("ben") is not None


def test_an_answer_names_the_clip_that_was_on_that_side(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 8, check_share=0)
    while (step := labelling.next_step("ann")) is not None:
        labelling.answer(step, "left" if step.number % 2 else "right", heard_s=(1.0, 2.0))
    sides = set()
    for number, (task, answer) in enumerate(zip(labelling.plan("ann"), labelling.answers.all(), strict=True), start=1):
        other = {"a": "b", "b": "a"}[task.left_clip]
        assert answer.answer == (task.left_clip if number % 2 else other) and answer.left_clip == task.left_clip
        assert (answer.heard_a_s, answer.heard_b_s) == ((1.0, 2.0) if task.left_clip == "a" else (2.0, 1.0))
        sides.add((task.left_clip, answer.answer))
    assert len(sides) == 4


def test_undo_asks_again_with_the_same_sides(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 4, axes=["x", "y"])
    steps = []
    for _ in range(3):
        step = labelling.next_step("ann")
        assert step is not None and labelling.answer(step, "left")
        steps.append(step)
    assert labelling.undo("ann") and labelling.next_step("ann") == steps[2]
    assert labelling.undo("ann") and labelling.next_step("ann") == steps[1]
    assert labelling.answer(steps[1], "tie") and labelling.next_step("ann") == steps[2]
    assert labelling.undo("ann") and labelling.undo("ann") and not labelling.undo("ann")


def test_a_second_answer_to_a_question_is_not_taken(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path)
    step = labelling.next_step("ann")
    assert step is not None and labelling.answer(step, "left") and not labelling.answer(step, "right")
    assert len(labelling.answers.all()) == 1


def test_a_new_start_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    before = labelling_of(tmp_path, 5, axes=["x"], seed=3)
    step = before.next_step("ann")
    assert step is not None and before.answer(step, "left")
    after = labelling_of(tmp_path, 5, axes=["x"], seed=3)
    expected, found = before.next_step("ann"), after.next_step("ann")
    assert found == expected and found is not None and found.number == 2
    with pytest.raises(ValueError, match=r"expected axes \['x'\], which its answers were given under, got \['y'\]"):
        labelling_of(tmp_path, 5, axes=["y"], seed=3)


def test_rows_can_be_added_while_answers_stay(tmp_path: Path) -> None:
    answer_all(labelling_of(tmp_path, 3, check_share=0), "ann")
    grown = labelling_of(tmp_path, 5, check_share=0)
    assert answer_all(grown, "ann") == 2 and len({answer.task for answer in grown.answers.all()}) == 5


def test_answers_to_other_pairs_are_refused(tmp_path: Path) -> None:
    answer_all(labelling_of(tmp_path, 2), "ann")
    others = pair_rows(2)
    for row in others:
        row["prompt"] += " of another table"
    with pytest.raises(ValueError, match="expected answers to mine, got 2 pairs, none of which are there"):
        Labelling(Pairs(others, name="mine"), Answers(tmp_path / "answers.sqlite"))


def test_the_sides_hold_the_clips_and_a_check_its_degraded_copy(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 6, check_share=0.5)
    checks = 0
    for task in labelling.plan("ann"):
        clips = labelling.clips(task)
        a, b = (clips["left" if task.left_clip == clip else "right"][0] for clip in "ab")
        assert_close(clips["reference"][0], labelling.pairs.reference(task.row)[0])  # type: ignore[index]
        if not task.check:
            assert_close(a, labelling.pairs.clip(task.row, "a")[0])
            assert_close(b, labelling.pairs.clip(task.row, "b")[0])
            continue
        checks += 1
        assert_close(a, labelling.pairs.clip(task.row, task.check)[0])
        # Noise of the clip's own power doubles that, of which two thirds are kept: 4/3, as far as 14,400 samples say.
        assert b.square().mean() / a.square().mean() == pytest.approx(4 / 3, rel=0.06)
        silent = (torch.arange(len(b)) // 2400) % 3 == 2
        assert (b[silent] == 0).all() and (b[~silent] != 0).all()
        assert_close(labelling.clips(task)["right"][0], clips["right"][0])  # the same copy each time
    assert checks == 3


@pytest.mark.parametrize("name", ["", "   ", "x" * 65, "a\nb"])
def test_a_name_is_needed(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="annotator: expected a name of 1 to 64 characters"):
        labelling_of(tmp_path).undo(name)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"axes: expected names that differ, got \['x', 'x'\]"):
        labelling_of(tmp_path, axes=["x", "x"])
    with pytest.raises(ValueError, match="check_share: expected a share from 0 to 1, got 2"):
        labelling_of(tmp_path, check_share=2)
    labelling = labelling_of(tmp_path)
    step = labelling.next_step("ann")
    assert step is not None
    with pytest.raises(ValueError, match=r"answer: expected one of \['left', 'right', 'tie', 'both_bad'\], got 'a'"):
        labelling.answer(step, "a")
    assert labelling.step("ann", step.task.id, step.axis) == step
    for task, axis in (("none", step.axis), (step.task.id, "none")):
        with pytest.raises(ValueError, match="expected a question of these pairs"):
            labelling.step("ann", task, axis)
