"""Masks and means over what counts: frames of an item, finite values, a given number of elements."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def counted_mean(values: Float[Tensor, "b n m"], counted: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Mean of `values` over all elements of the frames `counted`."""
    return values.mean(-1).where(counted, 0.0).sum(-1) / counted.sum(-1)


def frame_mean(values: Float[Tensor, "b n"], lengths_frames: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Mean of `values` over each item's own frames."""
    kept = lengths_to_mask(lengths_frames, values.shape[1])
    return values.where(kept, 0.0).sum(-1) / lengths_frames


def finite_mean(values: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean over the finite ones of `values`; 0, still with a (zero) gradient, if there is none."""
    finite = torch.isfinite(values)
    return values.where(finite, 0.0).sum() / finite.sum().clamp(min=1)


def lengths_to_mask(lengths: Int[Tensor, " b"], length: int) -> Bool[Tensor, "b {length}"]:
    """True at the first `lengths[b]` of the `length` positions of row b."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def kept_mean(values: Float[Tensor, " b"], dropped: Bool[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean of `values` over the rows that are not `dropped`; 0 without any."""
    return values.masked_fill(dropped, 0.0).sum() / (~dropped).sum().clamp(min=1)
