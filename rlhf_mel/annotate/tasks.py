"""Which pairs are labelled, in which order, and which clip is on the left: by a seed and the annotator's name.

A table of pairs has `prompt` (the text) and two clips: `audio_a` and `audio_b`, or `chosen` and `rejected` of a data
set of preferences that is to be labelled again (a: chosen). Optionally `reference_audio`, `reference_text`, `voice`;
other columns are kept for the export.

A pair is known by the hash of its text and of the samples of its clips, so that answers stay with it when rows are
added or moved. The order of an annotator is a permutation of all pairs, with attention checks strewn in. The side of a
clip is drawn in permuted blocks of four, two of which have the first clip on the left, so that an annotator who stops
early has seen both sides equally often, to within two (permuted-block randomisation: Matts & Lachin 1988, Controlled
Clinical Trials 9: 327).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rlhf_mel.data.preferences.audio import UNREADABLE, ClipReader, Encoded, read_clip
from rlhf_mel.data.preferences.sources import open_source

CLIPS = (("audio_a", "audio_b"), ("chosen", "rejected"))
"""The two ways to name the clips of a pair."""

REFERENCE = "reference_audio"

_BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """One pair to compare, or an attention check: a clip beside a degraded copy of itself."""

    id: str
    row: int
    """Of the pair in the table."""
    left_clip: str
    """"a" or "b"."""
    check: str = ""
    """Of an attention check: the clip of the pair, "a" or "b", that is its a; its b is the degraded copy."""


class Pairs:
    """The pairs of a table that can be labelled; the others are counted by reason.

    Args:
        rows: a `datasets.Dataset`, or a list of rows.
        reader: where paths of clips start.

    Raises:
        ValueError: columns are missing, or no pair can be labelled.
    """

    def __init__(self, rows: Any, *, name: str = "pairs", reader: ClipReader | None = None) -> None:
        self.name = name
        self.rows = rows
        self.columns = _clip_columns(rows, name)
        self.ids: dict[str, int] = {}
        """Row of the table by id of the pair."""
        self.dropped: dict[str, list[int]] = {}
        """Rows that are left out, by reason."""
        self.mixed_rates: list[int] = []
        """Rows whose clips differ in sample rate: all are played at the highest."""
        self._reader = reader or ClipReader()
        self._first_unreadable = ""
        for row, values in enumerate(rows):
            self._take(row, values)
        if not self.ids:
            raise ValueError(
                f"{name}: expected at least one pair that can be labelled, got none among {len(rows)} rows: "
                f"{'; '.join(self.notes())}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def encoded(self, row: int, clip: str) -> Encoded:
        """Clip "a" or "b" of a row as `datasets` keeps it: bytes of its file, or a path."""
        return self._reader.encoded(self.rows[row][self.columns["ab".index(clip)]])

    def clip(self, row: int, clip: str) -> tuple[Float[Tensor, " s"], int]:
        """Mono samples of clip "a" or "b" of a row, and their rate in Hz."""
        return read_clip(self.encoded(row, clip))

    def reference(self, row: int) -> tuple[Float[Tensor, " s"], int] | None:
        """The voice's clip of a row, where it has one."""
        value = self.rows[row].get(REFERENCE)
        return None if value is None else read_clip(self._reader.encoded(value))

    def notes(self) -> list[str]:
        """What a person should know of the table: rows left out and why, mixed sample rates."""
        total = len(self.rows)
        lines = [f"{len(rows)} of {total} rows left out, {why} ({_listed(rows)})" for why, rows in self.dropped.items()]
        if self._first_unreadable:
            lines.append(self._first_unreadable)
        if self.mixed_rates:
            lines.append(
                f"{len(self.mixed_rates)} of {total} rows hold clips of different sample rates, played at the highest "
                f"({_listed(self.mixed_rates)})"
            )
        return lines

    def _take(self, row: int, values: Mapping[str, Any]) -> None:
        text = values["prompt"]
        if not isinstance(text, str) or not text.strip():
            self._drop("without a text in 'prompt'", row)
            return
        digests: list[bytes] = []
        rates: list[int] = []
        for column in (*self.columns, REFERENCE):
            if column == REFERENCE and values.get(column) is None:
                continue
            try:
                waveform, rate_hz = read_clip(self._reader.encoded(values[column]))
            except UNREADABLE as error:
                self._drop("with audio that does not decode", row)
                self._first_unreadable = self._first_unreadable or f"row {row}, {column}: {error}"
                return
            digests.append(hashlib.sha256(waveform.numpy().tobytes()).digest())
            rates.append(rate_hz)
        self._keep(row, text, digests, rates)

    def _keep(self, row: int, text: str, digests: Sequence[bytes], rates: Sequence[int]) -> None:
        """Take a pair that can be played, unless it has nothing to compare or was there before."""
        if digests[0] == digests[1]:
            self._drop("with the same clip twice", row)
            return
        key = hashlib.sha256(b"".join([text.encode(), *digests[:2]])).hexdigest()[:16]
        if key in self.ids:
            self._drop("equal to an earlier row", row)
            return
        self.ids[key] = row
        if rates[0] != rates[1]:
            self.mixed_rates.append(row)

    def _drop(self, why: str, row: int) -> None:
        self.dropped.setdefault(why, []).append(row)


def load_pairs(source: Any, *, split: str = "train", columns: Mapping[str, str] | None = None) -> Pairs:
    """The pairs of anything that holds preference data, a folder, file, hub id or table: see sources.py.

    Args:
        split: of a source with several.
        columns: our names to the source's, where they differ: {"audio_a": "first"}.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a column is missing, or no pair can be labelled.
    """
    opened = open_source(source, split=split)
    rows = opened.load(opened.columns)
    columns = columns or {}
    if missing := sorted(set(columns.values()) - set(opened.columns)):
        raise ValueError(f"{opened.name}: expected columns {missing}, got {opened.columns}; correct --columns")
    if isinstance(rows, list):
        ours = {theirs: name for name, theirs in columns.items()}
        rows = [{ours.get(name, name): value for name, value in row.items() if name not in columns} for row in rows]
    else:
        rows = rows.remove_columns(
            [name for name in columns if name in opened.columns and name not in columns.values()]
        )
        rows = rows.rename_columns({theirs: name for name, theirs in columns.items() if theirs != name})
    return Pairs(rows, name=opened.name, reader=ClipReader(root=Path(opened.root)))


def plan(pairs: Iterable[tuple[str, int]], annotator: str, *, seed: int = 0, check_share: float = 0.1) -> list[Task]:
    """All tasks of an annotator, in order; the same whenever it is asked for.

    Args:
        pairs: id and row of each.
        check_share: attention checks for each pair, rounded; the same ones for all annotators.
    """
    known = list(pairs)
    common, own = random.Random(f"{seed} checks"), random.Random(f"{seed} {annotator}")
    checked = [(*pair, common.choice("ab")) for pair in common.sample(known, round(check_share * len(known)))]
    own.shuffle(known)
    sides = _sides(len(known), own)
    tasks = [Task(id=key, row=row, left_clip=side) for (key, row), side in zip(known, sides, strict=True)]
    for (key, row, clip), side in zip(checked, _sides(len(checked), own), strict=True):
        check = Task(id=f"check-{key}-{clip}", row=row, left_clip=side, check=clip)
        tasks.insert(own.randint(1, len(tasks)), check)  # never first, where the page is still new
    return tasks


def _sides(count: int, generator: random.Random) -> list[str]:
    """The left clip of each: two of every four are "a", in random order."""
    sides: list[str] = []
    while len(sides) < count:
        block = list("ab" * (_BLOCK // 2))
        generator.shuffle(block)
        sides += block
    return sides[:count]


def _clip_columns(rows: Any, name: str) -> tuple[str, str]:
    found = list(rows.column_names) if hasattr(rows, "column_names") else list(rows[0] if rows else ())
    for clips in CLIPS:
        if {"prompt", *clips} <= set(found):
            return clips
    raise ValueError(
        f"{name}: expected the columns 'prompt' and {' or '.join(str(list(clips)) for clips in CLIPS)}, got {found}; "
        "name them: --columns prompt=text,audio_a=first,audio_b=second"
    )


def _listed(rows: Sequence[int]) -> str:
    return "rows " + ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
