"""Adjoint Matching: regress the velocity to the reference's plus what the gradient of the reward says it lacks.

The policy is to generate p*(x_1) ~ p_ref(x_1) exp(r(x_1) / beta). As a control problem, with the noise sigma and the
drift b_ref of the reference and a control u,

    dx = (b_ref + sigma u) dt + sigma dW,   min_u E[ int |u|^2 / 2 dt - r(x_1) / beta ],   u*(x, t) = sigma grad V_t(x).

Its optimum is the law of p* times exp(-V_0(x_0)): p* itself only where x_1 does not remember x_0. The flow's SDEs with
sigma^2 = a^2 (1 - t) / t all forget it, their sigma being infinite at t = 0; but only with a^2 = 2 is the v that u
stands for the velocity of the flow to p*, so that any sampler, the ODE included, generates p* after fine-tuning
(Theorem 1; "memoryless" is their name for it). By path.py b = 2 v - x / t then, hence u = (2 / sigma) (v - v_ref), and

    dg/dt = -(d b_ref / dx)^T g,   g(1) = grad r(x_1) / beta            the lean adjoint, backward along each path
    loss = int |u - sigma g|^2 / 2 dt = int |v - v_ref - c g|^2 / c dt,   c = sigma^2 / 2 = (1 - t) / t.

Paths and g are constants. At the optimum E[g | x_t] = grad V_t(x_t), and there is no other critical point (Proposition
7). On a grid, paths are those of the SDE's exponential integrator (flow/sde.py, a^2 = 2: all noise is new in the first
step), and g goes back through the means of its steps. In the first step, where c is infinite, c = (1 - t')^2 / t' with
the g after the step: the step's variance over how far v moves its mean. For a Gaussian flow and a linear r all others
are exact on every grid.

dynamics = "ode" controls the ODE itself, dx = (v_ref + u) dt, as if sigma = 1, to the optimum of

    E[ r(x_1) / beta - int |v - v_ref|^2 / 2 dt ].

g (v_ref + u) - |u|^2 / 2 is greatest at u = g. Backward, dg/dt = -(d (v_ref + u) / dx)^T g + (du/dx)^T u: there the
terms with du/dx cancel, the adjoint is lean again, and the loss is int |v - v_ref - g|^2 / 2 dt; on a grid u_k is
g_{k+1}, exactly. Here x_1 remembers all of x_0, so the optimum is not p*; it is that of VGG-Flow (Liu et al. 2025,
arXiv 2512.05116). With `last_steps`, only these are trained and g is not solved for the others. Deterministic dynamics
and truncation are ideas of Guo et al. 2026, arXiv 2605.06583 ("ODE-AM-3": three steps), of which abstract and summaries
were at hand only: the equations above are derived here, not taken from there.

Noise, control and loss are those of the generated frames. The frames of the reference clip follow the ODE, as in all
SDE rollouts (sde_rollout.py); the noise they begin with is as a part of the prompt. A guided velocity is not that of a
flow with a known score: p_ref is then what the guided SDE generates, and g grows. The theory is of no guidance.

Reference: Domingo-Enrich et al. 2025, Adjoint Matching, arXiv 2409.08861, Algorithm 1 (their adjoint is -g, their
reward multiplier 1 / beta, their sigma^2 = 2 (1 - t + h) / (t + h)). On a trained network g can grow exponentially on
its way back; they clip the loss for that, here `max_push` shortens c g where it is beyond all reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.base import AlgorithmBase
from rlhf_mel.flow.policy import Policy, evaluating, velocity_as_now
from rlhf_mel.flow.recompute import differentiated
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.flow.sde import SDE
from rlhf_mel.flow.sde_rollout import Trajectory
from rlhf_mel.masked import counted_mean
from rlhf_mel.metrics import Metrics, score_metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts, Rollout, Scores

DYNAMICS = ("memoryless", "ode")


Finalize = Callable[[Tensor, Any], Tensor]
"""(x_1 [b, T, M], cond) -> mel [b, T, M]."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the velocity is regressed to in n steps of b rollouts that were solved together."""

    trajectory: Trajectory
    steps: Sequence[int]
    base: Tensor
    """Float [n, b, T, M]: v_ref at the states of those steps."""
    push: Tensor
    """Float [n, b, T, M]: c g, shortened where it is too long."""
    weights: Tensor
    """Float [n]: of |v - v_ref - c g|^2."""
    shortened: Tensor
    """Float [b]: share of the n steps whose push was."""


class AdjointTargets(NamedTuple):
    """What the velocity is regressed to in B rollouts, for several updates."""

    targets: Sequence[Targets]
    dropped: Tensor
    """Bool [B]: rollouts without a reward or without a finite adjoint; they are left out."""
    metrics: Metrics


def control_scales(t: Float[Tensor, " times"], dynamics: str) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """c and the weights of the loss in the k steps of the grid t, of k + 1 times."""
    dt = t.diff()
    if dynamics == "ode":
        return torch.ones_like(dt), dt / 2
    c = (1 - t[:-1]) / t[:-1]
    c[0] = (1 - t[1]) ** 2 / t[1]
    return c, dt / c


def lean_adjoint(
    reference: ReferencePolicy,
    trajectory: Trajectory,
    cond: Any,
    finalize: Finalize,
    end: Float[Tensor, "b n m"],
    first: int,
) -> tuple[Float[Tensor, "ends b n m"], Float[Tensor, "steps b n m"]]:
    """g before each of the steps from `first` on, and at the end; and v_ref before each of them.

    Args:
        cond: the policy's, of the same prompts.
        finalize: the policy's.
        end: the gradient with respect to the finalized mel.
    """
    steps = len(trajectory.t) - 1
    cond_ref = reference.encode(trajectory.prompts, cfg_strength=trajectory.cfg_strength)
    adjoints: list[Tensor] = []
    base: list[Tensor] = []
    for k in reversed(range(first, steps)):
        with torch.enable_grad():
            x = trajectory.states[k].detach().requires_grad_()
            v = reference.velocity(x.to(trajectory.dtype), trajectory.t[k], cond_ref).to(x.dtype)
            after = trajectory.sde.transition(x, v, trajectory.t, k, cond.generated).mean
            if k == steps - 1:
                adjoints += torch.autograd.grad(finalize(after, cond), after, end, retain_graph=True)
        adjoints += torch.autograd.grad(after, x, adjoints[-1])
        base.append(v.detach())
    return torch.stack(adjoints[::-1]), torch.stack(base[::-1])


def reward_gradient(pipeline: Pipeline, rollouts: Rollout, prompts: Prompts) -> tuple[Float[Tensor, "b n m"], Scores]:
    """Gradient of each item's total with respect to its mel, and the scores."""
    with torch.enable_grad():
        mel = rollouts.mel.detach().requires_grad_()
        scores = pipeline.score(replace(rollouts, mel=mel), prompts)
        if not scores.total.requires_grad:
            raise ValueError(
                "adjoint_matching: expected rewards with a gradient at the mel, got some cut off from it; look "
                "for detach or no_grad in the vocoder"
            )
        (gradient,) = torch.autograd.grad(scores.total.sum(), mel)
    return gradient, scores


def shortened(
    push: Float[Tensor, "steps b n m"], counted: Bool[Tensor, "b n"], most: float | None
) -> tuple[Float[Tensor, "steps b n m"], Bool[Tensor, "steps b"]]:
    """`push` with a root mean square of at most `most` over the frames `counted`, and which were longer."""
    if most is None:
        return push, torch.zeros_like(push[..., 0, 0], dtype=torch.bool)
    length = torch.stack([counted_mean(one.square(), counted) for one in push]).sqrt()
    return push * (most / length).clamp(max=1.0)[..., None, None], length > most


def adjoint_matching_loss(
    control: Float[Tensor, "steps b n m"],
    push: Float[Tensor, "steps b n m"],
    weights: Float[Tensor, " steps"],
    counted: Bool[Tensor, "b n"],
) -> Float[Tensor, " b"]:
    """Sum over steps of weight * mean of |v - v_ref - c g|^2 over the frames `counted`; control = v - v_ref."""
    squares = zip(weights, (control - push).square(), strict=True)
    return torch.stack([weight * counted_mean(square, counted) for weight, square in squares]).sum(0)


class AdjointMatching(AlgorithmBase):
    """Regression to the reference's velocity plus what the reward's gradient asks for; see the top."""

    name = "adjoint_matching"
    reward_gradient = True
    default_beta = 0.01

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Which process is controlled, in which steps, and how far a target may be."""

        dynamics: str = "memoryless"
        """'memoryless': the paper's SDE, reaches the tilted distribution; 'ode': deterministic, see the top."""
        last_steps: int | None = None
        """Train and solve the adjoint for that many last steps only; null: all. 2605.06583: 3, with 'ode'."""
        num_train_steps: int | None = None
        """Of those, how many are regressed, drawn anew for each batch; null: all. soc-fine-tuning-sd: 4 of 50."""
        max_push: float | None = 1.0
        """Longest c g, as a root mean square over an item's elements (its velocity has about 3); null: no limit."""

        def __post_init__(self) -> None:
            if self.dynamics not in DYNAMICS:
                raise ValueError(
                    f"dynamics of adjoint_matching: expected one of {list(DYNAMICS)}, got {self.dynamics!r}"
                )
            for option in ("last_steps", "num_train_steps"):
                value = getattr(self, option)
                if value is not None and (not isinstance(value, int) or value < 1):
                    raise ValueError(
                        f"{option} of adjoint_matching: expected a whole number of at least 1, or null for all, "
                        f"got {value!r}"
                    )
            most = self.max_push
            if most is not None and (not isinstance(most, int | float) or not most > 0):
                raise ValueError(f"max_push of adjoint_matching: expected above 0, or null for no limit, got {most!r}")

    config: Config

    @property
    @override
    def step_noise(self) -> SDE:
        return SDE(noise_level=0.0 if self.config.dynamics == "ode" else math.sqrt(2))

    @override
    def check(self, pipeline: Pipeline) -> None:
        super().check(pipeline)
        if pipeline.reference is None or not self.beta > 0:
            raise ValueError(
                f"algorithm 'adjoint_matching' tilts the reference policy by exp(r / beta): expected beta above 0, "
                f"got {self.beta}; set --beta"
            )
        if pipeline.sampling.method != "euler":
            raise ValueError(
                f"algorithm 'adjoint_matching' goes back through single steps: expected --solver euler, got "
                f"{pipeline.sampling.method!r}"
            )
        steps = pipeline.sampling.steps
        trained = self.config.last_steps or steps
        if steps < 2 or not (self.config.num_train_steps or 1) <= trained <= steps:
            raise ValueError(
                f"steps of adjoint_matching: expected num_train_steps <= last_steps <= sampling_steps and at least 2 "
                f"sampling_steps, got {self.config.num_train_steps}, {self.config.last_steps} and {steps}"
            )

    @override
    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> AdjointTargets:
        steps = pipeline.sampling.steps
        window = range(steps - 1)
        rollouts, trajectories = pipeline.sde_rollout(prompts, generator, sde=self.step_noise, window=window)
        gradient, scores = reward_gradient(pipeline, rollouts, prompts)
        dropped = ~scores.total.isfinite()
        trained = self._trained_steps(steps, generator)
        targets = []
        for trajectory in trajectories:
            rows = list(trajectory.rows)
            one = self._targets(pipeline, trajectory, gradient[rows] / self.beta, trained)
            broken = ~one.push.isfinite().transpose(0, 1).flatten(1).all(1)
            dropped[rows] |= broken
            # infinity would reach the weights even where the loss leaves the row out
            targets.append(replace(one, push=one.push.masked_fill(broken[None, :, None, None], 0.0)))
        metrics = score_metrics(scores, prompts.group_ids) | {"dropped_rollouts": dropped}
        return AdjointTargets(targets, dropped, metrics)

    def _trained_steps(self, steps: int, generator: torch.Generator) -> list[int]:
        first = steps - (self.config.last_steps or steps)
        count = self.config.num_train_steps or steps - first
        return sorted((first + torch.randperm(steps - first, generator=generator)[:count]).tolist())

    def _targets(self, pipeline: Pipeline, trajectory: Trajectory, gradient: Tensor, trained: Sequence[int]) -> Targets:
        """gradient: of r / beta by the generated frames [b, T, M] of these rollouts."""
        policy, reference, first = pipeline.policy, pipeline.reference, trained[0]
        assert reference is not None
        with evaluating(policy), torch.no_grad():
            cond = policy.encode(trajectory.prompts, cfg_strength=trajectory.cfg_strength)
        end = torch.zeros_like(trajectory.states[0])
        for item, generated in enumerate(cond.generated):
            end[item, generated] = gradient[item, : int(generated.sum())].to(end.dtype)
        adjoints, base = lean_adjoint(reference, trajectory, cond, policy.finalize, end, first)
        c, weights = control_scales(trajectory.t.to(end.dtype), self.config.dynamics)
        at = [k + 1 if self.config.dynamics == "ode" else max(k, 1) for k in trained]
        push = c[trained][:, None, None, None] * adjoints[[k - first for k in at]]
        push, longer = shortened(push, cond.generated, self.config.max_push)
        share = len(trained) / (self.config.last_steps or len(c))
        return Targets(
            trajectory=trajectory,
            steps=trained,
            base=base[[k - first for k in trained]],
            push=push,
            weights=weights[trained] / share,
            shortened=longer.float().mean(0),
        )

    @override
    def loss(
        self, pipeline: Pipeline, collected: AdjointTargets, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        batch, kept = len(collected.dropped), ~collected.dropped
        loss: Any = 0.0
        anchor, shortened_push = torch.zeros(2, batch, device=kept.device)
        for targets in collected.targets:
            rows = list(targets.trajectory.rows)
            v, counted = _velocities(pipeline.policy, targets)
            control = v - targets.base
            losses = adjoint_matching_loss(control, targets.push, targets.weights, counted)
            loss = loss + losses.where(kept[rows], 0.0).sum() / kept.sum().clamp(min=1)
            anchor[rows] = counted_mean(control.detach().square().mean(0), counted)
            shortened_push[rows] = targets.shortened
        return loss, {**collected.metrics, "anchor": anchor, "shortened_push": shortened_push}

    @override
    def trajectories(self, collected: AdjointTargets) -> Sequence[Trajectory]:
        return [targets.trajectory for targets in collected.targets]


def _velocities(policy: Policy, targets: Targets) -> tuple[Tensor, Tensor]:
    """v [n, b, T, M] at the states of the trained steps, with gradients, and the frames that count, bool [b, T]."""
    trajectory = targets.trajectory
    with evaluating(policy):
        cond = policy.encode(trajectory.prompts, cfg_strength=trajectory.cfg_strength)
        velocity = differentiated(velocity_as_now(policy, cond), checkpoint=True)
        states = [(trajectory.states[k], trajectory.t[k]) for k in targets.steps]
        v = torch.stack([velocity(x.to(trajectory.dtype), t).to(x.dtype) for x, t in states])
    return v, cond.generated


algorithm = AdjointMatching
