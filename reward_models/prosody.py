"""How close the liveliness of the pitch comes to what was asked for: rewards are easily paid by monotone speech.

    score = -|s - target|,    s: standard deviation of the pitch of voiced frames, in semitones (see speech/pitch.py)

0 is best. The target is the reference clip's own spread, or a given one; it has two sides, so that a pitch that runs
wild pays as little as one that does not move. A clip with too little voice counts as monotone, its gradient is 0.
Rewards of error rates alone make speech monotone (Shin et al. 2025, arXiv:2509.18531); so did MOS with words here.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.rewards.distance import Distance
from rlhf_mel.speech.pitch import pitch_spread


class Prosody(Distance):
    """Distance from a spread of pitch as a frozen reward model."""

    name = "prosody"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the reward `prosody`."""

        target_semitones: float | None = None
        """Standard deviation of the pitch asked for; None: that of each prompt's reference clip."""

        def __post_init__(self) -> None:
            target = self.target_semitones
            if target is None:
                return
            if isinstance(target, bool) or not isinstance(target, int | float) or not 0 <= target <= 12:
                raise ValueError(
                    "target_semitones of reward 'prosody': expected 0 to 12, or none for the reference's, got "
                    f"{target!r}"
                )

    def __init__(self, config: Config | None = None) -> None:
        super().__init__((config or self.Config()).target_semitones)

    @override
    def measure(self, clip: Float[Tensor, " s"], rate_hz: int) -> Float[Tensor, ""]:
        spread = pitch_spread(clip, rate_hz)
        return 0.0 * clip.sum() if spread is None else spread


reward_model = Prosody
