"""Pitch: a vibrato's closed form and its gradient, an independent tracker, silence and short clips."""

from __future__ import annotations

import math

import librosa
import numpy as np
import pytest
import soundfile
import torch
from problems import ASSETS, SAMPLE_RATE_HZ, vibrato

from rlhf_mel.speech.pitch import RATE_HZ, pitch, pitch_spread

pytestmark = pytest.mark.rounding


@pytest.mark.parametrize("hz", [90.0, 120.0, 210.0])
@pytest.mark.parametrize("semitones", [0.5, 1.0, 3.0])
def test_the_spread_of_a_vibrato_is_that_of_a_sine_and_so_is_its_gradient(semitones: float, hz: float) -> None:
    """A sine of amplitude A has a deviation of A / sqrt(2); a frame of 50 ms sees a swing of 333 ms almost whole."""
    depth = torch.tensor(semitones, dtype=torch.float64, requires_grad=True)
    spread = pitch_spread(vibrato(depth, hz), SAMPLE_RATE_HZ)
    assert spread is not None
    (gradient,) = torch.autograd.grad(spread, depth)
    assert spread.item() == pytest.approx(semitones / math.sqrt(2), rel=0.03)
    assert gradient.item() == pytest.approx(1 / math.sqrt(2), rel=0.03)


@pytest.mark.parametrize("hz", [70.0, 131.3, 260.0, 440.0])
def test_a_steady_tone_is_at_its_pitch(hz: float) -> None:
    semitones, voiced = pitch(vibrato(0.0, hz), SAMPLE_RATE_HZ)
    assert bool(voiced.all()) and (semitones - 12 * math.log2(hz)).abs().max().item() < 0.05


def test_recordings_have_the_pitch_that_another_tracker_finds() -> None:
    """librosa's pyin (Mauch and Dixon 2014) on the bundled reference clips, where both hear a voice."""
    differences = []
    for path in sorted((ASSETS / "prompts/references").glob("*.flac")):
        samples, rate_hz = soundfile.read(path, dtype="float32")
        semitones, voiced = pitch(torch.from_numpy(samples), rate_hz)
        heard = librosa.resample(samples, orig_sr=rate_hz, target_sr=RATE_HZ)
        theirs, said_voiced, _ = librosa.pyin(
            heard, fmin=60, fmax=500, sr=RATE_HZ, frame_length=1024, hop_length=160, center=False
        )
        frames = min(len(semitones), len(theirs) - 1)  # theirs begin 64 ms before the middle of a window of 64 ms
        both = voiced[:frames].numpy() & said_voiced[:frames]
        differences.append(np.abs(semitones[:frames].numpy() - 12 * np.log2(theirs[:frames]))[both])
    apart = np.concatenate(differences)
    assert len(apart) > 500 and np.median(apart) < 0.25 and (apart < 1).mean() > 0.9


def test_noise_and_silence_have_no_voice() -> None:
    noise = torch.randn(SAMPLE_RATE_HZ, generator=torch.Generator().manual_seed(0))
    assert pitch(noise, SAMPLE_RATE_HZ)[1].float().mean().item() < 0.05
    assert pitch_spread(torch.zeros(SAMPLE_RATE_HZ), SAMPLE_RATE_HZ) is None
    assert pitch_spread(torch.zeros(10), SAMPLE_RATE_HZ) is None, "shorter than a window"
    assert pitch_spread(vibrato(1.0, seconds=0.1), SAMPLE_RATE_HZ) is None, "fewer than ten frames"


def test_pauses_do_not_count() -> None:
    """Noise 40 dB below the voice is beyond the 30 dB of silence, whatever it correlates with."""
    tone = vibrato(2.0)
    noise = torch.randn(len(tone), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hum = 0.01 * vibrato(0.0, hz=400.0)
    spread, with_pause = (pitch_spread(x, SAMPLE_RATE_HZ) for x in (tone, torch.cat([tone, hum + 1e-5 * noise])))
    assert spread is not None and with_pause is not None
    assert with_pause.item() == pytest.approx(spread.item(), rel=0.02)
