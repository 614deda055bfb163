"""Flow-GRPO: rollouts of one prompt compete; what the better ones did at random becomes more probable.

    A_i = (r_i - mean_group) / std_group;    loss: see families/policy_gradient.py

Rewards need no gradient. The steps of a window are those of an SDE with the flow's own marginals, all others of the
ODE (see flow/sde_rollout.py). The window decides the variant:

    window_size = null, window_range = [0, K]     Flow-GRPO: every step (with sde = flow_sde; others: [0, K - 1])
    window_size = 2                               Flow-GRPO-Fast: a window drawn anew for each batch (the default)
    window_size = 4, window_shift_every = 25      MixGRPO: a window that moves on by a step every 25 updates
    guard = true                                  GRPO-Guard

References: Liu et al. 2025, Flow-GRPO, arXiv 2505.05470, and its repository (Fast, defaults); Li et al. 2025, MixGRPO,
arXiv 2507.21802; Wang et al. 2025, GRPO-Guard, arXiv 2510.22319. Flow-GRPO trains best without guidance, which is
--train_cfg_strength 0; FlowTTS-GRPO (arXiv 2606.23190) found the same of F5-TTS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from rlhf_mel.algorithms.base import Clip
from rlhf_mel.algorithms.families.advantages import check_scaling, score_advantages
from rlhf_mel.algorithms.families.policy_gradient import (
    PolicyGradientAlgorithm,
    ScoredTrajectories,
    check_clipping,
    check_sde_window,
)
from rlhf_mel.flow.sde import SDE
from rlhf_mel.metrics import score_metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts

WINDOW_TIMES = 0.05, 0.5
"""Default window position: times at which its steps begin.

With sway a third of the steps begin before: so short, and with so much noise in what they begin with, that they learn
little (docs/comparison.md).
"""


def window_at(first: int, stop: int, size: int | None, position: int) -> range:
    """The window of `size` steps at `position`, modulo the places there are in the steps [first, stop)."""
    size = stop - first if size is None else size
    start = first + position % (stop - first - size + 1)
    return range(start, start + size)


class FlowGRPO(PolicyGradientAlgorithm):
    """PPO on a window of random steps, rewards compared within the group; see the top."""

    name = "flow_grpo"
    needs_groups = True
    default_beta = 0.04

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Noise, window, clipping, and how advantages are scaled."""

        sde: str = "exponential"
        """Noise of the random steps: 'exponential', 'flow_sde' (the paper's) or 'flow_cps' (see flow/sde.py)."""
        noise_level: float = 0.7
        """Its size a. flow_grpo: 0.7, with 'flow_cps' 0.8; FlowTTS-GRPO: 0.5."""
        window_size: int | None = 2
        """Random steps of a rollout, in a row; null: all of window_range."""
        window_range: Sequence[int] | None = None
        """Steps [first, stop) that the window lies in; null: those that begin at 0.05 <= t < 1/2 (see WINDOW_TIMES).

        Where these are fewer than window_size, some before them too. flow_grpo's Fast takes the first half of its
        steps, which with sway would be t < 0.08.
        """
        window_shift_every: int | None = None
        """Updates after which the window moves on by one step, at the end back to the beginning; null: random."""
        shared_prior: bool = False
        """Start the rollouts of a group at the same noise: they then differ by the window's noise only."""
        epsilon: float = 1e-4
        """Clip range of the ratio, which is per element: of a likelihood it would be epsilon times their number."""
        epsilon_high: float | None = None
        """Upper clip range; null: epsilon."""
        scale_rewards: str = "group"
        """Divide advantages by the standard deviation of their 'group', the 'batch' (one device's), or by 'none'."""
        multi_objective_aggregation: str = "sum_then_normalize"
        """Several rewards: sum them, then normalise ('sum_then_normalize'), or each first ('normalize_then_sum')."""
        advantage_clip: float = 5.0
        """Largest size of an advantage."""
        guard: bool = False
        """Ratio and step weights of GRPO-Guard; its epsilon is smaller still, 2e-6 in verl-omni."""

        def __post_init__(self) -> None:
            check_clipping("flow_grpo", self.epsilon, self.epsilon_high, self.advantage_clip)
            check_scaling("flow_grpo", self.scale_rewards, self.multi_objective_aggregation)
            self._check_window()
            SDE(kind=self.sde, noise_level=self.noise_level)  # raises

        def _check_window(self) -> None:
            for option in ("window_size", "window_shift_every"):
                value = getattr(self, option)
                if value is not None and (not isinstance(value, int) or value < 1):
                    raise ValueError(
                        f"{option} of flow_grpo: expected a whole number of at least 1, or null, got {value!r}"
                    )
            bounds = self.window_range
            if bounds is not None and (len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]):
                raise ValueError(f"window_range of flow_grpo: expected [first, stop) with first < stop, got {bounds!r}")

    config: Config

    def __init__(self, config: Config | None = None, *, beta: float = 0.0) -> None:
        super().__init__(config, beta=beta)
        self._updates = 0

    @override
    def check(self, pipeline: Pipeline) -> None:
        first, stop = self._window_range(pipeline)
        check_sde_window(self.name, pipeline, self.step_noise, range(first, stop))
        if (self.config.window_size or 1) > stop - first:
            raise ValueError(
                f"window_size of flow_grpo: expected at most the {stop - first} steps of [{first}, {stop}), got "
                f"{self.config.window_size}; set window_range or raise sampling_steps"
            )

    @property
    @override
    def clip(self) -> Clip:
        return Clip.of(self.config.epsilon, self.config.epsilon_high, guard=self.config.guard)

    def _window_range(self, pipeline: Pipeline) -> tuple[int, int]:
        if self.config.window_range is not None:
            first, stop = self.config.window_range
            return first, stop
        sampling = pipeline.sampling
        t = pipeline.policy.timesteps(sampling.steps, sway_sampling_coef=sampling.sway_sampling_coef)
        first, stop = (int((t < time).sum()) for time in WINDOW_TIMES)
        stop = min(stop, self.step_noise.random_steps(sampling.steps).stop)
        return max(1, min(first, stop - (self.config.window_size or 1))), stop

    def _window(self, pipeline: Pipeline, generator: torch.Generator) -> range:
        every = self.config.window_shift_every
        drawn = int(torch.randint(2**31, (), generator=generator))
        position = drawn if every is None else self._updates // every
        return window_at(*self._window_range(pipeline), self.config.window_size, position)

    @override
    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> ScoredTrajectories:
        config, window = self.config, self._window(pipeline, generator)
        rollouts, trajectories = pipeline.sde_rollout(
            prompts, generator, sde=self.step_noise, window=window, shared_prior=config.shared_prior
        )
        scores = pipeline.score(rollouts, prompts)
        advantages = score_advantages(
            scores,
            dict(zip(pipeline.rewards.names, pipeline.rewards.weights, strict=True)),
            prompts.group_ids,
            scale_rewards=config.scale_rewards,
            multi_objective_aggregation=config.multi_objective_aggregation,
        )
        dropped = ~scores.total.isfinite()
        return ScoredTrajectories(
            trajectories=trajectories,
            advantages=advantages.clamp(-config.advantage_clip, config.advantage_clip),
            dropped=dropped,
            metrics=score_metrics(scores, prompts.group_ids)
            | {"dropped_rollouts": dropped, "window_start": torch.tensor(float(window.start))},
        )

    @override
    def on_update(self, pipeline: Pipeline) -> None:
        self._updates += 1

    def state_dict(self) -> dict[str, int]:
        """How many updates there were: where the window is."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` gave."""
        self._updates = state["updates"]


algorithm = FlowGRPO
