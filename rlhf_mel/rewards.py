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

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_mel.audio import lengths_to_mask, resample, resampled_length
from rlhf_mel.types import Audio, Prompts, Scores

NEEDS = frozenset({"text", "reference"})
FUNCTION_KEYWORDS = (
    "prompts",
    "completions",
    "sample_rate_hz",
    "reference_audio",
    "reference_texts",
    "reference_sample_rate_hz",
)


@runtime_checkable
class RewardModel(Protocol):
    """A frozen judge. A batch scores as its items alone do, and padding does not count."""

    name: str
    """How metrics call it: `rewards/<name>/mean`."""
    differentiable: bool
    """Whether the score has a gradient with respect to what it hears."""
    domain: Literal["waveform", "mel"]
    """Which of the two it hears; the gradient flows there."""
    sample_rate_hz: int | None
    """Rate at which it hears the waveform; None: whatever the vocoder makes."""
    needs: frozenset[str]
    """Of "text" and "reference" (the voice's clip): what it reads of the prompts."""
    range: tuple[float, float]
    """Lowest and highest score, inclusive; may be infinite."""

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        """Float [B], higher is better."""
        ...


RewardFunction = Callable[..., Sequence[float | None]]
RewardSpec = str | RewardModel | RewardFunction


class FunctionReward:
    """A plain function as a reward model without gradient.

    It is called with keywords: `prompts` (B texts), `completions` (B float32 numpy waveforms [S], each at its own
    length), `sample_rate_hz`, `reference_audio` (B waveforms), `reference_texts`, `reference_sample_rate_hz`, and every
    other column of the data set by its name. A function without `**kwargs` gets only those it names. It returns B
    floats, or None for a row it skips. An attribute `sample_rate_hz` of the function asks for that sample rate.
    """

    differentiable = False
    domain: Literal["waveform", "mel"] = "waveform"
    needs: frozenset[str] = frozenset()
    range = (-math.inf, math.inf)

    def __init__(self, function: RewardFunction, name: str | None = None) -> None:
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"reward {function.__name__!r}: expected a plain function, got an async one; "
                "wrap the call in asyncio.run"
            )
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self.sample_rate_hz: int | None = getattr(function, "sample_rate_hz", None)
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        self._takes_any = len(named) < len(parameters)
        self._named = {p.name for p in named}
        self._required = {p.name for p in named if p.default is inspect.Parameter.empty}

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        """Float32 [B]; NaN where the function returned None."""
        values = self.values(audio, prompts)
        return torch.tensor([math.nan if value is None else value for value in values])

    def values(self, audio: Audio, prompts: Prompts) -> list[float | None]:
        """What the function returns: a float or None for each row."""
        values = self.function(**self._keywords(audio, prompts))
        if isinstance(values, Tensor) or hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, Sequence) or len(values) != len(prompts):
            got = f"{len(values)} values" if isinstance(values, Sequence) else repr(values)
            raise ValueError(f"reward {self.name!r} must return a list of {len(prompts)} floats or None, got {got}")
        return [None if value is None else float(value) for value in values]

    def _keywords(self, audio: Audio, prompts: Prompts) -> dict[str, Any]:
        if clash := sorted(set(prompts.columns) & set(FUNCTION_KEYWORDS)):
            raise ValueError(
                f"reward {self.name!r}: columns {clash} carry the name of a keyword that every reward function "
                "gets; rename the columns"
            )
        available = {
            "prompts": list(prompts.texts),
            "completions": _waveforms(audio.waveform, audio.lengths_samples),
            "sample_rate_hz": audio.sample_rate_hz,
            "reference_audio": _waveforms(prompts.reference_audio, prompts.reference_lengths_samples),
            "reference_texts": list(prompts.reference_texts),
            "reference_sample_rate_hz": prompts.sample_rate_hz,
            **prompts.columns,
        }
        if missing := sorted(self._required - set(available)):
            raise ValueError(
                f"reward {self.name!r} needs {missing}: expected some of {sorted(available)}; "
                "add the column to the data set or give the parameter a default"
            )
        return {name: value for name, value in available.items() if self._takes_any or name in self._named}


def _waveforms(waveform: Tensor, lengths_samples: Tensor) -> list[Any]:
    """Float32 numpy arrays without padding; no gradient leaves torch."""
    rows = waveform.detach().float().cpu()
    return [row[:length].numpy() for row, length in zip(rows, lengths_samples.tolist(), strict=True)]


def known_rewards() -> list[str]:
    """The names that `load_reward` takes: the modules of the package `reward_models`."""
    package = importlib.import_module("reward_models")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def load_reward(spec: RewardSpec) -> RewardModel:
    """The reward model called `spec`: "mos", "package.module:Name", a reward model, its class or a plain function.

    Raises:
        ValueError: no such name; the message lists the known ones.
        TypeError: what was found is not a reward.
    """
    found: Any = _find(spec) if isinstance(spec, str) else spec
    if inspect.isclass(found):
        found = found()
    if callable(getattr(found, "score", None)):
        _check_declarations(found)
        return found
    if callable(found):
        return FunctionReward(found)
    raise TypeError(f"reward {spec!r}: expected a reward model or a function, got {type(found).__name__}")


def _find(spec: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    if attribute:
        return _attribute(_import(module_name, spec), attribute, spec)
    if spec not in known_rewards():
        raise ValueError(
            f"unknown reward {spec!r}: expected one of {known_rewards()}, or 'package.module:Name' for your own"
        )
    return _attribute(importlib.import_module(f"reward_models.{spec}"), "reward_model", spec)


def _import(module_name: str, spec: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something of its own
        raise ValueError(
            f"reward {spec!r}: no module {error.name!r}; put its folder on the path, e.g. PYTHONPATH=."
        ) from error


def _attribute(module: Any, attribute: str, spec: str) -> Any:
    if not hasattr(module, attribute):
        raise ValueError(f"reward {spec!r}: module {module.__name__} has no {attribute!r}; define it there")
    return getattr(module, attribute)


def _check_declarations(model: Any) -> None:
    """Raise TypeError unless a reward model says all that `RewardModel` asks for."""
    who = f"reward {getattr(model, 'name', type(model).__name__)!r}"
    absent = [name for name in RewardModel.__annotations__ if not hasattr(model, name)]
    if absent:
        raise TypeError(f"{who} does not declare {absent}; see rlhf_mel.rewards.RewardModel")
    if model.domain not in ("waveform", "mel"):
        raise TypeError(f"{who}: domain must be 'waveform' or 'mel', got {model.domain!r}")
    if not NEEDS.issuperset(model.needs):
        raise TypeError(f"{who}: needs must be of {sorted(NEEDS)}, got {sorted(model.needs)}")
    if model.sample_rate_hz is not None and model.sample_rate_hz <= 0:
        raise TypeError(f"{who}: sample_rate_hz must be positive or None, got {model.sample_rate_hz!r}")
    if not model.range[0] < model.range[1]:
        raise TypeError(f"{who}: range must be (low, high), got {model.range!r}")


class Rewards:
    """Several reward models and their weights as one: `rewards(audio, prompts) -> Scores`.

    Scores are float32, whatever autocast says. A model that is not differentiable hears detached sound, without a
    graph. Every waveform model hears its own sample rate; the gradient passes through the resampling.
    """

    def __init__(self, models: Sequence[RewardSpec], weights: Sequence[float] | None = None) -> None:
        if isinstance(models, str) or not models:
            raise ValueError(f"rewards: expected a list of at least one reward, got {models!r}")
        self.models: list[RewardModel] = [load_reward(model) for model in models]
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
        heard = _as_heard(model, audio)
        if isinstance(model, FunctionReward):
            values = model.values(heard, prompts)
            score = torch.tensor([math.nan if value is None else value for value in values], device=device)
            return score, torch.tensor([value is None for value in values], device=device)
        with torch.set_grad_enabled(model.differentiable and torch.is_grad_enabled()):
            score = model.score(heard, prompts)
    _check_score(model, score, heard)
    return score.float(), torch.zeros(len(prompts), dtype=torch.bool, device=device)


def _as_heard(model: RewardModel, audio: Audio) -> Audio:
    """The sound in float32 at the model's sample rate; detached where the model has no gradient."""
    with torch.set_grad_enabled(model.differentiable and torch.is_grad_enabled()):
        waveform = audio.waveform if audio.waveform.dtype == torch.float64 else audio.waveform.float()
        mel = audio.mel if audio.mel.dtype == torch.float64 else audio.mel.float()
        if not model.differentiable:
            waveform, mel = waveform.detach(), mel.detach()
        heard = replace(audio, waveform=waveform, mel=mel)
        wanted_hz = model.sample_rate_hz
        if model.domain == "mel" or wanted_hz is None or wanted_hz == audio.sample_rate_hz:
            return heard
        lengths = resampled_length(audio.lengths_samples, audio.sample_rate_hz, wanted_hz)
        resampled = resample(waveform, audio.sample_rate_hz, wanted_hz)
        # The resampling filter rings past the end of an item that is not the longest.
        resampled = resampled.where(lengths_to_mask(lengths, resampled.shape[1]), 0.0)
        return replace(heard, waveform=resampled, lengths_samples=lengths, sample_rate_hz=wanted_hz)


def _check_score(model: RewardModel, score: Any, heard: Audio) -> None:
    """Raise unless `score` is what the model promised: float [B], and with a gradient where it has one."""
    expected = (len(heard.waveform),)
    if not isinstance(score, Tensor) or score.shape != expected or not score.is_floating_point():
        got = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"reward {model.name!r}: expected a float tensor of shape {expected}, got {got}")
    source = heard.mel if model.domain == "mel" else heard.waveform
    if model.differentiable and source.requires_grad and not score.requires_grad:
        raise ValueError(
            f"reward {model.name!r} declares a gradient, got a score without one; look for no_grad, detach or numpy "
            "in it, or declare differentiable = False"
        )
