"""How close the loudness of the speech comes to what was asked for, so that no other reward is paid by being louder.

    score = -|L - target| in LU (a LU is a dB),    L: loudness by ITU-R BS.1770-4, K-weighted and gated, in LUFS

0 is best. The target is the reference clip's own loudness, or a given one. What is below -70 LUFS, the recommendation's
gate, counts as -70, its gradient is 0. The slope is the same however far off: what is trained is pulled by its median,
and a few takes that are far off do not outweigh the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.rewards.distance import Distance
from rlhf_mel.speech.audio import loudness_lufs

GATE_LUFS = -70.0


class Level(Distance):
    """Distance from a loudness as a frozen reward model."""

    name = "level"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the reward `level`."""

        target_lufs: float | None = None
        """Loudness asked for, -70 to 0 LUFS; None: that of each prompt's reference clip."""

        def __post_init__(self) -> None:
            target = self.target_lufs
            if target is None:
                return
            if isinstance(target, bool) or not isinstance(target, int | float) or not GATE_LUFS <= target <= 0:
                raise ValueError(
                    f"target_lufs of reward 'level': expected -70 to 0, or none for the reference's, got {target!r}"
                )

    def __init__(self, config: Config | None = None) -> None:
        super().__init__((config or self.Config()).target_lufs)

    @override
    def measure(self, clip: Float[Tensor, " s"], rate_hz: int) -> Float[Tensor, ""]:
        loudness = loudness_lufs(clip, rate_hz).to(clip.dtype)
        return loudness if bool(loudness > GATE_LUFS) else GATE_LUFS + 0.0 * clip.sum()


reward_model = Level
