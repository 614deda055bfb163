"""UNetT, the backbone of E2-TTS: a flat transformer whose second half sees the first half's layers again.

    x = [time; frames];  first half: push x, x = layer(x);  second half: x = layer(skip(x, pop)))

Reference: E2 TTS, Eskimez et al. 2024 (arXiv:2406.18009), as in F5-TTS, Chen et al. 2024 (arXiv:2410.06885).
Constructor arguments, state_dict keys and numbers are those of f5-tts 1.1.22; time convention: see path.py.
Time is one more position before the frames, there is no AdaLN, and text is its embedding alone unless
`conv_layers` is given. Pure, as _base.py says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from rlhf_mel.f5.backbones._base import Backbone, FrameTextArch
from rlhf_mel.f5.backbones._common import InputEmbedding, RotaryBuffer, TextEmbedding
from rlhf_mel.f5.layers import DirectionNorm, FeedForward, Rope, SelfAttention, rotary_table

SKIPS = ("concat", "add", "none")


@dataclass(frozen=True, kw_only=True)
class UNetTArch(FrameTextArch):
    """Constructor arguments of UNetT."""

    skip_connect_type: str = "concat"
    """How a layer of the second half sees its counterpart: "concat" (a linear layer of both), "add" or "none"."""

    def __post_init__(self) -> None:
        if self.depth % 2:
            raise ValueError(f"depth: expected an even number of layers, each with its counterpart, got {self.depth}")
        if self.skip_connect_type not in SKIPS:
            raise ValueError(f"skip_connect_type: expected one of {list(SKIPS)}, got {self.skip_connect_type!r}")


class UNetT(Backbone):
    """Layers over time and mel frames; text is laid over the frames."""

    def __init__(self, **arguments: Any):
        """Fields of UNetTArch."""
        arch = UNetTArch(**arguments)
        super().__init__(arch)
        self.skip_connect_type = arch.skip_connect_type
        text_dim = arch.mel_dim if arch.text_dim is None else arch.text_dim
        self.text_embed = TextEmbedding(
            arch.text_num_embeds, text_dim, arch.text_mask_padding, conv_layers=arch.conv_layers
        )
        self.input_embed = InputEmbedding(arch.mel_dim, text_dim, arch.dim)
        self.rotary_embed = RotaryBuffer(arch.dim_head)
        self.layers = nn.ModuleList(_layer(arch, index) for index in range(arch.depth))
        self.norm_out = DirectionNorm(arch.dim)
        self.proj_out = nn.Linear(arch.dim, arch.mel_dim)

    @override
    def rope(self, frames: int, device: torch.device | None = None) -> Rope:
        """Rotary angles of time and `frames` after it, float32; once a solve."""
        return rotary_table(frames + 1, self.dim_head, device or self.proj_out.weight.device)

    @override
    def _embed_text(
        self, text: Tensor, frames: int, lengths_frames: Tensor | None, drop_text: bool | Tensor, exact: bool
    ) -> Tensor:
        """Unless it is to be exact, `lengths_frames` changes nothing: text is embedded over all frames."""
        embedded: Tensor = self.text_embed(text, frames, lengths_frames if exact else None, drop_text, exact)
        return embedded

    @override
    def _velocity(
        self,
        x: Tensor,
        cond: Tensor,
        text_embedding: Tensor,
        time_embedding: Tensor,
        mask: Tensor | None,
        rope: Rope,
        exact: bool,
    ) -> Tensor:
        time_embedding = time_embedding.expand(len(x), -1)
        # f5-tts: its convolutions see the padding
        frames = self.input_embed(x, cond, text_embedding, mask if exact else None)
        hidden = torch.cat((time_embedding.unsqueeze(1), frames), dim=1)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        skips: list[Tensor] = []
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            join, attention_norm, attention, feed_forward_norm, feed_forward = layer
            if index < self.depth // 2:
                skips.append(hidden)
            else:
                hidden = self._join(join, hidden, skips.pop())
            hidden = hidden + attention(attention_norm(hidden), mask, rope, exact)
            hidden = hidden + feed_forward(feed_forward_norm(hidden))
        velocity: Tensor = self.proj_out(self.norm_out(hidden)[:, 1:])
        return velocity

    def _join(self, join: nn.Module | None, hidden: Tensor, skip: Tensor) -> Tensor:
        if join is not None:
            joined: Tensor = join(torch.cat((hidden, skip), dim=-1))
            return joined
        return hidden + skip if self.skip_connect_type == "add" else hidden


def _layer(arch: UNetTArch, index: int) -> nn.ModuleList:
    """Join, norm, attention, norm, feed-forward: F5-TTS's checkpoints number them 0 to 4."""
    joins = arch.skip_connect_type == "concat" and index >= arch.depth // 2
    join: Any = nn.Linear(arch.dim * 2, arch.dim, bias=False) if joins else None
    feed_forward = FeedForward(arch.dim, arch.ff_mult, arch.dropout)
    attention = SelfAttention(arch.dim, arch.attention)
    return nn.ModuleList([join, DirectionNorm(arch.dim), attention, DirectionNorm(arch.dim), feed_forward])
