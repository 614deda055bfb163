"""The family that learns from preferences: pairs of clips, of a data set or of the policy's own rollouts.

    r(x_1) = -(beta / 2) (|v_theta(x_t, t) - u|^2 - |v_ref(x_t, t) - u|^2)                see clip_fit.py

r is the implicit reward of a clip. Flow-DPO compares the r of two clips, flow_kto judges each against a reference
point, sft_chosen has no r and learns v = u of the chosen ones. The two clips of a pair share time and noise; with
`stored_noise` each has the noise, and the rhythm, that its own sampling began with (PNAPO), by `chosen_seed`,
`rejected_seed` and `row` of the data set.

What is exact: at any one t, if labels come from a Bradley-Terry model of a reward R, the loss of Flow-DPO is least
where r(w) - r(l) = R(w) - R(l). A Gaussian flow N(m, s^2) of D elements, whose mean theta moves, has v_theta - v_ref =
theta g(t), where g = d v / d m. In u - v_ref shared noise cancels between the clips, which leaves g (w - l), so

    r(w) - r(l) = (beta / D) theta g(t)^2 sum(w - l).

Exact DPO of weight beta' has beta' theta sum(w - l) / s^2. So at one t, with a reward of slope c, the optimum is theta
= c D / (beta g^2), the mean of p_ref exp(R / beta') for beta' = (beta / D) g(t)^2 s^2; g(0) = 1. Over several t it is a
compromise, the root of one equation. tests/algorithms/test_pairs_optimum.py trains to both.

`online`: a batch is prompts, not a data set. Each is spoken `num_generations` times, the rewards choose the best and
the worst of these, and `num_iterations` updates learn from the pairs before the policy speaks again. Where the rewards
do not tell two rollouts apart, the pair has the weight 0 and is counted in `dropped_pairs`.

Weights: a loss is sum w loss / sum w over the pairs of a micro-batch (`weighted_mean`), as that of a reward model is,
so that a data set of 15 votes a pair begins at log 2 like one of a vote each.

References: Liu et al. 2025, Improving Video Generation with Human Feedback (Flow-DPO), arXiv 2501.13918; stored noise:
Lu et al. 2026, PNAPO, arXiv 2605.09433; online: Guo et al. 2024, Direct Language Model Alignment from Online AI
Feedback, arXiv 2402.04792. Names of metrics: TRL's DPOTrainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from rlhf_mel.algorithms.base import AlgorithmBase
from rlhf_mel.algorithms.families.clip_fit import Clips, Fit, fit_of, starting_noise
from rlhf_mel.algorithms.families.forward_process import ForwardProcessOptions, Samples, check_number, collect_samples
from rlhf_mel.data.preferences.load import PairBatch, PreferenceDataset
from rlhf_mel.flow.noise import branched, item_generator
from rlhf_mel.flow.policy import Policy, with_durations
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Audio, Prompts, Rollout

SEEDS = ("chosen_seed", "rejected_seed", "row")
"""Columns of a preference data set that say what noise its clips were sampled from."""


@dataclass(frozen=True, kw_only=True)
class PairTrainingOptions:
    """What the Configs of the family have in common."""

    online: bool = False
    """Learn from pairs of the policy's own rollouts that the rewards rank, instead of a data set."""
    num_noise_samples: int = 1
    """Draws of time (and noise) for each pair and update. Paper: 1."""
    time_power: float = 0.0
    """Times are drawn with density (1 + p) (1 - t)^p: 0 is uniform, above 0 prefers noise."""
    loss_cfg_strength: float = 0.0
    """Guidance of the velocities that are compared. Paper: none, as in pretraining."""
    stored_noise: bool = False
    """Begin each clip at the noise that it was sampled from, by its seed, instead of at fresh noise. PNAPO: true."""

    def check(self, name: str) -> None:
        """Raise a ValueError on the first invalid option; `name` is the algorithm's."""
        for option in ("online", "stored_noise"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} of {name}: expected true or false, got {getattr(self, option)!r}")
        check_number(name, "loss_cfg_strength", self.loss_cfg_strength, least=0.0)
        self.draws.check(name)

    @property
    def draws(self) -> ForwardProcessOptions:
        """As the family on final mels has them; its advantages are the rewards less the mean of their group."""
        return ForwardProcessOptions(
            num_noise_samples=self.num_noise_samples,
            time_power=self.time_power,
            loss_cfg_strength=self.loss_cfg_strength,
            scale_rewards="none",
            advantage_clip=float("inf"),
        )


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """b pairs that several updates learn from."""

    clips: Clips
    """2b: the chosen ones, then in the same order the rejected ones."""
    soft_labels: Float[Tensor, " b"]
    """Probability that the chosen one is the better."""
    margins: Float[Tensor, " b"]
    """How much better it was called, in a unit of the data set."""
    weights: Float[Tensor, " b"]
    """How much a pair counts beside the others, at least 0; 0: it teaches nothing."""
    metrics: Mapping[str, Tensor]
    """What to log with every update that they are used for."""


class PairAlgorithm(AlgorithmBase):
    """An algorithm that learns from pairs: of a data set, or with `online` of its own rollouts."""

    learns_from_pairs = True
    default_beta = 2000.0

    def __init__(self, config: Any = None, *, beta: float = default_beta) -> None:
        super().__init__(config, beta=beta)
        self.learns_from_pairs = not self.config.online
        self.needs_groups = self.config.online

    @override
    def check(self, pipeline: Pipeline) -> None:
        if pipeline.reference is None or not self.beta > 0:
            raise ValueError(
                f"algorithm {self.name!r} compares the policy with its reference: expected beta above 0, got "
                f"{self.beta:g}; {self.default_beta:g} is the default"
            )

    @override
    def check_pairs(self, preferences: PreferenceDataset) -> None:
        if self.config.stored_noise:
            check_columns(preferences, SEEDS, f"stored_noise of {self.name}")

    @override
    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> Any:
        return best_and_worst(*sampled_clips(pipeline, prompts, generator, self.config))

    @override
    def collect_pairs(self, pipeline: Pipeline, pairs: PairBatch, generator: torch.Generator) -> Any:
        return pairs_of(pipeline.policy, pairs, self.config)

    def fit(self, pipeline: Pipeline, clips: Clips, generator: torch.Generator) -> Fit:
        """Of policy and reference, at draws of `generator`."""
        return fit_of(pipeline.policy, pipeline.reference, clips, self.config.draws, generator)


def check_columns(preferences: PreferenceDataset, columns: Sequence[str], option: str) -> None:
    """Raise a ValueError unless every row has all these columns; `option` is what needs them."""
    for column in columns:
        lacking = [row for row, value in enumerate(_column(preferences.rows, column)) if value is None]
        if lacking:
            raise ValueError(
                f"{option}: expected a {column} in every row of {preferences.name}, got none in {len(lacking)} of "
                f"{len(preferences)}, the first is row {lacking[0]}; remove the option or those rows"
            )


def _column(rows: Any, name: str) -> Sequence[Any]:
    """A column of a table, of audio nothing is read; None in every row where there is none."""
    names = getattr(rows, "column_names", None)
    if names is None:
        return [row.get(name) for row in rows]
    return list(rows[name]) if name in names else [None] * len(rows)


def clip_prompts(batch: PairBatch) -> Prompts:
    """What the 2b clips answer, those of the chosen first: prompts that ask for as many frames as the clip has."""
    prompts = batch.prompts.select([*range(len(batch))] * 2)
    lengths = torch.cat([batch.chosen.lengths_frames, batch.rejected.lengths_frames])
    return replace(prompts, generated_frames=lengths, durations_frames=None, timing_seeds=None, group_ids=None)


def select_pairs(batch: PairBatch, rows: Sequence[int]) -> PairBatch:
    """The pairs at `rows`, in that order; clips keep their padding."""
    taken: dict[str, Any] = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    chosen, rejected = (_select_audio(sound, rows) for sound in (batch.chosen, batch.rejected))
    return replace(batch, prompts=batch.prompts.select(rows), chosen=chosen, rejected=rejected, **taken)


def _select_audio(sound: Audio, rows: Sequence[int]) -> Audio:
    taken: dict[str, Any] = {name: value[rows] for name, value in vars(sound).items() if isinstance(value, Tensor)}
    return replace(sound, **taken)


def pairs_of(policy: Policy, batch: PairBatch, options: PairTrainingOptions) -> Pairs:
    """A batch of a data set as pairs of clips.

    Raises:
        ValueError: `stored_noise`, and no seeds.
    """
    generators = _sampling_generators(batch) if options.stored_noise else None
    prompts = with_durations(policy, clip_prompts(batch), generators)  # draws a rhythm from each, as sampling did
    mel = pad_sequence([*batch.chosen.mel, *batch.rejected.mel], batch_first=True)
    lengths = torch.cat([batch.chosen.lengths_frames, batch.rejected.lengths_frames])
    clips = Clips(
        prompts=prompts,
        rollouts=Rollout(mel=mel, lengths_frames=lengths),
        draw_ids=[*range(len(batch))] * 2,
        noise=None if generators is None else starting_noise(policy, prompts, generators)[0],
    )
    return Pairs(clips=clips, soft_labels=batch.soft_labels, margins=batch.margins, weights=batch.weights, metrics={})


def _sampling_generators(batch: PairBatch) -> list[torch.Generator]:
    """Those that the chosen, then the rejected clips were sampled with (flow/noise.py)."""
    if batch.chosen_seeds is None or batch.rejected_seeds is None or batch.rows is None:
        raise ValueError(
            f"stored_noise: expected {', '.join(SEEDS)} in every row of the data set, got a batch without; remove the "
            "option or those rows"
        )
    seeds = [*batch.chosen_seeds.tolist(), *batch.rejected_seeds.tolist()]
    return [item_generator(seed, row) for seed, row in zip(seeds, batch.rows.tolist() * 2, strict=True)]


def sampled_clips(
    pipeline: Pipeline, prompts: Prompts, generator: torch.Generator, options: PairTrainingOptions
) -> tuple[Clips, Samples]:
    """Rollouts of the policy as clips with draws of their own, and with their rewards less the mean of their group."""
    generators = branched(generator, len(prompts))  # those of the rollouts
    samples = collect_samples(pipeline, prompts, generator, options.draws)
    noise = starting_noise(pipeline.policy, samples.prompts, generators)[0] if options.stored_noise else None
    clips = Clips(prompts=samples.prompts, rollouts=samples.rollouts, draw_ids=range(len(prompts)), noise=noise)
    return clips, samples


def best_and_worst(clips: Clips, samples: Samples) -> Pairs:
    """A pair a group; of weight 0, so that every process has as much to compute, where there is no difference."""
    ends = []
    for group in torch.unique(samples.group_ids):
        places = torch.nonzero((samples.group_ids == group) & ~samples.dropped)[:, 0]
        worth = samples.advantages[places]
        ends.append((int(places[worth.argmax()]), int(places[worth.argmin()])) if len(places) else (0, 0))
    chosen, rejected = (list(places) for places in zip(*ends, strict=True))
    margins = samples.advantages[chosen] - samples.advantages[rejected]
    return Pairs(
        clips=clips.select([*chosen, *rejected], [*range(len(ends))] * 2),
        soft_labels=torch.ones_like(margins),
        margins=margins,
        weights=(margins > 0).float(),
        metrics={**samples.metrics, "dropped_pairs": margins <= 0},
    )


def weighted_mean(values: Float[Tensor, "n b"], weights: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """sum w value / sum w over the rows, of the mean over draws: the size of the weights has no effect; 0 without any.

    As preference_loss of rewards/bradley_terry.py: of the rows of one micro-batch on one device. Accumulation and data
    parallel training then average these means, so that a row counts beside those of its own micro-batch by its weight,
    and each micro-batch as much as any other, whatever its weights add up to.
    """
    tiniest = torch.finfo(weights.dtype).tiny
    return (weights * values.mean(0)).sum() / weights.sum().clamp(min=tiniest)


def reward_metrics(chosen: Float[Tensor, "n b"], rejected: Float[Tensor, "n b"]) -> Metrics:
    """TRL's names: implicit rewards, the share of pairs (and draws) that they order as the labels do, their margin."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen.mean(0),
        "rewards/rejected": rejected.mean(0),
        "rewards/accuracies": (chosen > rejected).float().mean(0),
        "rewards/margins": (chosen - rejected).mean(0),
    }


def fit_metrics(fit: Fit) -> Metrics:
    """`anchor`, and errors of the velocity on chosen and on rejected clips: falling margins may hide that both rise."""
    chosen, rejected = fit.errors.detach().mean(0).chunk(2)
    return {"chosen_error": chosen, "rejected_error": rejected, "anchor": fit.anchors.detach().mean(0)}
