"""A flow on which every forward-process method has a known point of rest, and the loop that trains to it.

`Movable` is the Gaussian flow of problems.py whose mean is moved by a trainable theta, d v / d theta = g(t). Solved by
Euler it generates N(mean + theta, D^2) exactly, D = prod_k (1 + dt a(t_k)) with a the slope of its velocity, so of
noisy versions of its own mels, with u = x_1 - x_0 and a reward r = c sum x_1,

    E[u - v_theta | t] = 0,    E[r (u - v_theta) | t] = c D^2 g(t),    v_theta - v_ref = theta g(t).

All methods but ORW therefore rest at beta theta E[g^2] = c D^2 E[g^2]: the mean of p_ref exp(r / beta), whose shift
is c D^2 / beta. (If D were the flow's own deviation, the two equations would hold at each x_t.) A baseline that counts
the rollout itself takes 1 / group off A.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from problems import LinearGaussianFlow, MelReward, Silent
from torch import Tensor, nn

from rlhf_mel.algorithms.base import Algorithm, load_algorithm
from rlhf_mel.algorithms.families.forward_process import Draw
from rlhf_mel.flow.noise import Generators, item_generators, item_noise
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.types import Prompts

STEPS, REFERENCE, GENERATED, MELS = 8, 2, 3, 2
ELEMENTS = GENERATED * MELS
GROUP, BATCH, UPDATES = 16, 128, 150
TOLERANCE = 0.05
"""What the shift comes from is a variance of rewards, estimated from BATCH rollouts in each of the UPDATES / 2 updates
that are averaged: sqrt(2 / (BATCH UPDATES / 2)) = 0.0144 of it. 3.5 of these."""


class Movable(nn.Module):
    """Frames 0 and 1 are the reference's, of value `pasted`; they feel theta as well, and must not count."""

    flow = LinearGaussianFlow(deviation=0.8)
    pasted = 3.0
    tokenizer = None
    voices: tuple[str, ...] = ()

    def __init__(self, theta: float = 0.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def durations(self, prompts: Prompts) -> Tensor:
        assert prompts.durations_frames is not None
        return prompts.durations_frames

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        assert prompts.durations_frames is not None
        frames = int(prompts.durations_frames[0])
        generated = (torch.arange(frames) >= REFERENCE).expand(len(prompts), frames)
        return SimpleNamespace(generated=generated, cfg_strength=cfg_strength)

    def prior(self, cond: Any, generator: Generators = None) -> Tensor:
        batch, frames = cond.generated.shape
        return item_noise([frames] * batch, MELS, item_generators(generator, batch), torch.device("cpu"), torch.float32)

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        t = t.reshape(-1, 1, 1)
        return self.flow.velocity(x, t) + self.theta * push(t)

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Tensor:
        return torch.linspace(0, 1, steps + 1)

    def finalize(self, x1: Tensor, cond: Any) -> Tensor:
        return x1.where(cond.generated.unsqueeze(-1), self.pasted)


class Known(Movable):
    """x_0 = 0 and v = theta, a number a prompt, at all x and t: the mels that it says are theta, and so are their u."""

    def become(self, *numbers: float) -> None:
        self.theta.data = torch.tensor(numbers)

    def prior(self, cond: Any, generator: Generators = None) -> Tensor:
        return torch.zeros(*cond.generated.shape, 1)

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.theta.reshape(-1, 1, 1).expand_as(x)


def slope(t: Tensor) -> Tensor:
    """a(t): d v / d x."""
    flow = Movable.flow
    return flow.velocity(torch.ones_like(t), t) - flow.velocity(torch.zeros_like(t), t)


def push(t: Tensor) -> Tensor:
    """g(t) = d v / d mean = 1 - t a(t)."""
    return 1 - t * slope(t)


def variance() -> float:
    """D^2, of what an Euler solve generates."""
    t = torch.linspace(0, 1, STEPS + 1).double()
    return math.prod((1 + slope(t[:-1]) / STEPS).tolist()) ** 2


def time_mean(power: float, weight: float = 0.0) -> float:
    """E[g^2 (1 - t)^weight] for times of density (1 + power) (1 - t)^power."""
    t = (torch.arange(20_000).double() + 0.5) / 20_000
    return ((1 + power) * (1 - t) ** (power + weight) * push(t).square()).mean().item()


def tilted_shift(scale: float, beta: float) -> float:
    """How far exp(r / beta), r = scale sum x, moves the mean; a group's mean counts the rollout itself."""
    start = LinearGaussianFlow(Movable.flow.mean, variance() ** 0.5)
    return (1 - 1 / GROUP) * (start.tilted(beta, slope=scale).mean - start.mean)


def prompts(batch: int = BATCH, group: int = GROUP, frames: int = GENERATED) -> Prompts:
    return Prompts(
        texts=["a"] * batch,
        reference_audio=torch.zeros(batch, 1),
        reference_lengths_samples=torch.ones(batch, dtype=torch.long),
        reference_texts=["a"] * batch,
        durations_frames=torch.full((batch,), REFERENCE + frames),
        group_ids=torch.arange(batch) // group,
    )


def pipeline(policy: Any, reward: object = None, *, anchored: bool = True, cfg_strength: float = 0.0) -> Pipeline:
    return Pipeline(
        policy=policy,
        vocoder=Silent(),
        rewards=Rewards([reward or MelReward()]),  # type: ignore[list-item]
        reference=ReferencePolicy(policy) if anchored else None,
        sampling=Sampling(steps=STEPS, cfg_strength=cfg_strength, sway_sampling_coef=None),
    )


def train(
    algorithm: Algorithm, parts: Pipeline, *, updates: int, rate: float, reuse: int = 1, batch: int = BATCH
) -> Tensor:
    """The one weight that is trained, averaged over the second half of the updates; a batch is used `reuse` times."""
    assert isinstance(parts.policy, nn.Module)
    (weight,) = (weight for weight in parts.policy.parameters() if weight.requires_grad)
    optimizer, own = torch.optim.SGD([weight], lr=rate), prompts(batch)
    kept, generator = [], torch.Generator().manual_seed(0)
    algorithm.check(parts)
    for update in range(updates):
        if update % reuse == 0:
            with torch.no_grad():
                collected = algorithm.collect(parts, own, generator)
        optimizer.zero_grad()
        algorithm.loss(parts, collected, generator)[0].backward()
        optimizer.step()
        algorithm.on_update(parts)
        kept.append(weight.detach().clone())
    return torch.stack(kept[updates // 2 :]).mean(0)


def trained(
    name: str, *, reward: MelReward, beta: float = 0.0, updates: int = UPDATES, rate: float = 0.1, **options: Any
) -> float:
    """theta of `Movable`, trained by the algorithm called `name`."""
    reuse = options.pop("reuse", 1)
    options = {"num_noise_samples": 2, "scale_rewards": "none", "advantage_clip": 1e6, **options}
    parts = pipeline(Movable(), reward, anchored=beta > 0)
    return train(load_algorithm(name, options, beta=beta), parts, updates=updates, rate=rate, reuse=reuse).item()


def draw(
    velocity: Any, target: Any, *, t: float = 0.25, advantage: float = 1.0, counted: Any = None, **others: Any
) -> Draw:
    """A Draw of one sample of one mel channel, from lists of numbers, one a frame."""

    def frames(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).reshape(1, -1, 1)

    shape = frames(velocity).shape[:2]
    return Draw(
        index=0,
        rows=[0],
        t=torch.tensor([t]),
        target=frames(target),
        velocity=frames(velocity),
        others={name: frames(values) for name, values in others.items()},
        counted=torch.ones(shape, dtype=torch.bool) if counted is None else torch.tensor([counted]),
        advantages=torch.tensor([advantage]),
    )
