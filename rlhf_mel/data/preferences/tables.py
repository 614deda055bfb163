"""Tables that are read as a whole: votes or scores joined to a table of clips, and scores of single clips as pairs.

Scores are comparable only between clips that were heard under the same conditions: of the same text, in the same
test or year, by the same listener. `within` names what must agree; the scores of one clip in such a group are averaged
(over its listeners, unless `within` names them), and of two clips the one with the higher mean was preferred:

    margin = mean score of chosen - mean score of rejected        a tie where |margin| <= tie_margin

A group of n clips has n (n - 1) / 2 pairs. Where each clip would meet more than 2 `pairs_per_clip` others, the clips
are put into a circle, in an order drawn by `seed`, and each meets the next `pairs_per_clip`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from rlhf_mel.data.preferences.audio import Clip, Inspector, shown
from rlhf_mel.data.preferences.pairs import Pair, PreferenceOptions, Tally, other_columns, text_of
from rlhf_mel.data.preferences.schemas import Schema
from rlhf_mel.data.preferences.verdicts import Verdict, number
from rlhf_mel.flow.noise import mix_seed, seeded

Labelled = Iterable[tuple[int, Mapping[str, Any], Mapping[str, Clip]]]
"""Rows of a table: number, values by role, clips by role."""


Found = tuple[Clip, str | None, Clip | None]
"""A clip, its text, and its reference."""


class ClipIndex:
    """Clips of a table by their id, and by text and model."""

    def __init__(self, rows: Labelled, name: str) -> None:
        self._name = name
        self._found: list[Found] = []
        self._places: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, labels, clips in rows:
            self._found.append((clips["clip"], text_of(labels.get("prompt")), clips.get("reference_audio")))
            if labels.get("clip_id") is not None:
                self._places[(str(labels["clip_id"]),)].append(index)
            if labels.get("clip_model") is not None and labels.get("clip_prompt_id") is not None:
                self._places[(str(labels["clip_prompt_id"]), str(labels["clip_model"]))].append(index)

    def find(self, identity: Any, prompt_id: Any = None, model: Any = None) -> Found | None:
        """By its id, or else by the id of its text and its model; None if there is no such clip.

        Raises:
            ValueError: there are several.
        """
        places = self._places.get((str(identity),), []) or self._places.get((str(prompt_id), str(model)), [])
        if len(places) > 1:
            asked = shown(identity if identity is not None else (prompt_id, model))
            raise ValueError(f"{self._name}: expected one clip {asked}, got rows {places[:5]}; add clip_id=COLUMN")
        return self._found[places[0]] if places else None


def joined_pairs(
    schema: Schema, votes: Labelled, clips: ClipIndex, options: PreferenceOptions, tally: Tally
) -> Iterator[Pair]:
    """A pair for each vote whose two clips are in the table of clips."""
    for index, labels, _ in votes:
        tally.rows += 1
        found = [
            clips.find(labels.get(f"audio_{side}"), labels.get("prompt_id"), labels.get(f"model_{side}"))
            for side in "ab"
        ]
        if found[0] is None or found[1] is None:
            missing = labels.get("audio_a" if found[0] is None else "audio_b", labels.get("prompt_id"))
            tally.drop("of clips that are not in the table", f"row {index}", shown(missing))
            continue
        (first, text, reference), (second, *_) = found[0], found[1]
        assert schema.family.verdicts is not None
        for verdict in schema.family.verdicts(labels, None):
            yield Pair(
                row=index,
                first=first,
                second=second,
                verdict=Verdict(share=verdict.share, margin=verdict.margin, axis=labels.get("axis"), why=verdict.why),
                prompt=text_of(labels.get("prompt")) or text,
                reference=reference,
                more=other_columns(schema, labels, options.keep),
            )


# Scores.


@dataclass(frozen=True, slots=True)
class Rating:
    """One score of one clip."""

    row: int
    clip: Clip
    score: float
    prompt: str | None
    reference: Clip | None
    axis: str | None
    more: Mapping[str, Any]


def within_columns(schema: Schema, columns: Sequence[str], options: PreferenceOptions, name: str) -> dict[str, str]:
    """Columns by role that two clips must agree in: `within/...` for each name of `options.within`.

    Raises:
        ValueError: nothing says what is comparable, or there is no such column.
    """
    roles = schema.columns
    meanings = {"prompt": ("prompt_id", "prompt"), "listener": ("annotator",), "annotator": ("annotator",)}
    names = [options.within] if isinstance(options.within, str) else list(options.within or ())
    if not names and not roles.keys() & {"prompt_id", "prompt"}:
        raise ValueError(
            f"{name}: scores are comparable only within a text, a test or a listener: expected within=COLUMN, or "
            f"within=[COLUMN, ...], got none, and no column that is known as the text among {list(columns)}"
        )
    found = {}
    for wanted in names or ["prompt"]:
        known = [roles[role] for role in meanings.get(wanted, ()) if role in roles]
        if not known and wanted not in columns:
            raise ValueError(f"within: expected 'prompt', 'listener' or one of {list(columns)}, got {wanted!r}")
        found[f"within/{wanted}"] = known[0] if known else wanted
    return found


def score_pairs(
    schema: Schema,
    rows: Labelled,
    clips: ClipIndex | None,
    options: PreferenceOptions,
    inspector: Inspector,
    tally: Tally,
) -> Iterator[Pair]:
    """Pairs of clips that agree in `within`; see the module."""
    groups: dict[tuple[Any, ...], list[Rating]] = defaultdict(list)
    for index, labels, own in rows:
        tally.rows += 1
        rating = _rating(index, labels, own, clips, schema, options, tally)
        place = tuple(labels.get(role) for role in schema.columns if role.startswith("within/"))
        if rating is not None and any(value is None for value in place):
            tally.drop("without a value of `within`", f"row {index}", shown(place))
        elif rating is not None and _readable(rating, inspector, tally):
            groups[(*place, rating.axis)].append(rating)
    for number_of_group, group in enumerate(groups.values()):
        yield from _group_pairs(group, number_of_group, options, inspector, tally)


def _rating(
    index: int,
    labels: Mapping[str, Any],
    own: Mapping[str, Clip],
    clips: ClipIndex | None,
    schema: Schema,
    options: PreferenceOptions,
    tally: Tally,
) -> Rating | None:
    score = number(labels.get("score"))
    if score is None:
        tally.drop("without a score", f"row {index}", shown(labels.get("score")))
        return None
    alone = None if clips is not None else (own["audio"], None, own.get("reference_audio"))
    found = alone if clips is None else clips.find(labels.get("audio"))
    if found is None:
        tally.drop("of clips that are not in the table", f"row {index}", shown(labels.get("audio")))
        return None
    clip, text, reference = found
    axis = None if labels.get("axis") is None else str(labels["axis"])
    tally.axes |= {axis} if axis is not None else set()
    if options.axis is not None and axis != options.axis:
        tally.drop("of another axis", f"row {index}", shown(axis))
        return None
    more = other_columns(schema, labels, options.keep)
    return Rating(index, clip, score, text_of(labels.get("prompt")) or text, reference, axis, more)


def _readable(rating: Rating, inspector: Inspector, tally: Tally) -> bool:
    problem = inspector.facts(rating.clip).problem
    if problem is not None:
        tally.drop("undecodable", f"row {rating.row}", problem)
    return problem is None


def _group_pairs(
    group: Sequence[Rating], place: int, options: PreferenceOptions, inspector: Inspector, tally: Tally
) -> Iterator[Pair]:
    by_clip: dict[bytes, list[Rating]] = defaultdict(list)
    for rating in group:
        by_clip[inspector.facts(rating.clip).digest].append(rating)
    scored = list(by_clip.values())
    if len(scored) < 2:
        tally.drop("of a clip with no other to compare it to", f"row {group[0].row}")
    met = _meetings(len(scored), options.pairs_per_clip, mix_seed(options.seed, place))
    if left_out := math.comb(len(scored), 2) - len(met):
        tally.dropped["pairs left out by pairs_per_clip"] += left_out
        tally.examples.setdefault("pairs left out by pairs_per_clip", f"a group of {len(scored)} clips")
    for one, other in met:
        yield _compared(scored[one], scored[other], options)


def _meetings(clips: int, each: int, seed: int) -> list[tuple[int, int]]:
    """All pairs of `clips`, or `each` with the next ones of a random circle."""
    if clips <= 2 * each + 1:
        return list(combinations(range(clips), 2))
    order = torch.randperm(clips, generator=seeded(seed)).tolist()
    return [(order[place], order[(place + step) % clips]) for place in range(clips) for step in range(1, each + 1)]


def _compared(first: Sequence[Rating], second: Sequence[Rating], options: PreferenceOptions) -> Pair:
    means = [sum(rating.score for rating in ratings) / len(ratings) for ratings in (first, second)]
    margin = means[0] - means[1]
    tie = abs(margin) <= options.tie_margin + 1e-9  # 4.3 - 4.2 is not exactly 0.1
    one, other = first[0], second[0]
    same = {name: value for name, value in one.more.items() if other.more.get(name) == value and name != "id"}
    people = {rating.more.get("annotator") for rating in (*first, *second)}
    if len(people) > 1:
        same.pop("annotator", None)
    return Pair(
        row=one.row,
        first=one.clip,
        second=other.clip,
        verdict=Verdict(
            share=0.5 if tie else float(margin > 0), margin=margin, axis=one.axis, why="scores too near" if tie else ""
        ),
        prompt=one.prompt if one.prompt == other.prompt else None,
        reference=one.reference,
        more={**same, "id": f"{one.row}-{other.row}"},
    )
