"""Masks and means over what counts: frames of an item, finite values, a given number of elements."""

from __future__ import annotations

import torch
from torch import Tensor


def counted_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean [B] of `values` [B, T, M] over the frames `counted`, bool [B, T]."""
    return values.mean(-1).where(counted, 0.0).sum(-1) / counted.sum(-1)


def frame_mean(values: Tensor, lengths_frames: Tensor) -> Tensor:
    """Mean [B] of `values` [B, T] over each item's own frames."""
    kept = lengths_to_mask(lengths_frames, values.shape[1])
    return values.where(kept, 0.0).sum(-1) / lengths_frames


def finite_mean(values: Tensor) -> Tensor:
    """Mean over the finite ones of `values` [B]; 0, still with a (zero) gradient, if there is none."""
    finite = torch.isfinite(values)
    return values.where(finite, 0.0).sum() / finite.sum().clamp(min=1)


def lengths_to_mask(lengths: Tensor, length: int) -> Tensor:
    """Bool [batch, length]: True at the first `lengths[b]` positions of row b."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def kept_mean(values: Tensor, dropped: Tensor) -> Tensor:
    """Mean of `values` [B] over the rows that are not in `dropped` [B]; 0 without any."""
    return values.masked_fill(dropped, 0.0).sum() / (~dropped).sum().clamp(min=1)
