"""What a row of preferences says of its two clips: who got which share of the votes, how strongly, on which axis.

Rows come with the roles of schemas.py for names. A Verdict is about (first, second), in the order that the data set
has them; which clip becomes `chosen` is decided later, in one place (pairs.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_mel.data.preferences.audio import shown

Row = Mapping[str, Any]
"""Values by role, without clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was answered about two clips."""

    share: float | None
    """Of the votes that went to the first clip, in [0, 1]; 0.5: a tie; None: there is no answer."""
    margin: float | None = None
    """Strength of the preference for the first clip in the data set's unit, negative where it is for the second."""
    votes: float = 1.0
    """Answers behind it."""
    axis: str | None = None
    """What was asked, where a data set asks several things."""
    why: str = ""
    """Kind of tie, or why there is no answer."""

    def swapped(self) -> Verdict:
        """The same answer about (second, first)."""
        share = None if self.share is None else 1.0 - self.share
        return replace(self, share=share, margin=None if self.margin is None else -self.margin)


def number(value: Any) -> float | None:
    """A finite number, also as text (lists in files have nothing else); None where there is none."""
    try:
        parsed = float(value)
    except (TypeError, ValueError):
        return None
    return parsed if math.isfinite(parsed) else None


_SIDE = re.compile(
    r"(?:(?:audio|clip|sample|model|system|option|speech|voice|side)[ _-]?)?(a|b)|"
    r"(?:audio|clip|sample|model|system|option|speech|voice|side)[ _-]?(1|2)|(left|right|first|second)"
)
_STRENGTH = re.compile(r"([ab])\s*\+\s*(\d+(?:\.\d+)?)")
_TIES = ("tie", "both", "equal", "same", "draw", "no preference", "neither", "no difference")


def read_label(value: Any) -> Verdict:
    """A, B or a tie, in words; with a strength as in "A+2". Numbers alone are no answer: 1 may mean either.

    >>> read_label("audio_b").share, read_label("B+2").margin, read_label("Tie (both not good)").share
    (0.0, -2.0, 0.5)
    """
    text = str(value).strip().lower() if isinstance(value, str) else ""
    if text.startswith(_TIES):
        return Verdict(share=0.5, margin=0.0, why=text.removeprefix("tie").strip(" ()/"))
    if strength := _STRENGTH.fullmatch(text):
        first = strength[1] == "a"
        return Verdict(share=float(first), margin=float(strength[2]) * (1 if first else -1))
    if side := _SIDE.fullmatch(text):
        return Verdict(share=float(next(filter(None, side.groups())) in ("a", "1", "left", "first")))
    return Verdict(share=None, why=f"expected A, B or a tie, got {shown(value)}")


def trl_verdicts(row: Row, axis: str | None) -> Iterator[Verdict]:
    """The first clip won, or has the share `soft_label` of the votes."""
    given = row.get("soft_label")
    share = 1.0 if given is None else number(given)
    if share is None or not 0 <= share <= 1:
        yield Verdict(share=None, why=f"expected a soft_label in [0, 1], got {shown(given)}", axis=row.get("axis"))
        return
    votes = 1.0 if row.get("weight") is None else number(row["weight"]) or 0.0
    yield Verdict(share=share, margin=number(row.get("margin")), votes=votes, axis=row.get("axis"))


def label_verdicts(row: Row, axis: str | None) -> Iterator[Verdict]:
    """The label decides; the annotators' answers give the share of votes, and their mean the strength."""
    label = read_label(row["label"])
    answers = [answer for value in row.get("annotations") or () if (answer := read_label(value)).share is not None]
    votes = float(len(answers) or 1)
    if label.share in (None, 0.5) or not answers:
        yield replace(label, votes=votes, axis=row.get("axis"))
        return
    share = sum(answer.share or 0.0 for answer in answers) / len(answers)
    margins = [answer.margin for answer in answers if answer.margin is not None]
    if (share - 0.5) * ((label.share or 0.0) - 0.5) <= 0:
        yield Verdict(share=None, why=f"label {shown(row['label'])} against {shown(row['annotations'])}")
        return
    margin = sum(margins) / len(margins) if margins else None
    yield Verdict(share=share, margin=margin, votes=votes, axis=row.get("axis"))


def votes_verdicts(row: Row, axis: str | None) -> Iterator[Verdict]:
    """One verdict an axis; votes in any unit, their share counts."""
    for role in row:
        if not role.startswith("votes_a"):
            continue
        name = role.removeprefix("votes_a").lstrip("/") or None
        first, second = number(row[role]), number(row.get(role.replace("votes_a", "votes_b")))
        answers = row.get(f"answers/{name}" if name else "answers")
        votes = number(row.get("num_votes")) or float(len(answers or ()) or 1)
        if first is None or second is None or first < 0 or second < 0 or first + second == 0:
            yield Verdict(share=None, axis=name, why=f"votes {shown(first)} and {shown(second)}")
        else:
            yield Verdict(share=first / (first + second), votes=votes, axis=name)


def winner_verdicts(row: Row, axis: str | None) -> Iterator[Verdict]:
    """The winner's name; both names: both were good. On an axis, whose rating is higher (SpeechArenaBench: 1 or 5)."""
    if axis is not None:
        yield _ratings(row.get("ratings"), axis)
        return
    text = str(row["winner"]).strip()
    sides = [{str(row[role]).strip() for role in (f"model_{side}", f"audio_{side}") if row.get(role)} for side in "ab"]
    shared = sides[0] & sides[1]
    parts = {text, *(part.strip() for part in text.split(","))}
    first, second = (bool((side - shared) & parts) for side in sides)
    if first or second:
        yield Verdict(share=0.5 + 0.5 * (first - second), why="both good" if first and second else "")
    elif (answer := read_label(row["winner"])).share is not None:
        yield answer
    else:
        yield replace(answer, why=f"{shown(text)} names " + ("both" if parts & shared else "neither"))


def _ratings(ratings: Any, axis: str) -> Verdict:
    """Of {"detailed_ratings_a": {axis: number}, "detailed_ratings_b": ...}."""
    sides = [(ratings or {}).get(f"detailed_ratings_{side}") or {} for side in "ab"]
    first, second = (number(side.get(axis)) for side in sides)
    if first is None or second is None:
        return Verdict(share=None, axis=axis, why=f"no ratings of {axis!r}, got {shown(list(sides[0]))}")
    return Verdict(share=0.5 + 0.5 * ((first > second) - (first < second)), margin=first - second, axis=axis)
