"""What a velocity of F5-TTS is conditioned on, and its guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_mel.f5.layers import Rope


class Condition(NamedTuple):
    """What the velocity needs to know of a batch; made once a solve.

    With guidance, what the backbone sees has 2B rows: the prompts, then the same with nothing known.
    """

    reference: Tensor
    """Float [B, T, M]: reference mel, zero beyond its end."""
    kept: Tensor
    """Bool [B, T]: frames that finalize copies from the reference."""
    generated: Tensor
    """Bool [B, T]: frames that are the policy's work."""
    known: Tensor
    """Float [B or 2B, T, M]: mel shown to the backbone."""
    text: Tensor
    """Float [B or 2B, T, D]: text embedding, with its graph."""
    mask: Tensor | None
    """Bool [B or 2B, T]: frames within each item's duration; None where all have the same."""
    rope: Rope
    lengths_frames: tuple[int, ...]
    """Total frames of each of the B items."""
    guidance: float
    """Classifier-free guidance strength s; 0 evaluates no unconditional branch."""


def velocity_by(backbone: Any) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    return partial(guided, backbone.velocity)


def guided(call: Callable[..., Tensor], x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """CFM.velocity by a backbone's own velocity."""
    call = partial(call, mask=cond.mask, rope=cond.rope)
    if not cond.guidance:
        return call(x, cond.known, cond.text, t).to(x.dtype)
    t = t if t.ndim == 0 else torch.cat((t, t))
    # in the dtype of x: under autocast the difference of two bfloat16 numbers has few digits
    prompted, free = call(torch.cat((x, x)), cond.known, cond.text, t).to(x.dtype).chunk(2)
    return prompted + (prompted - free) * cond.guidance
