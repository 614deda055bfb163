"""What an algorithm is: a batch of prompts in, `(loss, metrics)` out. One file each; the file's name is its name.

    prompts --policy--> mel --vocoder--> waveform --reward models--> scores

    collected = collect(prompts)    once, without gradients;    loss(collected)    for each of num_iterations updates

`Pipeline` is that path, the same for every algorithm. An algorithm declares what it needs of it
(`reward_gradient`) and checks it once, before the first update.

The anchor to the reference policy is the mean over time, frames and mel channels of |v - v_ref|^2 along the policy's
own path. For any SDE with the marginals of the flow, dx = (v + sigma^2 s / 2) dt + sigma dW, the score
s = (t v - x) / (1 - t) is linear in v (see path.py), so by Girsanov's theorem

    KL(path || path_ref) = E int (1 + sigma^2 t / (2 (1 - t)))^2 / (2 sigma^2) |v - v_ref|^2 dt:

the anchor is the integrand without its factor of t (for the memoryless sigma^2 = 2 (1 - t) / t of Adjoint Matching,
arXiv 2409.08861, that factor is t / (1 - t)), and it bounds the Wasserstein-2 distance between what the two flows
generate (ORW-CFM-W2, arXiv 2502.06061). It is not called `kl`, since a flow without noise has none.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import rlhf_mel.algorithms
from rlhf_mel.advantages import score_advantages
from rlhf_mel.audio import lengths_to_mask
from rlhf_mel.ema import LaggedPolicy
from rlhf_mel.forward_process import Options, Samples
from rlhf_mel.policy import Policy, ReferencePolicy, rollout
from rlhf_mel.rewards import Rewards
from rlhf_mel.solvers import SDE, STEPWISE_METHODS
from rlhf_mel.sound import sound
from rlhf_mel.trajectories import Trajectory, sde_rollout
from rlhf_mel.types import Prompts, Rollout, Scores
from rlhf_mel.vocoders import Vocoder

Metrics = dict[str, Tensor]
"""Name to a scalar or to [B], one value a rollout (bool: counted, else averaged); `pool` makes the logged numbers."""


@runtime_checkable
class Algorithm(Protocol):
    """Turns prompts into a loss. Its class has a nested `Config`, a dataclass that checks its own values.

    An algorithm with a state of its own (say, an average of the weights) also has `state_dict()` and
    `load_state_dict(state)`: tensors, numbers and strings, saved with every checkpoint and restored on resume.
    """

    name: str
    reward_gradient: bool
    """Whether the loss differentiates the rewards with respect to the mel."""
    needs_groups: bool
    """Whether it compares rollouts of one prompt with each other: num_generations must be at least 2."""
    default_beta: float
    """`beta` of a run that names none."""

    def check(self, pipeline: Pipeline) -> None:
        """Raise a ValueError if the pipeline lacks something that the loss needs."""
        ...

    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> Any:
        """What `loss` learns from, made without gradients and kept for `num_iterations` updates."""
        ...

    def loss(self, pipeline: Pipeline, collected: Any, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """The loss of one batch, and what to log of it."""
        ...

    def on_update(self, pipeline: Pipeline) -> None:
        """Called after each step of the optimizer."""
        ...


class AlgorithmBase:
    """What most algorithms share: nothing to collect but the prompts, nothing to do after an update."""

    reward_gradient = False
    needs_groups = False
    default_beta = 1.0

    def check(self, pipeline: Pipeline) -> None:
        return None

    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> Any:
        return prompts

    def on_update(self, pipeline: Pipeline) -> None:
        return None


class LaggedAlgorithm(AlgorithmBase):
    """An algorithm with an average of past policies, which moves after updates and is kept in checkpoints."""

    _lagged: LaggedPolicy

    def on_update(self, pipeline: Pipeline) -> None:
        self._lagged.on_update()

    def state_dict(self) -> dict[str, Any]:
        return self._lagged.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lagged.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the policy is solved; the fields of `policy.rollout`."""

    steps: int = 16
    cfg_strength: float = 2.0
    sway_sampling_coef: float | None = -1.0
    method: str = "euler"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """From prompts to scores: the policy that is trained, and all that is frozen around it."""

    policy: Policy
    vocoder: Vocoder
    rewards: Rewards
    reference: ReferencePolicy | None
    """The policy before training; None where nothing is anchored to it (beta = 0)."""
    sampling: Sampling = Sampling()
    reward_batch_size: int | None = None
    """Rollouts that vocoder and rewards hear at once; None: all."""

    def rollout(
        self,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        grad_steps: int,
        jump_from: int | None = None,
    ) -> tuple[Rollout, Tensor]:
        """Rollout whose last `grad_steps` steps carry gradients, and its anchor [B] over those steps.

        jump_from: solve up to this step of the grid, then take one straight step to the end of the flow, to
            x + (1 - t) v(x, t); None: solve to the end.
        """
        view = _View(self.policy, self.reference, jump_from)
        spoken = rollout(
            view,
            prompts,
            generator=generator,
            grad_steps=grad_steps,
            checkpoint=grad_steps > 1,  # one step's graph is all that is ever held, kept or recomputed
            **dataclasses.asdict(self.sampling),
        )
        _check_finite(spoken.mel)
        if self.reference is None:
            return spoken, spoken.mel.new_zeros(len(prompts))
        mel, rate = spoken.mel[..., :-1], spoken.mel[..., -1]
        times = view.timesteps(self.sampling.steps, sway_sampling_coef=self.sampling.sway_sampling_coef)
        duration = times[-1] - times[-1 - grad_steps]
        return dataclasses.replace(spoken, mel=mel), frame_mean(rate, spoken.lengths_frames) / duration

    def sample(self, prompts: Prompts, generator: torch.Generator) -> Rollout:
        """Rollout without gradients."""
        spoken = rollout(self.policy, prompts, generator=generator, grad_steps=0, **dataclasses.asdict(self.sampling))
        _check_finite(spoken.mel)
        return spoken

    def sde_rollout(
        self, prompts: Prompts, generator: torch.Generator, *, sde: SDE, window: range, shared_prior: bool = False
    ) -> tuple[Rollout, list[Trajectory]]:
        """Rollout without gradients whose steps in `window` are random, and the probabilities of those steps."""
        spoken, trajectories = sde_rollout(
            self.policy,
            prompts,
            sde=sde,
            window=window,
            shared_prior=shared_prior,
            generator=generator,
            **dataclasses.asdict(self.sampling),
        )
        _check_finite(spoken.mel)
        return spoken, trajectories

    def score(self, spoken: Rollout, prompts: Prompts) -> Scores:
        """What the rewards say of a rollout, in float32 whatever the autocast around it.

        In parts of `reward_batch_size`, of which backward() holds the graph of one at a time and computes it again.
        """
        with torch.autocast(spoken.mel.device.type, enabled=False):
            spoken = dataclasses.replace(spoken, mel=spoken.mel.float())
            parts = torch.arange(len(prompts)).split(self.reward_batch_size or len(prompts))
            if len(parts) == 1:
                return self.rewards(sound(self.vocoder, spoken), prompts)
            scores = [self._score_part(spoken, prompts, rows.tolist()) for rows in parts]
        breakdown = {name: torch.cat([score.breakdown[name] for score in scores]) for name in self.rewards.names}
        return Scores(total=torch.cat([score.total for score in scores]), breakdown=breakdown)

    def _score_part(self, spoken: Rollout, prompts: Prompts, rows: list[int]) -> Scores:
        lengths = spoken.lengths_frames[rows]
        chosen = prompts.select(rows)

        def score(mel: Tensor) -> Scores:
            return self.rewards(sound(self.vocoder, Rollout(mel=mel, lengths_frames=lengths)), chosen)

        mel = spoken.mel[rows, : int(lengths.max())]
        return recompute(score, mel, use_reentrant=False) if mel.requires_grad else score(mel)


def _check_finite(mel: Tensor) -> None:
    if not bool(torch.isfinite(mel).all()):
        raise FloatingPointError(
            "the policy generated a mel that is not finite: expected numbers, got NaN or infinity; lower "
            "learning_rate or raise beta, and start again from the last checkpoint"
        )


def collect_samples(
    pipeline: Pipeline,
    prompts: Prompts,
    generator: torch.Generator,
    options: Options,
    *,
    across_groups: bool = False,
) -> Samples:
    """What the forward-process family learns from: rollouts of the policy, their advantages and reward metrics.

    across_groups: compare all rollouts of the batch with each other, whatever their prompt.
    """
    prompts = dataclasses.replace(prompts, durations_frames=pipeline.policy.durations(prompts))
    spoken = pipeline.sample(prompts, generator)
    scores = pipeline.score(spoken, prompts)
    group_ids = torch.arange(len(prompts)) if prompts.group_ids is None else prompts.group_ids
    compared = (torch.zeros_like(group_ids) if across_groups else group_ids).to(scores.total.device)
    advantages = score_advantages(
        scores,
        dict(zip(pipeline.rewards.names, pipeline.rewards.weights, strict=True)),
        compared,
        scale_rewards=options.scale_rewards,
        multi_objective_aggregation=options.multi_objective_aggregation,
    )
    dropped = ~scores.total.isfinite()
    return Samples(
        prompts=prompts,
        spoken=spoken,
        advantages=advantages.clamp(-options.advantage_clip, options.advantage_clip),
        group_ids=compared,
        dropped=dropped,
        cfg_strength=pipeline.sampling.cfg_strength,
        metrics=score_metrics(scores, prompts.group_ids) | {"dropped_rollouts": dropped},
    )


def check_sde_window(name: str, pipeline: Pipeline, sde: SDE, window: range) -> None:
    """Raise unless the steps of `window`, those that may be random, are in the grid and have noise."""
    steps, method = pipeline.sampling.steps, pipeline.sampling.method
    if sde.noise_level == 0:
        raise ValueError(f"noise_level of {name}: expected above 0, got 0: without noise a step has no probability")
    random = sde.random_steps(steps)
    if not 0 <= window.start < window.stop <= random.stop:
        raise ValueError(
            f"algorithm {name!r} trains steps [{window.start}, {window.stop}): expected some of [0, {random.stop}), "
            f"those of the {steps} sampling_steps that have noise by {sde.kind!r}; change window_range or "
            "sampling_steps"
        )
    if method not in STEPWISE_METHODS:
        raise ValueError(
            f"algorithm {name!r} takes single steps: expected --solver of {STEPWISE_METHODS}, got {method!r}"
        )


def require_reward_gradient(name: str, pipeline: Pipeline) -> None:
    """Raise if the vocoder or a reward has no gradient; `name` is the algorithm's."""
    weighted = zip(pipeline.rewards.models, pipeline.rewards.weights, strict=True)
    parts = {f"reward {model.name!r}": model.differentiable for model, weight in weighted if weight != 0}
    parts["the vocoder"] = pipeline.vocoder.differentiable
    lacking = [part for part, differentiable in parts.items() if not differentiable]
    if lacking:
        raise ValueError(
            f"algorithm {name!r} follows the gradient of the reward through the waveform: expected every part to be "
            f"differentiable, got {' and '.join(lacking)} without a gradient; choose another, or an algorithm that "
            "needs none"
        )


class _Condition(NamedTuple):
    policy: Any
    reference: Any
    generated: Tensor


class _View(nn.Module):
    """The policy, with the anchor as one more channel of its state, or with a grid cut short, or both.

    The channel is da/dt = mean_M |v - v_ref|^2, a(0) = 0, where gradients flow, and 0 elsewhere: the solver
    integrates it with the mel, under its truncation, checkpoints and grouping (as the kinetic energy of Finlay et
    al. 2020, arXiv 2002.02798). The reference is differentiated by the state where the state has a gradient.
    """

    def __init__(self, policy: Policy, reference: ReferencePolicy | None, jump_from: int | None) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        self.jump_from = jump_from

    def durations(self, prompts: Prompts) -> Tensor:
        return self.policy.durations(prompts)

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        cond = self.policy.encode(prompts, cfg_strength=cfg_strength)
        if self.reference is None:
            return cond
        return _Condition(cond, self.reference.encode(prompts, cfg_strength=cfg_strength), cond.generated)

    def prior(self, cond: Any, generator: Any = None) -> Tensor:
        if self.reference is None:
            return self.policy.prior(cond, generator)
        return F.pad(self.policy.prior(cond.policy, generator), (0, 1))

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        if self.reference is None:
            return self.policy.velocity(x, t, cond)
        mel = x[..., :-1]
        v = self.policy.velocity(mel, t, cond.policy)
        v_ref = self.reference.velocity(mel, t, cond.reference)
        return torch.cat([v, (v - v_ref).square().mean(-1, keepdim=True)], dim=-1)

    def velocity_without_gradient(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """In the steps that are not trained: the anchor stands still."""
        if self.reference is None:
            return self.velocity(x, t, cond)
        return F.pad(self.policy.velocity(x[..., :-1], t, cond.policy), (0, 1))

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Tensor:
        times = self.policy.timesteps(steps, sway_sampling_coef=sway_sampling_coef)
        return times if self.jump_from is None else torch.cat([times[: self.jump_from + 1], times[-1:]])

    def finalize(self, x1: Tensor, cond: Any) -> Tensor:
        if self.reference is None:
            return self.policy.finalize(x1, cond)
        return torch.cat([self.policy.finalize(x1[..., :-1], cond.policy), x1[..., -1:]], dim=-1)


def frame_mean(values: Tensor, lengths_frames: Tensor) -> Tensor:
    """Mean [B] of `values` [B, T] over each item's own frames."""
    kept = lengths_to_mask(lengths_frames, values.shape[1])
    return values.where(kept, 0.0).sum(-1) / lengths_frames


def finite_mean(values: Tensor) -> Tensor:
    """Mean over the finite ones of `values` [B]; 0, still with a (zero) gradient, if there is none."""
    finite = torch.isfinite(values)
    return values.where(finite, 0.0).sum() / finite.sum().clamp(min=1)


def guard_rows(mel: Tensor, dropped: Tensor) -> Tensor:
    """`mel`, whose gradient is 0 in the rows marked in `dropped` [B, bool]; rows whose gradient is not finite are
    marked and zeroed as well.

    A score that is not finite has no useful gradient, and 0 times NaN is NaN: leaving it out of the loss would not
    keep it out of the weights.
    """

    def clean(grad: Tensor) -> Tensor:
        dropped.logical_or_(~torch.isfinite(grad).flatten(1).all(1))
        return grad.masked_fill(dropped[:, None, None], 0.0)

    if mel.requires_grad:
        mel.register_hook(clean)
    return mel


def pathwise_scores(pipeline: Pipeline, spoken: Rollout, prompts: Prompts) -> tuple[Tensor, Metrics]:
    """Total score [B] with its gradient, NaN where a row is to be dropped, and the reward metrics."""
    dropped = torch.zeros(len(prompts), dtype=torch.bool, device=spoken.mel.device)
    scores = pipeline.score(dataclasses.replace(spoken, mel=guard_rows(spoken.mel, dropped)), prompts)
    dropped.logical_or_(~torch.isfinite(scores.total.detach()))
    return scores.total, score_metrics(scores, prompts.group_ids) | {"dropped_rollouts": dropped}


def score_metrics(scores: Scores, group_ids: Tensor | None) -> Metrics:
    """`reward`, `rewards/NAME` and, where groups have two or more members, `frac_reward_zero_std`."""
    metrics = {"reward": scores.total.detach()}
    metrics |= {f"rewards/{name}": values.detach() for name, values in scores.breakdown.items()}
    if group_ids is not None and len(group_ids.unique()) < len(group_ids):
        metrics["frac_reward_zero_std"] = frac_zero_std(scores.total.detach(), group_ids)
    return metrics


def frac_zero_std(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Share of groups all of whose finite rewards are equal: they say nothing of what is better."""
    groups = [rewards[(group_ids == group) & rewards.isfinite()] for group in group_ids.unique()]
    return torch.stack([(group == group[:1]).all() for group in groups]).float().mean()


def pool(batches: Sequence[Mapping[str, Sequence[float | bool]]]) -> dict[str, float]:
    """The numbers to log of the metrics of several batches and processes, in TRL's names.

    Rollouts count alike whatever batch they came in. `reward` and `rewards/NAME` get a mean and a standard
    deviation (n - 1) over the finite values, flags are counted, everything else is averaged.
    """
    logged: dict[str, float] = {}
    for name in dict.fromkeys(name for batch in batches for name in batch):
        values = torch.tensor([value for batch in batches for value in batch.get(name, ())])
        if values.dtype == torch.bool:
            logged[name] = int(values.sum())
            continue
        finite = values[torch.isfinite(values)].double()
        mean = finite.mean().item() if len(finite) else float("nan")
        std = finite.std().item() if len(finite) > 1 else 0.0
        if name == "reward":
            logged |= {"reward": mean, "reward_std": std}
        elif name.startswith("rewards/"):
            logged |= {f"{name}/mean": mean, f"{name}/std": std}
        else:
            logged[name] = mean
    return logged


def known_algorithms() -> list[str]:
    """The names `load_algorithm` knows: files of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(rlhf_mel.algorithms.__path__) if module.name != "base")


def load_algorithm(name: str, options: Mapping[str, Any] | None = None, *, beta: float = 0.0) -> Algorithm:
    """The algorithm called `name` (or your own, 'package.module:Class'), with `options` of its Config.

    Raises:
        ValueError: an unknown name or option; the message lists the known ones.
    """
    factory = algorithm_class(name)
    known = [f.name for f in dataclasses.fields(factory.Config)]
    for option in options or {}:
        if option not in known:
            raise ValueError(f"unknown option {option!r} of algorithm {name!r}: expected some of {known}")
    return factory(factory.Config(**(options or {})), beta=beta)


def algorithm_class(name: str) -> Any:
    """The class behind a name that `load_algorithm` takes; raises ValueError for an unknown one."""
    if ":" in name:
        module_name, class_name = name.split(":", 1)
        return getattr(importlib.import_module(module_name), class_name)
    if name not in known_algorithms():
        raise ValueError(f"unknown algorithm {name!r}: expected one of {known_algorithms()} or 'package.module:Class'")
    return importlib.import_module(f"rlhf_mel.algorithms.{name}").algorithm
