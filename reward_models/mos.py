"""Mean opinion score of speech, 1 (bad) to 5 (excellent), as DistillMOS predicts it; differentiable to the waveform.

DistillMOS (Stahl & Gamper, 2025, arXiv 2502.05356; PyPI `distillmos`, MIT, weights in the package) hears segments
of N = 122,880 samples (7.68 s) at 16 kHz; a shorter clip is followed by zeros, a longer one is heard through

    hops = ceil((S - N) / 16,000) + 1    segments at evenly spaced starts, and the score is their mean.

A segment x is brought to peak 1, and enters a CNN as the complex STFT Z with compressed magnitude, Z |Z|^-0.7. Three
things differ from the package, whose score is reproduced (see tests/test_mos.py for the tolerance):

1. |Z|^-0.7 has no gradient at Z = 0, and an exact zero is common: the package's own padding gives NaN. Here the
   compression is Z (|Z|^2 + eps^2)^-0.35, smooth everywhere, with slope at most eps^-0.7. Nothing is added to the
   signal: dither of 1e-4 on the padding would lift the score of one natural clip from 3.5 to 4.6.
2. Padding is known beforehand. Seven frames past the end of the speech the CNN's features no longer depend on it, so
   they are computed once for silence and the CNN runs on the speech alone (40 % of the work for 3 s).
3. A peak below -60 dBFS is not brought up to 1: the gradient of that normalisation grows as 1 / peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from distillmos import ConvTransformerSQAModel
from distillmos.sqa import DEFAULT_WEIGHTS_CHKPT, MAX_HOP_LEN, SEQ_LEN
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_mel.types import Audio, Prompts

HOP_LENGTH = 160
WIN_LENGTH = 320
SEGMENT_FRAMES = SEQ_LEN // HOP_LENGTH
"""STFT frames of a segment: 768. The CNN's last layer has stride 2 in time, so 384 features."""
RECEPTIVE_FRAMES = 6
"""A feature j depends on the STFT frames 2j - 6 ... 2j + 6: six layers of width 3."""
COMPRESSION_EPS = 3e-5
"""Magnitude below which the compression is linear, 128 dB under the |Z| = 80 of a full-scale sine."""
PEAK_FLOOR = 1e-3
"""-60 dBFS."""


def segment_starts(length_samples: int) -> list[int]:
    """Where the package's segments of a clip of `length_samples` begin."""
    excess = max(length_samples - SEQ_LEN, 0)
    hops = math.ceil(excess / MAX_HOP_LEN) + 1
    return [int(excess * share) for share in torch.linspace(0, 1, hops, dtype=torch.float64).tolist()]


def compressed_stft(waveform: Float[Tensor, "b s"], eps: float) -> Float[Tensor, "b 2 bins n"]:
    """Z (|Z|^2 + eps^2)^-0.35, real and imaginary, 161 bins, a frame each 160 samples; see the module's docstring."""
    edge = (WIN_LENGTH - HOP_LENGTH) // 2
    spectrum = torch.stft(
        F.pad(waveform, (edge, edge), mode="reflect"),
        n_fft=WIN_LENGTH,
        hop_length=HOP_LENGTH,
        win_length=WIN_LENGTH,
        window=torch.hann_window(WIN_LENGTH, device=waveform.device, dtype=waveform.dtype),
        center=False,
        return_complex=True,
    )
    parts = torch.view_as_real(spectrum)
    energy = parts.square().sum(-1, keepdim=True)
    return (parts * (energy + eps**2) ** -0.35).permute(0, 3, 1, 2)


class Mos(nn.Module):
    """DistillMOS as a frozen reward model."""

    name = "mos"
    differentiable = True
    domain = "waveform"
    sample_rate_hz = 16_000
    needs: frozenset[str] = frozenset()
    range = (1.0, 5.0)

    silence_features: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the reward `mos`."""

        compression_eps: float = COMPRESSION_EPS
        """Magnitude below which the compression is linear. Larger: smaller gradients, carried less by what is
        inaudible, and a score further from the package's: by up to 0.3 for 1e-3, by up to 0.8 for 1e-2."""

        def __post_init__(self) -> None:
            eps = self.compression_eps
            if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
                raise ValueError(
                    f"compression_eps of reward 'mos': expected a number above 0, got {eps!r}; write 1.0e-3, not 1e-3, "
                    "in YAML, which takes the latter for a text"
                )

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or self.Config()
        # Built without memory, then given the checkpoint's tensors: no random numbers are drawn for the weights.
        with torch.device("meta"):
            self.network = ConvTransformerSQAModel(load_weights=False)
        weights = torch.load(DEFAULT_WEIGHTS_CHKPT, map_location="cpu", weights_only=True)["model"]
        self.network.load_state_dict(weights, assign=True)
        self.requires_grad_(False).eval()
        with torch.no_grad():
            silence = self._cnn(torch.zeros(1, SEQ_LEN))
        self.register_buffer("silence_features", silence, persistent=False)

    def train(self, mode: bool = True) -> Mos:
        """A judge does not learn: always in evaluation mode (batch statistics would mix the items)."""
        return super().train(False)

    def score(self, audio: Audio, prompts: Prompts) -> Float[Tensor, " b"]:
        """Mean opinion score of each clip, 1 to 5."""
        lengths = [int(length) for length in audio.lengths_samples.tolist()]
        starts = [segment_starts(length) for length in lengths]
        segments = [
            row[start : min(start + SEQ_LEN, length)]
            for row, length, row_starts in zip(audio.waveform, lengths, starts, strict=True)
            for start in row_starts
        ]
        # One by one on a CPU: 8 clips of 3 s, forward and backward, take 0.94 s so and 1.34 s together (large blocks of
        # memory are fetched anew each time), and a short clip does not wait for a long one.
        together = 1 if audio.waveform.device.type == "cpu" else len(segments)
        scores = torch.cat(
            [self._score_segments(segments[i : i + together]) for i in range(0, len(segments), together)]
        )
        counts = [len(row_starts) for row_starts in starts]
        means = [part.mean() for part in torch.split(scores, counts)]
        return torch.stack(means)

    def _score_segments(self, segments: Sequence[Tensor]) -> Tensor:
        waveform = nn.utils.rnn.pad_sequence(list(segments), batch_first=True)
        peak = waveform.abs().amax(dim=1, keepdim=True) + 1e-8
        features = self._features(waveform / peak.clamp_min(PEAK_FLOOR))
        quality: Tensor = self.network.transformer_pool_attn(features.transpose(1, 2))
        return 1 + 4 * quality

    def _features(self, waveform: Tensor) -> Tensor:
        """CNN features [B, C, 384] of [B, S] followed by zeros up to a whole segment."""
        speech_frames = math.ceil((waveform.shape[1] + (WIN_LENGTH - HOP_LENGTH) // 2) / HOP_LENGTH)
        heard = (speech_frames + RECEPTIVE_FRAMES - 1) // 2 + 1
        frames = 2 * (heard - 1) + RECEPTIVE_FRAMES + 1
        if frames >= SEGMENT_FRAMES - RECEPTIVE_FRAMES:
            return self._cnn(F.pad(waveform, (0, SEQ_LEN - waveform.shape[1])))
        speech = self._cnn(F.pad(waveform, (0, frames * HOP_LENGTH - waveform.shape[1])))
        silence = self.silence_features.expand(len(waveform), -1, -1)
        return torch.cat([speech[:, :, :heard], silence[:, :, heard:]], dim=2)

    def _cnn(self, waveform: Tensor) -> Tensor:
        features: Tensor = self.network.cnn.cnn(compressed_stft(waveform, self.config.compression_eps))
        return features.flatten(1, 2)


reward_model = Mos
