"""The values that travel between the five nouns: prompts, rollouts, audio, scores.

Letters in shapes: b batch, n mel frames, m mel bands, s samples. Padding is zero, lengths say where it begins.
Everything is a frozen dataclass with one shape and one unit a field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """What is to be said, and in whose voice: a batch of b prompts."""

    texts: Sequence[str]
    """b sentences to speak."""
    reference_audio: Float[Tensor, "b s"]
    """Reference clips at `sample_rate_hz`, zero-padded on the right."""
    reference_lengths_samples: Int[Tensor, " b"]
    """Samples of each reference clip."""
    reference_texts: Sequence[str]
    """b transcripts of the reference clips."""
    sample_rate_hz: int = 24_000
    generated_frames: Int[Tensor, " b"] | None = None
    """Mel frames of speech that the rows ask for; None: the policy's duration rule."""
    durations_frames: Int[Tensor, " b"] | None = None
    """Mel frames of speech and, of policies that continue a reference, of that; None: not settled yet."""
    timing_seeds: Int[Tensor, " b"] | None = None
    """What the rhythm of each item is drawn from, by a policy that draws it; None: not drawn yet (flow/policy.py)."""
    group_ids: Int[Tensor, " b"] | None = None
    """Rollouts of one prompt share a group id; None: every row is its own group."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Every other dataset column, b values each; passed to reward functions by name."""

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device | str) -> Prompts:
        """The same with its tensors on `device`."""
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
    """What the policy made of b prompts; only generated frames, never those of the reference clip."""

    mel: Float[Tensor, "b n m"]
    """Log mel, zero beyond each item's own length."""
    lengths_frames: Int[Tensor, " b"]
    """Generated frames of each item."""
    trajectory: Float[Tensor, "times b total m"] | None = None
    """Solver states where asked for, of total frames: those of the reference included."""


@dataclass(frozen=True)
class Audio:
    """b sounds as a reward model sees them: the waveform, and the mel it was made from."""

    waveform: Float[Tensor, "b s"]
    """In [-1, 1], zero beyond each item's own length."""
    lengths_samples: Int[Tensor, " b"]
    sample_rate_hz: int
    mel: Float[Tensor, "b n m"]
    """Log mel, zero beyond each item's own length."""
    lengths_frames: Int[Tensor, " b"]


@dataclass(frozen=True)
class Scores:
    """What the reward models said of b sounds; higher is better."""

    total: Float[Tensor, " b"]
    """Weighted sum."""
    breakdown: Mapping[str, Float[Tensor, " b"]]
    """By name of the reward, unweighted."""
