"""The core of the forward-process family: velocity regression at noisy versions of what a policy said.

    x_t = (1 - t) x_0 + t x_1,    u = x_1 - x_0,    v_theta(x_t, t)                x_1: a final mel; x_0, t: drawn anew

Only final mels and their rewards are needed: any solver, no trajectory, no probability. An algorithm of this family is
what it says of (v_theta, u, advantage) at each draw, and perhaps of the velocities of other policies there.

Why it works: v_theta(x_t, t) = E[u | x_t] for what the policy generates, so with advantages A = (r - mean) / scale

    E[A (u - v_theta) | x_t] = E[r u | x_t] - E[r | x_t] E[u | x_t],  over the scale,

the covariance of reward and velocity: where v_theta has to go for more reward. With the anchor beta |v_theta - v_ref|^2
AWM, DiffusionNFT and RAM come to rest where v_theta = v_ref + E[A (u - v_theta) | x_t] / beta (weights of time aside),
ORW with exp(tau A) / mean in the place of A. For Gaussian mels and a linear reward that is the flow of the optimum of
E[A] - beta KL(p || p_ref), p_ref exp(A / beta), or p_ref exp(tau A / beta): the tests train to it.

Frames of the reference clip are in x_1 as `finalize` pastes them in, as in pretraining; only generated frames count.
The end of the flow must be the log mel itself, as it is for F5-TTS and its kin.
Prompts of one total duration are taken together, so each item is what it would be alone. Times and noise of an item
come from its own generator; the n draws of an item are stratified in time. Losses are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.base import LaggedAlgorithm
from rlhf_mel.algorithms.families.advantages import check_scaling, score_advantages
from rlhf_mel.flow.ema import MovingAverage
from rlhf_mel.flow.noise import Generators, branched, item_generators, of_rows
from rlhf_mel.flow.path import interpolate, velocity
from rlhf_mel.flow.policy import Policy, Velocities, evaluating, rows_by_duration, velocity_as_now, with_durations
from rlhf_mel.flow.recompute import differentiated
from rlhf_mel.masked import counted_mean, lengths_to_mask
from rlhf_mel.metrics import Metrics, score_metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts, Rollout


@dataclass(frozen=True, kw_only=True)
class ForwardProcessOptions:
    """What the Configs of the family have in common."""

    num_noise_samples: int = 4
    """Draws of time and noise for each rollout and update. AWM: 6, RAM: 8, DiffusionNFT: one a sampling step."""
    time_power: float = 0.0
    """Times are drawn with density (1 + p) (1 - t)^p: 0 is uniform, above 0 prefers noise."""
    loss_cfg_strength: float | None = None
    """Guidance of the velocity that is regressed; null: that of the rollouts, as in the repositories of NFT and AWM."""
    scale_rewards: str = "batch"
    """Divide advantages by the standard deviation of their 'group', the 'batch' (one device's), or by 'none'."""
    multi_objective_aggregation: str = "sum_then_normalize"
    """Several rewards: sum them, then normalise ('sum_then_normalize'), or each first ('normalize_then_sum')."""
    advantage_clip: float = 5.0
    """Largest size of an advantage."""

    def check(self, name: str) -> None:
        """Raise a ValueError on the first invalid option; `name` is the algorithm's."""
        check_scaling(name, self.scale_rewards, self.multi_objective_aggregation)
        draws, guidance = self.num_noise_samples, self.loss_cfg_strength
        if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
            raise ValueError(f"num_noise_samples of {name}: expected a whole number of at least 1, got {draws!r}")
        check_number(name, "time_power", self.time_power, least=0.0)
        check_positive(name, "advantage_clip", self.advantage_clip)
        if guidance is not None:
            check_number(name, "loss_cfg_strength", guidance, least=0.0)


def check_number(name: str, option: str, value: Any, *, least: float) -> None:
    """Raise a ValueError unless `value`, of an option of the algorithm `name`, is a number of at least `least`."""
    if not isinstance(value, int | float) or not value >= least:
        raise ValueError(f"{option} of {name}: expected a number of at least {least:g}, got {value!r}")


def check_positive(name: str, option: str, value: Any) -> None:
    """Raise a ValueError unless `value`, of an option of the algorithm `name`, is a number above 0."""
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{option} of {name}: expected a number above 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """B rollouts that several updates learn from: final mels and what they are worth."""

    prompts: Prompts
    """With `durations_frames` as the rollouts have them."""
    rollouts: Rollout
    advantages: Float[Tensor, " b"]
    group_ids: Int[Tensor, " b"]
    """Rollouts that were compared with each other share one."""
    dropped: Bool[Tensor, " b"]
    """Rollouts without a reward; they count in anchors only."""
    cfg_strength: float
    """Guidance of the rollouts."""
    metrics: Mapping[str, Tensor]
    """What to log of them, with every update that they are used for."""


@dataclass(frozen=True, kw_only=True)
class LaggedSamples:
    """Rollouts of theta_old (ema.LaggedPolicy), and theta_old itself, as it was when they were made."""

    samples: Samples
    old: MovingAverage


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One draw of time and noise for b samples of one total duration of n frames, all float32."""

    index: int
    """Which of the draws."""
    rows: Sequence[int]
    """Places of the samples in their batch."""
    t: Float[Tensor, " b"]
    target: Float[Tensor, "b n m"]
    """u = x_1 - x_0."""
    velocity: Float[Tensor, "b n m"]
    """v_theta(x_t, t), with gradient."""
    others: Mapping[str, Float[Tensor, "b n m"]]
    """Velocities of other policies there, without gradient."""
    counted: Bool[Tensor, "b n"]
    """Generated frames."""
    advantages: Float[Tensor, " b"]

    def mse(self, one: Float[Tensor, "b n m"], other: Float[Tensor, "b n m"]) -> Float[Tensor, " b"]:
        """Mean of (one - other)^2 over the elements of the generated frames."""
        return counted_mean((one - other).square(), self.counted)

    def anchors(self) -> dict[str, Float[Tensor, " b"]]:
        """`anchor`, mean (v_theta - v_ref)^2, if there is a reference."""
        reference = self.others.get("reference")
        return {} if reference is None else {"anchor": self.mse(self.velocity, reference)}


Objective = Callable[[Draw], Mapping[str, Float[Tensor, " b"]]]
"""What an algorithm says of a draw: values by name."""


def regress(
    policy: Policy,
    samples: Samples,
    objective: Objective,
    options: ForwardProcessOptions,
    generator: Generators,
    **others: Velocities | None,
) -> dict[str, Float[Tensor, " b"]]:
    """Means over the draws of what `objective` says of each, with gradients where its values have them.

    Args:
        generator: for times and noise; one for all, seeded in the order of the samples, or one an item.
        **others: by the name that a Draw has them under, without those that are None; asked without gradient.
    """
    compared = {name: other for name, other in others.items() if other is not None}
    generators = item_generators(generator, len(samples.prompts))
    by_duration = rows_by_duration(samples.prompts)
    checkpoint = len(by_duration) * options.num_noise_samples > 1  # else one velocity's graph is all there is
    sums: dict[str, Tensor] = {}
    with evaluating(policy):
        for rows in by_duration:
            for draw in _draws(policy, samples, rows, options, of_rows(generators, rows), compared, checkpoint):
                index = torch.tensor(rows, device=draw.t.device)
                for name, values in objective(draw).items():
                    empty = values.new_zeros(len(samples.prompts))
                    sums[name] = sums.get(name, empty).index_add(0, index, values)
    return {name: values / options.num_noise_samples for name, values in sums.items()}


def _draws(
    policy: Policy,
    samples: Samples,
    rows: Sequence[int],
    options: ForwardProcessOptions,
    generators: Sequence[torch.Generator] | None,
    others: Mapping[str, Velocities],
    checkpoint: bool,
) -> Iterator[Draw]:
    """The draws for the samples at `rows`, which share a total duration."""
    guidance = samples.cfg_strength if options.loss_cfg_strength is None else options.loss_cfg_strength
    prompts = samples.prompts.select(rows)
    cond = policy.encode(prompts, cfg_strength=guidance)
    conds = {name: other.encode(prompts, cfg_strength=guidance) for name, other in others.items()}
    x1 = final_mels(policy, samples, rows, cond)
    times = draw_times(len(rows), options, generators).to(x1.device)
    function = differentiated(velocity_as_now(policy, cond), checkpoint)
    for index, drawn in enumerate(times):
        noise = policy.prior(cond, generators)
        t = drawn.to(noise.dtype).float()  # as the policy sees it, so that x_t is where it believes to be
        x0 = noise.float()
        at = interpolate(x0, x1, t).to(noise.dtype), t.to(noise.dtype)
        with torch.no_grad():
            compared = {name: other.velocity(*at, conds[name]).float() for name, other in others.items()}
        yield Draw(
            index=index,
            rows=rows,
            t=t,
            target=velocity(x0, x1),
            velocity=function(*at).float(),
            others=compared,
            counted=cond.generated,
            advantages=samples.advantages[list(rows)],
        )


def final_mels(policy: Policy, samples: Samples, rows: Sequence[int], cond: Any) -> Float[Tensor, "b n m"]:
    """x_1, float32: the mels at `rows` where they were generated, elsewhere what `finalize` pastes in."""
    mel, lengths_frames = samples.rollouts.mel[list(rows)], samples.rollouts.lengths_frames[list(rows)]
    x1 = mel.new_zeros(*cond.generated.shape, mel.shape[-1])
    x1[cond.generated] = mel[lengths_to_mask(lengths_frames, mel.shape[1])]
    return policy.finalize(x1, cond).float().detach()


def draw_times(
    batch: int, options: ForwardProcessOptions, generators: Sequence[torch.Generator] | None
) -> Float[Tensor, "draws b"]:
    """Times of [0, 1]: of an item's n draws, one in each n-th of the probability of `time_power`."""
    n = options.num_noise_samples
    each = [None] * batch if generators is None else generators
    uniform = torch.stack(
        [torch.rand(n, generator=g, device=None if g is None else g.device).cpu() for g in each], dim=1
    )
    share = (torch.arange(n)[:, None] + uniform) / n
    return 1 - (1 - share) ** (1 / (1 + options.time_power))


def anchored_loss(
    loss: Float[Tensor, ""], samples: Samples, values: Mapping[str, Float[Tensor, " b"]], **weights: float
) -> tuple[Float[Tensor, ""], Metrics]:
    """`loss` plus weight times mean of those `values` that have a weight; and all values to log, with the samples'."""
    for name, weight in weights.items():
        if name in values:
            loss = loss + weight * values[name].mean()
    return loss, {**samples.metrics, **{name: value.detach() for name, value in values.items()}}


def collect_samples(
    pipeline: Pipeline,
    prompts: Prompts,
    generator: torch.Generator,
    options: ForwardProcessOptions,
    *,
    across_groups: bool = False,
) -> Samples:
    """What the forward-process family learns from: rollouts of the policy, their advantages and reward metrics.

    Args:
        across_groups: compare all rollouts of the batch with each other, whatever their prompt.
    """
    prompts = with_durations(pipeline.policy, prompts, branched(generator, len(prompts)))
    rollouts = pipeline.sample(prompts, generator)
    scores = pipeline.score(rollouts, prompts)
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
        rollouts=rollouts,
        advantages=advantages.clamp(-options.advantage_clip, options.advantage_clip),
        group_ids=compared,
        dropped=dropped,
        cfg_strength=pipeline.sampling.cfg_strength,
        metrics=score_metrics(scores, prompts.group_ids) | {"dropped_rollouts": dropped},
    )


class OldPolicyAlgorithm(LaggedAlgorithm):
    """An algorithm whose rollouts are theta_old's, which follows the policy up to now (ema.LaggedPolicy)."""

    @override
    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> LaggedSamples:
        old = self._lagged.refreshed(pipeline.policy)
        with old.applied():
            return LaggedSamples(samples=collect_samples(pipeline, prompts, generator, self.config), old=old)

    def regressed(
        self, pipeline: Pipeline, collected: LaggedSamples, objective: Objective, generator: torch.Generator
    ) -> dict[str, Float[Tensor, " b"]]:
        """`regress` beside theta_old and the reference."""
        old, reference = collected.old, pipeline.reference
        samples, options = collected.samples, self.config
        return regress(pipeline.policy, samples, objective, options, generator, old=old, reference=reference)
