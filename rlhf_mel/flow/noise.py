"""Noise from seeds: the one place that makes generators. The global generator of PyTorch is never touched.

    item_generator(seed, row)        of a prompt in a list: `rlhf-mel sample`, evaluations, a run's samples/
    seeded(mix_seed(seed, step))     of a batch in training, by all the numbers that name the batch
    item_generators(generator, B)    from that one, a generator for each item of the batch

So an item's noise is distinct, and the same whatever batch it is in and whatever device the policy is on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, one for each item, or None: PyTorch's global one."""


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that starts at `seed`; on the CPU unless asked, so that a seed means the same on every device."""
    return torch.Generator(device).manual_seed(seed)


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, all of which matter (NumPy's SeedSequence)."""
    return _mixed([len(numbers), *numbers]) >> 1


def item_generator(seed: int, row: int) -> torch.Generator:
    """The noise of the prompt at `row` of a list: the same whatever batch it is in, different for each seed and row."""
    return seeded(_mixed([seed, row]))


def item_generators(generator: Generators, batch: int) -> list[torch.Generator] | None:
    """A generator for each item, seeded in order by the one given, which moves on; None stays None."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        if len(generator) != batch:
            raise ValueError(f"generator: expected one, or {batch} (one an item), got {len(generator)}")
        return list(generator)
    return [seeded(seed, generator.device) for seed in _drawn_seeds(generator, batch)]


def branched(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """`count` generators seeded by the one given, which stays where it is."""
    return [seeded(seed, generator.device) for seed in _drawn_seeds(generator.clone_state(), count)]


def of_rows(generators: Sequence[torch.Generator] | None, rows: Sequence[int]) -> list[torch.Generator] | None:
    """The generators of the items at `rows`; None stays None."""
    return None if generators is None else [generators[row] for row in rows]


def item_noise(
    lengths_frames: Sequence[int],
    channels: int,
    generators: Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "b n m"]:
    """Standard normal, zero beyond each length; each item from its own generator, in float32."""
    if generators is None:
        rows = [torch.randn(length, channels, device=device, dtype=dtype) for length in lengths_frames]
    else:
        rows = [
            torch.randn(length, channels, generator=generator, device=generator.device).to(device, dtype)
            for length, generator in zip(lengths_frames, generators, strict=True)
        ]
    return pad_sequence(rows, batch_first=True)


def _mixed(numbers: Sequence[int]) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _drawn_seeds(generator: torch.Generator, count: int) -> list[int]:
    """`count` seeds below 2^63 - 1, drawn from the generator, which moves on."""
    seeds: list[int] = torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device).tolist()
    return seeds
