"""Prompt lists in the formats there are, as rows of `text`, `reference_audio`, `reference_text` and what else is there.

| file                    | a line                                                                                 |
|-------------------------|----------------------------------------------------------------------------------------|
| `.jsonl`                | a JSON object                                                                          |
| `.csv`, `.tsv`          | values under a header                                                                  |
| `.lst` with bars        | seed-tts-eval's `id|reference text|reference wav|text[|wav]`                           |
| `.lst` with tabs        | LibriSpeech-PC's `reference, seconds, its text, utterance, seconds, its text` (F5-TTS) |
| a `datasets` repository | a row, audio as an `Audio` feature or as a path                                        |

Paths start from the file's folder. A column under another name is renamed by `columns`: {"text": "sentence"}.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows of a prompt list, by its suffix.

    Raises:
        ValueError: an unknown suffix, or a line that is not in its format; the message names it.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_table, ".tsv": _read_table, ".lst": _read_list}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected prompts in one of {sorted(readers)}, got {path.suffix!r}")
    return list(readers[path.suffix.lower()](path))


def rename(rows: Sequence[Row], columns: Mapping[str, str], *, name: str) -> list[Row]:
    """Rows with `columns[ours]` under the name `ours`; what stood there before is gone."""
    for row in rows:
        if missing := [theirs for theirs in columns.values() if theirs not in row]:
            raise ValueError(f"{name}: expected columns {missing}, got {sorted(row)}; correct `columns`")
    kept = [{key: value for key, value in row.items() if key not in columns.values()} for row in rows]
    renamed = [{ours: row[theirs] for ours, theirs in columns.items()} for row in rows]
    return [{**left, **taken} for left, taken in zip(kept, renamed, strict=True)]


def table_of(table: Any, split: str, *, name: str) -> Any:
    """A table of `datasets`, or a list of rows, of what is in memory: a dictionary's `split`, a stream read to its end.

    Audio stays encoded: whatever a table holds besides costs nothing until a row is used.

    Raises:
        ValueError: it is none of these; or there is no such split.
    """
    if isinstance(table, Mapping):
        if split not in table:
            raise ValueError(f"{name}: expected split {split!r}, got splits {list(table)}; name one of them")
        table = table[split]
    if isinstance(table, Sequence) and not isinstance(table, str | bytes):
        return list(table)
    if not hasattr(table, "select_columns"):
        raise ValueError(
            f"{name}: expected a table of `datasets` or a list of rows, got {type(table).__name__}; "
            "Dataset.from_list makes one of rows"
        )
    table = encoded_audio(table.with_format(None))
    if hasattr(table, "__len__"):
        return table
    from datasets import Audio, Dataset, Features, Value

    if not table.features:
        return list(table)
    # a struct, since as Audio `datasets` would encode with torchcodec what is encoded
    clip = {"bytes": Value("binary"), "path": Value("string")}
    kinds = {name: clip if isinstance(kind, Audio) else kind for name, kind in table.features.items()}
    return Dataset.from_list(list(table), features=Features(kinds))


def encoded_audio(table: Any) -> Any:
    """The table with its audio undecoded, as the files have it."""
    from datasets import Audio  # slow to import, and lists in files need none of it

    for column, feature in (table.features or {}).items():
        if isinstance(feature, Audio) and feature.decode:
            table = table.cast_column(column, Audio(decode=False))
    return table


def renamed_columns(
    table: Any, columns: Mapping[str, str], keep: Sequence[str] | None = None, *, name: str
) -> Dataset | list[Row]:
    """A table of `table_of` with our names for its columns, and of the others those to `keep`; None: all.

    Raises:
        ValueError: the table lacks some of them.
    """
    if isinstance(table, list):
        rows = rename(table, columns, name=name) if columns else table
        return rows if keep is None else [{column: row.get(column) for column in (*columns, *keep)} for row in rows]
    others = [column for column in table.column_names if column not in {*columns, *columns.values()}]
    wanted = {**{column: column for column in (others if keep is None else keep)}, **columns}
    if missing := [theirs for theirs in wanted.values() if theirs not in table.column_names]:
        raise ValueError(f"{name}: expected columns {missing}, got {table.column_names}; correct `columns`")
    if len(set(wanted.values())) < len(wanted):
        raise ValueError(f"{name}: expected each column once, got {dict(columns)}; name different ones")
    table = table.select_columns(list(wanted.values()))
    return table.rename_columns({theirs: ours for ours, theirs in wanted.items() if theirs != ours})


def cache_of_folder(source: str) -> str | None:
    """Where `datasets` should cache a local folder, as it is now; None: no local folder, its usual place.

    `datasets` 5 knows a folder whose card has `configs` by the folder's last name alone: of two folders of one name, or
    one written anew, it would give the rows that it read first.
    """
    import datasets

    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / digest)


def load_hub_rows(source: str, *, split: str, config: str | None = None) -> Dataset:
    """A split of a `datasets` source: a hub id, a local folder (audiofolder, parquet ...) or a builder's name.

    Raises:
        FileNotFoundError: there is no such source, or the hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        return load_dataset(source, config, split=split, cache_dir=cache_of_folder(source))
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{source}: expected a data set with split {split!r} on the hub, in its cache or local, got: {reason}"
        ) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    """One mapping a non-empty line. (`datasets`' JSON reader names neither the file nor the line of an error.)"""
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield row


def _read_table(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} values, got more or fewer"
                )
            yield {**row, **_number(path, reader.line_num, row)}


def _number(path: Path, line: int, row: Row) -> dict[str, float | None]:
    """`duration_s` as a number; an empty field is none."""
    if "duration_s" not in row:
        return {}
    try:
        return {"duration_s": float(row["duration_s"]) if row["duration_s"].strip() else None}
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: 'duration_s' must be seconds, got {row['duration_s']!r}") from error


def _read_list(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if "\t" in line:
            yield _librispeech_row(path, number, line.split("\t"))
        else:
            yield _seed_tts_row(path, number, line.split("|"))


def _seed_tts_row(path: Path, number: int, fields: Sequence[str]) -> Row:
    if len(fields) not in (4, 5):
        raise ValueError(f"{path}, line {number}: expected 'id|text|wav|text[|wav]', got {len(fields)} fields")
    utterance, reference_text, reference_audio, text, *target = fields
    return {
        "id": utterance,
        "text": text,
        "reference_audio": reference_audio,
        "reference_text": reference_text,
        "target_audio": target[0] if target else None,
    }


def _librispeech_row(path: Path, number: int, fields: Sequence[str]) -> Row:
    """`reference_audio` is SPEAKER/CHAPTER/UTTERANCE.flac, as in the folder of test-clean."""
    try:
        reference, _, reference_text, utterance, seconds, text = fields
        speaker, chapter, _ = reference.split("-")
        target_s = float(seconds)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: expected 'speaker-chapter-number, seconds, text' twice, parted by tabs,"
            f" got {len(fields)} fields ({error})"
        ) from error
    return {
        "id": utterance,
        "text": text.strip(),
        "reference_audio": f"{speaker}/{chapter}/{reference}.flac",
        "reference_text": reference_text,
        "target_duration_s": target_s,
        "voice": speaker,
    }


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-empty lines and their numbers."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")
