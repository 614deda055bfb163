"""Hear held-out prompts: the trained reward beside judges that no one trained on.

A reward that goes up proves nothing by itself; it is what was optimised. `evaluate` lets the policy speak every
held-out prompt with noise seeded by (seed, row), so that before and after differ in the weights alone, and measures
the rewards (`rewards/NAME`; `reward`: their weighted sum) and what speech/measures.py lists; verdict.py says what the
difference of two evaluations proves.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.flow.noise import item_generator
from rlhf_mel.flow.policy import Policy, rollout
from rlhf_mel.metrics import pool
from rlhf_mel.pipeline import Sampling, vocode
from rlhf_mel.progress import progress
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.measures import Judge, clips, default_judges, recognizer_judges
from rlhf_mel.speech.recognizer import Recognizer
from rlhf_mel.types import Audio, Prompts, Rollout
from rlhf_mel.vocoders import Vocoder


@runtime_checkable
class Sampler(Protocol):
    """A policy and prompts to speech; the same noise in, the same speech out, whatever the batch."""

    def __call__(
        self,
        policy: Policy,
        prompts: Prompts,
        *,
        steps: int,
        cfg_strength: float,
        sway_sampling_coef: float | None,
        method: str,
        generator: Sequence[torch.Generator],
    ) -> Rollout:
        """Speech of each prompt, without gradients; `generator`: one a prompt, the rest as in `policy.rollout`."""
        ...


def plain(policy: Policy, prompts: Prompts, **options: Any) -> Rollout:
    """One rollout of each prompt: policy.rollout without gradients."""
    return rollout(policy, prompts, grad_steps=0, **options)


@dataclass(frozen=True)
class EvaluationResult:
    """One evaluation: a value a prompt for each measure, and what was heard."""

    measures: Mapping[str, Sequence[float]]
    """By name, one float a prompt, NaN where it could not be taken; rewards as `reward` and `rewards/NAME`."""
    waveforms: Sequence[Float[Tensor, " _"]]
    """What the policy said: a waveform a prompt, float32, on the CPU."""
    sample_rate_hz: int
    transcripts: Sequence[str]
    """What the recognizer heard; empty without one."""
    voices: Sequence[str] = ()
    """In whose voice each prompt was spoken (`voices_of`); empty: not known."""
    closed: bool = False
    """Whether these are all voices that the policy speaks in, and not some of many."""

    @property
    def items(self) -> list[dict[str, float]]:
        """The measures of each prompt, by name."""
        return [dict(zip(self.measures, row, strict=True)) for row in zip(*self.measures.values(), strict=True)]

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """Means over the finite values, rewards in TRL's names, and `dropped_rollouts`: rows without a reward."""
        dropped = [not math.isfinite(total) for total in self.measures["reward"]]
        return pool([{**self.measures, "dropped_rollouts": dropped}])


def evaluate(
    policy: Policy,
    vocoder: Vocoder,
    rewards: Rewards,
    prompts: Prompts,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    recognizer: Recognizer | None = None,
    judges: Sequence[Judge] | None = None,
    batch_size: int = 8,
    sampler: Sampler = plain,
    shown_as: str | None = None,
) -> EvaluationResult:
    """Let the policy speak all `prompts` and measure what is heard; nothing is trained, no gradient is kept.

    Args:
        sampling: how the policy is solved; None: the defaults of `Sampling`.
        seed: of the noise, with the prompt's row.
        recognizer: without it there is no `cer` and no `voice_similarity`.
        judges: functions of the sound; None: those of MEASURES.
        batch_size: prompts at a time; changes memory and speed, not the result.
        sampler: how the policy is made to speak: once, or say `BestOfN`, `NoiseOptimisation`.
        shown_as: what progress and remaining time are shown as; None: not at all.

    Raises:
        ValueError: the recognizer is of other mels than the vocoder, or prompts lack what a reward needs.
    """
    if recognizer is not None and recognizer.mel_spec != vocoder.mel_spec:
        raise ValueError(
            f"evaluate: expected a recognizer of the vocoder's mels {vocoder.mel_spec}, got {recognizer.mel_spec}"
        )
    rewards.check(prompts)
    judges = default_judges() if judges is None else judges
    options = asdict(sampling or Sampling())
    measures: dict[str, list[float]] = {}
    waveforms: list[Tensor] = []
    transcripts: list[str] = []
    for start in progress(range(0, len(prompts), batch_size), shown_as):
        rows = range(start, min(start + batch_size, len(prompts)))
        batch = prompts.select(rows)
        rollouts = sampler(policy, batch, generator=[item_generator(seed, row) for row in rows], **options)
        with torch.no_grad():
            audio = vocode(vocoder, rollouts)
            measured = _scored(rewards, audio, batch)
            for judge in judges:
                measured |= judge(audio)
            if recognizer is not None:
                texts = recognizer.transcribe(audio.mel, audio.lengths_frames)
                transcripts += texts
                for recognizer_judge in recognizer_judges():
                    measured |= recognizer_judge(recognizer, audio, batch, texts)
        for name, values in measured.items():
            measures.setdefault(name, []).extend(torch.as_tensor(values).double().tolist())
        waveforms += clips(audio)
    voices = voices_of(prompts)
    closed = set(policy.voices) == set(voices)
    return EvaluationResult(measures, waveforms, vocoder.sample_rate_hz, transcripts, voices, closed)


def _scored(rewards: Rewards, audio: Audio, prompts: Prompts) -> dict[str, Tensor]:
    """`reward`, the weighted sum, and each `rewards/NAME`: float [B]."""
    scores = rewards(audio, prompts)
    return {"reward": scores.total} | {f"rewards/{name}": values for name, values in scores.breakdown.items()}


def voices_of(prompts: Prompts) -> list[str]:
    """A name a prompt: the column `voice` where there is one, else the same name for the same reference clip."""
    named = prompts.columns.get("voice", [None] * len(prompts))
    references = zip(prompts.reference_audio.cpu(), prompts.reference_lengths_samples.tolist(), strict=True)
    same_clip = [hashlib.sha256(clip[:length].numpy().tobytes()).hexdigest() for clip, length in references]
    return [clip if voice is None else str(voice) for voice, clip in zip(named, same_clip, strict=True)]
