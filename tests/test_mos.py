"""DistillMOS as a reward: the package's own numbers, without its NaN gradients and at less work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from distillmos import ConvTransformerSQAModel
from distillmos.sqa import MAX_HOP_LEN, SEQ_LEN
from torch import Tensor

from reward_models.mos import Mos, segment_starts
from rlhf_mel.types import Audio, Prompts

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
    exact = Mos(compression_eps=1e-12)
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
    # Central difference of step h along a unit direction, in float64: h^2 f''' / 6 + 1e-16 f / h. f bends where |Z| is
    # about eps = 3e-5; with h = 3e-7 over 16,000 samples |Z| moves by 2e-8: (2e-8 / 3e-5)^2 = 5e-7, and 1e-9 of rounding.
    mos = Mos().double()
    clip = voice(9, 1.0).double()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(clip), generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    waveform = clip.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(mos, waveform).sum(), waveform)
    step = 3e-7
    with torch.no_grad():
        slope = (score(mos, clip + step * direction) - score(mos, clip - step * direction)).item() / (2 * step)
    assert (gradient @ direction).item() == pytest.approx(slope, rel=1e-5)
    assert abs(slope) > 0.1  # the comparison is of numbers, not of zeros


def test_gradient_is_finite_where_the_package_has_none(mos: Mos, package: ConvTransformerSQAModel) -> None:
    for clip in (CLIPS["exact zeros inside"], torch.zeros(8000)):
        waveform = clip.clone().requires_grad_()
        (ours,) = torch.autograd.grad(score(mos, waveform).sum(), waveform)
        assert ours.isfinite().all()
    waveform = CLIPS["3 s"].clone().requires_grad_()
    (theirs,) = torch.autograd.grad(package(waveform[None]).sum(), waveform)
    assert theirs.isnan().any()  # its own padding; if this fails, the package was mended


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


def test_noise_lowers_the_score(mos: Mos) -> None:
    clip = CLIPS["3 s"]
    noise = 0.1 * torch.randn(len(clip), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert score(mos, clip) - score(mos, clip + noise) > 0.3


def test_frozen_and_always_in_evaluation_mode(mos: Mos) -> None:
    assert not mos.train().training and not any(module.training for module in mos.modules())
    assert not any(parameter.requires_grad for parameter in mos.parameters())
    assert math.isfinite(score(mos, CLIPS["0.3 s"]).item())


def test_building_it_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    Mos()
    assert torch.equal(torch.get_rng_state(), state)
