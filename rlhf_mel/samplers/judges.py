"""Measures of speech (speech/measures.py) as rewards: samples ranked by DNSMOS, or by a recognizer's errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.lookup import did_you_mean
from rlhf_mel.rewards.base import RewardSpec
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.rewards.load import check_name
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.measures import MEASURES, measure
from rlhf_mel.speech.recognizer import Recognizer, load_recognizer
from rlhf_mel.types import Audio, Prompts


class JudgeReward:
    """A measure as a reward without gradient: its value, or minus that where lower is better.

    Args:
        name: of a line of MEASURES that says which direction is better and has a judge.
        recognizer: of measures that need one; its mels are those of the vocoder.
    """

    differentiable = False
    domain: Literal["waveform", "mel"] = "waveform"
    sample_rate_hz: int | None = None
    needs: frozenset[str] = frozenset()
    range: tuple[float, float] = (-math.inf, math.inf)

    def __init__(self, name: str, recognizer: Recognizer | None = None) -> None:
        if name not in ranking_measures():
            near = did_you_mean(name, ranking_measures())
            raise ValueError(f"measure {name!r}: expected one of {ranking_measures()}, got that{near}")
        self.name = name
        self.needs = frozenset({"reference"}) if name == "voice_similarity" else frozenset()
        self._measure = measure(name)
        self._recognizer = recognizer
        if self._measure.judge is None and recognizer is None:
            raise ValueError(f"measure {name!r}: expected a recognizer, got none; pass one")

    def score(self, audio: Audio, prompts: Prompts) -> Float[Tensor, " b"]:
        """The measure of each clip, higher is better."""
        if self._measure.judge is not None:
            values = self._measure.judge(audio)[self.name]
        else:
            assert self._recognizer is not None and self._measure.recognizer_judge is not None
            texts = self._recognizer.transcribe(audio.mel, audio.lengths_frames)
            values = self._measure.recognizer_judge(self._recognizer, audio, prompts, texts)[self.name]
        sign = -1.0 if self._measure.better == "lower" else 1.0
        return (sign * torch.as_tensor(values)).float().to(audio.waveform.device)


def ranking_measures() -> list[str]:
    """The measures that say which of two clips is better and that this package takes."""
    return [name for name, known in MEASURES.items() if known.better and (known.judge or known.recognizer_judge)]


def ranking(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    mel_spec: MelSpec,
    recognizer: str = "tiny",
    device: torch.device | str = "cpu",
) -> Rewards:
    """Rewards (rewards/load.py) and measures, by name, as one weighted sum.

    Args:
        weights: one a name, 1 unless given.
        options: of rewards, by name.
        mel_spec: of the mels that are ranked.
        recognizer: who transcribes, where a measure needs it.

    Raises:
        ValueError: a name is neither a reward nor a measure, the message lists both; the recognizer is of other mels.
    """
    measures = ranking_measures()
    for name in names:
        if name not in measures:
            try:
                check_name(name)
            except ValueError as error:
                raise ValueError(f"{error}; or one of the measures {measures}") from error
    listens = any(name in measures and MEASURES[name].judge is None for name in names)
    heard_by = load_recognizer(recognizer, device=device) if listens else None
    if heard_by is not None and heard_by.mel_spec != mel_spec:
        raise ValueError(f"rank_by: expected a recognizer of the policy's mels {mel_spec}, got {heard_by.mel_spec}")
    models: list[RewardSpec] = [JudgeReward(name, heard_by) if name in measures else name for name in names]
    return Rewards(models, weights, options).to(device)
