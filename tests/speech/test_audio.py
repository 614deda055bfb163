"""Mels against librosa and torchaudio, counts and levels against arithmetic, files against what is wrong with them."""

from __future__ import annotations

import math

import librosa
import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.speech.audio import (
    MelSpec,
    frames_to_samples,
    level_dbfs,
    load_audio,
    log_mel,
    mel_filters,
    resample,
    resampled_length,
    rms,
    samples_to_frames,
)

VOCOS, BIGVGAN = MelSpec(), MelSpec(kind="bigvgan")
SMALL = {
    kind: MelSpec(sample_rate_hz=8000, n_fft=16, hop_length=4, win_length=16, n_mels=3, kind=kind)
    for kind in ("vocos", "bigvgan")
}


def speechlike(batch: int = 2, samples: int = 12_000) -> torch.Tensor:
    """Float64 noise with a level that rises from -60 to -10 dB: every part of the logarithm is visited."""
    noise = torch.randn(batch, samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * torch.logspace(-3, -0.5, samples, dtype=torch.float64)


def sine(frequency_hz: float, samples: int, sample_rate_hz: int) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency_hz * torch.arange(samples, dtype=torch.float64) / sample_rate_hz)


# librosa and torchaudio build their filterbanks in float32: 1e-7 of a band's peak, at most 1e-4 of a log mel.
FILTER_TOLERANCE = 1e-4


def test_vocos_mel_equals_librosa() -> None:
    waveform = speechlike()
    mel = librosa.feature.melspectrogram(
        y=waveform.numpy(), sr=24_000, n_fft=1024, hop_length=256, n_mels=100, power=1.0, htk=True, norm=None,
        pad_mode="reflect",
    )  # fmt: skip
    expected = np.log(np.maximum(mel, 1e-5)).transpose(0, 2, 1)
    np.testing.assert_allclose(log_mel(waveform).numpy(), expected, atol=FILTER_TOLERANCE)


def test_vocos_mel_equals_torchaudio() -> None:
    waveform = speechlike().float()
    transform = torchaudio.transforms.MelSpectrogram(24_000, 1024, hop_length=256, n_mels=100, power=1)
    torch.testing.assert_close(log_mel(waveform), transform(waveform).clamp(min=1e-5).log().mT, atol=1e-5, rtol=0)


def test_bigvgan_mel_equals_librosa() -> None:
    waveform = speechlike()
    padded = np.pad(waveform.numpy(), ((0, 0), (384, 384)), mode="reflect")
    spectrum = librosa.stft(padded, n_fft=1024, hop_length=256, center=False, dtype=np.complex128)
    filters = librosa.filters.mel(sr=24_000, n_fft=1024, n_mels=100, fmin=0, fmax=12_000)
    mel = filters @ np.sqrt(np.abs(spectrum) ** 2 + 1e-9)
    expected = np.log(np.maximum(mel, 1e-5)).transpose(0, 2, 1)
    np.testing.assert_allclose(log_mel(waveform, BIGVGAN).numpy(), expected, atol=FILTER_TOLERANCE)


def test_a_sine_has_the_magnitude_that_its_window_gives_it() -> None:
    # 1500 Hz is bin 64 of 1024 at 24 kHz. A Hann window sums to 512, so a sine of amplitude 0.5 has magnitude
    # 0.5 * 512 / 2 = 128 there and half of it in bins 63 and 65; the filters weigh these three bins.
    mel = log_mel(0.5 * sine(1500, 24_000, 24_000)[None])[0, 40].exp()
    filters = mel_filters(VOCOS, dtype=torch.float64)
    expected = 64 * filters[63] + 128 * filters[64] + 64 * filters[65]
    torch.testing.assert_close(mel, expected.clamp(min=1e-5), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("samples", "spec", "frames", "back"),
    [(24_000, VOCOS, 94, 23_808), (2048, VOCOS, 9, 2048), (24_000, BIGVGAN, 93, 23_808), (2048, BIGVGAN, 8, 2048)],
)
def test_frame_and_sample_counts(samples: int, spec: MelSpec, frames: int, back: int) -> None:
    assert log_mel(torch.zeros(1, samples), spec).shape == (1, frames, 100)
    assert samples_to_frames(samples, spec) == frames
    assert frames_to_samples(frames, spec) == back
    assert samples_to_frames(back, spec) == frames
    assert frames_to_samples(torch.tensor([frames, 0]), spec).tolist() == [back, 0]


def test_digital_silence_is_the_floor() -> None:
    torch.testing.assert_close(log_mel(torch.zeros(1, 4096)), torch.full((1, 17, 100), math.log(1e-5)))


@pytest.mark.parametrize("kind", ["vocos", "bigvgan"])
def test_mel_gradient_equals_finite_differences(kind: str) -> None:
    waveform = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda w: log_mel(w, SMALL[kind]), waveform.requires_grad_())


def test_mel_gradient_after_a_cache_filled_in_inference_mode() -> None:
    spec = MelSpec(n_mels=37)  # used nowhere else: the cache is empty
    with torch.inference_mode():
        log_mel(torch.randn(1, 4096), spec)
    waveform = torch.randn(1, 4096, requires_grad=True)
    log_mel(waveform, spec).sum().backward()
    assert waveform.grad is not None and waveform.grad.abs().sum() > 0


def test_mel_is_the_same_under_autocast() -> None:
    waveform = speechlike().float()
    with torch.autocast("cpu", torch.bfloat16):
        mel = log_mel(waveform)
    assert mel.dtype == torch.float32
    assert torch.equal(mel, log_mel(waveform))


@pytest.mark.parametrize(
    ("waveform", "message"), [(torch.zeros(24_000), "batch, samples"), (torch.zeros(1, 512), "more than 512 samples")]
)
def test_mel_of_a_wrong_shape(waveform: torch.Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check"):
        log_mel(waveform)


@pytest.mark.parametrize("wrong", [{"kind": "whisper"}, {"hop_length": 2048}, {"win_length": 2048}])
def test_mel_spec_is_validated(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        MelSpec(**wrong)


def test_lengths_to_mask() -> None:
    expected = [[False, False, False], [True, False, False], [True, True, True]]
    assert lengths_to_mask(torch.tensor([0, 1, 5]), 3).tolist() == expected


def test_resampled_sine_is_the_sine() -> None:
    resampled = resample(sine(440, 24_000, 24_000)[None], 24_000, 16_000)[0]
    # The filter is 6 zero crossings wide: its pass band ripples by under 1 %; the edges lack a neighbourhood.
    torch.testing.assert_close(resampled[100:-100], sine(440, 16_000, 16_000)[100:-100], atol=1e-2, rtol=0)


@pytest.mark.parametrize("to_hz", [16_000, 22_050, 48_000])
def test_resampling_ignores_zero_padding(to_hz: int) -> None:
    waveform = speechlike(1, 3001)
    alone = resample(waveform, 24_000, to_hz)
    padded = resample(torch.nn.functional.pad(waveform, (0, 999)), 24_000, to_hz)
    length = int(resampled_length(torch.tensor([3001]), 24_000, to_hz))
    assert alone.shape == (1, length) and length == math.ceil(3001 * to_hz / 24_000)
    torch.testing.assert_close(padded[:, :length], alone, atol=1e-12, rtol=0)


def test_resampling_is_linear_and_its_gradient_is_the_transpose() -> None:
    # <R u, v> = <u, R^T v>, and R^T v is what backward returns; with the cache filled in inference mode first.
    u, v = torch.randn(1, 300, dtype=torch.float64), torch.randn(1, 225, dtype=torch.float64)
    with torch.inference_mode():
        resample(u, 8000, 6000)
    leaf = torch.randn(1, 300, dtype=torch.float64, requires_grad=True)
    (resample(leaf, 8000, 6000) * v).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close((leaf.grad * u).sum(), (resample(u, 8000, 6000) * v).sum())


def test_levels() -> None:
    full_scale = sine(1000, 24_000, 24_000)[None]
    torch.testing.assert_close(level_dbfs(full_scale), torch.tensor([-3.0103], dtype=torch.float64), atol=1e-3, rtol=0)
    assert level_dbfs(torch.zeros(1, 10)).item() == pytest.approx(-200)
    # 3-4-0-0: over two samples sqrt(12.5), over four sqrt(6.25).
    waveform = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    assert rms(waveform, torch.tensor([2])).item() == pytest.approx(math.sqrt(12.5))
    assert rms(waveform).item() == pytest.approx(2.5)


def test_rms_gradient_of_silence_is_zero() -> None:
    silence = torch.zeros(1, 8, requires_grad=True)
    rms(silence, torch.tensor([4])).sum().backward()
    assert silence.grad is not None and silence.grad.tolist() == [[0.0] * 8]


def write(path, samples, sample_rate_hz: int = 24_000, **options) -> str:
    soundfile.write(path, samples, sample_rate_hz, **options)
    return str(path)


def test_load_audio_makes_mono_at_the_rate_asked_for(tmp_path) -> None:
    left = 0.5 * sine(440, 48_000, 48_000)
    path = write(
        tmp_path / "stereo.wav", torch.stack([left, torch.zeros_like(left)], 1).numpy(), 48_000, subtype="FLOAT"
    )
    clip = load_audio(path)
    assert clip.dtype == torch.float32 and clip.shape == (24_000,)
    expected = 0.25 * sine(440, 24_000, 24_000).float()  # the mean of the channels
    torch.testing.assert_close(clip[100:-100], expected[100:-100], atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0), "empty"),
        (np.zeros(24_000), "silence"),
        (2e-4 * np.ones(24_000), "silence"),
        (np.clip(2 * np.sin(np.arange(24_000) / 20), -1, 1), "full scale"),
        (0.1 * np.random.default_rng(0).standard_normal(13 * 24_000), "at most 12 s"),
        (np.full(24_000, np.nan), "NaN"),
    ],
)
def test_load_audio_refuses(tmp_path, samples: np.ndarray, message: str) -> None:
    path = write(tmp_path / "clip.wav", samples, subtype="FLOAT")
    with pytest.raises(ValueError, match=message):
        load_audio(path)


def test_load_audio_of_what_is_no_audio(tmp_path) -> None:
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(ValueError, match="libsndfile"):
        load_audio(tmp_path / "text.wav")
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        load_audio(tmp_path / "missing.wav")


def test_load_audio_takes_a_longer_clip_where_allowed(tmp_path) -> None:
    path = write(tmp_path / "long.flac", 0.1 * np.random.default_rng(0).standard_normal(13 * 24_000))
    assert load_audio(path, max_duration_s=None).shape == (13 * 24_000,)
