"""What training did to held-out prompts: the trained reward beside judges that no one trained on, and a verdict.

A reward that goes up proves nothing by itself; it is what was optimised. `evaluate` lets the policy speak every
held-out prompt with noise seeded by (seed, row), so that before and after differ in the weights alone, and measures

| measure            | what                                                                               | better |
|--------------------|------------------------------------------------------------------------------------|--------|
| rewards/NAME       | the trained rewards; `reward`: their weighted sum                                  | high   |
| dnsmos_ovrl, _sig, _bak | DNSMOS P.835 (Reddy et al. 2022, arXiv 2110.01763): overall, speech, background | high |
| cer                | character error rate of the recognizer's greedy transcript, (S + D + I) / N        | low    |
| voice_similarity   | cosine of the recognizer's voice embeddings of the generated and the reference mel | high   |
| level_dbfs         | 10 log10 mean power of the speech frames; a full-scale sine is -3.01               | same   |
| silence_ratio      | share of 20 ms frames without speech                                               | same   |
| duration_s         | 20 ms times the frames with speech                                                 | same   |
| f0_std_semitones   | standard deviation of the pitch of voiced frames: monotone speech is low           | same   |
| clipping_ratio     | share of samples at full scale, |x| >= 0.999                                       | low    |

A frame has no speech if it is more than 40 dB below the clip's loud level (the 95th percentile of its frames), or below
-60 dBFS. DNSMOS depends on the level, 0.05 for 6 dB on one clip: the guard on the level bounds that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jiwer
import numpy as np
import torch
from torch import Tensor

from rlhf_mel.algorithms.base import pool
from rlhf_mel.audio import MelSpec, log_mel, resample
from rlhf_mel.policy import Policy, rollout
from rlhf_mel.recognizer import Recognizer, normalize_text
from rlhf_mel.rewards import Rewards
from rlhf_mel.sound import sound
from rlhf_mel.types import Audio, Prompts, Rollout
from rlhf_mel.vocoders import Vocoder

JUDGE_SAMPLE_RATE_HZ = 16_000
"""What DNSMOS hears, and what is enough for pitch."""
FRAME_S = 0.02
QUIET_POWER_RATIO = 1e-4
"""-40 dB relative to the loud frames of the clip."""
SILENCE_POWER = 1e-6
"""-60 dBFS."""

Judge = Callable[[Audio], Mapping[str, Tensor]]
"""A pure function of the sound: measures by name, each float [B]."""


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
    ) -> Rollout: ...


def plain(policy: Policy, prompts: Prompts, **options: Any) -> Rollout:
    """One rollout of each prompt: policy.rollout without gradients."""
    return rollout(policy, prompts, grad_steps=0, **options)


@dataclass(frozen=True)
class EvaluationResult:
    """One evaluation: a value a prompt for each measure, and what was heard."""

    measures: Mapping[str, Sequence[float]]
    """By name, one float a prompt, NaN where it could not be taken; rewards as `reward` and `rewards/NAME`."""
    waveforms: Sequence[Tensor]
    """What the policy said: one float32 [S] a prompt, on the CPU."""
    sample_rate_hz: int
    transcripts: Sequence[str]
    """What the recognizer heard; empty without one."""

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
    steps: int = 16,
    cfg_strength: float = 2.0,
    sway_sampling_coef: float | None = -1.0,
    method: str = "euler",
    seed: int = 0,
    recognizer: Recognizer | None = None,
    judges: Sequence[Judge] | None = None,
    batch_size: int = 8,
    sampler: Sampler = plain,
) -> EvaluationResult:
    """Let the policy speak all `prompts` and measure what is heard; nothing is trained, no gradient is kept.

    Args:
        recognizer: without it there is no `cer` and no `voice_similarity`.
        judges: functions of the sound; None: `DEFAULT_JUDGES`.
        batch_size: prompts at a time; changes memory and speed, not the result.
        sampler: how the policy is made to speak: once, or say `best_of_n.BestOfN`, `guidance.NoiseOptimisation`.
    """
    if recognizer is not None and recognizer.mel_spec != vocoder.mel_spec:
        raise ValueError(
            f"evaluate: expected a recognizer of the vocoder's mels {vocoder.mel_spec}, got {recognizer.mel_spec}"
        )
    measures: dict[str, list[float]] = {}
    waveforms: list[Tensor] = []
    transcripts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        part = prompts.select(rows)
        spoken = sampler(
            policy,
            part,
            steps=steps,
            cfg_strength=cfg_strength,
            sway_sampling_coef=sway_sampling_coef,
            method=method,
            generator=[item_generator(seed, row) for row in rows],
        )
        with torch.no_grad():
            audio = sound(vocoder, spoken)
            scores = rewards(audio, part)
            measured: dict[str, Any] = {"reward": scores.total}
            measured |= {f"rewards/{name}": values for name, values in scores.breakdown.items()}
            for judge in DEFAULT_JUDGES if judges is None else judges:
                measured |= judge(audio)
            if recognizer is not None:
                heard = recognizer.transcribe(audio.mel, audio.lengths_frames)
                transcripts += heard
                measured["cer"] = character_error_rates(part.texts, heard)
                measured["voice_similarity"] = voice_similarity(recognizer, audio, part)
        for name, values in measured.items():
            measures.setdefault(name, []).extend(torch.as_tensor(values).double().tolist())
        waveforms += clips(audio)
    return EvaluationResult(measures, waveforms, vocoder.sample_rate_hz, transcripts)


def item_generator(seed: int, row: int) -> torch.Generator:
    """The noise of one prompt: the same whatever batch it is in, different for each seed and row."""
    mixed = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))


def clips(audio: Audio) -> list[Tensor]:
    """The B waveforms, each [S] at its own length: float32, on the CPU, without gradient."""
    rows = audio.waveform.detach().float().cpu()
    return [row[:length] for row, length in zip(rows, audio.lengths_samples.tolist(), strict=True)]


def dnsmos(audio: Audio) -> dict[str, Tensor]:
    """DNSMOS P.835 of each clip, 1 to 5, as the package `speechmos` computes it.

    It repeats a clip shorter than 9.01 s by doubling it (for an empty clip, forever), and refuses |x| > 1.
    """
    from speechmos import dnsmos as package  # loads librosa and ONNX Runtime

    def judged(clip: Tensor) -> dict[str, float]:
        if clip.numel() == 0 or not bool(clip.isfinite().all()):
            raise ValueError("dnsmos: expected a finite waveform, got an empty one, NaN or infinity")
        heard = resample(clip[None], audio.sample_rate_hz, JUDGE_SAMPLE_RATE_HZ)[0].clamp(-1, 1)
        return package.run(heard.numpy(), JUDGE_SAMPLE_RATE_HZ)

    results = [judged(clip) for clip in clips(audio)]
    return {
        f"dnsmos_{name}": torch.tensor([float(result[f"{name}_mos"]) for result in results])
        for name in ("ovrl", "sig", "bak")
    }


def signal(audio: Audio) -> dict[str, Tensor]:
    """Level, silence, duration, pitch and clipping of each clip; see the module's docstring."""
    measured = [_signal(clip, audio.sample_rate_hz) for clip in clips(audio)]
    return {name: torch.tensor([clip[name] for clip in measured]) for name in measured[0]}


DEFAULT_JUDGES: tuple[Judge, ...] = (dnsmos, signal)


def _signal(waveform: Tensor, sample_rate_hz: int) -> dict[str, float]:
    power, speech = speech_frames(waveform, sample_rate_hz)
    speech_power = power[speech].sum().item() / max(int(speech.sum()), 1)
    return {
        "level_dbfs": 10 * math.log10(speech_power + 1e-20),
        "silence_ratio": 1 - speech.double().mean().item(),
        "duration_s": FRAME_S * int(speech.sum()),
        "f0_std_semitones": f0_std_semitones(waveform, sample_rate_hz),
        "clipping_ratio": (waveform.abs() >= 0.999).double().mean().item(),
    }


def speech_frames(waveform: Tensor, sample_rate_hz: int) -> tuple[Tensor, Tensor]:
    """Power [F] of the whole 20 ms frames of [S], and which of them hold speech (bool [F])."""
    frame = round(FRAME_S * sample_rate_hz)
    if len(waveform) < frame:
        raise ValueError(f"expected at least {frame} samples ({FRAME_S:g} s), got {len(waveform)}")
    power = waveform.double().unfold(0, frame, frame).square().mean(-1)
    loud = power.quantile(0.95).item()
    return power, power > max(loud * QUIET_POWER_RATIO, SILENCE_POWER)


def f0_std_semitones(waveform: Tensor, sample_rate_hz: int) -> float:
    """Standard deviation of 12 log2 f0 over voiced frames (pYIN, Mauch & Dixon 2014); NaN without any.

    Frames more than an octave from the median are errors of the pitch tracker, and left out.
    """
    import librosa  # slow to import

    heard = resample(waveform[None], sample_rate_hz, JUDGE_SAMPLE_RATE_HZ)[0].numpy()
    f0_hz, voiced, _ = librosa.pyin(
        heard, fmin=60, fmax=500, sr=JUDGE_SAMPLE_RATE_HZ, frame_length=1024, hop_length=256
    )
    if not voiced.any():
        return math.nan
    semitones = 12 * np.log2(f0_hz[voiced])
    near = np.abs(semitones - np.median(semitones)) < 12
    return float(semitones[near].std())


def character_error_rates(texts: Sequence[str], transcripts: Sequence[str]) -> list[float]:
    """(substitutions + deletions + insertions) / characters of each text, both in the recognizer's letters."""
    return [jiwer.cer(normalize_text(text), transcript) for text, transcript in zip(texts, transcripts, strict=True)]


def voice_similarity(recognizer: Recognizer, audio: Audio, prompts: Prompts) -> Tensor:
    """Cosine [B] between the voice of the generated mel and that of the reference clip."""
    mel, lengths_frames = reference_mels(prompts, recognizer.mel_spec)
    references = recognizer.voice_embedding(mel.to(audio.mel.device), lengths_frames.to(audio.mel.device))
    spoken = recognizer.voice_embedding(audio.mel, audio.lengths_frames)
    return torch.cosine_similarity(spoken, references, dim=-1)


def reference_mels(prompts: Prompts, spec: MelSpec) -> tuple[Tensor, Tensor]:
    """Mels [B, T, M] of the reference clips, and the frames of each; one by one, or padding reaches the last frames."""
    mels = [
        log_mel(resample(clip[None, :length], prompts.sample_rate_hz, spec.sample_rate_hz), spec)[0]
        for clip, length in zip(prompts.reference_audio, prompts.reference_lengths_samples.tolist(), strict=True)
    ]
    lengths_frames = torch.tensor([len(mel) for mel in mels], device=mels[0].device)
    return torch.nn.utils.rnn.pad_sequence(mels, batch_first=True), lengths_frames


def _finite_mean(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else math.nan


@dataclass(frozen=True)
class Guard:
    """How far a measure may move. `change` is after minus before: of the means, or of the worst prompt."""

    limit: str
    holds: Callable[[float], bool]
    change: Callable[[np.ndarray, np.ndarray], float] = lambda before, after: float(np.mean(after) - np.mean(before))


SLACK = 1e-6
"""A change at its limit is within it, whatever rounding says."""

GUARDS: Mapping[str, Guard] = {
    "dnsmos_ovrl": Guard("rise of at least 0.05", lambda change: change >= 0.05 - SLACK),
    "cer": Guard("rise of at most 0.01", lambda change: change <= 0.01 + SLACK),
    "voice_similarity": Guard("drop of at most 0.02", lambda change: change >= -0.02 - SLACK),
    "level_dbfs": Guard("within 1.5 dB", lambda change: abs(change) <= 1.5 + SLACK),
    "silence_ratio": Guard(
        "no clip up by more than 0.2",
        lambda change: change <= 0.2 + SLACK,
        lambda before, after: float(np.max(after - before)),
    ),
    "duration_s": Guard(
        "no clip down by more than 20 %",
        lambda change: change >= -0.2 - SLACK,
        lambda before, after: float(np.min(after / np.maximum(before, FRAME_S) - 1)),
    ),
    "f0_std_semitones": Guard(
        "mean down by no more than 20 %",
        lambda change: change >= -0.2 - SLACK,
        lambda before, after: _finite_mean(after) / _finite_mean(before) - 1,
    ),
}
"""What an improvement must respect. The first is the judge: it has to agree."""

CONFIRMED = "confirmed"
NOT_CONVINCED = "reward up, judge not convinced"
NOT_IMPROVED = "reward not improved"


def verdict(before: EvaluationResult, after: EvaluationResult) -> dict[str, Any]:
    """Whether the judges confirm what the reward says, for the same prompts and seed; JSON-ready.

    `overall`: "confirmed" if the mean reward rose, DNSMOS was measured, and every measured guard is ok; "reward up,
    judge not convinced" if the reward rose and one of these fails; else "reward not improved". `guards`: by measure
    `before` and `after` (means), `change`, `standard_error` of the paired difference over prompts, `limit`, and
    `status`: "ok", "worse" or "not measured".
    """
    guards = {name: _guard(name, guard, before, after) for name, guard in GUARDS.items()}
    reward = _compared("reward", before, after)
    improved = reward["change"] > 0
    agreed = guards["dnsmos_ovrl"]["status"] == "ok" and all(guard["status"] != "worse" for guard in guards.values())
    overall = NOT_IMPROVED if not improved else CONFIRMED if agreed else NOT_CONVINCED
    return {
        "overall": overall,
        "reward": {**reward, "status": "ok" if improved else "worse"},
        "guards": guards,
    }


def _guard(name: str, guard: Guard, before: EvaluationResult, after: EvaluationResult) -> dict[str, Any]:
    if name not in before.measures or name not in after.measures:
        return {"limit": guard.limit, "status": "not measured"}
    change = guard.change(np.array(before.measures[name]), np.array(after.measures[name]))
    status = "ok" if guard.holds(change) else "worse"  # NaN does not hold
    return {**_compared(name, before, after), "change": change, "limit": guard.limit, "status": status}


def _compared(name: str, before: EvaluationResult, after: EvaluationResult) -> dict[str, float]:
    """Means over the prompts that have a value both times, their difference and its standard error."""
    pairs = np.array([before.measures[name], after.measures[name]])
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    if not pairs.shape[1]:
        return {"before": math.nan, "after": math.nan, "change": math.nan, "standard_error": math.nan}
    means = pairs.mean(1)
    spread = np.diff(pairs, axis=0).std(ddof=1) if pairs.shape[1] > 1 else math.nan
    return {
        "before": float(means[0]),
        "after": float(means[1]),
        "change": float(means[1] - means[0]),
        "standard_error": float(spread / math.sqrt(pairs.shape[1])),
    }
