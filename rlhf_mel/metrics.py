"""Metrics of a batch, and how those of many batches and processes become the numbers that are logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_mel.types import Scores

Metrics = dict[str, Tensor]
"""Name to a scalar or to [b], one value a rollout (bool: counted, else averaged); `pool` makes the logged numbers."""


OF_PREFERENCES = frozenset({"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"})
"""Implicit rewards (algorithms/families/pairs.py), which TRL's DPOTrainer logs as plain means."""


def score_metrics(scores: Scores, group_ids: Int[Tensor, " b"] | None) -> Metrics:
    """`reward`, `rewards/NAME` and, where groups have two or more members, `frac_reward_zero_std`."""
    metrics = {"reward": scores.total.detach()}
    metrics |= {f"rewards/{name}": values.detach() for name, values in scores.breakdown.items()}
    if group_ids is not None and len(torch.unique(group_ids)) < len(group_ids):
        metrics["frac_reward_zero_std"] = frac_zero_std(scores.total.detach(), group_ids)
    return metrics


def frac_zero_std(rewards: Float[Tensor, " b"], group_ids: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Share of groups all of whose finite rewards are equal: they say nothing of what is better."""
    groups = [rewards[(group_ids == group) & rewards.isfinite()] for group in torch.unique(group_ids)]
    return torch.stack([(group == group[:1]).all() for group in groups]).float().mean()


def pool(batches: Sequence[Mapping[str, Sequence[float | bool]]]) -> dict[str, float]:
    """The numbers to log of the metrics of several batches and processes, in TRL's names.

    Rollouts count alike whatever batch they came in. `reward` and `rewards/NAME` get a mean and a standard
    deviation (n - 1) over the finite values, flags are counted, everything else (`OF_PREFERENCES` too) is averaged.
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
        elif name.startswith("rewards/") and name not in OF_PREFERENCES:
            logged |= {f"{name}/mean": mean, f"{name}/std": std}
        else:
            logged[name] = mean
    return logged
