"""What algorithms share that differentiate the reward through the solve: losses, scores, rows that are not finite."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rlhf_mel.masked import finite_mean
from rlhf_mel.metrics import Metrics, score_metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts, Rollout


def draft_loss(rewards: Tensor, anchor: Tensor, beta: float) -> Tensor:
    """-mean(rewards [B], the finite ones) + beta mean(anchor [B])."""
    return -finite_mean(rewards) + beta * anchor.mean()


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
