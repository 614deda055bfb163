"""Rewards that hold a measure of the sound to a target: minus the distance from it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_mel.types import Audio, Prompts


class Distance(nn.Module):
    """score = -|measure - target|, the target being the measure of the reference clip, or a given one.

    A subclass has `name` and `measure`, and says in its Config what a given target may be.
    """

    name: str
    differentiable = True
    domain = "waveform"
    sample_rate_hz: int | None = None
    range = (-math.inf, 0.0)

    def __init__(self, target: float | None) -> None:
        super().__init__()
        self.target = target
        self.needs = frozenset({"reference"} if target is None else ())

    def measure(self, clip: Float[Tensor, " s"], rate_hz: int) -> Float[Tensor, ""]:
        """Of one clip, with a graph to it."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method measure, got none")

    def score(self, audio: Audio, prompts: Prompts) -> Float[Tensor, " b"]:
        """Minus the distance from the target, in the measure's unit, of each clip."""
        heard = self._measured(audio.waveform, audio.lengths_samples, audio.sample_rate_hz)
        if self.target is not None:
            return -(heard - self.target).abs()
        with torch.no_grad():
            asked = self._measured(prompts.reference_audio, prompts.reference_lengths_samples, prompts.sample_rate_hz)
        return -(heard - asked.to(heard)).abs()

    def _measured(self, waveform: Tensor, lengths_samples: Tensor, rate_hz: int) -> Float[Tensor, " b"]:
        rows = zip(waveform, lengths_samples.tolist(), strict=True)
        return torch.stack([self.measure(row[:length], rate_hz) for row, length in rows])
