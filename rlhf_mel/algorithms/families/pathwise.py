"""What algorithms share that differentiate the reward through the solve: losses, scores, rows that are not finite."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_mel.masked import finite_mean
from rlhf_mel.metrics import Metrics, score_metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts, Rollout


def draft_loss(rewards: Float[Tensor, " b"], anchor: Float[Tensor, " b"], beta: float) -> Float[Tensor, ""]:
    """-mean(rewards, the finite ones) + beta mean(anchor)."""
    return -finite_mean(rewards) + beta * anchor.mean()


def check_grad_steps(option: str, asked: int, pipeline: Pipeline) -> None:
    """Raise a ValueError if more steps are to be differentiated than a rollout has; `option` is what asks for them."""
    if asked > pipeline.sampling.steps:
        raise ValueError(f"{option}: expected at most the {pipeline.sampling.steps} sampling_steps, got {asked}")


def guard_rows(mel: Float[Tensor, "b n m"], dropped: Bool[Tensor, " b"]) -> Float[Tensor, "b n m"]:
    """`mel`, whose gradient is 0 in the rows marked in `dropped`; rows of a gradient that is not finite are marked too.

    A score that is not finite has no useful gradient, and 0 times NaN is NaN: leaving it out of the loss would not
    keep it out of the weights.
    """

    def clean(grad: Tensor) -> Tensor:
        dropped.logical_or_(~torch.isfinite(grad).flatten(1).all(1))
        return grad.masked_fill(dropped[:, None, None], 0.0)

    if mel.requires_grad:
        mel.register_hook(clean)  # type: ignore[no-untyped-call]  # torch declares no types of it
    return mel


def pathwise_scores(pipeline: Pipeline, rollouts: Rollout, prompts: Prompts) -> tuple[Float[Tensor, " b"], Metrics]:
    """Total scores with their gradient, not finite where a row is to be dropped, and the reward metrics."""
    dropped = torch.zeros(len(prompts), dtype=torch.bool, device=rollouts.mel.device)
    scores = pipeline.score(dataclasses.replace(rollouts, mel=guard_rows(rollouts.mel, dropped)), prompts)
    dropped.logical_or_(~torch.isfinite(scores.total.detach()))
    return scores.total, score_metrics(scores, prompts.group_ids) | {"dropped_rollouts": dropped}
