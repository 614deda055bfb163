"""Best-of-N: sample every prompt N times and keep what the rewards like best.

    i* = argmax_i r(vocoder(x_1^i)),   x_0^1 ... x_0^N ~ N(0, I) independent

No training, no gradient, any reward; N times the cost of inference. What it generates has the density
N p(x) F(r(x))^(N-1), F the distribution function of the rewards, and a divergence to p of log N - (N - 1) / N at most
(equal for continuous rewards; Beirami et al. 2024, arXiv 2401.01879): the line that a trained policy has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from rlhf_mel.flow.noise import Generators, branched, item_generators
from rlhf_mel.flow.policy import Policy, rollout
from rlhf_mel.samplers.base import RewardSampler
from rlhf_mel.types import Prompts, Rollout


@dataclass(frozen=True, kw_only=True)
class BestOfN(RewardSampler):
    """A sampler that keeps the best of N rollouts of each prompt."""

    n: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n of best-of-N: expected a whole number of at least 1, got {self.n!r}")

    @torch.no_grad()
    def __call__(self, policy: Policy, prompts: Prompts, *, generator: Generators = None, **options: Any) -> Rollout:
        """The best of N rollouts of each prompt, one pass of the batch after another; options: of policy.rollout.

        The first is the rollout without a choice, for the same generator. A rollout without a finite total is worse
        than any other.
        """
        best, best_total = None, torch.tensor(-torch.inf)
        for generators in candidate_generators(item_generators(generator, len(prompts)), self.n):
            candidate = rollout(policy, prompts, generator=generators, grad_steps=0, **options)
            total = self.total(candidate, prompts)
            total = total.where(total.isfinite(), -torch.inf)
            best = candidate if best is None else better(best, candidate, total > best_total)
            best_total = torch.maximum(total, best_total.to(total))
        assert best is not None
        return best


def better(kept: Rollout, other: Rollout, chosen: Bool[Tensor, " b"]) -> Rollout:
    """`other` in the rows that are `chosen`."""
    frames = max(kept.mel.shape[1], other.mel.shape[1])
    mels = [F.pad(rollout.mel, (0, 0, 0, frames - rollout.mel.shape[1])) for rollout in (kept, other)]
    lengths = other.lengths_frames.where(chosen.to(kept.lengths_frames.device), kept.lengths_frames)
    return Rollout(mels[1].where(chosen[:, None, None], mels[0])[:, : int(lengths.max())], lengths)


def candidate_generators(generators: list[torch.Generator] | None, n: int) -> list[list[torch.Generator] | None]:
    """N lists of a generator for each item: first those given, then N - 1 that they seed."""
    if generators is None:
        return [None] * n
    each = [(generator, *branched(generator, n - 1)) for generator in generators]
    return [list(candidate) for candidate in zip(*each, strict=True)]
