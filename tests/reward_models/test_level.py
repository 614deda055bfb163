"""Level: the recommendation's calibration, the gradient of a gain, the reference as target, silence, bad options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reward_models.level import Level
from rlhf_mel.types import Audio, Prompts

pytestmark = pytest.mark.rounding

RATE_HZ = 24_000


def tone(seconds: float, amplitude: float = 1.0, hz: float = 997.0) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * hz * torch.arange(round(seconds * RATE_HZ)) / RATE_HZ)


def as_audio(*clips: Tensor) -> Audio:
    lengths = torch.tensor([len(clip) for clip in clips])
    return Audio(
        torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True),
        lengths,
        RATE_HZ,
        torch.zeros(len(clips), 1, 100),
        torch.ones(len(clips), dtype=torch.long),
    )


def prompts(*references: Tensor) -> Prompts:
    audio = torch.nn.utils.rnn.pad_sequence(list(references), batch_first=True)
    texts = ["a"] * len(references)
    return Prompts(texts, audio, torch.tensor([len(reference) for reference in references]), texts)


def level(**options: Any) -> Level:
    return Level(Level.Config(**options))


def test_it_is_calibrated_as_the_recommendation_says() -> None:
    """BS.1770-4: a 997 Hz sine at full scale in one channel is at -3.01 LUFS; 20 dB less of it at -23.01."""
    audio = as_audio(tone(2), tone(2, 0.1))
    scores = level(target_lufs=-23.0).score(audio, prompts(tone(1), tone(1)))
    assert scores.tolist() == pytest.approx([-19.99, -0.01], abs=0.1)  # as meters may be off


def test_the_target_is_the_reference_unless_one_is_given() -> None:
    audio, references = as_audio(tone(2, 0.2), tone(1, 0.1)), prompts(tone(1, 0.1), tone(2, 0.2))
    db = 20 * math.log10(2)
    assert level().score(audio, references).tolist() == pytest.approx([-db, -db], abs=1e-3)
    assert level().score(audio, prompts(tone(3, 0.2), tone(3, 0.1))).tolist() == pytest.approx([0, 0], abs=1e-3)
    assert level().needs == {"reference"} and level(target_lufs=-20).needs == frozenset()


@pytest.mark.parametrize(("target", "sign"), [(-10.0, 1), (-40.0, -1)])
def test_the_gradient_of_a_gain_is_that_of_a_decibel(target: float, sign: int) -> None:
    """With x = g y, d (20 log10 g) / d ln g = 20 / ln 10; too quiet asks for more, too loud for less."""
    clip = tone(1, 0.1) + tone(1, 0.05, hz=3000)
    waveform = clip[None].requires_grad_()
    audio = Audio(waveform, torch.tensor([len(clip)]), RATE_HZ, torch.zeros(1, 1, 100), torch.ones(1, dtype=torch.long))
    (gradient,) = torch.autograd.grad(level(target_lufs=target).score(audio, prompts(clip)).sum(), waveform)
    assert (gradient * waveform).sum().item() == pytest.approx(sign * 20 / math.log(10), rel=1e-4)


def test_a_batch_scores_as_its_items_alone() -> None:
    clips = tone(2, 0.3), tone(0.7, 0.02, hz=300), tone(0.1, 0.5)  # the last is shorter than a block
    references = [tone(1), tone(1, 0.4), tone(0.5)]
    together = level().score(as_audio(*clips), prompts(*references))
    alone = [level().score(as_audio(*[clip]), prompts(of_it)) for clip, of_it in zip(clips, references, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_silence_is_at_the_gate_and_its_gradient_is_zero() -> None:
    waveform = torch.zeros(1, RATE_HZ, requires_grad=True)
    audio = Audio(waveform, torch.tensor([RATE_HZ]), RATE_HZ, torch.zeros(1, 1, 100), torch.ones(1, dtype=torch.long))
    scores = level(target_lufs=-20.0).score(audio, prompts(tone(1)))
    (gradient,) = torch.autograd.grad(scores.sum(), waveform)
    assert scores.tolist() == [-50.0] and not gradient.any()
    quiet = as_audio(tone(1, 1e-5))  # -103 LUFS: below the gate of -70
    assert level(target_lufs=-20.0).score(quiet, prompts(tone(1))).tolist() == [-50.0]


@pytest.mark.parametrize("target", [3.0, -71, "loud", True, float("nan")])
def test_a_target_that_is_no_loudness_is_refused(target: Any) -> None:
    with pytest.raises(ValueError, match=r"target_lufs of reward 'level': expected -70 to 0, or none .* got "):
        level(target_lufs=target)
