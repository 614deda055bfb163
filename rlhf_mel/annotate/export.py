"""Answers as a data set of preferences, in the form of data/preferences/load.py: a row for each.

| answer        | row                                                                    |
|---------------|------------------------------------------------------------------------|
| one clip      | that as `chosen`, the other as `rejected`, `soft_label` 1              |
| tie, both bad | the first clip as `chosen`, the second as `rejected`, `soft_label` 0.5 |

`answer` says what it was ("preferred", "tie", "both_bad"), `pair` which rows are of one pair, `annotator` and `axis`
whose and on what. What the table of pairs has besides (reference, voice, `row`, seeds) goes along, the seeds as those
of chosen and rejected. `load_preferences` merges answers of several annotators, and drops or keeps ties. Attention
checks are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_mel.annotate.agreement import annotators
from rlhf_mel.annotate.labelling import Labelling, is_check
from rlhf_mel.annotate.store import Answer
from rlhf_mel.data.preferences.files import write_preferences

SEEDS = (("seed_a", "seed_b"), ("chosen_seed", "rejected_seed"))
"""Seeds of the first and the second clip, in pairs to label and in preferences that are labelled again."""

_KEPT = ("reference_audio", "reference_text", "voice", "id", "row")


def export(labelling: Labelling, folder: str | Path, *, drop_failed: float | None = None, about: str = "") -> list[str]:
    """Write the answers to a new folder; lines that say how many, and what was left out.

    Args:
        drop_failed: leave out annotators who failed a greater share of their attention checks.
        about: for the card.

    Raises:
        ValueError: there is no answer to write.
        FileExistsError: there is a data set in the folder.
    """
    answers = [answer for answer in labelling.answers.all() if not is_check(answer.task)]
    failed = _failed(labelling, drop_failed)
    kept = [answer for answer in answers if answer.annotator not in failed]
    known = [answer for answer in kept if answer.task in labelling.pairs.ids]
    if not known:
        raise ValueError(
            f"{folder}: expected answers to export, got none of {len(answers)} in {labelling.answers.path}"
        )
    about = about or f"Answers of {len({a.annotator for a in known})} annotators on {', '.join(labelling.axes)}."
    write_preferences(rows(labelling, known), folder, about=about)
    lines = [f"{folder}: {len(known)} answers"]
    if failed:
        lines.append(
            f"  left out: {len(answers) - len(kept)} answers of {', '.join(sorted(failed))}, who failed more than "
            f"{drop_failed:.0%} of the attention checks"
        )
    if missing := len(kept) - len(known):
        lines.append(f"  left out: {missing} answers to pairs that are not in {labelling.pairs.name}")
    return lines


def rows(labelling: Labelling, answers: list[Answer]) -> Iterator[dict[str, Any]]:
    """A row of the data set for each answer to a pair."""
    for answer in answers:
        row = labelling.pairs.ids[answer.task]
        values = labelling.pairs.rows[row]
        chosen, rejected = ("b", "a") if answer.answer == "b" else ("a", "b")
        yield {
            "prompt": values["prompt"],
            "chosen": labelling.pairs.encoded(row, chosen),
            "rejected": labelling.pairs.encoded(row, rejected),
            **{name: values[name] for name in _KEPT if values.get(name) is not None},
            **_seeds(values, swapped=chosen == "b"),
            "soft_label": 1.0 if answer.answer in ("a", "b") else 0.5,
            "axis": answer.axis,
            "annotator": answer.annotator,
            "answer": answer.answer if answer.answer in ("tie", "both_bad") else "preferred",
            "pair": answer.task,
        }


def _seeds(values: Mapping[str, Any], *, swapped: bool) -> dict[str, int]:
    for names in SEEDS:
        first, second = (values.get(name) for name in names)
        if first is not None and second is not None:
            return {"chosen_seed": second if swapped else first, "rejected_seed": first if swapped else second}
    return {}


def _failed(labelling: Labelling, share: float | None) -> set[str]:
    if share is None:
        return set()
    summaries = annotators(labelling.answers.all(), labelling.axes)
    return {summary.annotator for summary in summaries if summary.failed_share > share}
