"""Reward models: what they promise, how they are found by name, and how several become one score.

A reward model judges a sound (or its mel) and gives one number an utterance, higher is better. Several are combined as

    total_b = sum_i weight_i * score_i,b

A score that is not finite makes the total of its row NaN: the row has no reward, it is neither bad nor good. A plain
function may skip a row by returning None, as in TRL: the other rewards then make up the total of that row.
Exceptions in a reward propagate.

Names: `load_reward("mos")` is the attribute `reward_model` of `reward_models/mos.py`; the file's name is the registry.
`load_reward("package.module:Name")` is a user's own class, object or plain function. A plain function is called with
keywords, in TRL's way (as `GRPOTrainer` does with `reward_funcs`):

    def brevity(completions: list[np.ndarray], sample_rate_hz: int, **columns) -> list[float | None]:
        return [-len(waveform) / sample_rate_hz for waveform in completions]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.rewards.base import RewardModel, RewardSpec
from rlhf_mel.rewards.function import FunctionReward
from rlhf_mel.rewards.load import load_reward
from rlhf_mel.speech.audio import resample, resampled_length
from rlhf_mel.types import Audio, Prompts, Scores


class Rewards:
    """Several reward models and their weights as one: `rewards(audio, prompts) -> Scores`.

    Scores are float32, whatever autocast says. A model that is not differentiable hears detached sound, without a
    graph. Every waveform model hears its own sample rate; the gradient passes through the resampling.
    """

    def __init__(
        self,
        models: Sequence[RewardSpec],
        weights: Sequence[float] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """weights: one a reward, 1 unless given. options: those of a reward (options.py), by its name in `models`."""
        if isinstance(models, str) or not models:
            raise ValueError(f"rewards: expected a list of at least one reward, got {models!r}")
        options = options or {}
        if unused := sorted(options.keys() - {model for model in models if isinstance(model, str)}):
            raise ValueError(f"rewards: expected options of {list(models)}, got those of {unused}; name it in the list")
        self.models: list[RewardModel] = [
            load_reward(model, options.get(model) if isinstance(model, str) else None) for model in models
        ]
        self.weights = [1.0] * len(self.models) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(self.models):
            raise ValueError(
                f"reward_weights: expected {len(self.models)} for {self.names}, got {len(self.weights)}; "
                "give one a reward"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"reward_weights must be finite, got {self.weights}")
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"rewards: names must differ, got {twice} more than once; name one anew")

    @property
    def names(self) -> list[str]:
        """Of the models, in their order; all differ."""
        return [model.name for model in self.models]

    @property
    def differentiable(self) -> bool:
        """Whether all that has weight has a gradient: what reward gradients (DRaFT, ReFL) need."""
        weighted = zip(self.models, self.weights, strict=True)
        return all(model.differentiable for model, weight in weighted if weight != 0)

    def to(self, device: torch.device | str) -> Rewards:
        """Move, in place, the models that live on a device."""
        for model in self.models:
            if isinstance(model, torch.nn.Module):
                model.to(device)
        return self

    def check(self, prompts: Prompts) -> None:
        """Raise ValueError if `prompts` lack what a model needs, before anything is generated for them."""
        for model in self.models:
            if "text" in model.needs and not all(text.strip() for text in prompts.texts):
                raise ValueError(f"reward {model.name!r} needs the text of every prompt, got an empty one")
            if "reference" in model.needs and not bool((prompts.reference_lengths_samples > 0).all()):
                raise ValueError(f"reward {model.name!r} needs a reference clip for every prompt, got an empty one")

    def __call__(self, audio: Audio, prompts: Prompts) -> Scores:
        """Score B sounds; see the module for what a score that is not finite does.

        Raises:
            ValueError: as many sounds as prompts were expected, or a model returned something else than it promised.
        """
        if len(prompts) != len(audio.waveform):
            raise ValueError(f"rewards: expected {len(prompts)} sounds for as many prompts, got {len(audio.waveform)}")
        breakdown: dict[str, Tensor] = {}
        total = torch.zeros(len(prompts), device=audio.waveform.device)
        scored = torch.zeros(len(prompts), dtype=torch.bool, device=audio.waveform.device)
        for model, weight in zip(self.models, self.weights, strict=True):
            score, skipped = _score(model, audio, prompts)
            breakdown[model.name] = score
            if weight != 0:
                usable = score.where(score.isfinite(), math.nan)
                total = total + weight * usable.masked_fill(skipped, 0.0)
                scored = scored | ~skipped
        return Scores(total=total.masked_fill(~scored, math.nan), breakdown=breakdown)


def _score(model: RewardModel, audio: Audio, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Float32 [B], and bool [B]: rows that a plain function skipped."""
    device = audio.waveform.device
    with torch.autocast(device.type, enabled=False):
        received = _as_heard(model, audio)
        if isinstance(model, FunctionReward):
            values = model.values(received, prompts)
            score = torch.tensor([math.nan if value is None else value for value in values], device=device)
            return score, torch.tensor([value is None for value in values], device=device)
        with torch.set_grad_enabled(model.differentiable and torch.is_grad_enabled()):
            score = model.score(received, prompts)
    _check_score(model, score, received)
    return score.float(), torch.zeros(len(prompts), dtype=torch.bool, device=device)


def _as_heard(model: RewardModel, audio: Audio) -> Audio:
    """The sound in float32 at the model's sample rate; detached where the model has no gradient."""
    with torch.set_grad_enabled(model.differentiable and torch.is_grad_enabled()):
        waveform = audio.waveform if audio.waveform.dtype == torch.float64 else audio.waveform.float()
        mel = audio.mel if audio.mel.dtype == torch.float64 else audio.mel.float()
        if not model.differentiable:
            waveform, mel = waveform.detach(), mel.detach()
        received = replace(audio, waveform=waveform, mel=mel)
        wanted_hz = model.sample_rate_hz
        if model.domain == "mel" or wanted_hz is None or wanted_hz == audio.sample_rate_hz:
            return received
        lengths = resampled_length(audio.lengths_samples, audio.sample_rate_hz, wanted_hz)
        resampled = resample(waveform, audio.sample_rate_hz, wanted_hz)
        # The resampling filter rings past the end of an item that is not the longest.
        resampled = resampled.where(lengths_to_mask(lengths, resampled.shape[1]), 0.0)
        return replace(received, waveform=resampled, lengths_samples=lengths, sample_rate_hz=wanted_hz)


def _check_score(model: RewardModel, score: Any, received: Audio) -> None:
    """Raise unless `score` is what the model promised: float [B], and with a gradient where it has one."""
    expected = (len(received.waveform),)
    if not isinstance(score, Tensor) or score.shape != expected or not score.is_floating_point():
        got = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"reward {model.name!r}: expected a float tensor of shape {expected}, got {got}")
    source = received.mel if model.domain == "mel" else received.waveform
    if model.differentiable and source.requires_grad and not score.requires_grad:
        raise ValueError(
            f"reward {model.name!r} declares a gradient, got a score without one; look for no_grad, detach or numpy "
            "in it, or declare differentiable = False"
        )
