"""DistillMOS as a reward: the package's own numbers, without its NaN gradients and at less work."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from distillmos import ConvTransformerSQAModel
from distillmos.sqa import MAX_HOP_LEN, SEQ_LEN
from torch import Tensor

import rlhf_mel
from reward_models.mos import Mos, compressed_stft, segment_starts
from rlhf_mel.speech.audio import load_audio
from rlhf_mel.types import Audio, Prompts

pytestmark = pytest.mark.rounding

RATE_HZ = 16_000


def voice(seed: int, duration_s: float) -> Tensor:
    """Something like speech: pulses with a moving pitch through three resonances, in syllables, with breath noise."""
    rng = np.random.default_rng(seed)
    samples = int(duration_s * RATE_HZ)
    time_s = np.arange(samples) / RATE_HZ
    f0_hz = rng.uniform(90, 180) * 2 ** (0.3 * np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * time_s))
    pulses = np.diff(np.floor(np.cumsum(f0_hz) / RATE_HZ), prepend=0.0) + 0.03 * rng.standard_normal(samples)
    spectrum, freq_hz = np.fft.rfft(pulses), np.fft.rfftfreq(samples, 1 / RATE_HZ)
    formants = sum(
        1 / (1 + ((freq_hz - centre) / 90) ** 2) for centre in rng.uniform([300, 900, 2200], [800, 2000, 3000])
    )
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2, 4) * time_s), 0, 1)
    waveform = np.fft.irfft(spectrum * formants, samples) * syllables + 1e-4 * rng.standard_normal(samples)
    return torch.tensor(0.5 * waveform / np.abs(waveform).max(), dtype=torch.float32)


def as_audio(clips: list[Tensor]) -> Audio:
    lengths = torch.tensor([len(clip) for clip in clips])
    mel, frames = torch.zeros(len(clips), 1, 1), torch.ones(len(clips), dtype=torch.long)
    return Audio(torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), lengths, RATE_HZ, mel, frames)


NO_PROMPTS = Prompts([], torch.zeros(0, 0), torch.zeros(0, dtype=torch.long), [])


@pytest.fixture(scope="module")
def mos() -> Mos:
    return Mos()


@pytest.fixture(scope="module")
def package() -> ConvTransformerSQAModel:
    return ConvTransformerSQAModel().eval()


def score(mos: Mos, *clips: Tensor) -> Tensor:
    return mos.score(as_audio(list(clips)), NO_PROMPTS)


CLIPS = {
    "3 s": voice(0, 3.0),
    "0.3 s": voice(1, 0.3),
    "exact zeros inside": torch.cat([voice(2, 1.0), torch.zeros(8000), voice(3, 1.0)]),
    "-50 dB": voice(4, 2.0) * 10**-2.5,
    "the longest that is cut": voice(5, 7.5),
    "one segment": voice(6, SEQ_LEN / RATE_HZ),
    "one sample more": voice(7, (SEQ_LEN + 1) / RATE_HZ),
    "12 s, six segments": voice(8, 12.0),
}


@pytest.mark.parametrize("name", CLIPS)
def test_equals_the_package(mos: Mos, package: ConvTransformerSQAModel, name: str) -> None:
    # The compression differs where |Z| < 1e-4. On 43 clips of natural speech of 0.8 to 19 s the largest difference
    # was 0.009, the median 0.001; the issue allows 0.02.
    clip = CLIPS[name]
    with torch.no_grad():
        expected = package(clip[None]).item()
        assert score(mos, clip).item() == pytest.approx(expected, abs=0.01)


def test_without_smoothing_equals_the_package_to_rounding(package: ConvTransformerSQAModel) -> None:
    # eps = 1e-12 leaves only the skipped padding: what is left of the difference is float32 arithmetic.
    exact = Mos(Mos.Config(compression_eps=1e-12))
    for name in ("3 s", "0.3 s", "12 s, six segments"):
        with torch.no_grad():
            assert score(exact, CLIPS[name]).item() == pytest.approx(package(CLIPS[name][None]).item(), abs=2e-4)


def test_segments_of_a_long_clip() -> None:
    # By hand: 12 s is 192,000 samples, 69,120 more than a segment; ceil(69,120 / 16,000) + 1 = 6 starts, 13,824 apart.
    assert segment_starts(192_000) == [0, 13_824, 27_648, 41_472, 55_296, 69_120]
    assert segment_starts(SEQ_LEN) == segment_starts(1) == [0]
    assert segment_starts(SEQ_LEN + MAX_HOP_LEN) == [0, MAX_HOP_LEN]


def test_batch_equals_single_and_padding_does_not_count(mos: Mos) -> None:
    clips = [CLIPS[name] for name in ("3 s", "0.3 s", "12 s, six segments", "-50 dB")]
    with torch.no_grad():
        alone = torch.cat([score(mos, clip) for clip in clips])
        torch.testing.assert_close(score(mos, *clips), alone, atol=1e-4, rtol=0)
        # What a GPU does: all segments as one padded batch.
        whole = [clips[0], clips[1], clips[3]]
        torch.testing.assert_close(mos._score_segments(whole), alone[[0, 1, 3]], atol=1e-4, rtol=0)
        short = as_audio(clips[:2])
        padded = Audio(
            torch.nn.functional.pad(short.waveform, (0, 5000), value=0.3),  # what lies beyond is never heard
            short.lengths_samples,
            RATE_HZ,
            short.mel,
            short.lengths_frames,
        )
        torch.testing.assert_close(mos.score(padded, NO_PROMPTS), alone[:2], atol=1e-4, rtol=0)


def test_gradient_equals_finite_differences() -> None:
    # Central differences in float64. The network has 1e6 leaky rectifiers, so the step h must be small enough that
    # hardly a kink is crossed: h = 1e-9, of which rounding (a few 1e-16 / h) leaves 1e-6. Directions: a random one, to
    # which the gradient is nearly orthogonal, and the gradient on a random half of the samples (slope about 160).
    mos = Mos().double()
    clip = voice(9, 1.0).double()
    waveform = clip.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(mos, waveform).sum(), waveform)
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(len(clip), generator=generator) < 0.5
    step = 1e-9
    for direction in (torch.randn(len(clip), generator=generator, dtype=torch.float64), gradient.where(half, 0.0)):
        direction = direction / direction.norm()
        with torch.no_grad():
            slope = (score(mos, clip + step * direction) - score(mos, clip - step * direction)).item() / (2 * step)
        assert (gradient @ direction).item() == pytest.approx(slope, rel=1e-6, abs=5e-6)
    assert slope > 100  # the comparison is of numbers, not of zeros


def test_gradient_is_finite_where_the_package_has_none(mos: Mos, package: ConvTransformerSQAModel) -> None:
    for clip in (CLIPS["exact zeros inside"], torch.zeros(8000)):
        waveform = clip.clone().requires_grad_()
        (ours,) = torch.autograd.grad(score(mos, waveform).sum(), waveform)
        assert ours.isfinite().all()
    waveform = CLIPS["3 s"].clone().requires_grad_()
    (theirs,) = torch.autograd.grad(package(waveform[None]).sum(), waveform)
    assert theirs.isnan().any()  # its own padding; if this fails, the package was mended


def test_slope_of_the_compression_at_silence() -> None:
    # Z = sum_n hann(n) x(n) exp(-2 pi i k n / 320), and d(Z |Z|^-0.7) = eps^-0.7 dZ at Z = 0: by hand for bin k = 2 of
    # frame 1, which looks at the samples 80 ... 399.
    eps = 3e-5
    waveform = torch.zeros(1, 800, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(compressed_stft(waveform, eps)[0, 0, 2, 1], waveform)
    n = torch.arange(320, dtype=torch.float64)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * n / 320)
    expected = torch.zeros(800, dtype=torch.float64)
    expected[80:400] = eps**-0.7 * hann * torch.cos(2 * math.pi * 2 * n / 320)
    torch.testing.assert_close(gradient[0], expected, atol=1e-9, rtol=1e-9)


def test_gradient_is_the_same_in_a_batch(mos: Mos) -> None:
    clips = [CLIPS["3 s"].clone().requires_grad_(), CLIPS["0.3 s"].clone().requires_grad_()]
    together = torch.autograd.grad(score(mos, *clips).sum(), clips)
    for clip, gradient in zip(clips, together, strict=True):
        (alone,) = torch.autograd.grad(score(mos, clip).sum(), clip)
        # float32, with slopes up to eps^-0.7 = 1e3 on numbers rounded to 6e-8
        assert (gradient - alone).norm() < 1e-3 * alone.norm()


def test_louder_is_not_better(mos: Mos) -> None:
    # The package normalises the peak: 12 dB change nothing but what eps (relative to the peak) and rounding do.
    clip = CLIPS["3 s"]
    with torch.no_grad():
        assert score(mos, clip / 4).item() == pytest.approx(score(mos, clip).item(), abs=1e-4)


SPEECH = Path(rlhf_mel.__file__).parent / "assets" / "prompts" / "references"


@pytest.mark.parametrize("path", sorted(SPEECH.glob("*.flac"))[:2], ids=lambda path: path.stem)
def test_natural_speech(mos: Mos, package: ConvTransformerSQAModel, path: Path) -> None:
    clip = load_audio(path, RATE_HZ)
    noise = 0.05 * torch.randn(len(clip), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        natural = score(mos, clip).item()
        assert natural == pytest.approx(package(clip[None]).item(), abs=0.01)
        assert natural - score(mos, clip + noise).item() > 0.3  # white noise at -26 dBFS is heard


def test_frozen_and_always_in_evaluation_mode(mos: Mos) -> None:
    assert not mos.train().training and not any(module.training for module in mos.modules())
    assert not any(parameter.requires_grad for parameter in mos.parameters())
    assert math.isfinite(score(mos, CLIPS["0.3 s"]).item())


def test_building_it_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    Mos()
    assert torch.equal(torch.get_rng_state(), state)
