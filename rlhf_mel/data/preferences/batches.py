"""Rows of pairs as the batch that a loss takes: clips decoded, resampled and padded, each with its own log mel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_mel.data.preferences.audio import UNREADABLE, ClipReader, load_clip, load_reference, shown
from rlhf_mel.data.preferences.files import CONTRACT
from rlhf_mel.speech.audio import MelSpec, log_mel
from rlhf_mel.types import Audio, Prompts


@dataclass(frozen=True)
class PairBatch:
    """b pairs as a loss takes them."""

    prompts: Prompts
    """Reference clips of length 0 where a row has none."""
    chosen: Audio
    rejected: Audio
    soft_labels: Float[Tensor, " b"]
    """Share of the votes for `chosen`."""
    margins: Float[Tensor, " b"]
    """Strength of the preference, 0 where it is not known."""
    weights: Float[Tensor, " b"]
    """Answers behind each pair."""
    chosen_seeds: Int[Tensor, " b"] | None = None
    rejected_seeds: Int[Tensor, " b"] | None = None
    rows: Int[Tensor, " b"] | None = None
    """Rows that the noise was drawn for."""

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> PairBatch:
        """The same with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: _audio_to(value, device) if isinstance(value, Audio) else value.to(device)
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **moved)


def collate_pairs(
    rows: Sequence[Mapping[str, Any]], mel_spec: MelSpec, *, prepare_references: bool = False
) -> PairBatch:
    """Rows in the module's form as a batch: clips decoded, resampled, padded, with the log mel of each alone."""
    reader = ClipReader()
    columns = dict.fromkeys(name for row in rows for name in row if name not in CONTRACT)
    columns |= dict.fromkeys(name for row in rows for name in ("id", "voice", "axis", "annotator") if name in row)
    references = [_reference(row, reader, mel_spec.sample_rate_hz, prepare_references) for row in rows]
    prompts = Prompts(
        texts=[row["prompt"] for row in rows],
        reference_audio=pad_sequence(references, batch_first=True),
        reference_lengths_samples=torch.tensor([len(reference) for reference in references]),
        reference_texts=[row.get("reference_text") or "" for row in rows],
        sample_rate_hz=mel_spec.sample_rate_hz,
        columns={name: [row.get(name) for row in rows] for name in columns},
    )
    return PairBatch(
        prompts=prompts,
        chosen=_sounds(rows, "chosen", reader, mel_spec),
        rejected=_sounds(rows, "rejected", reader, mel_spec),
        soft_labels=_numbers(rows, "soft_label", 1.0),
        margins=_numbers(rows, "margin", 0.0),
        weights=_numbers(rows, "weight", 1.0),
        chosen_seeds=_integers(rows, "chosen_seed"),
        rejected_seeds=_integers(rows, "rejected_seed"),
        rows=_integers(rows, "row"),
    )


def _reference(row: Mapping[str, Any], reader: ClipReader, rate_hz: int, prepare: bool) -> Tensor:
    if row.get("reference_audio") is None:
        return torch.zeros(0)
    return load_reference(reader.encoded(row["reference_audio"]), rate_hz, prepare)


def _sounds(rows: Sequence[Mapping[str, Any]], column: str, reader: ClipReader, mel_spec: MelSpec) -> Audio:
    """Each mel is of its clip alone: frames at the right edge would otherwise see the padding."""
    clips = []
    for place, row in enumerate(rows):
        try:
            clips.append(load_clip(reader.encoded(row[column]), mel_spec.sample_rate_hz))
        except UNREADABLE as error:
            raise ValueError(
                f"{column} of pair {shown(row.get('id', place))}: {error}; load with check_audio=True to leave it out"
            ) from error
    mels = [log_mel(clip[None], mel_spec)[0] for clip in clips]
    return Audio(
        waveform=pad_sequence(clips, batch_first=True),
        lengths_samples=torch.tensor([len(clip) for clip in clips]),
        sample_rate_hz=mel_spec.sample_rate_hz,
        mel=pad_sequence(mels, batch_first=True),
        lengths_frames=torch.tensor([len(mel) for mel in mels]),
    )


def _audio_to(sound: Audio, device: torch.device | str) -> Audio:
    moved: dict[str, Any] = {name: value.to(device) for name, value in vars(sound).items() if isinstance(value, Tensor)}
    return replace(sound, **moved)


def _numbers(rows: Sequence[Mapping[str, Any]], column: str, absent: float) -> Tensor:
    return torch.tensor([absent if row.get(column) is None else float(row[column]) for row in rows])


def _integers(rows: Sequence[Mapping[str, Any]], column: str) -> Tensor | None:
    values = [row.get(column) for row in rows]
    if all(value is None for value in values):
        return None
    if None in values:
        raise ValueError(f"{column}: expected a value in every row of a batch or in none, got {shown(values)}")
    return torch.tensor(values, dtype=torch.long)
