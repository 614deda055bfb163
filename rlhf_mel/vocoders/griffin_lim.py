"""Griffin-Lim: magnitudes from the mel by least squares, phases by iteration; no weights, no gradient.

    |X| = max(0, exp(mel) F^+);   repeat: phase of STFT(ISTFT(|X| exp(i phase)))

Griffin and Lim, "Signal estimation from modified short-time Fourier transform" (1984), in torchaudio's fast
form (Perraudin et al. 2013). Metallic, but it judges a policy without a trained vocoder in the way.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torchaudio
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from rlhf_mel.speech.audio import MelSpec, frames_to_samples, mel_filters


class GriffinLim(nn.Module):
    """See the module docstring; deterministic (phases start at zero). Each item is inverted alone."""

    differentiable = False

    def __init__(self, mel_spec: MelSpec | None = None, *, iterations: int = 32) -> None:
        super().__init__()
        self.mel_spec = mel_spec or MelSpec()
        if self.mel_spec.kind != "vocos":
            raise ValueError(f"griffin_lim: expected centred 'vocos' mels, got {self.mel_spec.kind!r}")
        self.sample_rate_hz = self.mel_spec.sample_rate_hz
        self.invert = torchaudio.transforms.GriffinLim(
            n_fft=self.mel_spec.n_fft,
            n_iter=iterations,
            win_length=self.mel_spec.win_length,
            hop_length=self.mel_spec.hop_length,
            power=1.0,
            rand_init=False,
        )
        self.pseudo_inverse: Tensor
        filters = mel_filters(self.mel_spec, dtype=torch.float64)
        self.register_buffer("pseudo_inverse", torch.linalg.pinv(filters).float(), persistent=False)

    @override
    @torch.no_grad()
    def forward(
        self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b s"]:
        """Waveform of log mel, s = frames_to_samples(n), detached; see `Vocoder`."""
        lengths = [mel.shape[1]] * len(mel) if lengths_frames is None else lengths_frames.tolist()
        waveform = self.pseudo_inverse.new_zeros(len(mel), frames_to_samples(mel.shape[1], self.mel_spec))
        for row, (item, frames) in enumerate(zip(mel, lengths, strict=True)):
            if (samples := frames_to_samples(frames, self.mel_spec)) == 0:
                continue
            magnitude = (item[:frames].float().exp() @ self.pseudo_inverse).clamp(min=0).T
            self.invert.length = samples
            waveform[row, :samples] = self.invert(magnitude)
        return waveform


def load(source: Path | str | None) -> GriffinLim:
    """Griffin-Lim needs no weights; `source` is not used."""
    return GriffinLim()
