"""DDPO: the policy gradient of the reward through every random step of a rollout, with a clipped ratio; no groups.

    A_i = (r_i - mean) / std,  over the batch of all processes;    loss: see families/policy_gradient.py

In the first update on a batch every ratio is 1 and the gradient is REINFORCE's, -A grad log p_theta. With
`per_prompt_buffer`, mean and std are those of a prompt's own last rewards, once there are enough of them: a prompt that
is hard for everyone then no longer looks bad. Rewards need no gradient.

Reference: Black et al. 2023, Training Diffusion Models with Reinforcement Learning, arXiv 2305.13301, and
github.com/kvablack/ddpo-pytorch (defaults). Their DDIM steps are here the SDE steps of flow/sde_rollout.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.families.advantages import EPSILON, check_scaling
from rlhf_mel.algorithms.families.policy_gradient import (
    PolicyGradientAlgorithm,
    ScoredTrajectories,
    check_clipping,
    check_sde_window,
)
from rlhf_mel.flow.sde import SDE
from rlhf_mel.metrics import score_metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts, Scores


class PromptStatistics:
    """The last rewards of each prompt, by its group id.

    Args:
        scaled: whether advantages are in standard deviations.
    """

    def __init__(self, buffer: int, min_count: int, *, scaled: bool = True) -> None:
        self._buffer = buffer
        self._min_count = min_count
        self._scaled = scaled
        self._rewards: dict[int, deque[float]] = {}

    def advantages(
        self, rewards: Float[Tensor, " b"], group_ids: Sequence[int], everyone: Sequence[tuple[int, float]]
    ) -> Float[Tensor, " b"]:
        """Advantages of `rewards`, 0 where a reward is not finite.

        Args:
            everyone: group id and reward of each rollout of all processes, these included; they are remembered.
        """
        finite = [(group, reward) for group, reward in everyone if math.isfinite(reward)]
        for group, reward in finite:
            self._rewards.setdefault(group, deque(maxlen=max(self._buffer, 1))).append(reward)
        batch = _standardiser([reward for _, reward in finite], self._scaled)
        known = {group for group in group_ids if self._knows(group)}
        of_group = {group: _standardiser(self._rewards[group], self._scaled) for group in known}
        rows = zip(group_ids, rewards.tolist(), strict=True)
        return torch.tensor([of_group.get(group, batch)(reward) for group, reward in rows], device=rewards.device)

    def _knows(self, group: int) -> bool:
        return self._buffer > 0 and len(self._rewards.get(group, ())) >= self._min_count

    def state_dict(self) -> dict[int, list[float]]:
        """The remembered rewards by group id."""
        return {group: list(last) for group, last in self._rewards.items()}

    def load_state_dict(self, state: Mapping[int, Sequence[float]]) -> None:
        """Restore what `state_dict` gave."""
        self._rewards = {group: deque(last, maxlen=max(self._buffer, 1)) for group, last in state.items()}


def _standardiser(rewards: Collection[float], scaled: bool) -> Callable[[float], float]:
    """(r - mean) / (std + 1e-4) over `rewards`, or r - mean; 0 where r is not finite, or where all are equal."""
    values = torch.tensor(list(rewards), dtype=torch.float64)
    if len(set(rewards)) < 2:
        return lambda reward: 0.0
    mean, scale = values.mean().item(), values.std().item() + EPSILON if scaled else 1.0
    return lambda reward: (reward - mean) / scale if math.isfinite(reward) else 0.0


def gathered(values: list[Any]) -> list[Any]:
    """`values` of all processes, in order of their rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    lists: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, values)
    return [value for of_rank in lists for value in of_rank]


class DDPO(PolicyGradientAlgorithm):
    """PPO on every random step, rewards compared with the batch or with a prompt's own past; see the top."""

    name = "ddpo"
    default_beta = 0.0

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Noise, clipping, and what rewards are compared with."""

        sde: str = "exponential"
        """Noise of the random steps: 'exponential', 'flow_sde' or 'flow_cps' (see flow/sde.py)."""
        noise_level: float = 0.7
        """Its size a, see sde.SDE."""
        window_range: Sequence[int] | None = None
        """Steps [first, stop) that are random and trained; null: all that have noise."""
        epsilon: float = 1e-4
        """Clip range of the ratio, which is per element (ddpo-pytorch: 1e-4); infinite: no bound."""
        epsilon_high: float | None = None
        """Upper clip range; null: epsilon."""
        scale_rewards: str = "batch"
        """Divide advantages by the standard deviation of what rewards are compared with ('batch'), or by 'none'."""
        multi_objective_aggregation: str = "sum_then_normalize"
        """Several rewards: sum them, then compare ('sum_then_normalize'), or each first ('normalize_then_sum')."""
        advantage_clip: float = 5.0
        """Largest size of an advantage."""
        per_prompt_buffer: int = 0
        """Rewards that are remembered of each prompt, to compare its rollouts with; 0: none. Paper: 32."""
        per_prompt_min_count: int = 16
        """Rewards of a prompt from which on it is compared with itself instead of with the batch."""

        def __post_init__(self) -> None:
            check_clipping("ddpo", self.epsilon, self.epsilon_high, self.advantage_clip)
            check_scaling("ddpo", self.scale_rewards, self.multi_objective_aggregation, known=("batch", "none"))
            for option, least in (("per_prompt_buffer", 0), ("per_prompt_min_count", 2)):
                value = getattr(self, option)
                if not isinstance(value, int) or value < least:
                    raise ValueError(f"{option} of ddpo: expected a whole number of at least {least}, got {value!r}")
            if 0 < self.per_prompt_buffer < self.per_prompt_min_count:
                raise ValueError(
                    f"per_prompt_buffer of ddpo: expected 0 or at least the per_prompt_min_count of "
                    f"{self.per_prompt_min_count}, got {self.per_prompt_buffer}"
                )
            if self.window_range is not None and len(self.window_range) != 2:
                raise ValueError(f"window_range of ddpo: expected [first, stop), got {self.window_range!r}")
            SDE(kind=self.sde, noise_level=self.noise_level)  # raises

    config: Config

    def __init__(self, config: Config | None = None, *, beta: float = 0.0) -> None:
        super().__init__(config, beta=beta)
        self._statistics: dict[str, PromptStatistics] = {}

    @override
    def check(self, pipeline: Pipeline) -> None:
        check_sde_window(self.name, pipeline, self.step_noise, self._window(pipeline))

    def _window(self, pipeline: Pipeline) -> range:
        if self.config.window_range is not None:
            return range(*self.config.window_range)
        return self.step_noise.random_steps(pipeline.sampling.steps)

    @override
    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> ScoredTrajectories:
        sde, window = self.step_noise, self._window(pipeline)
        rollouts, trajectories = pipeline.sde_rollout(prompts, generator, sde=sde, window=window)
        scores = pipeline.score(rollouts, prompts)
        weights = dict(zip(pipeline.rewards.names, pipeline.rewards.weights, strict=True))
        group_ids = [0] * len(prompts) if prompts.group_ids is None else prompts.group_ids.tolist()
        advantages = self._advantages(scores, weights, group_ids)
        dropped = ~scores.total.isfinite()
        return ScoredTrajectories(
            trajectories=trajectories,
            advantages=advantages.clamp(-self.config.advantage_clip, self.config.advantage_clip),
            dropped=dropped,
            metrics=score_metrics(scores, prompts.group_ids) | {"dropped_rollouts": dropped},
        )

    def _advantages(self, scores: Scores, weights: Mapping[str, float], group_ids: Sequence[int]) -> Tensor:
        """Advantages [B]; of several rewards as in `score_advantages`, compared with the rollouts of all processes."""
        if self.config.multi_objective_aggregation == "sum_then_normalize":
            return self._compared("total", scores.total, group_ids)
        summed = torch.zeros_like(scores.total)
        for name, weight in weights.items():
            if weight != 0:
                reward = scores.breakdown[name].where(scores.total.isfinite(), torch.nan)
                summed += weight * self._compared(name, reward, group_ids)
        summed = summed.where(scores.total.isfinite(), torch.nan)
        everyone = [value for value in gathered(summed.tolist()) if math.isfinite(value)]
        return torch.tensor([*map(_standardiser(everyone, scaled=True), summed.tolist())], device=summed.device)

    def _compared(self, name: str, rewards: Tensor, group_ids: Sequence[int]) -> Tensor:
        everyone = gathered(list(zip(group_ids, rewards.tolist(), strict=True)))
        return self._statistics_of(name).advantages(rewards, group_ids, everyone)

    def _statistics_of(self, name: str) -> PromptStatistics:
        config = self.config
        if name not in self._statistics:
            scaled = config.scale_rewards == "batch" or config.multi_objective_aggregation == "normalize_then_sum"
            buffer, least = config.per_prompt_buffer, config.per_prompt_min_count
            self._statistics[name] = PromptStatistics(buffer, least, scaled=scaled)
        return self._statistics[name]

    def state_dict(self) -> dict[str, dict[int, list[float]]]:
        """The remembered rewards by name of the reward and group id."""
        return {name: statistics.state_dict() for name, statistics in self._statistics.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
        """Restore what `state_dict` gave."""
        for name, rewards in state.items():
            self._statistics_of(name).load_state_dict(rewards)


algorithm = DDPO
