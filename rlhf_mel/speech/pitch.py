"""Pitch by autocorrelation, with a gradient at the waveform (Boersma 1993, Proc. IFA 17: 97-110; Praat's method "ac").

    r(tau) = r_xw(tau) / r_w(tau),    both normed to 1 at tau = 0;    F0 = 1 / tau at the highest peak of
    R(tau) = r(tau) - 0.01 log2(60 Hz tau)

r_xw is the autocorrelation of a windowed frame of 50 ms, r_w that of the window. A frame is voiced where r is above
0.45 at the peak, and the frame no more than 30 dB below the clip's loudest. No path is sought through the frames. Which
peak is the highest has no gradient; where the peak lies, by the parabola through three lags, has.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_mel.speech.audio import resample

RATE_HZ = 16_000
FLOOR_HZ, CEILING_HZ = 60, 500
WINDOW = 3 * RATE_HZ // FLOOR_HZ
"""Samples of a frame: three periods of the lowest pitch."""
HOP = 160
VOICED_ABOVE = 0.45
OCTAVE_COST = 0.01
SILENT_BELOW_DB = 30.0
FURTHEST_SEMITONES = 12.0
"""From the median pitch: what is further is an error of an octave."""


def pitch(waveform: Float[Tensor, " s"], rate_hz: int) -> tuple[Float[Tensor, " frames"], Bool[Tensor, " frames"]]:
    """Pitch every 10 ms in semitones above 1 Hz, and which frames are voiced; the others' numbers mean nothing."""
    heard = resample(waveform[None], rate_hz, RATE_HZ)[0]
    if len(heard) < WINDOW:
        heard = torch.nn.functional.pad(heard, (0, WINDOW - len(heard)))
    frames = heard.unfold(0, WINDOW, HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    power = frames.detach().square().mean(-1)
    r = _autocorrelation(frames)
    shortest, longest = RATE_HZ // CEILING_HZ, RATE_HZ // FLOOR_HZ
    lags = torch.arange(shortest, longest, device=r.device)
    known = r.detach()
    is_peak = (known[:, lags] > known[:, lags - 1]) & (known[:, lags] >= known[:, lags + 1])
    strength = known[:, lags] - OCTAVE_COST * (lags * FLOOR_HZ / RATE_HZ).log2()
    best = strength.where(is_peak, -torch.inf).argmax(-1)
    lag = lags[best].unsqueeze(-1)
    before, at, after = (r.gather(-1, lag + step).squeeze(-1) for step in (-1, 0, 1))
    voiced = is_peak.any(-1) & (at.detach() > VOICED_ABOVE) & (power > 10 ** (-SILENT_BELOW_DB / 10) * power.max())
    bend = (before - 2 * at + after).where(voiced, -1.0)
    period = lag.squeeze(-1) + (before - after) / (2 * bend)
    return 12 * (RATE_HZ / period).log2(), voiced


def pitch_spread(waveform: Float[Tensor, " s"], rate_hz: int) -> Float[Tensor, ""] | None:
    """Standard deviation of the pitch of the voiced frames, in semitones; None with fewer than ten."""
    semitones, voiced = pitch(waveform, rate_hz)
    if not bool(voiced.any()):
        return None
    near = (semitones.detach() - semitones.detach()[voiced].median()).abs() < FURTHEST_SEMITONES
    kept = semitones[voiced & near]
    return kept.std() if len(kept) >= 10 else None


def _autocorrelation(frames: Float[Tensor, "frames window"]) -> Float[Tensor, "frames lags"]:
    """r(tau) of each frame at lags 0 ... WINDOW - 1; see the top. Of silence zero."""
    window, of_window = _window(frames.device, frames.dtype)
    spectrum = torch.fft.rfft(frames * window, n=2 * WINDOW)
    r: Tensor = torch.fft.irfft(spectrum.real.square() + spectrum.imag.square())[:, : len(of_window)]
    return r / (r[:, :1] + 1e-12) / of_window


@functools.lru_cache(maxsize=8)
def _window(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The Hann window and its autocorrelation, normed, at the lags that are looked at."""
    with torch.inference_mode(False):
        window = torch.hann_window(WINDOW, device=device, dtype=dtype)
        spectrum = torch.fft.rfft(window, n=2 * WINDOW)
        r = torch.fft.irfft(spectrum.abs().square())[: RATE_HZ // FLOOR_HZ + 2]
        return window, r / r[0]
