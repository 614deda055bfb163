"""Prompts: what to say, and whose voice to say it in.

One row a prompt: `text`, `reference_audio` (a path relative to its list, an encoded `Audio` of `datasets`, or its
samples as {"array", "sampling_rate"}) and `reference_text`; optionally `id`, `voice`, and `duration_s` (seconds of
speech to generate; without it the policy's duration rule decides, or F5-TTS's where `PromptOptions` says so). Any other
column reaches the rewards by its name, through `Prompts.columns`. prompt_files.py has the formats.

A row that cannot be used is an error that names it, when the data set is built; or it is dropped and counted, where
that was asked for. None is ever skipped in silence.
"""

from __future__ import annotations

import functools
import math
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_mel.data.preferences.audio import wav_bytes
from rlhf_mel.data.prompt_files import encoded_audio, load_hub_rows, read_rows, rename, renamed_columns, table_of
from rlhf_mel.speech.audio import MelSpec, load_audio, read_speech, samples_to_frames
from rlhf_mel.speech.durations import f5_total_frames
from rlhf_mel.speech.reference_clips import prepare_reference
from rlhf_mel.storage import ASSETS
from rlhf_mel.types import Prompts

if TYPE_CHECKING:
    from datasets import Dataset

REQUIRED = ("text", "reference_audio", "reference_text")


SPLITS = ("train", "tuning", "heldout")


_CLIPS_IN_MEMORY = 512


DURATION_RULES = ("policy", "f5")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What is done with rows beyond reading them."""

    prepare_references: bool = False
    """Shorten, trim and raise reference clips as F5-TTS does (reference_clips.py); long ones are not refused."""
    duration_rule: str = "policy"
    """Who decides where a row has no `duration_s`: "policy", or "f5", F5-TTS's inference (f5_total_frames)."""
    drop_unusable: bool = False
    """Leave out rows that cannot be used, with a warning that counts them; `PromptDataset.dropped` says why."""

    def __post_init__(self) -> None:
        if self.duration_rule not in DURATION_RULES:
            raise ValueError(f"duration_rule: expected one of {list(DURATION_RULES)}, got {self.duration_rule!r}")


@functools.lru_cache(maxsize=_CLIPS_IN_MEMORY)
def _load_clip(source: str | bytes, sample_rate_hz: int, prepare: bool = False) -> Tensor:
    if prepare:
        return prepare_reference(*read_speech(source), sample_rate_hz)
    return load_audio(source, sample_rate_hz)


class PromptDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of prompts; `collate` makes a `Prompts` of some of them.

    Args:
        rows: a `datasets.Dataset`, or mappings of columns.
        root: folder that relative `reference_audio` paths start from.
        name: how errors call the data set.
        mel_spec: sample rate of the clips, and the frames that `duration_s` is turned into.
        check_audio: load every clip once when built (about 5 ms each), so that a bad one stops the run at its start.
        options: see PromptOptions.

    Raises:
        ValueError: some rows cannot be used; the message counts and lists them.
    """

    def __init__(
        self,
        rows: Dataset | Sequence[Mapping[str, Any]],
        *,
        root: Path | str = ".",
        name: str = "prompts",
        mel_spec: MelSpec | None = None,
        check_audio: bool = True,
        options: PromptOptions | None = None,
    ) -> None:
        self.name = name
        self.mel_spec = mel_spec or MelSpec()
        self.options = options or PromptOptions()
        self.dropped: list[str] = []
        self._root = Path(root)
        self.rows: Any = _table(rows) if isinstance(rows, Sequence) else rows
        if not len(self.rows):
            raise ValueError(f"{name} has no rows: expected some, each with {list(REQUIRED)}")
        problems = self._problems(functools.partial(self._row_problem, check_audio=check_audio))
        if self.options.drop_unusable and 0 < len(problems) < len(self):
            self._drop(problems)
        else:
            self._raise_if_any(list(problems.values()))
        self._raise_if_any(self._duration_problems())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], "row": row}

    def head(self, count: int) -> PromptDataset:
        """The first `count` rows."""
        return PromptDataset(
            _rows_at(self.rows, range(min(count, len(self)))),
            root=self._root,
            name=self.name,
            mel_spec=self.mel_spec,
            check_audio=False,
            options=self.options,
        )

    def check_texts(self, tokenizer: Callable[[str], list[str]]) -> None:
        """Raise if the policy's tokenizer cannot read some of the texts."""

        def problem(row: Mapping[str, Any]) -> str | None:
            try:
                tokenizer(row["text"]), tokenizer(row["reference_text"])
            except ValueError as error:
                return str(error)
            return None

        self._raise_if_any(list(self._problems(problem).values()))

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Prompts:
        """Rows of this data set as a batch; rows of one prompt share its row number as group id."""
        read = {row["row"]: self._clip(row) for row in {row["row"]: row for row in rows}.values()}  # once a prompt
        clips = [read[row["row"]] for row in rows]
        lengths = torch.tensor([clip.shape[0] for clip in clips])
        others = [name for name in rows[0] if name not in (*REQUIRED, "duration_s", "row")]
        return Prompts(
            texts=[row["text"] for row in rows],
            reference_audio=torch.nn.utils.rnn.pad_sequence(clips, batch_first=True),
            reference_lengths_samples=lengths,
            reference_texts=[row["reference_text"] for row in rows],
            sample_rate_hz=self.mel_spec.sample_rate_hz,
            generated_frames=self._generated_frames(rows, lengths),
            group_ids=torch.tensor([row["row"] for row in rows]),
            columns={name: [row[name] for row in rows] for name in others},
        )

    def _generated_frames(self, rows: Sequence[Mapping[str, Any]], lengths: Tensor) -> Tensor | None:
        """`duration_s` in frames, rounded up to whole ones; or by F5-TTS's rule; or None, where the policy rules."""
        if rows[0].get("duration_s") is not None:
            return torch.tensor([math.ceil(row["duration_s"] * self.mel_spec.frame_rate_hz) for row in rows])
        if self.options.duration_rule != "f5":
            return None
        hop = self.mel_spec.hop_length
        pairs = zip(rows, lengths.tolist(), strict=True)
        totals = [f5_total_frames(samples, hop, row["reference_text"], row["text"]) for row, samples in pairs]
        return (torch.tensor(totals) - samples_to_frames(lengths, self.mel_spec)).clamp(min=1)  # as in CFM.sample

    def _source(self, row: Mapping[str, Any]) -> str | bytes:
        """The reference clip: a path, or the bytes of an encoded `Audio`."""
        value = row["reference_audio"]
        if isinstance(value, Mapping):
            return value["bytes"] or str(self._root / value["path"])
        return str(self._root / value)

    def _clip(self, row: Mapping[str, Any]) -> Tensor:
        return _load_clip(self._source(row), self.mel_spec.sample_rate_hz, self.options.prepare_references)

    def _row_problem(self, row: Mapping[str, Any], *, check_audio: bool) -> str | None:
        """Why a row cannot be used, or None."""
        for column in REQUIRED:
            encoded = row.get(column) if column == "reference_audio" else None
            if isinstance(encoded, Mapping) and (encoded.get("bytes") or encoded.get("path")):
                continue
            if not isinstance(row.get(column), str) or not row[column].strip():
                return f"{column!r} must be a non-empty string, got {reprlib.repr(row.get(column))}"
        duration_s = row.get("duration_s")
        if duration_s is not None and not (isinstance(duration_s, int | float) and duration_s > 0):
            return f"'duration_s' must be above 0 seconds, got {reprlib.repr(duration_s)}"
        source = self._source(row)
        if isinstance(source, str) and not Path(source).is_file():
            return f"reference audio not found: {source}"
        if check_audio:
            try:
                self._clip(row)
            except (ValueError, OSError, RuntimeError) as error:
                return str(error)
        return None

    def _problems(self, problem_of: Callable[[Mapping[str, Any]], str | None]) -> dict[int, str]:
        """What is wrong, by row."""
        return {
            index: f"row {index} (id {reprlib.repr(row.get('id'))}): {problem}"
            for index, row in enumerate(self.rows)
            if (problem := problem_of(row)) is not None
        }

    def _drop(self, problems: Mapping[int, str]) -> None:
        self.dropped = list(problems.values())
        warnings.warn(
            f"{self.name}: {len(problems)} of {len(self)} rows dropped; first: {self.dropped[0]}", stacklevel=3
        )
        self.rows = _rows_at(self.rows, [index for index in range(len(self)) if index not in problems])

    def _duration_problems(self) -> list[str]:
        """`Prompts.generated_frames` is a tensor or None, so durations are given for all rows or for none."""
        missing = [index for index, row in enumerate(self.rows) if row.get("duration_s") is None]
        if not missing or len(missing) == len(self):
            return []
        return [f"row {index}: 'duration_s' is missing, other rows have it" for index in missing]

    def _raise_if_any(self, problems: Sequence[str]) -> None:
        """One error that counts and lists the rows with a problem."""
        if problems:
            shown = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
            raise ValueError(
                f"{len(problems)} of {len(self)} rows of {self.name} cannot be used; correct or remove them:\n  {shown}"
            )


def _table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have every column that one of them has, None where they had none."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} | _encoded_clip(number, row) for number, row in enumerate(rows)]


def _encoded_clip(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """The reference clip of a row that has it as samples, as bytes of a file; empty for all others."""
    clip = row.get("reference_audio")
    if not isinstance(clip, Mapping) or clip.get("array") is None:
        return {}
    try:
        return {"reference_audio": {"bytes": wav_bytes(clip["array"], clip.get("sampling_rate")), "path": None}}
    except ValueError as error:
        raise ValueError(f"row {number}, 'reference_audio': {error}") from error


def _rows_at(rows: Any, places: Sequence[int]) -> Any:
    """Those rows, of a table or of a `datasets.Dataset`."""
    return [rows[place] for place in places] if isinstance(rows, list) else rows.select(places)


def load_prompts(
    source: str | Path,
    *,
    split: str,
    mel_spec: MelSpec | None = None,
    columns: Mapping[str, str] | None = None,
    audio_root: str | Path | None = None,
    options: PromptOptions | None = None,
) -> PromptDataset:
    """The prompts called `source`: 'tiny' (bundled), a list (prompt_files.py), or a folder with `{split}.jsonl`.

    Args:
        source: name or path.
        split: 'train', 'tuning' (to choose settings by) or 'heldout' (to report); which bundled file, or of a folder's.
        mel_spec: that of the policy.
        columns: our names to the list's, where they differ: {"text": "sentence"}.
        audio_root: folder that relative paths of clips start from; the list's own unless given.
        options: what is done with clips and durations.

    Raises:
        FileNotFoundError: no such file; the message says where it was looked for.
        ValueError: rows that cannot be used.
    """
    path = _prompt_file(source, split)
    rows = rename(read_rows(path), columns or {}, name=str(path))
    return PromptDataset(rows, root=audio_root or path.parent, name=str(path), mel_spec=mel_spec, options=options)


def load_dataset_prompts(
    source: Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] | None = None,
    config: str | None = None,
    mel_spec: MelSpec | None = None,
    options: PromptOptions | None = None,
) -> PromptDataset:
    """Prompts from any source of `datasets`: a hub id, a local folder, or what is in memory.

    In memory: a Dataset, a DatasetDict, their iterable kinds (read to their end, into memory), a list of rows.

    Args:
        columns: our names (`text`, `reference_audio`, `reference_text`, `duration_s`) to theirs, where they differ.
        keep: more columns for the rewards; None: all there are.
        config: the data set's configuration, where it has several.
        split: of the data set, where it has splits.
        mel_spec: of the policy.
        options: of the prompts.

    Raises:
        FileNotFoundError: no such data set.
        ValueError: no such split or column, or rows that cannot be used.
    """
    if isinstance(source, str):
        name = source
        table: Any = encoded_audio(load_hub_rows(source, split=split, config=config))
    else:
        name = "data set"
        table = table_of(source, split, name=name)
    named = {**{column: column for column in REQUIRED}, **(columns or {})}
    rows = renamed_columns(table, named, keep, name=name)
    return PromptDataset(rows, name=name, mel_spec=mel_spec, options=options)


def _prompt_file(source: str | Path, split: str) -> Path:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {list(SPLITS)}")
    if source == "tiny":
        return ASSETS / f"prompts/{split}.jsonl"
    path = Path(source).expanduser()
    path = path / f"{split}.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no prompts at {path}: expected 'tiny', a JSONL file, or a folder with {split}.jsonl, got {str(source)!r}"
        )
    return path
