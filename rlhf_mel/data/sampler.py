"""Which prompts an update sees: groups of rollouts of one prompt, the same on every process and after a resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from rlhf_mel.flow.noise import mix_seed, seeded


class GroupSampler(torch.utils.data.Sampler[int]):
    """Every row once an epoch, `num_generations` times in a row, in an order that (seed, epoch) decides.

    With `num_iterations` above 1, the `rollouts_per_update` rows of an update come that often in a row, so that each
    of its micro-batches, on every process, meets its own again. The last update of an epoch is then filled up with
    rows of the epoch's beginning.

    `epoch` is asked at the start of each pass, so that a resumed run sees the order of the uninterrupted one
    without any saved state.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        num_generations: int,
        seed: int,
        epoch: Callable[[], int],
        num_iterations: int = 1,
        rollouts_per_update: int = 1,
    ) -> None:
        self._num_rows = num_rows
        self._num_generations = num_generations
        self._num_iterations = num_iterations
        self._block = rollouts_per_update if num_iterations > 1 else 1
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self._num_rows * self._num_generations / self._block) * self._block * self._num_iterations

    def __iter__(self) -> Iterator[int]:
        generator = seeded(mix_seed(self._seed, self._epoch()))
        order = torch.randperm(self._num_rows, generator=generator).tolist()
        rollouts = [row for row in order for _ in range(self._num_generations)]
        for start in range(0, len(rollouts), self._block):
            block = [rollouts[place % len(rollouts)] for place in range(start, start + self._block)]
            yield from block * self._num_iterations
