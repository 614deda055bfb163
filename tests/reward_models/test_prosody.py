"""Prosody: two-sided distance from a spread of pitch, by hand; its gradient's sign; the reference; voiceless clips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import SAMPLE_RATE_HZ, vibrato
from torch import Tensor

from reward_models.prosody import Prosody
from rlhf_mel.types import Audio, Prompts

pytestmark = pytest.mark.rounding


def as_audio(*clips: Tensor) -> Audio:
    lengths = torch.tensor([len(clip) for clip in clips])
    waveform = torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True)
    count = len(clips)
    return Audio(waveform, lengths, SAMPLE_RATE_HZ, torch.zeros(count, 1, 100), torch.ones(count, dtype=torch.long))


def prompts(*references: Tensor) -> Prompts:
    audio = torch.nn.utils.rnn.pad_sequence(list(references), batch_first=True)
    texts = ["a"] * len(references)
    return Prompts(texts, audio, torch.tensor([len(reference) for reference in references]), texts)


def prosody(**options: Any) -> Prosody:
    return Prosody(Prosody.Config(**options))


def test_a_vibrato_is_as_far_from_the_target_as_its_spread() -> None:
    """Spreads of 1 / sqrt(2) and 4 / sqrt(2), 0.71 and 2.83 semitones: too little and too much of 2."""
    audio, reference = as_audio(vibrato(1.0), vibrato(4.0)), vibrato(2 * math.sqrt(2))
    want = [-(2 - 1 / math.sqrt(2)), -(4 / math.sqrt(2) - 2)]
    assert prosody(target_semitones=2.0).score(audio, prompts(reference, reference)).tolist() == pytest.approx(
        want, abs=0.05
    )
    assert prosody().score(audio, prompts(reference, reference)).tolist() == pytest.approx(want, abs=0.1)
    assert prosody().needs == {"reference"} and prosody(target_semitones=2.0).needs == frozenset()


@pytest.mark.parametrize(("target", "sign"), [(4.0, 1), (0.2, -1)])
def test_monotone_speech_is_asked_for_more_and_wild_speech_for_less(target: float, sign: int) -> None:
    depth = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    score = prosody(target_semitones=target).score(as_audio(vibrato(depth)), prompts(vibrato(1.0)))
    (gradient,) = torch.autograd.grad(score.sum(), depth)
    assert gradient.item() == pytest.approx(sign / math.sqrt(2), rel=0.03)


def test_a_batch_scores_as_its_items_alone() -> None:
    clips = vibrato(1.0).float(), vibrato(2.0, seconds=0.8).float(), torch.zeros(3000)
    references = [vibrato(0.5).float(), vibrato(3.0, seconds=1.0).float(), vibrato(1.0).float()]
    together = prosody().score(as_audio(*clips), prompts(*references))
    alone = [prosody().score(as_audio(clip), prompts(of_it)) for clip, of_it in zip(clips, references, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_what_has_no_voice_counts_as_monotone() -> None:
    silence = as_audio(torch.zeros(24_000))
    assert prosody(target_semitones=2.0).score(silence, prompts(torch.zeros(9))).tolist() == [-2.0]


@pytest.mark.parametrize("target", [-1.0, 13, "lively", True, float("nan")])
def test_a_target_that_is_no_spread_is_refused(target: Any) -> None:
    with pytest.raises(ValueError, match=r"target_semitones of reward 'prosody': expected 0 to 12, or none .* got "):
        prosody(target_semitones=target)
