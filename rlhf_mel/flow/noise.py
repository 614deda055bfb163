"""Noise from seeds: distinct for each item, equal whatever batch an item is in; the global generator is untouched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, one for each item, or None: PyTorch's global one."""


def item_generators(generator: Generators, batch: int) -> list[torch.Generator] | None:
    """A generator for each item, seeded in order by the one given; None stays None."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        if len(generator) != batch:
            raise ValueError(f"generator: expected one, or {batch} (one an item), got {len(generator)}")
        return list(generator)
    seeds = torch.randint(2**63 - 1, (batch,), generator=generator, device=generator.device)
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds.tolist()]


def item_noise(
    lengths_frames: Sequence[int],
    channels: int,
    generators: Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Standard normal [B, T, M], zero beyond each length; each item from its own generator, in float32."""
    if generators is None:
        rows = [torch.randn(length, channels, device=device, dtype=dtype) for length in lengths_frames]
    else:
        rows = [
            torch.randn(length, channels, generator=generator, device=generator.device).to(device, dtype)
            for length, generator in zip(lengths_frames, generators, strict=True)
        ]
    return pad_sequence(rows, batch_first=True)


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, all of which matter (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def item_generator(seed: int, row: int) -> torch.Generator:
    """The noise of one prompt: the same whatever batch it is in, different for each seed and row."""
    mixed = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))
