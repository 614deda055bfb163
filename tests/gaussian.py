"""A Gaussian policy whose every quantity is known, for the tests of methods that follow the steps of a rollout.

Frames: `REFERENCE` of the clip, then `GENERATED`; mels of `MELS` channels. The velocity of step k is that of
problems.LinearGaussianFlow plus shift_k + slope_k x with trainable numbers, so with Euler's steps

    x_{k+1} = (1 + dt_k (flow_k + slope_k)) x_k + dt_k (constant_k + shift_k),

where flow_k and constant_k are the flow's own. `exact=True` takes in their place those with which Euler's steps are the
solution of the ODE: x_k ~ N(t_k mean, s_k^2) at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from problems import LinearGaussianFlow, Silent
from torch import Tensor, nn

from rlhf_mel.flow.noise import Generators, item_generators, item_noise
from rlhf_mel.flow.ode import timesteps
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.types import Audio, Prompts

REFERENCE, GENERATED, MELS = 2, 3, 2
ELEMENTS = GENERATED * MELS
FLOW = LinearGaussianFlow()


class GaussianPolicy(nn.Module):
    tokenizer = None
    voices: tuple[str, ...] = ()

    def __init__(
        self,
        steps: int,
        *,
        exact: bool = False,
        grid: Tensor | None = None,
        train_slope: bool = True,
        flow: LinearGaussianFlow = FLOW,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.grid = timesteps(steps, use_epss=False) if grid is None else grid
        self.exact = exact
        self.shift = nn.Parameter(torch.zeros(steps))
        self.slope = nn.Parameter(torch.zeros(steps), requires_grad=train_slope)

    def durations(self, prompts: Prompts) -> Tensor:
        assert prompts.durations_frames is not None
        return prompts.durations_frames

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        frames = prompts.durations_frames.tolist()  # type: ignore[union-attr]
        generated = torch.ones(len(prompts), frames[0], dtype=torch.bool)
        generated[:, :REFERENCE] = False
        return SimpleNamespace(generated=generated)

    def prior(self, cond: Any, generator: Generators = None) -> Tensor:
        batch, frames = cond.generated.shape
        return item_noise([frames] * batch, MELS, item_generators(generator, batch), torch.device("cpu"), torch.float32)

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        k = int((t - 1e-6 > self.grid).sum())
        return self.flow_velocity(x, k) + self.shift[k] + self.slope[k] * x

    def flow_velocity(self, x: Tensor, k: int) -> Tensor:
        start, end = self.grid[k], self.grid[k + 1]
        if not self.exact:
            return self.flow.velocity(x, start)
        ahead = end * self.flow.mean + self.flow.scale(end) / self.flow.scale(start) * (x - start * self.flow.mean)
        return (ahead - x) / (end - start)

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Tensor:
        return self.grid

    def finalize(self, x1: Tensor, cond: Any) -> Tensor:
        return x1.where(cond.generated.unsqueeze(-1), 9.0)

    @torch.no_grad()
    def euler_factors(self) -> list[float]:
        """1 + dt (flow_k + slope_k) of each step."""
        dt = self.grid.diff()
        at = [self.velocity(torch.tensor([0.0, 1.0]), t, None) for t in self.grid[:-1]]
        return [1 + float(h * (v[1] - v[0])) for h, v in zip(dt, at, strict=True)]

    def left(self) -> list[float]:
        """What the later steps leave of a change of the state after each step."""
        factors = self.euler_factors()
        return [math.prod(factors[k + 1 :]) for k in range(len(factors))]

    @torch.no_grad()
    def end_moments(self) -> tuple[float, float]:
        """Mean and deviation of x_1 by Euler's steps."""
        mean, deviation = 0.0, 1.0
        for h, t, factor in zip(self.grid.diff().tolist(), self.grid, self.euler_factors(), strict=False):
            mean = factor * mean + h * self.velocity(torch.tensor(0.0), t, None).item()
            deviation *= abs(factor)
        return mean, deviation


@dataclass
class MelReward:
    """scale * sum of the mel; with a target, -scale / 2 * sum of (mel - target)^2 over the frames of each item."""

    scale: float = 1.0
    target: Any = None
    name: str = "mel"
    differentiable: bool = True
    domain: str = "mel"
    sample_rate_hz: int | None = None
    needs: frozenset[str] = frozenset()
    range: tuple[float, float] = (-math.inf, math.inf)

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        mel = audio.mel if self.target is None else -(audio.mel - self.target).square() / 2
        inside = torch.arange(mel.shape[1]) < audio.lengths_frames[:, None]
        return self.scale * mel.where(inside.unsqueeze(-1), 0.0).sum((1, 2))


def prompts(batch: int, group: int = 1) -> Prompts:
    return Prompts(
        texts=["a"] * batch,
        reference_audio=torch.zeros(batch, 1),
        reference_lengths_samples=torch.ones(batch, dtype=torch.long),
        reference_texts=["a"] * batch,
        durations_frames=torch.full((batch,), REFERENCE + GENERATED),
        group_ids=torch.arange(batch) // group,
    )


def pipeline(policy: GaussianPolicy, reward: object, *, anchored: bool = False) -> Pipeline:
    return Pipeline(
        policy=policy,
        vocoder=Silent(),
        rewards=Rewards([reward]),  # type: ignore[list-item]
        reference=ReferencePolicy(policy) if anchored else None,
        sampling=Sampling(steps=len(policy.grid) - 1, cfg_strength=0.0, sway_sampling_coef=None),
    )
