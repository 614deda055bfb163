"""Where preference data come from: opened as a table of encoded audio, and of no more columns than are needed.

A source is a hub id, a folder or file of anything that `datasets` reads (parquet, audiofolder, save_to_disk), a list in
a file (.jsonl, .csv, .tsv: prompt_files.py, paths relative to it), or a table in memory: Dataset, DatasetDict,
their iterable kinds, or a list of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_mel.data.prompt_files import cache_of_folder, encoded_audio, read_rows

LISTS = (".jsonl", ".csv", ".tsv")


TERMS_CHARACTERS = 300


@dataclass(frozen=True)
class Licence:
    """What a data set's card says of its use."""

    name: str | None = None
    terms: str = ""
    """Beginning of the terms that were to be agreed to, in one line."""

    def __str__(self) -> str:
        name = self.name or "not stated: ask its authors"
        limits = " (not for commercial use)" if "-nc" in name.lower() or "noncommercial" in name.lower() else ""
        return f"licence {name}{limits}" + (f"; terms: {self.terms}" if self.terms else "")


@dataclass
class Source:
    """A table that is read when its columns are chosen."""

    name: str
    """How messages call it."""
    columns: list[str]
    kinds: dict[str, str]
    """By column: "audio", "text", "number", "bool", "labels", "list", "mapping", or "unknown": no value."""
    root: Path = Path(".")
    """Where relative paths of clips start."""
    licence: Licence = field(default_factory=Licence)
    label_names: dict[str, list[str]] = field(default_factory=dict)
    """Names of the values of ClassLabel columns."""
    load: Callable[[Sequence[str]], Any] = field(repr=False, default=list)
    """The table with these columns alone: a `datasets.Dataset`, an IterableDataset, or a list of rows."""
    configs: list[str] = field(default_factory=list)
    """Configurations of the data set, where it has any."""


def open_source(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    audio_root: str | Path | None = None,
) -> Source:
    """Find out what is in `source`; nothing but its schema is read.

    Raises:
        FileNotFoundError: there is no such data set or split; it is gated; or it needs a loading script.
        ValueError: a table that cannot be used, or has no rows.
    """
    if isinstance(source, str | Path):
        opened = _open_named(str(source), split, config, revision, streaming)
    else:
        opened = _open_table(source, "data set", split, streaming)
    opened.root = Path(audio_root) if audio_root is not None else opened.root
    return opened


def _open_named(name: str, split: str, config: str | None, revision: str | None, streaming: bool) -> Source:
    path = Path(name).expanduser()
    listed = _list_file(path, split)
    if listed is not None:
        opened = _open_table(list(read_rows(listed)), str(listed), split, streaming)
        opened.root = listed.parent
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        opened = _open_table(load_from_disk(str(path)), name, split, streaming)
        opened.root = path
    else:
        opened = _open_loadable(name, split, config, revision, streaming)
    opened.licence = _licence_of_card(name, opened.licence)
    return opened


def _list_file(path: Path, split: str) -> Path | None:
    """The list at `path`, or of that split in a folder."""
    if path.is_dir():
        return next((file for suffix in LISTS if (file := path / f"{split}{suffix}").is_file()), None)
    return path if path.suffix.lower() in LISTS and path.is_file() else None


def _open_loadable(name: str, split: str, config: str | None, revision: str | None, streaming: bool) -> Source:
    """What load_dataset opens; of parquet only the columns that are asked for are read."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError

    file = Path(name).expanduser()
    where: dict[str, Any] = {"path": name, "name": config, "revision": revision}
    where["cache_dir"] = cache_of_folder(name)
    if file.is_file():
        where = {"path": file.suffix.lstrip("."), "data_files": {split: str(file)}, "cache_dir": None}
    try:
        builder = load_dataset_builder(**where)
        peeked = load_dataset(**where, split=split, streaming=True)
        opened = _open_table(peeked, name, split, True)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _refusal(name, split, error) from error

    def load(columns: Sequence[str]) -> Any:
        if hasattr(builder.config, "drop_metadata") and (streaming or file.is_dir()):  # an audiofolder
            rows = _audio_paths(peeked.select_columns(list(columns)))
            return rows if streaming else list(rows)
        projection = {"columns": list(columns)} if hasattr(builder.config, "columns") else {}
        try:
            table = load_dataset(**where, **projection, split=split, streaming=streaming)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise _refusal(name, split, error) from error
        return encoded_audio(table.select_columns(list(columns)))

    opened.load = load
    opened.configs = list(builder.builder_configs)
    opened.root = file if file.is_dir() else file.parent
    return opened


def _refusal(name: str, split: str, error: Exception) -> FileNotFoundError:
    """The error in one sentence that says what to do."""
    said = " ".join(f"{error} {error.__cause__ or ''}".split())[:300] or type(error).__name__
    if "scripts are no longer supported" in said:
        return FileNotFoundError(
            f"{name}: expected data files, got a loading script ({said}), which datasets >= 4 does not run; try its "
            "parquet copy, revision='refs/convert/parquet', or ask its authors for one"
        )
    if "is a gated dataset" in said:
        return FileNotFoundError(
            f"{name}: the data set is gated: agree to its terms at https://huggingface.co/datasets/{name}, then run "
            "`hf auth login`"
        )
    return FileNotFoundError(
        f"{name}: expected a data set with split {split!r} on the hub, in its cache or local, got: {said}"
    )


def _open_table(table: Any, name: str, split: str, streaming: bool) -> Source:
    """A table in memory, of any kind."""
    if isinstance(table, Mapping):
        if split not in table:
            raise FileNotFoundError(f"{name}: expected split {split!r}, got splits {list(table)}")
        table = table[split]
    if not streaming and not hasattr(table, "__len__"):
        raise ValueError(f"{name}: expected streaming=True with an iterable data set, which has no length, got False")
    rows = _rows_with_all_columns(table) if isinstance(table, Sequence) else table.with_format(None)
    features = getattr(rows, "features", None) or {}
    first = {} if features else _first_values(rows)
    if not (features or first) or (hasattr(rows, "__len__") and not len(rows)):
        raise ValueError(f"{name} has no rows: expected some")

    def load(wanted: Sequence[str]) -> Any:
        if isinstance(rows, list) or not features:  # rows of a stream without features may lack columns
            return rows
        chosen = encoded_audio(rows.select_columns(list(wanted)))
        return chosen.to_iterable_dataset() if streaming and hasattr(chosen, "to_iterable_dataset") else chosen

    return Source(
        name=name,
        columns=list(features or first),
        kinds=_kinds_of_features(features) if features else {key: _kind_of_value(first[key]) for key in first},
        licence=Licence(getattr(getattr(rows, "info", None), "license", None) or None),
        label_names={column: list(feature.names) for column, feature in features.items() if _is_label(feature)},
        load=load,
    )


def _rows_with_all_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _first_values(rows: Any) -> dict[str, Any]:
    """Of a list by column the first value that there is; of a stream without features its first row."""
    if not isinstance(rows, list):
        return dict(next(iter(rows), {}))
    columns = rows[0] if rows else {}
    return {column: next((row[column] for row in rows if row[column] is not None), None) for column in columns}


def _audio_paths(table: Any) -> Any:
    """A streamed audiofolder with its audio as paths, which it is; as Audio, decoded or not, it needs torchcodec."""
    from datasets import Audio, Value

    for column, feature in table.features.items():
        if isinstance(feature, Audio):
            table = table.cast_column(column, Value("string"))
    return table


def _is_label(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _kinds_of_features(features: Mapping[str, Any]) -> dict[str, str]:
    """What the columns of a `datasets` table hold; no row is read for that: one can be a gigabyte."""
    starts = {"string": "text", "large_string": "text", "bool": "bool", "binary": "audio", "large_binary": "audio"}
    starts |= {"int": "number", "uint": "number", "float": "number", "decimal": "number"}
    kinds = {}
    for column, feature in features.items():
        dtype = str(getattr(feature, "dtype", ""))
        known = next((kind for start, kind in starts.items() if dtype.startswith(start)), "unknown")
        if isinstance(feature, Mapping):
            known = _kind_of_value(feature)
        elif type(feature).__name__ in ("List", "LargeList", "Sequence", "list"):
            known = "list"
        names = {"Audio": "audio", "ClassLabel": "labels"}
        kinds[column] = names.get(type(feature).__name__, known)
    return kinds


def _kind_of_value(value: Any) -> str:
    """What a column holds by one of its values."""
    if isinstance(value, bytes) or (isinstance(value, Mapping) and {"bytes", "path", "array"} & set(value)):
        return "audio"
    kinds = ((bool, "bool"), (int | float, "number"), (str | Path, "text"), (Mapping, "mapping"), (Sequence, "list"))
    return next((kind for types, kind in kinds if isinstance(value, types)), "unknown")


def _licence_of_card(name: str, known: Licence) -> Licence:
    """Licence and terms by the card README.md: of a folder, of the folder around a file, or of the hub."""
    from huggingface_hub import DatasetCard
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(name).expanduser()
    local = [folder / "README.md" for folder in ((path, path.parent) if path.exists() else ())]
    place = next((str(card) for card in local if card.is_file()), None if path.exists() else name)
    if place is None:
        return known
    try:
        card = DatasetCard.load(place).data
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):  # no card, or none in reach: said as "not stated"
        return known
    found = card.get("license") or card.get("license_name") or known.name
    terms = " ".join(str(card.get("extra_gated_prompt") or "").split())
    shortened = terms if len(terms) <= TERMS_CHARACTERS else terms[:TERMS_CHARACTERS] + " ..."
    return Licence(", ".join(found) if isinstance(found, list) else found, shortened)
