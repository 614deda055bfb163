"""What a reward model is: its declarations, and how they are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from rlhf_mel.types import Audio, Prompts

NEEDS = frozenset({"text", "reference"})


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

    def score(self, audio: Audio, prompts: Prompts) -> Float[Tensor, " b"]:
        """The score of each item, higher is better."""
        ...


RewardFunction = Callable[..., Sequence[float | None]]


RewardSpec = str | RewardModel | RewardFunction


def check_declarations(model: Any) -> None:
    """Raise TypeError unless a reward model says all that `RewardModel` asks for."""
    who = f"reward {getattr(model, 'name', type(model).__name__)!r}"
    absent = [name for name in RewardModel.__annotations__ if not hasattr(model, name)]
    if absent:
        raise TypeError(f"{who} does not declare {absent}; see rlhf_mel.rewards.base.RewardModel")
    if model.domain not in ("waveform", "mel"):
        raise TypeError(f"{who}: domain must be 'waveform' or 'mel', got {model.domain!r}")
    if not NEEDS.issuperset(model.needs):
        raise TypeError(f"{who}: needs must be of {sorted(NEEDS)}, got {sorted(model.needs)}")
    if model.sample_rate_hz is not None and model.sample_rate_hz <= 0:
        raise TypeError(f"{who}: sample_rate_hz must be positive or None, got {model.sample_rate_hz!r}")
    if not model.range[0] < model.range[1]:
        raise TypeError(f"{who}: range must be (low, high), got {model.range!r}")
