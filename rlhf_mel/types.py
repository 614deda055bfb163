"""The values that travel between the five nouns: prompts, rollouts, audio, scores.

Letters in shapes: B batch, T mel frames, M mel channels, S samples, K solver steps. Padding is zero, lengths say
where it begins. Everything is a frozen dataclass with one shape and one unit a field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """What is to be said, and in whose voice: a batch of B prompts."""

    texts: Sequence[str]
    """B sentences to speak."""
    reference_audio: Tensor
    """Float [B, S]: reference clips at `sample_rate_hz`, zero-padded on the right."""
    reference_lengths_samples: Tensor
    """Long [B]: samples of each reference clip."""
    reference_texts: Sequence[str]
    """B transcripts of the reference clips."""
    sample_rate_hz: int = 24_000
    durations_frames: Tensor | None = None
    """Long [B]: mel frames of reference plus generated speech; None: the policy's duration rule."""
    group_ids: Tensor | None = None
    """Long [B]: rollouts of one prompt share a group id; None: every row is its own group."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Every other dataset column, B values each; passed to reward functions by name."""

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device | str) -> Prompts:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def select(self, rows: Sequence[int]) -> Prompts:
        """The prompts at `rows`, in that order; the reference clips keep their padding."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.reference_audio.device)
        taken: dict[str, Any] = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(
            self,
            texts=[self.texts[row] for row in rows],
            reference_texts=[self.reference_texts[row] for row in rows],
            columns={name: [column[row] for row in rows] for name, column in self.columns.items()},
            **taken,
        )


@dataclass(frozen=True)
class Rollout:
    """What the policy made of B prompts; only generated frames, never those of the reference clip."""

    mel: Tensor
    """Float [B, T, M]: log mel, zero beyond each item's own length."""
    lengths_frames: Tensor
    """Long [B]: generated frames of each item."""
    trajectory: Tensor | None = None
    """Float [K+1, B, T_total, M] where asked for: solver states, reference frames included."""


@dataclass(frozen=True)
class Audio:
    """B sounds as a reward model sees them: the waveform, and the mel it was made from."""

    waveform: Tensor
    """Float [B, S] in [-1, 1], zero beyond each item's own length."""
    lengths_samples: Tensor
    """Long [B]."""
    sample_rate_hz: int
    mel: Tensor
    """Float [B, T, M]: log mel, zero beyond each item's own length."""
    lengths_frames: Tensor
    """Long [B]."""


@dataclass(frozen=True)
class Scores:
    """What the reward models said of B sounds; higher is better."""

    total: Tensor
    """Float [B]: weighted sum."""
    breakdown: Mapping[str, Tensor]
    """Reward name to float [B], unweighted."""
