"""A Matcha-TTS of a few weights, a module with the same seams for where that package is not installed, and a vocoder.

`--policy tiny_matcha:build` and `tiny_matcha:build_shaped` name the two, `--vocoder tiny_matcha:Tone` the third.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_mel.adapters.matcha import MatchaPolicy
from rlhf_mel.speech.audio import MelSpec, frames_to_samples

SPEC = MelSpec(sample_rate_hz=22_050, n_mels=8, kind="bigvgan", f_max_hz=8000.0)


def to_ids(text: str) -> list[int]:
    """A blank before each letter."""
    return [id for char in text for id in (0, 1 + ord(char) % 30)]


def matcha_model(n_spks: int = 1) -> Any:
    """The package's own class, all weights away from zero."""
    from matcha.models.matcha_tts import MatchaTTS

    encoder = SimpleNamespace(
        encoder_type="RoPE Encoder",
        encoder_params=SimpleNamespace(
            n_feats=8, n_channels=16, filter_channels=16, filter_channels_dp=16, n_heads=2, n_layers=1, kernel_size=3,
            p_dropout=0.1, spk_emb_dim=16, n_spks=n_spks, prenet=True,
        ),
        duration_predictor_params=SimpleNamespace(filter_channels_dp=16, kernel_size=3, p_dropout=0.1),
    )  # fmt: skip
    decoder = dict(
        channels=(16, 16), dropout=0.05, attention_head_dim=8, n_blocks=1, num_mid_blocks=1, num_heads=2,
        act_fn="snakebeta",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MatchaTTS(
            n_vocab=40, n_spks=n_spks, spk_emb_dim=16, n_feats=8, encoder=encoder, decoder=decoder,
            cfm=SimpleNamespace(name="CFM", solver="euler", sigma_min=1e-4), out_size=None,
            data_statistics=dict(mel_mean=-5.5, mel_std=2.1),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


class ShapedEncoder(nn.Module):
    """Ids to means [B, M, N], log durations [B, 1, N] and mask, as Matcha's TextEncoder returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.proj_m, self.proj_w = nn.Embedding(40, 16), nn.Linear(16, 8), nn.Linear(16, 1)

    def forward(self, ids: Tensor, lengths: Tensor, speakers: None) -> tuple[Tensor, Tensor, Tensor]:
        mask = (torch.arange(ids.shape[1]) < lengths[:, None])[:, None].float()
        hidden = self.emb(ids)
        return self.proj_m(hidden).mT * mask, (1 + self.proj_w(hidden).sigmoid()).mT * mask, mask


class ShapedEstimator(nn.Module):
    """Velocity [B, M, T] of each frame from the frame, its mean and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.final_proj = nn.Linear(17, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: None) -> Tensor:
        time = t.reshape(-1, 1, 1).expand(len(x), 1, x.shape[2])
        return self.final_proj(self.hidden(torch.cat([x, mu, time], dim=1).mT).tanh()).mT * mask


class ShapedMatcha(nn.Module):
    """What MatchaPolicy asks of Matcha, and its names: `encoder`, `decoder.estimator`, `mel_mean`, `mel_std`."""

    n_feats, n_spks = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = ShapedEncoder(), nn.Module()
        self.decoder.estimator = ShapedEstimator()
        self.register_buffer("mel_mean", torch.tensor(-5.5))
        self.register_buffer("mel_std", torch.tensor(2.1))


def build() -> MatchaPolicy:
    return MatchaPolicy(matcha_model(), to_ids, mel_spec=SPEC)


def build_shaped() -> MatchaPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MatchaPolicy(ShapedMatcha(), to_ids, mel_spec=SPEC)


class Tone(nn.Module):
    """A frame is a stretch of a tone, as loud as the sigmoid of its mean over the bands."""

    differentiable = True
    mel_spec = SPEC
    sample_rate_hz = SPEC.sample_rate_hz

    def forward(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        frames = torch.full((len(mel),), mel.shape[1]) if lengths_frames is None else lengths_frames
        samples = frames_to_samples(mel.shape[1], SPEC)
        loudness = mel.mean(-1).sigmoid().repeat_interleave(SPEC.hop_length, dim=1)[:, :samples]
        place = torch.arange(samples)
        return loudness * (0.06 * place).sin() * (place < frames_to_samples(frames, SPEC)[:, None])
