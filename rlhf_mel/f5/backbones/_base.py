"""What every backbone of F5-TTS has: its constructor's arguments, what CFM asks of it, f5-tts's call.

    v(x_t, t | mel, text) = velocity(x, mel, embed_text(text), t)

A backbone holds no state besides weights. What a solve needs only once (`embed_text`, `rope`) is computed outside and
passed in, so `velocity` is pure: shapes decide everything, nothing waits for the device, and one velocity can be
checkpointed, compiled block by block, or captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from rlhf_mel.f5.layers import AttentionConfig, Rope, TimestepEmbedding, rotary_table


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Constructor arguments of every backbone: names and defaults of f5-tts."""

    dim: int
    """Width of the stream of frames."""
    depth: int = 8
    """Number of blocks."""
    heads: int = 8
    dim_head: int = 64
    """Width of a head of attention."""
    dropout: float = 0.1
    """Probability, after attention and in the feed-forward."""
    ff_mult: float = 4
    """Inner width of the feed-forward, in units of `dim`."""
    mel_dim: int = 100
    """Mel bands."""
    text_num_embeds: int = 256
    """Tokens of the vocabulary; the embedding has one row more, for "no text here"."""
    text_mask_padding: bool = True
    """Whether embeddings are zero where there is no token."""
    qk_norm: str | None = None
    """See AttentionConfig."""
    attn_backend: str = "torch"
    """Accepted and not used: PyTorch's own dispatch picks the kernel."""
    attn_mask_enabled: bool = False
    """See AttentionConfig."""

    @property
    def attention(self) -> AttentionConfig:
        """What the attention layers take of these."""
        return AttentionConfig(
            heads=self.heads,
            dim_head=self.dim_head,
            dropout=self.dropout,
            qk_norm=self.qk_norm,
            attn_mask_enabled=self.attn_mask_enabled,
        )


@dataclass(frozen=True, kw_only=True)
class FrameTextArch(Arch):
    """Those of DiT and UNetT besides, which lay text over frames."""

    text_dim: int | None = None
    """Width of the text embedding; None: mel_dim."""
    conv_layers: int = 0
    """ConvNeXt blocks over the text embedding."""
    pe_attn_head: int | None = None
    """See AttentionConfig."""

    @property
    @override
    def attention(self) -> AttentionConfig:
        return replace(super().attention, pe_attn_head=self.pe_attn_head)


class Backbone(nn.Module):
    """A velocity of mel frames given mel and text; a subclass has `_embed_text` and `_velocity`."""

    checkpoint_activations = False
    """Whether a block's activations are computed again in backward()."""
    proj_out: nn.Linear

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = asdict(arch)
        self.dim, self.depth, self.dim_head = arch.dim, arch.depth, arch.dim_head
        self.time_embed = TimestepEmbedding(arch.dim)

    def rope(self, frames: int, device: torch.device | None = None) -> Rope:
        """Rotary angles for `frames`, float32; once a solve."""
        return rotary_table(frames, self.dim_head, device or self.proj_out.weight.device)

    def embed_text(
        self,
        text: Int[Tensor, "b t"],
        frames: int,
        lengths_frames: Int[Tensor, " b"] | None = None,
        *,
        drop_text: bool | Bool[Tensor, " b"] = False,
        exact: bool = False,
    ) -> Float[Tensor, "b positions d"]:
        """Token ids, padded with -1, to embeddings; once a solve, with its graph.

        Args:
            lengths_frames: frames of each item, where some have fewer than `frames`.
            drop_text: all items, or those marked, as if they had no text (for guidance).
            exact: see `velocity`.
        """
        return self._embed_text(text, frames, lengths_frames, drop_text, exact)

    def velocity(
        self,
        x: Float[Tensor, "b n m"],
        cond: Float[Tensor, "b n m"],
        text_embedding: Float[Tensor, "b positions d"],
        time: Float[Tensor, " ..."],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        rope: Rope | None = None,
        exact: bool = False,
    ) -> Float[Tensor, "b n m"]:
        """Velocity at x and `time`, given known mel `cond` and what `embed_text` made.

        Args:
            time: [b], or a scalar (or [1]) shared by the batch: AdaLN then runs on one row.
            mask: frames within each item's duration; None: all.
            exact: hide padding from all that mixes frames, so that each item gets what it gets alone; False: mask as
                f5-tts does, where padding is attended to.
        """
        rope = self.rope(x.shape[1], x.device) if rope is None else rope
        time_embedding = self.time_embed(time.reshape(-1), x.dtype)
        return self._velocity(x, cond, text_embedding, time_embedding, mask, rope, exact)

    def _embed_text(
        self, text: Tensor, frames: int, lengths_frames: Tensor | None, drop_text: bool | Tensor, exact: bool
    ) -> Tensor:
        raise NotImplementedError

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
        raise NotImplementedError

    @override
    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        text: Tensor,
        time: Tensor,
        mask: Tensor | None = None,
        drop_audio_cond: bool = False,
        drop_text: bool = False,
        cfg_infer: bool = False,
        cache: bool = False,
    ) -> Float[Tensor, "b_or_2b n m"]:
        """f5-tts's call: token ids [b, t] in, velocity out; with `cfg_infer` of 2b rows, conditional ones first.

        `cache` is accepted and means nothing here: there is no module state to cache in.

        Raises:
            ValueError: shapes that do not fit, see `velocity` for those of x, cond, time and mask.
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


def embed_with_and_without(
    backbone: Backbone,
    text: Int[Tensor, "b t"],
    frames: int,
    lengths_frames: Int[Tensor, " b"] | None,
    exact: bool = False,
) -> Float[Tensor, "2*b positions d"]:
    """Embeddings of the items, then of the same without text, as classifier-free guidance needs them."""
    twice = None if lengths_frames is None else lengths_frames.repeat(2)
    dropped = torch.arange(2 * len(text), device=text.device) >= len(text)
    return backbone.embed_text(text.repeat(2, 1), frames, twice, drop_text=dropped, exact=exact)


def check_inputs(x: Tensor, cond: Tensor, text: Tensor, time: Tensor, mask: Tensor | None) -> None:
    """Refuse what is not of the shapes of `Backbone.forward`.

    Raises:
        ValueError: with the name of the argument.
    """
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
