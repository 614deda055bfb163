"""DRaFT-LV: DRaFT-1 with less variance, from one rollout whose last step is taken n times from fresh noise.

    x_1 by all K steps without gradient;   t the last time of the grid;   for i = 1 ... n
    x_t^i = (1 - t) eps_i + t x_1,   eps_i ~ N(0, I);   x_1^i = x_t^i + (1 - t) v(x_t^i, t)
    loss = mean_i mean_B [ -r(vocoder(x_1^i)) + beta anchor^i ],   d x_1^i / d theta through that velocity only

The paper adds the noise of the last step to the sample and denoises it again, with gradient, n times. By path.py noisy
x_1 is (1 - t) eps + t x_1: if x_1 has the distribution of the flow, each x_t^i has its marginal at t, as the state from
which DRaFT-1 takes its step, and the mean of the gradient is DRaFT-1's. Given x_1 the n gradients are independent, so
what the last noise adds to the variance is divided by n, for n passes of one step and not of K:

    Var = Var(E[g | x_1]) + E Var(g | x_1) / n.

(A policy solved in few steps has not quite the distribution of its flow, and the means differ by as much.)

Reference: Clark et al. 2023, Directly Fine-Tuning Diffusion Models on Differentiable Rewards, arXiv 2309.17400; n = 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.base import AlgorithmBase
from rlhf_mel.algorithms.families.pathwise import draft_loss, pathwise_scores
from rlhf_mel.flow.noise import branched, item_generators, item_noise
from rlhf_mel.flow.path import interpolate
from rlhf_mel.flow.policy import rollout, with_durations
from rlhf_mel.flow.start_states import Restarted, begin_at
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts


def renoised(
    x1: Float[Tensor, "b n m"], durations_frames: Int[Tensor, " b"], t: Float[Tensor, ""], generator: torch.Generator
) -> list[Tensor]:
    """(1 - t) eps + t x_1 of each row, [n, m], cut to its own frames; distinct noise for each."""
    frames = durations_frames.tolist()
    noise = item_noise(frames, x1.shape[-1], item_generators(generator, len(x1)), x1.device, x1.dtype)
    return [state[:length] for state, length in zip(interpolate(noise, x1, t), frames, strict=True)]


class DraftLV(AlgorithmBase):
    """DRaFT-1 with n last steps from each rollout; see the top."""

    name = "draft_lv"
    reward_gradient = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How many last steps there are."""

        num_renoisings: int = 2
        """n: last steps taken from one sample. Each costs one velocity with gradient, one vocoder and reward pass."""

        def __post_init__(self) -> None:
            if not isinstance(self.num_renoisings, int) or self.num_renoisings < 1:
                raise ValueError(
                    f"num_renoisings of draft_lv: expected a whole number of at least 1, got {self.num_renoisings!r}"
                )

    config: Config

    @override
    def loss(
        self, pipeline: Pipeline, collected: Prompts, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        policy, sampling = pipeline.policy, pipeline.sampling
        options = dataclasses.asdict(sampling)
        collected = with_durations(policy, collected, branched(generator, len(collected)))
        samples = rollout(policy, collected, generator=generator, grad_steps=0, return_trajectory=True, **options)
        assert samples.trajectory is not None
        # group_ids would make groups of the n last steps
        copies = dataclasses.replace(collected, group_ids=None)
        copies = copies.select([row for row in range(len(collected)) for _ in range(self.config.num_renoisings)])
        assert copies.durations_frames is not None
        x1 = samples.trajectory[-1].repeat_interleave(self.config.num_renoisings, dim=0)
        times = policy.timesteps(sampling.steps, sway_sampling_coef=sampling.sway_sampling_coef)[-2:]
        states = renoised(x1, copies.durations_frames, times[0], generator)
        last_step = dataclasses.replace(pipeline, policy=Restarted(policy, times))
        rollouts, anchor = last_step.rollout(begin_at(copies, states), generator, grad_steps=1)
        rewards, metrics = pathwise_scores(pipeline, rollouts, copies)
        return draft_loss(rewards, anchor, self.beta), metrics | {"anchor": anchor.detach()}


algorithm = DraftLV
