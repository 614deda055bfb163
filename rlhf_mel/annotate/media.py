"""Sounds as annotators hear and see them: equally loud, drawn to one scale of time, with no name that tells them apart.

Loudness L is that of ITU-R BS.1770-4 (K-weighted, gated, in LUFS). All clips of a page are brought to one loudness, -23
LUFS (EBU R 128) or less where a peak would pass full scale, so that the louder of two is not taken for the better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.evaluation.report_media import image, mel_of, player
from rlhf_mel.flow.noise import seeded
from rlhf_mel.speech.audio import loudness_lufs

TARGET_LUFS = -23.0
PEAK = 0.98
"""Highest sample of what is played."""


def equally_loud(clips: Sequence[Float[Tensor, " _"]], rate_hz: int) -> list[Float[Tensor, " _"]]:
    """The clips at one loudness, TARGET_LUFS or the most at which no peak passes PEAK; silence stays."""
    loudness = [float(loudness_lufs(clip, rate_hz)) for clip in clips]
    heard = [(clip, level) for clip, level in zip(clips, loudness, strict=True) if math.isfinite(level)]
    highest = [level + 20 * math.log10(PEAK / float(clip.abs().max())) for clip, level in heard]
    target = min([TARGET_LUFS, *highest])
    gains = [10 ** ((target - level) / 20) if math.isfinite(level) else 1.0 for level in loudness]
    return [clip * gain for clip, gain in zip(clips, gains, strict=True)]


def degraded(waveform: Float[Tensor, " s"], rate_hz: int, seed: int) -> Float[Tensor, " s"]:
    """A copy that is worse on any account: white noise as loud as the speech, and every third 0.1 s is cut out."""
    noise = torch.randn(len(waveform), generator=seeded(seed))
    noisy = waveform + noise * waveform.square().mean().sqrt()
    kept = (torch.arange(len(waveform)) // max(round(0.1 * rate_hz), 1)) % 3 != 2
    return noisy * kept


def clips_html(clips: Mapping[str, Float[Tensor, " _"]], rate_hz: int) -> dict[str, str]:
    """A player, a waveform and a mel of each clip, by its label; widths are in proportion to the durations."""
    mels = {label: mel_of(clip, rate_hz) for label, clip in clips.items()}
    brightest = max(float(mel.max()) for mel in mels.values())
    longest = max(len(clip) for clip in clips.values())
    loudest = max(max(float(clip.abs().max()) for clip in clips.values()), 1e-6)
    return {
        label: (
            f'<div class="view"><div class="span" style="width:{100 * len(clip) / longest:.2f}%">'
            f"{waveform_svg(clip / loudest)}{image(mels[label], brightest, f'mel of {label}')}"
            f'<i class="cursor"></i></div></div>{player(clip, rate_hz)}'
        )
        for label, clip in clips.items()
    }


def waveform_svg(waveform: Float[Tensor, " s"], columns: int = 300) -> str:
    """The least and the greatest sample in each of `columns` stretches, as a filled outline; for samples in [-1, 1]."""
    parts = [part for part in waveform.tensor_split(min(columns, len(waveform))) if len(part)]
    top = [f"{x} {-float(part.max()):.3f}" for x, part in enumerate(parts)]
    bottom = [f"{x} {-float(part.min()):.3f}" for x, part in enumerate(parts)]
    outline = "L".join([*top, *reversed(bottom)])
    return (
        f'<svg class="wave" viewBox="0 -1 {max(len(parts) - 1, 1)} 2" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="M{outline}Z"/></svg>'
    )
