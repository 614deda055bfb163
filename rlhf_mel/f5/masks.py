"""Spans and masks as F5-TTS draws them, from its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.speech.audio import MelSpec


def mel_spec_from_f5(kwargs: Mapping[str, Any]) -> MelSpec:
    """MelSpec from f5-tts's names: n_mel_channels, target_sample_rate, mel_spec_type."""
    ours = {"n_mel_channels": "n_mels", "target_sample_rate": "sample_rate_hz", "mel_spec_type": "kind"}
    return MelSpec(**{ours.get(name, name): value for name, value in kwargs.items()})


def kept_frames(lens: Int[Tensor, " b"], edit_mask: Tensor | None, frames: int) -> Bool[Tensor, "b n"]:
    """Frames taken from the reference, of which bool `edit_mask` [b, up to n] may take some away (False).

    Raises:
        ValueError: an edit_mask that is not bool, or not of b (or one) rows.
    """
    kept = lengths_to_mask(lens, frames)
    if edit_mask is None:
        return kept
    if edit_mask.dtype != torch.bool or edit_mask.ndim != 2 or edit_mask.shape[0] not in (1, len(lens)):
        raise ValueError(
            f"edit_mask: expected bool [{len(lens)}, reference frames], True = keep,"
            f" got {edit_mask.dtype} {list(edit_mask.shape)}"
        )
    return kept & F.pad(edit_mask, (0, frames - edit_mask.shape[1]), value=False)


def spans(
    lens: Int[Tensor, " b"], fractions: Float[Tensor, " b"], places: Float[Tensor, " b"], frames: int
) -> Bool[Tensor, "b n"]:
    """A span of `fractions` of each length, begun at `places` in [0, 1) of the room."""
    spans = (fractions * lens).long()
    first = ((lens - spans) * places).long().unsqueeze(1)
    position = torch.arange(frames, device=lens.device)
    return (position >= first) & (position < first + spans.unsqueeze(1))


def uniform(batch: int, generator: torch.Generator | None, device: torch.device) -> Float[Tensor, " b"]:
    """Uniform numbers in [0, 1), drawn on the generator's own device."""
    drawn_on = device if generator is None else generator.device
    return torch.rand(batch, generator=generator, device=drawn_on).to(device)


def chance(probability: float, generator: torch.Generator | None) -> bool:
    """True with `probability`."""
    device = None if generator is None else generator.device
    return bool(torch.rand((), generator=generator, device=device) < probability)
