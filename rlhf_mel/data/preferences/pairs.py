"""From what rows say to pairs: what cannot be used is counted, answers about one pair are merged, ties are settled.

The order, for each pair: an answer, the axis, a text, clips that can be read and differ; then answers of several
annotators about the same pair become one, with

    soft_label = sum_i votes_i share_i / sum_i votes_i      weight = sum_i votes_i

(margin likewise, where every answer has one); then a share of exactly one half is a tie, and else the clip with more
than half of the votes is `chosen`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_mel.data.preferences.audio import UNREADABLE, Clip, ClipReader, Inspector, shown
from rlhf_mel.data.preferences.schemas import SEEDS, Schema
from rlhf_mel.data.preferences.verdicts import Verdict, number

TIES = ("drop", "keep")


ANNOTATORS = ("merge", "keep")


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """What is made of the rows; see `load_preferences`."""

    axis: str | None = None
    """Which question's answers, where there are several; None: the overall one, or all, named by column `axis`."""
    ties: str = "drop"
    """"drop", or "keep" with a soft_label of 0.5."""
    annotators: str = "merge"
    """"merge" the answers about one pair into a soft_label, or "keep" each as a row. Streams keep them."""
    require_text: bool = True
    """Drop pairs without a text; False: their prompt is "", enough for a reward model that only hears."""
    references: bool = True
    """Read reference clips where there are some; False: leave those columns out."""
    prepare_references: bool = False
    """Shorten, trim and raise them as F5-TTS does (reference_clips.py); else clips above 12 s cannot be used."""
    check_audio: bool = True
    """Decode each clip at load (about 5 ms); False: headers only, and a clip broken further on stops the run later."""
    fetch_urls: bool = False
    """Download clips that are given as URLs."""
    keep: Sequence[str] = ()
    """More columns to carry along."""
    within: str | Sequence[str] | None = None
    """Of scores: what two clips must agree in to be compared: "prompt" (the default), "listener", or columns."""
    tie_margin: float = 0.0
    """Of scores: a difference up to this is a tie."""
    pairs_per_clip: int = 8
    """Of scores: in larger groups each clip meets at most so many others, drawn by `seed`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("ties", TIES), ("annotators", ANNOTATORS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}")
        if self.tie_margin < 0 or self.pairs_per_clip < 1:
            raise ValueError(
                "tie_margin, pairs_per_clip: expected at least 0 and 1, got "
                f"{self.tie_margin} and {self.pairs_per_clip}"
            )


@dataclass
class Tally:
    """How many rows were read, and what became of those that were dropped."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """By reason, the first row with it."""
    axes: set[str] = field(default_factory=set)
    """Axes that were answered."""
    two_rates: int = 0
    """Pairs of clips with different sample rates."""

    def drop(self, reason: str, where: str, why: str = "") -> None:
        """Count one more, and keep the first as an example."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, f"{where}: {why}"[:240] if why else where)

    def __str__(self) -> str:
        parts = [f"{count} {reason} (first: {self.examples[reason]})" for reason, count in self.dropped.most_common(8)]
        return "; ".join(parts) or "none"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pair:
    """Two clips, and what was said of them."""

    row: int
    """Of the source."""
    first: Clip
    second: Clip
    verdict: Verdict
    prompt: str | None = None
    reference: Clip | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the contract, and those that are carried along."""

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"row {self.row}" + (f" (id {shown(self.more['id'])})" if self.more.get("id") is not None else "")

    def swapped(self) -> Pair:
        """The same with its clips in the other order."""
        seeds = {"chosen_seed": self.more.get("rejected_seed"), "rejected_seed": self.more.get("chosen_seed")}
        more = {**self.more, **{name: value for name, value in seeds.items() if name in self.more}}
        return replace(self, first=self.second, second=self.first, verdict=self.verdict.swapped(), more=more)


def text_of(value: Any) -> str | None:
    """A text with something in it, or None."""
    return value.strip() if isinstance(value, str) and value.strip() else None


def other_columns(schema: Schema, labels: Mapping[str, Any], keep: Sequence[str]) -> dict[str, Any]:
    """id, voice, annotator, reference_text, seeds, and the columns to keep."""
    named = ("id", "voice", "annotator", "reference_text")
    more: dict[str, Any] = {}
    for role in named:
        value = labels.get(role)
        joined = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        if joined is not None:
            more[role] = str(joined)
    more |= {
        role: int(value) for role in SEEDS if (value := labels.get(role)) is not None and number(value) is not None
    }
    return more | {column: labels[f"keep/{column}"] for column in keep}


def row_pairs(
    schema: Schema, index: int, labels: Mapping[str, Any], clips: Mapping[str, Clip], options: PreferenceOptions
) -> Iterator[Pair]:
    """The pairs of a row of two clips: one for each axis that it answers."""
    first, second = (clips[role] for role in schema.family.clips)
    more = other_columns(schema, labels, options.keep)
    assert schema.family.verdicts is not None
    for verdict in schema.family.verdicts(labels, options.axis):
        yield Pair(
            row=index,
            first=first,
            second=second,
            verdict=verdict,
            prompt=text_of(labels.get("prompt")),
            reference=clips.get("reference_audio"),
            more=more,
        )


def split_table(table: Any, schema: Schema) -> tuple[Any, dict[str, Any]]:
    """The table without its clips, and by role of a clip that column alone: labels are read without any audio."""
    if isinstance(table, list):
        return table, dict.fromkeys(schema.clip_roles, table)
    clips = {schema.columns[role] for role in schema.clip_roles}
    labels = [column for column in table.column_names if column not in clips]
    return table.select_columns(labels), {
        role: table.select_columns([schema.columns[role]]) for role in schema.clip_roles
    }


def table_rows(table: Any, schema: Schema) -> Iterator[tuple[int, dict[str, Any], dict[str, Clip]]]:
    """Number, values by role and clips by role of each row."""
    light, clips = split_table(table, schema)
    rows: Iterable[Any] = light if isinstance(light, list) or light.column_names else ({} for _ in range(len(table)))
    for index, row in enumerate(rows):
        cells = {role: Clip(cell, index, schema.columns[role]) for role, cell in clips.items()}
        yield index, schema.labels(row), cells


def stream_rows(table: Any, schema: Schema) -> Iterator[tuple[int, dict[str, Any], dict[str, Clip]]]:
    """As table_rows, of a table that is read once, in order."""
    for index, row in enumerate(table):
        yield index, schema.labels(row), {role: Clip([row], 0, schema.columns[role]) for role in schema.clip_roles}


class Usable:
    """Decides whether a pair can be used, and counts those that cannot."""

    def __init__(self, options: PreferenceOptions, inspector: Inspector, tally: Tally) -> None:
        self._options, self._inspector, self._tally = options, inspector, tally

    def __call__(self, pair: Pair) -> bool:
        """Whether the pair has an answer on the axis, a text, and two clips that can be read and differ."""
        refused = self._problem(pair)
        if refused is not None:
            self._tally.drop(refused[0], pair.where, refused[1])
        return refused is None

    def _problem(self, pair: Pair) -> tuple[str, str] | None:
        """Reason and details."""
        verdict = pair.verdict
        if verdict.axis is not None:
            self._tally.axes.add(str(verdict.axis))
        if self._options.axis is not None and verdict.axis != self._options.axis:
            return "of another axis", shown(verdict.axis)
        if verdict.share is None or verdict.votes <= 0:
            return "without an answer", verdict.why or "no votes"
        if self._options.require_text and pair.prompt is None:
            return "without text", "require_text=False keeps them for a reward model that only hears"
        return self._clip_problem(pair)

    def _clip_problem(self, pair: Pair) -> tuple[str, str] | None:
        for clip in (pair.first, pair.second):
            if problem := self._inspector.facts(clip).problem:
                return "undecodable", f"{clip.column}: {problem}"
        if self._inspector.identical(pair.first, pair.second):
            return "of two identical clips", ""
        one, other = self._inspector.facts(pair.first), self._inspector.facts(pair.second)
        self._tally.two_rates += one.rate_hz != other.rate_hz
        if pair.reference is None or pair.reference.value is None:
            return None
        if text_of(pair.more.get("reference_text")) is None:
            return "without the reference's text", "references=False leaves references out"
        problem = self._inspector.reference_problem(pair.reference)
        return None if problem is None else ("with an unusable reference", f"{problem}; references=False leaves it out")


def merge_answers(pairs: Iterable[Pair], inspector: Inspector, tally: Tally) -> list[Pair]:
    """One pair for all answers about the same two clips, text and axis; see the module."""
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        clips = frozenset(inspector.facts(clip).digest for clip in (pair.first, pair.second))
        groups.setdefault((pair.prompt, pair.verdict.axis, clips), []).append(pair)
    return [_merged(group, inspector, tally) for group in groups.values()]


def _merged(group: Sequence[Pair], inspector: Inspector, tally: Tally) -> Pair:
    first = group[0]
    if len(group) == 1:
        return first
    digest = inspector.facts(first.first).digest
    aligned = [pair if inspector.facts(pair.first).digest == digest else pair.swapped() for pair in group]
    for pair in aligned[1:]:
        tally.drop("merged into an earlier row", pair.where, f"the clips of {first.where}")
    verdicts = [pair.verdict for pair in aligned]
    votes = sum(verdict.votes for verdict in verdicts)
    margins = [verdict.votes * verdict.margin for verdict in verdicts if verdict.margin is not None]
    verdict = Verdict(
        share=sum(verdict.votes * (verdict.share or 0.0) for verdict in verdicts) / votes,
        margin=sum(margins) / votes if len(margins) == len(verdicts) else None,
        votes=votes,
        axis=first.verdict.axis,
        why=first.verdict.why if all(verdict.share == 0.5 for verdict in verdicts) else "annotators disagree evenly",
    )
    people = dict.fromkeys(pair.more["annotator"] for pair in aligned if pair.more.get("annotator"))
    more = {**first.more, **({"annotator": ", ".join(people)} if people else {})}
    return replace(first, verdict=verdict, more=more)


def settled(pair: Pair, ties: str, tally: Tally) -> Pair | None:
    """The pair with the clip that won first; None for a tie that is dropped, and counted."""
    share = pair.verdict.share
    assert share is not None
    if abs(share - 0.5) < 1e-9:
        if ties == "keep":
            return pair
        tally.drop("tie" + (f" ({pair.verdict.why})" if pair.verdict.why else ""), pair.where)
        return None
    return pair if share > 0.5 else pair.swapped()


def pair_labels(pair: Pair) -> dict[str, Any]:
    """A settled pair as a row without its clips; what is absent is left out."""
    verdict = pair.verdict
    row = {"prompt": pair.prompt or "", "soft_label": verdict.share, "weight": verdict.votes}
    row |= {"margin": verdict.margin} if verdict.margin is not None else {}
    row |= {"axis": verdict.axis} if verdict.axis is not None else {}
    return {**row, **pair.more}


def pair_row(pair: Pair, reader: ClipReader) -> dict[str, Any]:
    """A settled pair as a row, with its clips encoded."""
    row = {"chosen": reader.encoded(pair.first.value), "rejected": reader.encoded(pair.second.value)}
    if pair.reference is not None and (value := pair.reference.value) is not None:
        row["reference_audio"] = reader.encoded(value)
    return pair_labels(pair) | row


class PairTable(Sequence[dict[str, Any]]):
    """Settled pairs as a table of rows; audio is read, encoded, when a row is asked for.

    `table[3]` is a row, `table["margin"]` a column. Nothing is copied: a row knows where its clips lie.
    """

    def __init__(self, pairs: Sequence[Pair], reader: ClipReader) -> None:
        self._pairs, self._reader = pairs, reader
        others = dict.fromkeys(name for pair in pairs for name in pair_labels(pair))
        others |= {"reference_audio": None} if any(pair.reference is not None for pair in pairs) else {}
        self.column_names = list(dict.fromkeys(["prompt", "chosen", "rejected", *others]))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, str):
            clips = ("chosen", "rejected", "reference_audio")
            return [row[place] for row in self] if place in clips else [pair_labels(p).get(place) for p in self._pairs]
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        pair = self._pairs[place]
        try:
            row = pair_row(pair, self._reader)
        except UNREADABLE as error:
            raise ValueError(f"{pair.where}: its clips can no longer be read: {error}") from error
        return {name: row.get(name) for name in self.column_names}

    def select(self, places: Iterable[int]) -> PairTable:
        """The rows at these places, in that order."""
        return PairTable([self._pairs[place] for place in places], self._reader)
