"""What samplers share that ask a reward: how a rollout is judged."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rlhf_mel.pipeline import vocode
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.types import Prompts, Rollout
from rlhf_mel.vocoders import Vocoder


@dataclass(frozen=True, kw_only=True)
class RewardSampler:
    """A sampler that is guided by rewards: `evaluate(..., sampler=BestOfN(vocoder=..., rewards=...))`."""

    vocoder: Vocoder
    """What the rewards hear mels by."""
    rewards: Rewards
    """To be others than those that judge the result, or the result says little."""

    def total(self, rollouts: Rollout, prompts: Prompts) -> Float[Tensor, " b"]:
        """Weighted sum of the rewards, with its gradient where vocoder and rewards have one."""
        return self.rewards(vocode(self.vocoder, rollouts), prompts).total
