"""Layers that the backbones of F5-TTS share: text laid over mel frames, and the layer that reads mel and text.

Layers that know nothing of text or mel are in layers.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

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

    @override
    def forward(
        self,
        text: Int[Tensor, "b t"],
        frames: int,
        lengths_frames: Int[Tensor, " b"] | None = None,
        drop_text: bool | Bool[Tensor, " b"] = False,
        exact: bool = False,
    ) -> Float[Tensor, "b n d"]:
        """Arguments of `Backbone.embed_text`."""
        tokens = _lay_over_frames(text, frames)
        inside = None
        if lengths_frames is not None:
            inside = torch.arange(frames, device=text.device) < lengths_frames.unsqueeze(1)
            tokens = tokens.masked_fill(~inside, FILLER)
        # taken before text is dropped: the unconditional branch of F5-TTS still knows how long the text is
        has_token = tokens != FILLER
        embedded = zero_padding(self.text_embed(drop_tokens(tokens, drop_text)), inside)
        if self.text_blocks is not None:
            embedded = self._contextualize(embedded, inside, has_token if self.mask_padding else None, exact)
        if self.average_upsampling:
            embedded = upsample_evenly(embedded, has_token.sum(dim=1), lengths_frames)
        return embedded

    def _contextualize(self, embedded: Tensor, inside: Tensor | None, has_token: Tensor | None, exact: bool) -> Tensor:
        positions = position_table(embedded.shape[1], embedded.shape[2], embedded.device).to(embedded.dtype)
        embedded = embedded + zero_padding(positions.expand_as(embedded), inside)
        counted = inside if exact else None
        kept = counted if has_token is None else has_token
        embedded = zero_padding(embedded, kept)
        for block in self.text_blocks or ():  # a solve embeds text once: what that keeps, it would keep for all steps
            embedded = zero_padding(run_block(block, embedded, counted, checkpointed=not self.training), kept)
        return embedded


def drop_tokens(tokens: Int[Tensor, "b t"], drop: bool | Bool[Tensor, " b"]) -> Int[Tensor, "b t"]:
    """`tokens`, all FILLER where `drop`, for the batch or item by item, says so."""
    if isinstance(drop, Tensor):
        return tokens.masked_fill(drop.unsqueeze(1), FILLER)
    return torch.full_like(tokens, FILLER) if drop else tokens


def _lay_over_frames(text: Tensor, frames: int) -> Tensor:
    """ids [B, N] with padding -1 to embedding rows [B, T]: shifted by one, cut or filled to the frames."""
    tokens = text[:, :frames] + 1
    return torch.nn.functional.pad(tokens, (0, frames - tokens.shape[1]), value=FILLER)


def upsample_evenly(
    embedded: Float[Tensor, "b n d"], text_lengths: Int[Tensor, " b"], lengths_frames: Int[Tensor, " b"] | None
) -> Float[Tensor, "b n d"]:
    """Spread the first `text_lengths` rows of each item evenly over its `lengths_frames`; frames beyond are zero.

    Of T frames and N tokens, every token gets T // N, the last T % N tokens one more (ZipVoice, arXiv:2506.13053).
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
    inside = (frame < lengths.unsqueeze(1)) & (text_lengths > 0).unsqueeze(1)
    return zero_padding(spread, inside)


class InputEmbedding(nn.Module):
    """Noisy mel, known mel and text, side by side in each frame, plus convolutional positions."""

    def __init__(self, mel_dim: int, text_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(mel_dim * 2 + text_dim, dim)
        self.conv_pos_embed = ConvPositionEmbedding(dim)

    @override
    def forward(
        self,
        x: Float[Tensor, "b n m"],
        cond: Float[Tensor, "b n m"],
        text_embedding: Float[Tensor, "b n e"],
        mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b n d"]:
        hidden: Tensor = self.proj(torch.cat((x, cond, text_embedding), dim=-1))
        positioned: Tensor = self.conv_pos_embed(hidden, mask) + hidden
        return positioned


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
