"""Features of a frozen Whisper encoder (Radford et al., arXiv 2212.04356), differentiable to the waveform.

    log-mel = (max(L, max L - 8) + 4) / 4,    L = log10(max(1e-10, F |STFT(w)|^2)),   16 kHz, 400-sample window, hop 160

in torch, as transformers' WhisperFeatureExtractor computes it without a gradient (tests/speech/test_whisper_features.py
compares the two), in a window that is padded with zeros. Whisper was trained on windows of 30 s; a shorter one costs
less, in proportion, and its features differ somewhat. A clip that is longer than a window is heard through several.

Every clip is heard at one level: it is divided by its loud level l (below), so a gain of the clip changes nothing.

    l^2 = sum_t p_t^2 / sum_t p_t,    p_t the mean power of frame t of 20 ms

is the mean of the power weighted by the power: frames of silence do not count, however many there are.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_mel.masked import lengths_to_mask

SAMPLE_RATE_HZ = 16_000
HOP_LENGTH = 160
N_FFT = 400
SAMPLES_PER_FEATURE = 2 * HOP_LENGTH
"""The encoder's second convolution has stride 2: 50 features a second."""
LEVEL_RMS = 0.1
"""The loud level that clips are brought to: -20 dBFS."""
QUIETEST_RMS = 1e-4
"""-80 dBFS: a loud level below it is taken for it, so that silence stays silence."""


def loud_level(
    waveform: Float[Tensor, "b s"], lengths_samples: Int[Tensor, " b"], frame: int = SAMPLES_PER_FEATURE
) -> Float[Tensor, " b"]:
    """The loud level l of each clip, an rms; see the module. At least QUIETEST_RMS."""
    inside = waveform.where(lengths_to_mask(lengths_samples, waveform.shape[1]), 0.0)
    power = F.pad(inside, (0, -waveform.shape[1] % frame)).unfold(1, frame, frame).square().mean(-1)
    weighted = power.square().sum(-1) / power.sum(-1).clamp(min=1e-12)
    return weighted.clamp(min=QUIETEST_RMS**2).sqrt()


class WhisperFeatures(nn.Module):
    """A frozen encoder: waveform at 16 kHz to the outputs of its layers."""

    filters: Tensor

    def __init__(self, encoder: Any, window_s: float | None = None) -> None:
        """encoder: a transformers WhisperEncoder, copied and frozen. window_s: None keeps its own, 30 s as trained."""
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        self._cut_window(window_s)
        self.window_samples: int = self.encoder.config.max_source_positions * SAMPLES_PER_FEATURE
        filters = mel_filter_bank(
            num_frequency_bins=1 + N_FFT // 2,
            num_mel_filters=self.encoder.config.num_mel_bins,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=SAMPLE_RATE_HZ,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    @property
    def dim(self) -> int:
        """Channels of a layer."""
        return int(self.encoder.config.d_model)

    @property
    def num_layers(self) -> int:
        """Outputs that `forward` gives: the embedded frames, and one a layer."""
        return int(self.encoder.config.encoder_layers) + 1

    def train(self, mode: bool = True) -> WhisperFeatures:
        """Frozen: always in evaluation mode, without dropout."""
        return super().train(False)

    def forward(
        self, waveform: Float[Tensor, "b s"], lengths_samples: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "layers b k d"], Int[Tensor, " b"]]:
        """Every layer's output, and how many of its k frames are each clip's own. Samples beyond a clip may be NaN."""
        dtype = self.encoder.conv1.weight.dtype
        waveform = waveform.to(dtype).where(lengths_to_mask(lengths_samples, waveform.shape[1]), 0.0)
        waveform = waveform * (LEVEL_RMS / loud_level(waveform, lengths_samples))[:, None]
        waveform = F.pad(waveform, (0, -waveform.shape[1] % self.window_samples))
        mel = self.log_mel(waveform)
        windows = mel.reshape(-1, self.window_samples // HOP_LENGTH, mel.shape[-1])
        output = self.encoder(windows.transpose(1, 2), output_hidden_states=True)
        lengths = -(-lengths_samples // SAMPLES_PER_FEATURE)
        layers = [layer.reshape(len(waveform), -1, self.dim)[:, : int(lengths.max())] for layer in output.hidden_states]
        return torch.stack(layers), lengths

    def log_mel(self, waveform: Float[Tensor, "b s"]) -> Float[Tensor, "b n m"]:
        """The log mel of a padded waveform; see the module."""
        window = torch.hann_window(N_FFT, device=waveform.device, dtype=waveform.dtype)
        spectrum = torch.stft(waveform, N_FFT, HOP_LENGTH, window=window, return_complex=True)[..., :-1]
        power = torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)
        log_power = (power @ self.filters.to(waveform.dtype)).clamp(min=1e-10).log10()
        return (log_power.maximum(log_power.amax((1, 2), keepdim=True) - 8) + 4) / 4

    def _cut_window(self, window_s: float | None) -> None:
        """Keep the first positions only: those of a shorter window."""
        config = self.encoder.config
        longest_s = config.max_source_positions * SAMPLES_PER_FEATURE / SAMPLE_RATE_HZ
        if window_s is None:
            return
        if not 0.1 <= window_s <= longest_s:
            raise ValueError(f"window_s of Whisper: expected 0.1 to {longest_s:g} seconds, got {window_s!r}")
        positions = round(window_s * SAMPLE_RATE_HZ / SAMPLES_PER_FEATURE)
        kept = self.encoder.embed_positions.weight[:positions].clone()
        self.encoder.embed_positions = nn.Embedding.from_pretrained(kept, freeze=True)  # type: ignore[no-untyped-call]
        config.max_source_positions = positions


def load_whisper_features(folder: Path | str, window_s: float | None = None) -> WhisperFeatures:
    """The encoder of a folder in transformers' format: a whole Whisper, or an encoder that was saved alone.

    Raises:
        FileNotFoundError: no such folder, or none with a config.json. Nothing is downloaded.
        ValueError: a model of another kind.
    """
    from transformers import AutoConfig, WhisperModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"encoder {str(folder)!r}: expected a folder in transformers' format with config.json and "
            "model.safetensors, found none; save one with WhisperModel.save_pretrained"
        )
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "whisper":
        raise ValueError(f"encoder {str(folder)!r}: expected a model_type of 'whisper', got {config.model_type!r}")
    alone = config.architectures == ["WhisperEncoder"]
    model: Any = WhisperEncoder if alone else WhisperModel
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    loaded = model.from_pretrained(folder, attn_implementation="sdpa", **options)
    return WhisperFeatures(loaded if alone else loaded.encoder, window_s)
