"""The course of the labelling, without a page: what an annotator is asked next, what an answer does, what undo does.

    labelling = Labelling(load_pairs("runs/pairs"), Answers("answers.sqlite"), axes=["naturalness", "similarity"])
    while (step := labelling.next_step("ann")) is not None:
        labelling.answer(step, "left")

A pair is asked about on one axis after another. Nothing is kept in memory but the plan of each annotator, which a seed
and the name settle, so that a server that dies and starts again goes on where the file of answers ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jaxtyping import Float
from torch import Tensor

from rlhf_mel.annotate.media import degraded
from rlhf_mel.annotate.store import Answer, Answers
from rlhf_mel.annotate.tasks import Pairs, Task, plan

CHOICES = ("left", "right", "tie", "both_bad")
"""What the page offers; `left` and `right` are sides, stored as the clip that was there."""

NAME_CHARACTERS = 64


@dataclass(frozen=True, kw_only=True)
class Step:
    """One question: a pair, on one axis, for one annotator."""

    annotator: str
    task: Task
    axis: str
    number: int
    """Of the task in the annotator's order, from 1."""
    total: int
    """Tasks of the annotator."""


class Labelling:
    """Pairs, the answers to them, and how both are put before annotators.

    Args:
        axes: what pairs are compared on; each is a question of its own.
        check_share: attention checks for each pair.
        seed: of the orders and sides.

    Raises:
        ValueError: unusable settings, or others than the answers in the file were given under.
    """

    def __init__(
        self,
        pairs: Pairs,
        answers: Answers,
        *,
        axes: Sequence[str] = ("overall",),
        check_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not axes or len(set(axes)) < len(axes) or not all(axis.strip() for axis in axes):
            raise ValueError(f"axes: expected names that differ, got {list(axes)}")
        if not 0 <= check_share <= 1:
            raise ValueError(f"check_share: expected a share from 0 to 1, got {check_share}")
        self.pairs = pairs
        self.axes = list(axes)
        self.answers = answers.settle({"axes": self.axes, "check_share": check_share, "seed": seed})
        self._plan = lru_cache(maxsize=1024)(
            lambda annotator: plan(pairs.ids.items(), annotator, seed=seed, check_share=check_share)
        )
        self._check_answers_are_of_these_pairs()

    def plan(self, annotator: str) -> list[Task]:
        """All tasks of an annotator, in order."""
        return list(self._plan(check_name(annotator)))

    def next_step(self, annotator: str) -> Step | None:
        """The first question that the annotator has not answered; None when all are."""
        tasks = self.plan(annotator)
        answered = {(answer.task, answer.axis) for answer in self.answers.all(annotator)}
        for number, task in enumerate(tasks, start=1):
            for axis in self.axes:
                if (task.id, axis) not in answered:
                    return Step(annotator=annotator, task=task, axis=axis, number=number, total=len(tasks))
        return None

    def step(self, annotator: str, task: str, axis: str) -> Step:
        """The question that a page names by the ids of its task and axis.

        Raises:
            ValueError: the annotator has no such question.
        """
        tasks = self.plan(annotator)
        for number, known in enumerate(tasks, start=1):
            if known.id == task and axis in self.axes:
                return Step(annotator=annotator, task=known, axis=axis, number=number, total=len(tasks))
        raise ValueError(f"expected a question of these pairs, got task {task!r}, axis {axis!r}; reload the page")

    def answer(self, step: Step, choice: str, *, heard_s: tuple[float, float] = (0.0, 0.0)) -> bool:
        """Write an answer to disk; False where the question had one already, which stays.

        Args:
            choice: of CHOICES.
            heard_s: seconds of the left and the right clip that were played.
        """
        if choice not in CHOICES:
            raise ValueError(f"answer: expected one of {list(CHOICES)}, got {choice!r}")
        left = step.task.left_clip
        clips = {"left": left, "right": "b" if left == "a" else "a"}
        heard = heard_s if left == "a" else heard_s[::-1]
        return self.answers.add(
            Answer(
                annotator=step.annotator,
                task=step.task.id,
                axis=step.axis,
                answer=clips.get(choice, choice),
                left_clip=left,
                heard_a_s=heard[0],
                heard_b_s=heard[1],
            )
        )

    def undo(self, annotator: str) -> bool:
        """Take back the annotator's last answer, which is then asked for again; False where there is none."""
        return self.answers.undo(check_name(annotator)) is not None

    def clips(self, task: Task) -> dict[str, tuple[Float[Tensor, " _"], int]]:
        """Samples and rate in Hz of what the page calls "left" and "right", and "reference" where there is one."""
        if task.check:
            clean, rate_hz = self.pairs.clip(task.row, task.check)
            of = {"a": (clean, rate_hz), "b": (degraded(clean, rate_hz, seed=task.row), rate_hz)}
        else:
            of = {clip: self.pairs.clip(task.row, clip) for clip in "ab"}
        sides = {"left": of[task.left_clip], "right": of["b" if task.left_clip == "a" else "a"]}
        reference = self.pairs.reference(task.row)
        return sides if reference is None else {**sides, "reference": reference}

    def _check_answers_are_of_these_pairs(self) -> None:
        answered = {pair_of(answer.task) for answer in self.answers.all()}
        if answered and not answered & self.pairs.ids.keys():
            raise ValueError(
                f"{self.answers.path}: expected answers to {self.pairs.name}, got {len(answered)} pairs, none of which "
                "are there; name another file of answers, or the pairs that these belong to"
            )


def pair_of(task: str) -> str:
    """The id of the pair that a task shows or is made of."""
    return task.split("-")[1] if is_check(task) else task


def is_check(task: str) -> bool:
    """Whether the id is that of an attention check."""
    return task.startswith("check-")


def check_name(annotator: str) -> str:
    """The annotator's name without spaces around it.

    Raises:
        ValueError: nothing is left of it, or too much.
    """
    name = annotator.strip()
    if not 0 < len(name) <= NAME_CHARACTERS or not name.isprintable():
        raise ValueError(f"annotator: expected a name of 1 to {NAME_CHARACTERS} characters, got {len(name)}")
    return name
