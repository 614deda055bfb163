"""Human preferences: pairs of clips of which people preferred one, from any of the schemas in use.

    pairs = load_preferences("declare-lab/audio-alpaca")
    batch = pairs.collate([pairs[0], pairs[1]])       # prompts, log mels and sound of chosen and rejected

A row is TRL's `prompt`, `chosen`, `rejected`, with audio encoded, and where the data set has them: `reference_audio`,
`reference_text`, `voice`, `id`; `soft_label` (the chosen clip's share of the votes, 0.5 to 1; absent: 1), `margin`
(strength in the data set's unit), `weight` (answers behind the row; absent: 1), `axis`, `annotator`; for pairs of one's
own the seeds of the noise that each clip was made from (flow/noise.py: item_generator(seed, row)).

What cannot be used is counted by reason in `counts`, and reported once, with the licence. Clips are resampled to the
policy's mel as they are read; clips of another rate than that are named in the report, since what a pair sounds like
above the lower rate's half would tell the two apart.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch

from rlhf_mel.data.preferences.audio import ClipReader, Inspector, is_url, shown
from rlhf_mel.data.preferences.batches import PairBatch, collate_pairs
from rlhf_mel.data.preferences.files import write_preferences
from rlhf_mel.data.preferences.pairs import (
    Pair,
    PairTable,
    PreferenceOptions,
    Tally,
    Usable,
    merge_answers,
    pair_row,
    row_pairs,
    settled,
    stream_rows,
    table_rows,
)
from rlhf_mel.data.preferences.schemas import Schema, find_clips, find_schema, parse_columns
from rlhf_mel.data.preferences.sources import Source, open_source
from rlhf_mel.data.preferences.tables import ClipIndex, joined_pairs, score_pairs, within_columns
from rlhf_mel.data.prompt_files import encoded_audio
from rlhf_mel.lookup import did_you_mean
from rlhf_mel.progress import progress
from rlhf_mel.speech.audio import MelSpec

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    Table: TypeAlias = (
        str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict | Sequence[Mapping[str, Any]]
    )

__all__ = [
    "PairBatch",
    "PairTable",
    "PreferenceDataset",
    "PreferenceOptions",
    "PreferenceStream",
    "collate_pairs",
    "load_preferences",
    "parse_columns",
    "write_preferences",
]


class _Collated:
    """What the map-style and the iterable data set share."""

    name: str
    mel_spec: MelSpec
    licence: str
    counts: dict[str, int]
    """How many rows were dropped, by reason."""
    prepare_references: bool = False

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> PairBatch:
        """Rows of this data set as a batch, for a DataLoader."""
        return collate_pairs(rows, self.mel_spec, prepare_references=self.prepare_references)


class PreferenceDataset(_Collated, torch.utils.data.Dataset[dict[str, Any]]):
    """Pairs by number. `load_preferences` makes one of any source; here rows already have the form of the module.

    Args:
        rows: a table of such rows: a sequence of mappings, or a `datasets.Dataset`.
        mel_spec: of the policy.
        name: how errors call the data set.
        counts: what was dropped, by reason.
        licence: of the data set.
        prepare_references: shorten, trim and raise reference clips as F5-TTS does.

    Raises:
        ValueError: there are no rows, or not with these columns.
    """

    def __init__(
        self,
        rows: Any,
        *,
        mel_spec: MelSpec | None = None,
        name: str = "preferences",
        counts: Mapping[str, int] | None = None,
        licence: str = "",
        prepare_references: bool = False,
    ) -> None:
        rows = rows if not hasattr(rows, "cast_column") else encoded_audio(rows)
        self.rows = rows
        self.name = name
        self.mel_spec = mel_spec or MelSpec()
        self.counts = dict(counts or {})
        self.licence = licence
        self.prepare_references = prepare_references
        if not len(rows):
            raise ValueError(f"{name} has no pairs: expected rows with 'prompt', 'chosen' and 'rejected'")
        if missing := {"prompt", "chosen", "rejected"} - set(rows[0]):
            raise ValueError(f"{name}: expected columns 'prompt', 'chosen', 'rejected', got none of {sorted(missing)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self.rows[row])


class PreferenceStream(_Collated, torch.utils.data.IterableDataset[dict[str, Any]]):
    """Pairs in the order of their source, read as they are asked for; `counts` are those of the current pass.

    Answers of several annotators about one pair stay rows of their own. A pass without any pair is an error, but for a
    worker of a DataLoader, whose share may have none; what a worker counts, it reports, and keeps to itself.
    """

    def __init__(
        self,
        source: Source,
        table: Any,
        schema: Schema,
        reader: ClipReader,
        options: PreferenceOptions,
        mel_spec: MelSpec,
    ) -> None:
        self.name, self.licence, self.mel_spec = source.name, str(source.licence), mel_spec
        self.counts = {}
        self._table, self._schema, self._reader = table, schema, reader
        self.options, self.prepare_references = options, options.prepare_references
        self._reported = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        tally, options = Tally(), self.options
        self.counts = tally.dropped
        inspector = _inspector(self._reader, self.mel_spec, options)
        usable, kept = Usable(options, inspector, tally), 0
        for index, labels, clips in stream_rows(self._table, self._schema):
            tally.rows += 1
            inspector.forget()
            for pair in row_pairs(self._schema, index, labels, clips, options):
                won = settled(pair, options.ties, tally) if usable(pair) else None
                if won is not None:
                    kept += 1
                    yield pair_row(won, self._reader)
        if torch.utils.data.get_worker_info() is None:
            _require_pairs(kept, self.name, options, tally)
        if not self._reported:
            self._reported = True
            _say(_report(self.name, self._schema, kept, tally, inspector, self.mel_spec))


@overload
def load_preferences(
    source: Table,
    *,
    split: str = ...,
    adapter: str | None = ...,
    columns: Mapping[str, str] | None = ...,
    streaming: Literal[False] = ...,
    config: str | None = ...,
    revision: str | None = ...,
    audio_from: Table | None = ...,
    audio_root: str | Path | None = ...,
    mel_spec: MelSpec | None = ...,
    **options: Any,
) -> PreferenceDataset: ...


@overload
def load_preferences(
    source: Table,
    *,
    split: str = ...,
    adapter: str | None = ...,
    columns: Mapping[str, str] | None = ...,
    streaming: Literal[True],
    config: str | None = ...,
    revision: str | None = ...,
    audio_from: Table | None = ...,
    audio_root: str | Path | None = ...,
    mel_spec: MelSpec | None = ...,
    **options: Any,
) -> PreferenceStream: ...


def load_preferences(
    source: Table,
    *,
    split: str = "train",
    adapter: str | None = None,
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    config: str | None = None,
    revision: str | None = None,
    audio_from: Table | None = None,
    audio_root: str | Path | None = None,
    mel_spec: MelSpec | None = None,
    **options: Any,
) -> PreferenceDataset | PreferenceStream:
    """Pairs of clips of which people preferred one, from any source and schema; only the columns in use are read.

    Args:
        source: hub id, folder, file, or a table in memory (sources.py).
        split: of the data set.
        adapter: which schema (schemas.py); None: found by the columns.
        columns: our roles to the data set's columns, where they are not known: {"chosen": "audio_a", ...}; of the table
            of clips `clip`, `clip_id`, `clip_model`, `clip_prompt_id`.
        streaming: read the source as it is asked for; needed for an IterableDataset.
        config: the data set's configuration, where it has several.
        revision: of a hub id.
        audio_from: another table that has the clips: one of the configurations of the same data set, or any source.
        audio_root: where relative paths of clips start; the source's own folder unless given.
        mel_spec: of the policy; clips are resampled to its rate.
        options: fields of PreferenceOptions: axis, ties, annotators, within, tie_margin, fetch_urls, require_text ...

    Raises:
        FileNotFoundError: there is no such data set or split, it is gated, or it needs a loading script.
        ValueError: the schema is not known (the message has a mapping that would do), an option cannot be meant, or no
            pair is left (the message says what became of the rows).
    """
    settings = _options(options)
    mel_spec = mel_spec or MelSpec()
    opened = open_source(
        source, split=split, config=config, revision=revision, streaming=streaming, audio_root=audio_root
    )
    named = columns or {}
    of_clips = {role: named[role] for role in named if role.split("_")[0] == "clip" and audio_from is not None}
    mapped = {role: column for role, column in named.items() if role not in of_clips}
    schema = find_schema(opened, adapter=adapter, columns=mapped, joined=audio_from is not None)
    schema = _with_extra_columns(schema, opened, settings)
    _check_request(schema, opened, settings, streaming)
    table = opened.load(list(dict.fromkeys(schema.columns.values())))
    reader = ClipReader(opened.root, settings.fetch_urls)
    _check_paths(table, schema, opened, reader)
    _say(f"{opened.name}: {opened.licence}")
    if streaming:
        return PreferenceStream(opened, table, schema, reader, settings, mel_spec)
    clips = None
    if audio_from is not None:
        where = _table_of_clips(audio_from, source, revision)
        clips = _clip_index(open_source(**where, split=split, audio_root=audio_root), of_clips, reader)
    return _settle_all(opened, table, schema, reader, clips, settings, mel_spec)


# Loading.

_SAID: set[str] = set()


def _say(line: str) -> None:
    """Print a line once in a process; to stderr, since stdout is for results."""
    if line not in _SAID:
        _SAID.add(line)
        print(line, file=sys.stderr)


def _options(given: Mapping[str, Any]) -> PreferenceOptions:
    known = [entry.name for entry in fields(PreferenceOptions)]
    if unknown := [name for name in given if name not in known]:
        near = did_you_mean(unknown[0], known)
        raise TypeError(f"load_preferences: expected options among {known}, got {unknown}{near}")
    return PreferenceOptions(**given)


def _with_extra_columns(schema: Schema, source: Source, options: PreferenceOptions) -> Schema:
    """With the columns to keep, and those of `within`; without references where they are not wanted."""
    if missing := [column for column in options.keep if column not in source.columns]:
        raise ValueError(f"keep: expected columns of {source.name}, {source.columns}, got {missing}")
    columns = dict(schema.columns)
    if not options.references:
        columns = {role: column for role, column in columns.items() if not role.startswith("reference_")}
    if options.axis is None:
        columns.pop("ratings", None)
    if schema.family.name == "scores":
        columns |= within_columns(schema, source.columns, options, source.name)
    return replace(schema, columns=columns | {f"keep/{column}": column for column in options.keep})


def _check_request(schema: Schema, source: Source, options: PreferenceOptions, streaming: bool) -> None:
    """What can be refused before any row is read."""
    if schema.family.name != "scores" and (options.within or options.tie_margin):
        raise ValueError(
            f"within, tie_margin: expected with scores of single clips, got adapter {schema.family.name!r} for "
            f"{source.name}"
        )
    if streaming and (schema.joined or schema.family.name == "scores"):
        raise ValueError(f"{source.name}: votes and scores of single clips need the whole table, got streaming=True")
    if options.require_text and "prompt" not in schema.columns and not schema.joined:
        raise ValueError(
            f"{source.name}: expected a text for each pair, got no such column in {source.columns}; name it, "
            "columns={'prompt': ...}, or pass require_text=False for a reward model that only hears"
        )


def _check_paths(table: Any, schema: Schema, source: Source, reader: ClipReader) -> None:
    """A column of text holds paths, URLs, or names of models: told apart by its first values, before all are read."""
    for column in (schema.columns[role] for role in schema.clip_roles if source.kinds[schema.columns[role]] == "text"):
        cells = table.select_columns([column]) if getattr(table, "features", None) else table
        values = [str(row[column]) for row in islice(iter(cells), 20) if row.get(column)]
        if any(map(is_url, values)) and not reader.fetch_urls:
            raise ValueError(
                f"{source.name}: expected clips in column {column!r}, got URLs: {shown(values[0])}; pass "
                "fetch_urls=True to download them"
            )
        if values and not any("://" in value or os.path.isfile(reader.root / value) for value in values):
            raise ValueError(
                f"{source.name}: expected clips in column {column!r}, got text that names no file in {reader.root}: "
                f"{shown(values[0])}; names of models are no audio, and clips elsewhere need audio_root=FOLDER"
            )


def _table_of_clips(audio_from: Any, source: Any, revision: str | None) -> dict[str, Any]:
    """Where the clips are: a configuration of the same data set, or a source of its own."""
    named = isinstance(source, str) and isinstance(audio_from, str) and "/" not in audio_from
    if named and not Path(audio_from).expanduser().exists():
        return {"source": source, "config": audio_from, "revision": revision}
    return {"source": audio_from}


def _clip_index(opened: Source, columns: Mapping[str, str], reader: ClipReader) -> ClipIndex:
    schema = find_clips(opened, columns)
    reader.root = opened.root
    table = opened.load(list(dict.fromkeys(schema.columns.values())))
    return ClipIndex(table_rows(table, schema), opened.name)


def _inspector(reader: ClipReader, mel_spec: MelSpec, options: PreferenceOptions) -> Inspector:
    return Inspector(reader, mel_spec, decode=options.check_audio, prepare=options.prepare_references)


def _settle_all(
    source: Source,
    table: Any,
    schema: Schema,
    reader: ClipReader,
    clips: ClipIndex | None,
    options: PreferenceOptions,
    mel_spec: MelSpec,
) -> PreferenceDataset:
    tally = Tally()
    inspector = _inspector(reader, mel_spec, options)
    pairs = list(_all_pairs(table, schema, clips, options, inspector, tally))
    check = Usable(options, inspector, tally)
    usable = [pair for pair in progress(pairs, f"{source.name}: reading clips") if check(pair)]
    if options.annotators == "merge":
        usable = merge_answers(usable, inspector, tally)
    kept = [won for pair in usable if (won := settled(pair, options.ties, tally)) is not None]
    _require_pairs(len(kept), source.name, options, tally)
    _say(_report(source.name, schema, len(kept), tally, inspector, mel_spec))
    return PreferenceDataset(
        PairTable(kept, reader),
        mel_spec=mel_spec,
        name=source.name,
        counts=tally.dropped,
        licence=str(source.licence),
        prepare_references=options.prepare_references,
    )


def _all_pairs(
    table: Any,
    schema: Schema,
    clips: ClipIndex | None,
    options: PreferenceOptions,
    inspector: Inspector,
    tally: Tally,
) -> Iterator[Pair]:
    rows = table_rows(table, schema)
    if schema.family.name == "scores":
        yield from score_pairs(schema, rows, clips, options, inspector, tally)
    elif clips is not None:
        yield from joined_pairs(schema, rows, clips, options, tally)
    else:
        for index, labels, own in rows:
            tally.rows += 1
            yield from row_pairs(schema, index, labels, own, options)


def _require_pairs(kept: int, name: str, options: PreferenceOptions, tally: Tally) -> None:
    if kept:
        return
    axes = f"; axes seen: {sorted(tally.axes)[:20]}" if options.axis is not None else ""
    raise ValueError(f"{name}: expected pairs, got 0 of {tally.rows} rows; dropped: {tally}{axes}")


def _report(name: str, schema: Schema, kept: int, tally: Tally, inspector: Inspector, mel_spec: MelSpec) -> str:
    """One line on what was found, and what was not used."""
    others = sorted(inspector.rates_hz - {mel_spec.sample_rate_hz})
    rates = f"; clips at {others} Hz are resampled to {mel_spec.sample_rate_hz} Hz" if others else ""
    if tally.two_rates:
        rates += f"; {tally.two_rates} pairs have clips of two rates, which the band above the lower one tells apart"
    return f"{name} (adapter {schema.family.name!r}): {kept} pairs of {tally.rows} rows; dropped: {tally}{rates}"
