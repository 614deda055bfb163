"""Checks of rewards: do they differ within a group, and is an item of a batch what it is alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch

from rlhf_mel.algorithms.base import Algorithm
from rlhf_mel.doctor.case import Examination, Finding, Status, mean_of, skipped, std_of
from rlhf_mel.doctor.noise import deviations
from rlhf_mel.flow.noise import item_generators, of_rows, seeded
from rlhf_mel.flow.policy import rollout, with_durations
from rlhf_mel.training.first_batch import all_equal
from rlhf_mel.types import Rollout


def check_reward_spread(exam: Examination) -> Finding:
    """Rollouts that are compared need rewards that differ, within their group or, alone in it, in the batch."""
    algorithm = exam.case.algorithm
    if exam.case.pairs is not None:
        return skipped("reward spread", f"{algorithm.name} learns from pairs; rewards are heard in evaluations only")
    rewards = exam.rewards.float().cpu()
    ids = torch.arange(len(rewards)) if exam.case.prompts.group_ids is None else exam.case.prompts.group_ids.cpu()
    groups = [rewards[(ids == group) & rewards.isfinite()] for group in torch.unique(ids)]
    smallest = min(int((ids == group).sum()) for group in torch.unique(ids))
    finite = rewards[rewards.isfinite()]
    compared = groups if smallest > 1 else [finite]
    flat = sum(all_equal(group) for group in compared)
    numbers = {
        "smallest_group": smallest,
        "reward": mean_of(finite),
        "spread_within": mean_of(torch.stack([std_of(group) for group in compared])),
        "spread_batch": float(std_of(finite)),
        "flat_groups": flat / len(compared),
        "not_finite": len(rewards) - len(finite),
    }
    status, advice = _judge_spread(algorithm, numbers)
    return Finding(name="reward spread", status=status, numbers=numbers, advice=advice)


def _judge_spread(algorithm: Algorithm, numbers: Mapping[str, float]) -> tuple[Status, str]:
    compares = not algorithm.reward_gradient
    if math.isnan(numbers["reward"]):
        return "fail", "no rollout got a finite reward: listen to what the policy says, then score it by hand"
    if algorithm.needs_groups and numbers["smallest_group"] < 2:
        return "fail", f"{algorithm.name} compares rollouts of one prompt: set num_generations to at least 2"
    if compares and numbers["flat_groups"] == 1:
        return "fail", "all rewards that are compared are equal: choose a finer reward, or more noise_level"
    if numbers["not_finite"]:
        return "warn", "rollouts without a finite reward are dropped: see which rows the reward cannot score, and why"
    if compares and numbers["flat_groups"] > 0:
        return "warn", "groups of equal rewards teach nothing: raise num_generations, or choose a finer reward"
    return "pass", ""


def check_batch_is_single(exam: Examination) -> Finding:
    """The mel of an item, and the reward of one mel, are the same in the batch and alone."""
    case = exam.case
    rows = rows_to_try(exam.ode.lengths_frames.tolist())
    mel_deviation = _alone_deviation(exam, rows)
    reward_change = max(_alone_reward_change(exam, row) for row in rows)
    mel_off, reward_off = not mel_deviation <= exam.tolerance, not reward_change <= exam.reward_tolerance
    advice = ""
    if mel_off:
        advice = (
            "an item's mel depends on what it is batched with: look for means over the batch, batch norm, or unmasked "
            "padding in encode and velocity"
        )
    elif reward_off:
        names = " or ".join(case.pipeline.rewards.names)
        advice = f"a reward depends on what it is batched with: mask the padding by lengths_samples in {names}"
    return Finding(
        name="batch = single",
        status="fail" if mel_off or reward_off else "pass",
        numbers={
            "deviation": mel_deviation,
            "tolerance": exam.tolerance,
            "reward_change": reward_change,
            "items": len(rows),
        },
        advice=advice,
    )


def rows_to_try(lengths_frames: Sequence[int]) -> list[int]:
    """First and last item, the shortest and the longest: padded and not, at either end of the batch."""
    order = sorted(range(len(lengths_frames)), key=lambda row: lengths_frames[row])
    return sorted({0, len(order) - 1, order[0], order[-1]})


def _alone_deviation(exam: Examination, rows: Sequence[int]) -> float:
    """Worst deviation of `rows` solved one by one from `rows` solved at once, for which they get one duration."""
    case = exam.case
    prompts = with_durations(case.pipeline.policy, case.prompts.select(rows))
    assert prompts.durations_frames is not None
    longest = int(prompts.durations_frames.max())
    prompts = replace(prompts, durations_frames=torch.full_like(prompts.durations_frames, longest))

    def rolled_out(items: Sequence[int]) -> Rollout:
        noise = item_generators(seeded(case.seed), len(rows))
        options = asdict(case.pipeline.sampling)
        return rollout(
            case.pipeline.policy, prompts.select(items), generator=of_rows(noise, items), grad_steps=0, **options
        )

    with case.precision():
        together = rolled_out(range(len(rows)))
        return max(deviations(rolled_out([item]), _item(together, item))[0] for item in range(len(rows)))


def _alone_reward_change(exam: Examination, row: int) -> float:
    """|reward alone - reward in the batch|, over the reward's size or 1; 0 if neither is finite."""
    with torch.no_grad():
        alone = float(exam.case.pipeline.score(_item(exam.ode, row), exam.case.prompts.select([row])).total)
    together = float(exam.ode_rewards[row])
    if not math.isfinite(alone) and not math.isfinite(together):
        return 0.0
    change = abs(alone - together) / max(abs(together), 1.0)
    return math.inf if math.isnan(change) else change


def _item(rollouts: Rollout, row: int) -> Rollout:
    length = int(rollouts.lengths_frames[row])
    return Rollout(rollouts.mel[row : row + 1, :length], rollouts.lengths_frames[row : row + 1])
