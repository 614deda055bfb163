"""Prompts from JSONL: what to say, and whose voice to say it in.

One row a prompt: `text`, `reference_audio` (a path, relative to the JSONL file), `reference_text`; optionally `id`,
`voice`, and `duration_s` (seconds of speech to generate; without it the policy's duration rule decides). Any other
column reaches the rewards by its name, through `Prompts.columns`.

A row that cannot be used is an error that names it, when the data set is built: no row is ever skipped.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from rlhf_mel.audio import MelSpec, load_audio, samples_to_frames
from rlhf_mel.types import Prompts

REQUIRED = ("text", "reference_audio", "reference_text")
SPLITS = ("train", "heldout")
_CLIPS_IN_MEMORY = 512


@functools.lru_cache(maxsize=_CLIPS_IN_MEMORY)
def _load_clip(path: str, sample_rate_hz: int) -> Tensor:
    return load_audio(path, sample_rate_hz)


class PromptDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of prompts; `collate` makes a `Prompts` of some of them.

    Args:
        rows: a `datasets.Dataset`, or mappings of columns.
        root: folder that relative `reference_audio` paths start from.
        name: how errors call the data set.
        mel_spec: sample rate of the clips, and the frames that `duration_s` is turned into.
        check_audio: load every clip once when built (about 5 ms each), so that a bad one stops the run at its start.

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
    ) -> None:
        self.name = name
        self.mel_spec = mel_spec or MelSpec()
        self._root = Path(root)
        self.rows = rows if isinstance(rows, Dataset) else _table(rows)
        if not len(self.rows):
            raise ValueError(f"{name} has no rows: expected one JSON object a line with {list(REQUIRED)}")
        self._raise_if_any(self._problems(functools.partial(self._row_problem, check_audio=check_audio)))
        self._raise_if_any(self._duration_problems())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], "row": row}

    def head(self, count: int) -> PromptDataset:
        """The first `count` rows."""
        return PromptDataset(
            self.rows.select(range(min(count, len(self)))),
            root=self._root,
            name=self.name,
            mel_spec=self.mel_spec,
            check_audio=False,
        )

    def check_texts(self, tokenizer: Callable[[str], list[str]]) -> None:
        """Raise if the policy's tokenizer cannot read some of the texts."""

        def problem(row: Mapping[str, Any]) -> str | None:
            try:
                tokenizer(row["text"]), tokenizer(row["reference_text"])
            except ValueError as error:
                return str(error)
            return None

        self._raise_if_any(self._problems(problem))

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Prompts:
        """Rows of this data set as a batch; rows of one prompt share its row number as group id."""
        clips = [self._clip(row) for row in rows]
        lengths = torch.tensor([clip.shape[0] for clip in clips])
        others = [name for name in rows[0] if name not in (*REQUIRED, "duration_s", "row")]
        return Prompts(
            texts=[row["text"] for row in rows],
            reference_audio=torch.nn.utils.rnn.pad_sequence(clips, batch_first=True),
            reference_lengths_samples=lengths,
            reference_texts=[row["reference_text"] for row in rows],
            sample_rate_hz=self.mel_spec.sample_rate_hz,
            durations_frames=self._durations_frames(rows, lengths),
            group_ids=torch.tensor([row["row"] for row in rows]),
            columns={name: [row[name] for row in rows] for name in others},
        )

    def _durations_frames(self, rows: Sequence[Mapping[str, Any]], lengths: Tensor) -> Tensor | None:
        """Frames of the reference clip plus `duration_s`, rounded up to whole frames."""
        if rows[0].get("duration_s") is None:
            return None
        frame_rate_hz = self.mel_spec.frame_rate_hz
        generated = torch.tensor([math.ceil(row["duration_s"] * frame_rate_hz) for row in rows])
        return samples_to_frames(lengths, self.mel_spec) + generated

    def _path(self, row: Mapping[str, Any]) -> Path:
        return self._root / row["reference_audio"]

    def _clip(self, row: Mapping[str, Any]) -> Tensor:
        return _load_clip(str(self._path(row)), self.mel_spec.sample_rate_hz)

    def _row_problem(self, row: Mapping[str, Any], *, check_audio: bool) -> str | None:
        """Why a row cannot be used, or None."""
        for column in REQUIRED:
            if not isinstance(row.get(column), str) or not row[column].strip():
                return f"{column!r} must be a non-empty string, got {row.get(column)!r}"
        duration_s = row.get("duration_s")
        if duration_s is not None and not duration_s > 0:
            return f"'duration_s' must be above 0 seconds, got {duration_s!r}"
        if not self._path(row).is_file():
            return f"reference audio not found: {self._path(row)}"
        if check_audio:
            try:
                self._clip(row)
            except (ValueError, OSError, RuntimeError) as error:
                return str(error)
        return None

    def _problems(self, problem_of: Callable[[Mapping[str, Any]], str | None]) -> list[str]:
        return [
            f"row {index} (id {row.get('id')!r}): {problem}"
            for index, row in enumerate(self.rows)
            if (problem := problem_of(row)) is not None
        ]

    def _duration_problems(self) -> list[str]:
        """`Prompts.durations_frames` is a tensor or None, so durations are given for all rows or for none."""
        durations = self.rows["duration_s"] if "duration_s" in self.rows.column_names else []
        missing = [index for index, duration_s in enumerate(durations) if duration_s is None]
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


def _table(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows as a table of every row's columns (`Dataset.from_list` takes the first row's and drops all others)."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def load_prompts(source: str | Path, *, split: str, mel_spec: MelSpec | None = None) -> PromptDataset:
    """The prompts called `source`: 'tiny' (bundled), a JSONL file, or a folder with `{split}.jsonl`.

    Args:
        source: name or path.
        split: 'train' or 'heldout'; which of the bundled files, or of a folder's.
        mel_spec: that of the policy.

    Raises:
        FileNotFoundError: no such file; the message says where it was looked for.
        ValueError: rows that cannot be used.
    """
    path = _prompt_file(source, split)
    return PromptDataset(list(_read_jsonl(path)), root=path.parent, name=str(path), mel_spec=mel_spec)


def _prompt_file(source: str | Path, split: str) -> Path:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {list(SPLITS)}")
    if source == "tiny":
        return Path(str(resources.files("rlhf_mel").joinpath(f"assets/prompts/{split}.jsonl")))
    path = Path(source).expanduser()
    path = path / f"{split}.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no prompts at {path}: expected 'tiny', a JSONL file, or a folder with {split}.jsonl, got {str(source)!r}"
        )
    return path


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    """One mapping a non-empty line. (`datasets`' JSON reader names neither the file nor the line of an error.)"""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield row


class GroupSampler(torch.utils.data.Sampler[int]):
    """Every row once an epoch, `num_generations` times in a row, in an order that (seed, epoch) decides.

    With `num_iterations` above 1, the `rollouts_per_update` rows of an update come that often in a row, so that each
    of its micro-batches, on every process, meets its own again. The last update of an epoch is then filled up with
    rows of the epoch's beginning.

    `epoch` is asked at the start of each pass, so that a resumed run sees the order of the uninterrupted one
    without any saved state.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        num_generations: int,
        seed: int,
        epoch: Callable[[], int],
        num_iterations: int = 1,
        rollouts_per_update: int = 1,
    ) -> None:
        self._num_rows = num_rows
        self._num_generations = num_generations
        self._num_iterations = num_iterations
        self._block = rollouts_per_update if num_iterations > 1 else 1
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self._num_rows * self._num_generations / self._block) * self._block * self._num_iterations

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seed(self._seed, self._epoch()))
        order = torch.randperm(self._num_rows, generator=generator).tolist()
        rollouts = [row for row in order for _ in range(self._num_generations)]
        for start in range(0, len(rollouts), self._block):
            block = [rollouts[place % len(rollouts)] for place in range(start, start + self._block)]
            yield from block * self._num_iterations


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, all of which matter (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))
