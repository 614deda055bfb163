"""What a velocity of F5-TTS is conditioned on, and its guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_mel.f5.backbones._base import embed_with_and_without
from rlhf_mel.f5.layers import Rope, zero_padding
from rlhf_mel.masked import lengths_to_mask


class Condition(NamedTuple):
    """What the velocity needs to know of a batch; made once a solve.

    With guidance, what the backbone sees has r = 2b rows: the prompts, then the same with nothing known; else r = b.
    """

    reference: Float[Tensor, "b n m"]
    """Reference mel, zero beyond its end."""
    kept: Bool[Tensor, "b n"]
    """Frames that finalize copies from the reference."""
    generated: Bool[Tensor, "b n"]
    """Frames that are the policy's work."""
    known: Float[Tensor, "r n m"]
    """Mel shown to the backbone."""
    text: Float[Tensor, "r _ d"]
    """Text embedding, with its graph."""
    mask: Bool[Tensor, "r n"] | None
    """Frames within each item's duration; None where all have the same."""
    rope: Rope
    lengths_frames: tuple[int, ...]
    """Total frames of each of the b items."""
    guidance: float
    """Classifier-free guidance strength s; 0 evaluates no unconditional branch."""
    exact: bool = False
    """Whether each item gets what it gets alone; False: padding is masked as in f5-tts, which attends to it."""


def condition_on(
    backbone: Any,
    reference: Float[Tensor, "b n m"],
    kept: Bool[Tensor, "b n"],
    ids: Int[Tensor, "b t"],
    lengths_frames: list[int],
    cfg_strength: float,
    *,
    exact: bool = False,
) -> Condition:
    """Condition of items of `lengths_frames` that keep the frames `kept` of `reference` and say `ids`.

    Args:
        cfg_strength: guidance; below 1e-5 there is none, as in f5-tts.
        exact: see `Condition`.
    """
    frames = reference.shape[1]
    durations = torch.tensor(lengths_frames, device=reference.device)
    inside = lengths_to_mask(durations, frames)
    mask = None if min(lengths_frames) == frames else inside
    known = reference.masked_fill(~kept.unsqueeze(-1), 0.0)
    text_lengths = None if mask is None else durations
    guidance = cfg_strength if cfg_strength >= 1e-5 else 0.0
    if guidance:
        known = torch.cat((known, torch.zeros_like(known)))
        text = embed_with_and_without(backbone, ids, frames, text_lengths, exact)
        mask = None if mask is None else torch.cat((mask, mask))
    else:
        text = backbone.embed_text(ids, frames, text_lengths, exact=exact)
    return Condition(
        reference=reference,
        kept=kept,
        generated=inside & ~kept,
        known=known,
        text=text,
        mask=mask,
        rope=backbone.rope(frames, reference.device),
        lengths_frames=tuple(lengths_frames),
        guidance=guidance,
        exact=exact,
    )


def velocity_by(backbone: Any) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """`guided` by the velocity of `backbone`: a function of x, t and condition."""
    return partial(guided, backbone.velocity)


def guided(
    call: Callable[..., Tensor], x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: Condition
) -> Float[Tensor, "b n m"]:
    """CFM.velocity by a backbone's own velocity, `call`: v + s (v - v_free)."""
    call = partial(call, mask=cond.mask, rope=cond.rope)
    if cond.exact:
        call = partial(call, exact=True)
    if not cond.guidance:
        return _without_padding(call(x, cond.known, cond.text, t).to(x.dtype), cond)
    t = t if t.ndim == 0 else torch.cat((t, t))
    # in the dtype of x: under autocast the difference of two bfloat16 numbers has few digits
    prompted, free = call(torch.cat((x, x)), cond.known, cond.text, t).to(x.dtype).chunk(2)
    return _without_padding(prompted + (prompted - free) * cond.guidance, cond)


def _without_padding(velocity: Float[Tensor, "b n m"], cond: Condition) -> Float[Tensor, "b n m"]:
    """Padding stays the zeros that it is in the noise, where items are to get what they get alone."""
    return zero_padding(velocity, cond.mask[: len(velocity)]) if cond.exact and cond.mask is not None else velocity
