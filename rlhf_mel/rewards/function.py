"""A plain function as a reward, in TRL's way: keyword arguments in, a list of floats out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.rewards.base import RewardFunction
from rlhf_mel.types import Audio, Prompts

FUNCTION_KEYWORDS = (
    "prompts",
    "completions",
    "sample_rate_hz",
    "reference_audio",
    "reference_texts",
    "reference_sample_rate_hz",
)


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

    def score(self, audio: Audio, prompts: Prompts) -> Float[Tensor, " b"]:
        """What the function returns, in float32; NaN where the function returned None."""
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
