"""Pairs written as a data set: parquet with the audio inside, and a card. `load_preferences` and `datasets` read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_mel.data.preferences.audio import ClipReader, clip_bytes, shown
from rlhf_mel.storage import write_whole

if TYPE_CHECKING:
    from datasets import Dataset

AUDIO = ("chosen", "rejected", "reference_audio")


CONTRACT = {
    "prompt": "string",
    "chosen": "audio",
    "rejected": "audio",
    "reference_audio": "audio",
    "reference_text": "string",
    "voice": "string",
    "id": "string",
    "margin": "float64",
    "soft_label": "float64",
    "weight": "float64",
    "axis": "string",
    "annotator": "string",
    "chosen_seed": "int64",
    "rejected_seed": "int64",
    "row": "int64",
}
"""Columns of a preference data set and their types."""


SHARD_BYTES = 256 * 2**20


def write_preferences(
    rows: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    split: str = "train",
    licence: str | None = None,
    about: str = "",
) -> Path:
    """Write rows in the form of preferences.py as parquet files with their audio inside, and README.md; the folder.

    Args:
        rows: `PreferenceDataset.rows`, or any rows of that form; further columns of text, numbers or truth values too.
        folder: a new or empty one.
        split: under which `datasets.load_dataset(folder)` finds them.
        licence: for the card.
        about: for the card, what the pairs are.

    Raises:
        FileExistsError: there are parquet files of this split already.
        ValueError: there are no rows, or a row lacks a text or a clip.
    """
    folder = Path(folder)
    data = folder / "data"
    if list(data.glob(f"{split}-*.parquet")):
        raise FileExistsError(f"{folder}: expected no files of split {split!r}, got some; choose another folder")
    data.mkdir(parents=True, exist_ok=True)
    table = getattr(rows, "rows", rows)  # of a PreferenceDataset
    table = table if hasattr(table, "__getitem__") else list(table)
    columns, count = _column_types(table), 0
    for number, shard in enumerate(_shards(table)):
        made = _shard_table(shard, columns)
        write_whole(data / f"{split}-{number:05d}.parquet", lambda file, made=made: made.to_parquet(str(file)))  # type: ignore[misc]
        count += len(shard)
    if not count:
        raise ValueError(f"{folder}: expected pairs to write, got none")
    card = _card(columns, count, licence, about)
    write_whole(folder / "README.md", lambda file: file.write_text(card, encoding="utf-8"))
    return folder


def _shards(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows with their audio as bytes, in lists of about SHARD_BYTES."""
    reader, shard, size = ClipReader(), [], 0
    for index, row in enumerate(rows):
        embedded = _embedded(row, index, reader)
        shard.append(embedded)
        size += sum(len(embedded[name]["bytes"]) for name in AUDIO if embedded.get(name))
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _embedded(row: Mapping[str, Any], index: int, reader: ClipReader) -> dict[str, Any]:
    if missing := [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]:
        raise ValueError(
            f"row {index} (id {shown(row.get('id'))}): expected 'prompt', 'chosen', 'rejected', got no {missing}"
        )
    found = dict(row)
    for name in AUDIO:
        if row.get(name) is not None:
            clip = reader.encoded(row[name])
            found[name] = {"bytes": clip_bytes(clip), "path": Path(clip["path"]).name if clip["path"] else None}
    return found


def _column_types(table: Any) -> dict[str, str]:
    """Types of all columns, those of the contract first; of others by their values."""
    named = getattr(table, "column_names", None)
    names = named or dict.fromkeys(name for row in table for name in row)
    kinds = {name: kind for name, kind in CONTRACT.items() if name in names}
    for name in names:
        if name not in kinds:
            values = table[name] if named else (row.get(name) for row in table)
            kinds[name] = _type_of(name, next((value for value in values if value is not None), ""))
    return kinds


def _type_of(name: str, value: Any) -> str:
    types = ((bool, "bool"), (int, "int64"), (float, "float64"), (str, "string"))
    kind = next((kind for type_, kind in types if isinstance(value, type_)), None)
    if kind is None:
        raise ValueError(f"column {name!r}: expected text, numbers or truth values, got {shown(value)}")
    return kind


def _shard_table(rows: list[dict[str, Any]], kinds: Mapping[str, str]) -> Dataset:
    from datasets import Audio, Dataset, Features, Value

    clip = {"bytes": Value("binary"), "path": Value("string")}
    plain = Features({name: clip if kind == "audio" else Value(kind) for name, kind in kinds.items()})
    table = Dataset.from_dict({name: [row.get(name) for row in rows] for name in kinds}, features=plain)
    for name in (name for name, kind in kinds.items() if kind == "audio"):
        table = table.cast_column(name, Audio())  # of a struct: encoding through the feature would need torchcodec
    return table


def _card(columns: Mapping[str, str], count: int, licence: str | None, about: str) -> str:
    lines = [f"license: {licence}"] if licence else []
    lines += ["task_categories:", "- text-to-speech", "tags:", "- preference", "- dpo"]
    # No `configs`: of a local folder with them `datasets` 5 caches by the folder's last name alone, so that two folders
    # of that name are one. data/SPLIT-* is found without.
    table = "\n".join(f"| `{name}` | {kind} |" for name, kind in columns.items())
    return (
        "---\n" + "\n".join(lines) + "\n---\n# Preferences\n"
        f"{about or 'Pairs of clips of the same text, of which one was preferred.'}\n\n{count} pairs.\n\n"
        f"| column | type |\n|---|---|\n{table}\n\n"
        "`soft_label`: the chosen clip's share of the votes, 1 where it is absent. `margin`: its strength.\n"
        "`weight`: answers behind a pair. Seeds: of the noise that each clip was made from.\n"
    )
