"""What the backbones of F5-TTS share: text laid over mel frames, the layer that reads mel and text, f5-tts's call.

Layers that know nothing of text or mel are in layers.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_mel.f5.layers import (
    AdaLayerNorm,
    AdaLayerNormFinal,
    ConvNeXtV2Block,
    ConvPositionEmbedding,
    position_table,
    rotary_frequencies,
    zero_padding,
)

FILLER = 0
"""Embedding row for "no text here"; token ids are shifted by one to make room, padding -1 lands on it."""


class TextEmbedding(nn.Module):
    """Token ids to one vector a mel frame: text is laid over the first frames, filler over the rest."""

    def __init__(
        self,
        text_num_embeds: int,
        text_dim: int,
        mask_padding: bool = True,
        average_upsampling: bool = False,
        conv_layers: int = 0,
    ):
        super().__init__()
        if average_upsampling and not mask_padding:
            raise ValueError(
                "text_embedding_average_upsampling: expected text_mask_padding=True with it, got False;"
                " set text_mask_padding=True"
            )
        self.mask_padding = mask_padding
        self.average_upsampling = average_upsampling
        self.text_embed = nn.Embedding(text_num_embeds + 1, text_dim)
        # absent, not empty, without convolutions: so are positions (E2-TTS has neither)
        self.text_blocks = (
            nn.Sequential(*[ConvNeXtV2Block(text_dim, text_dim * 2) for _ in range(conv_layers)])
            if conv_layers
            else None
        )

    def forward(
        self, text: Tensor, frames: int, lengths_frames: Tensor | None = None, drop_text: bool | Tensor = False
    ) -> Tensor:
        tokens = _lay_over_frames(text, frames)
        inside = None
        if lengths_frames is not None:
            inside = torch.arange(frames, device=text.device) < lengths_frames.unsqueeze(1)
            tokens = tokens.masked_fill(~inside, FILLER)
        # taken before text is dropped: the unconditional branch of F5-TTS still knows how long the text is
        spoken = tokens != FILLER
        embedded = self.text_embed(drop_tokens(tokens, drop_text))
        embedded = zero_padding(embedded, inside)
        if self.text_blocks is not None:
            embedded = self._contextualize(embedded, inside, spoken if self.mask_padding else None)
        if self.average_upsampling:
            embedded = upsample_evenly(embedded, spoken.sum(dim=1), lengths_frames)
        return embedded

    def _contextualize(self, embedded: Tensor, inside: Tensor | None, spoken: Tensor | None) -> Tensor:
        positions = position_table(embedded.shape[1], embedded.shape[2], embedded.device).to(embedded.dtype)
        embedded = embedded + zero_padding(positions.expand_as(embedded), inside)
        embedded = zero_padding(embedded, spoken)
        for block in self.text_blocks or ():  # a solve embeds text once: what that keeps, it would keep for all steps
            embedded = zero_padding(run_block(block, embedded, checkpointed=not self.training), spoken)
        return embedded


def drop_tokens(tokens: Tensor, drop: bool | Tensor) -> Tensor:
    """`tokens` [B, N], all FILLER where `drop`, for the batch or bool [B], says so."""
    if isinstance(drop, Tensor):
        return tokens.masked_fill(drop.unsqueeze(1), FILLER)
    return torch.full_like(tokens, FILLER) if drop else tokens


def embed_with_and_without(backbone: Any, text: Tensor, frames: int, lengths_frames: Tensor | None) -> Tensor:
    """Embeddings of ids [B, N], then of the same without text, as classifier-free guidance needs them [2B, ...]."""
    twice = None if lengths_frames is None else lengths_frames.repeat(2)
    dropped = torch.arange(2 * len(text), device=text.device) >= len(text)
    embedded: Tensor = backbone.embed_text(text.repeat(2, 1), frames, twice, drop_text=dropped)
    return embedded


def _lay_over_frames(text: Tensor, frames: int) -> Tensor:
    """ids [B, N] with padding -1 to embedding rows [B, T]: shifted by one, cut or filled to the frames."""
    tokens = text[:, :frames] + 1
    return torch.nn.functional.pad(tokens, (0, frames - tokens.shape[1]), value=FILLER)


def upsample_evenly(embedded: Tensor, text_lengths: Tensor, lengths_frames: Tensor | None) -> Tensor:
    """Spread the first N_b rows of each item evenly over its T_b frames; frames beyond T_b are zero.

    Every token gets T_b // N_b frames, the last T_b % N_b tokens one more (ZipVoice, arXiv:2506.13053).
    """
    batch, frames, _ = embedded.shape
    lengths = embedded.new_full((batch,), frames, dtype=torch.long) if lengths_frames is None else lengths_frames
    count = text_lengths.clamp(min=1)
    base = torch.div(lengths, count, rounding_mode="floor").clamp(min=1)
    short_tokens = count - lengths % count  # these get `base` frames each, the rest `base + 1`
    frame = torch.arange(frames, device=embedded.device).expand(batch, -1)
    boundary = (short_tokens * base).unsqueeze(1)
    base, short_tokens = base.unsqueeze(1), short_tokens.unsqueeze(1)
    early = torch.div(frame, base, rounding_mode="floor")
    late = short_tokens + torch.div(frame - boundary, base + 1, rounding_mode="floor")
    token = torch.where(frame < boundary, early, late).clamp(max=frames - 1)
    spread = embedded.gather(1, token.unsqueeze(-1).expand_as(embedded))
    heard = (frame < lengths.unsqueeze(1)) & (text_lengths > 0).unsqueeze(1)
    return zero_padding(spread, heard)


class InputEmbedding(nn.Module):
    """Noisy mel, known mel and text, side by side in each frame, plus convolutional positions."""

    def __init__(self, mel_dim: int, text_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(mel_dim * 2 + text_dim, dim)
        self.conv_pos_embed = ConvPositionEmbedding(dim)

    def forward(self, x: Tensor, cond: Tensor, text_embedding: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.proj(torch.cat((x, cond, text_embedding), dim=-1))
        return self.conv_pos_embed(hidden, mask) + hidden


class RotaryBuffer(nn.Module):
    """Holds `inv_freq` because F5-TTS checkpoints do; the table is computed afresh in float32 (see layers.py)."""

    inv_freq: Tensor

    def __init__(self, dim_head: int):
        super().__init__()
        self.register_buffer("inv_freq", rotary_frequencies(dim_head))


def run_block(block: nn.Module, *inputs: Any, checkpointed: bool) -> Any:
    """`block(*inputs)`; where gradients are on and it is to be `checkpointed`, its activations are computed again."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def start_from_zero(backbone: nn.Module, proj_out: nn.Linear) -> None:
    """AdaLN-zero: every block starts as the identity and the output as zero (so do most gradients)."""
    norms = [layer for layer in backbone.modules() if isinstance(layer, (AdaLayerNorm, AdaLayerNormFinal))]
    for layer in [*(norm.linear for norm in norms), proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def forward_as_f5(
    self: Any,
    x: Tensor,
    cond: Tensor,
    text: Tensor,
    time: Tensor,
    mask: Tensor | None = None,
    drop_audio_cond: bool = False,
    drop_text: bool = False,
    cfg_infer: bool = False,
    cache: bool = False,
) -> Tensor:
    """f5-tts's call: token ids in, velocity out; with `cfg_infer` [2B, T, M], conditional rows first.

    `cache` is accepted and means nothing here: there is no module state to cache in. The `forward` of every
    backbone; all that is a backbone's own is in its `embed_text` and `velocity`.
    """
    check_inputs(x, cond, text, time, mask)
    frames = x.shape[1]
    lengths = None if mask is None else mask.sum(dim=1)
    if not cfg_infer:
        known = torch.zeros_like(cond) if drop_audio_cond else cond
        return self.velocity(x, known, self.embed_text(text, frames, lengths, drop_text=drop_text), time, mask=mask)
    return self.velocity(
        torch.cat((x, x)),
        torch.cat((cond, torch.zeros_like(cond))),
        embed_with_and_without(self, text, frames, lengths),
        time if time.ndim == 0 else torch.cat((time, time)),
        mask=None if mask is None else torch.cat((mask, mask)),
    )


def check_inputs(x: Tensor, cond: Tensor, text: Tensor, time: Tensor, mask: Tensor | None) -> None:
    if x.ndim != 3 or cond.shape != x.shape:
        raise ValueError(
            f"x and cond: expected one shape [batch, frames, mels], got {list(x.shape)}, {list(cond.shape)}"
        )
    batch, frames, _ = x.shape
    if text.ndim != 2 or text.shape[0] != batch or text.is_floating_point():
        raise ValueError(f"text: expected ids [{batch}, tokens], padded with -1, got {text.dtype} {list(text.shape)}")
    if time.ndim > 1 or (time.ndim == 1 and time.shape[0] != batch):
        raise ValueError(f"time: expected a scalar or [{batch}], got {list(time.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, frames)):
        raise ValueError(f"mask: expected bool [{batch}, {frames}], got {mask.dtype} {list(mask.shape)}")
