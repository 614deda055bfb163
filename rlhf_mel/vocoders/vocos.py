"""Vocos: a mel's frames become short-time spectra, the inverse STFT makes them sound.

    h = backbone(mel);   log |X|, arg X = head.out(h);   waveform = ISTFT(|X| exp(i arg X))

Siuzdak, "Vocos: Closing the gap between time-domain and Fourier-based neural vocoders" (2023). Backbone and
head are the classes of the `vocos` package. What is done here and not there:
- `Vocos.decode` runs under inference_mode; this is differentiable in the mel;
- padding is exact: padded frames are zero at every convolution, as its zero padding is for the item alone,
  and the overlap-add divides by the windows of an item's own frames only;
- no host synchronisation (torch.istft reads its window sum back), so it can be captured in a CUDA graph;
- float32 even under autocast: in bfloat16 a phase of 30 radians is off by 0.1.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override
from vocos.heads import ISTFTHead
from vocos.models import VocosBackbone

from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.speech.audio import MelSpec, frames_to_samples
from rlhf_mel.storage import download, write_tensors, write_whole

MAX_MAGNITUDE = 1e2
"""Where ISTFTHead clips; beyond it the gradient is zero."""


PUBLISHED_FILES = ("config.yaml", "pytorch_model.bin")


class VocosVocoder(nn.Module):
    """A frozen Vocos; see `load` and the module docstring. `trainable` builds one to train."""

    differentiable = True

    def __init__(self, backbone: VocosBackbone, head: ISTFTHead, mel_spec: MelSpec) -> None:
        super().__init__()
        if mel_spec.kind != "vocos" or backbone.adanorm or head.istft.padding != "center":
            raise ValueError(
                "VocosVocoder: expected 'vocos' mels, no bandwidth condition and 'center' padding, got "
                f"{mel_spec.kind!r}, adanorm={backbone.adanorm}, {head.istft.padding!r}; use a mel Vocos"
            )
        self.backbone = backbone
        self.head = head
        self.mel_spec = mel_spec
        self.sample_rate_hz = mel_spec.sample_rate_hz
        self.eval().requires_grad_(False)

    @classmethod
    def trainable(cls, mel_spec: MelSpec, *, dim: int, intermediate_dim: int, num_layers: int) -> VocosVocoder:
        """A fresh Vocos whose parameters take gradients."""
        backbone = VocosBackbone(
            input_channels=mel_spec.n_mels, dim=dim, intermediate_dim=intermediate_dim, num_layers=num_layers
        )
        head = ISTFTHead(dim=dim, n_fft=mel_spec.n_fft, hop_length=mel_spec.hop_length, padding="center")
        return cls(backbone, head, mel_spec).train().requires_grad_(True)

    @override
    def forward(
        self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b s"]:
        """Waveform of log mel, s = frames_to_samples(n); differentiable; see `Vocoder`."""
        batch, frames, _ = mel.shape
        if lengths_frames is None:
            lengths_frames = torch.full((batch,), frames, device=mel.device)
        padded = ~lengths_to_mask(lengths_frames, frames)[:, None]
        with torch.autocast(mel.device.type, enabled=False):
            mel = mel.to(self.head.out.weight.dtype)
            spectrum = self._spectrum(self._hidden(mel.transpose(1, 2), padded), padded)
            return self._overlap_add(spectrum, padded, frames_to_samples(lengths_frames, self.mel_spec))

    def _hidden(self, mel: Tensor, padded: Tensor) -> Tensor:
        """The backbone's features [B, T, D]. Filled, not multiplied: padding may be NaN."""
        net = self.backbone
        hidden = net.norm(net.embed(mel.masked_fill(padded, 0.0)).transpose(1, 2)).transpose(1, 2)
        for block in net.convnext:
            hidden = block(hidden.masked_fill(padded, 0.0))
        normed: Tensor = net.final_layer_norm(hidden.transpose(1, 2))
        return normed

    def _spectrum(self, hidden: Tensor, padded: Tensor) -> Tensor:
        """Complex short-time spectrum [B, bins, T], zero in padded frames."""
        log_magnitude, phase = self.head.out(hidden).transpose(1, 2).chunk(2, dim=1)
        magnitude = log_magnitude.exp().clamp(max=MAX_MAGNITUDE)
        return torch.polar(magnitude.masked_fill(padded, 0.0), phase.masked_fill(padded, 0.0))

    def _overlap_add(self, spectrum: Tensor, padded: Tensor, lengths_samples: Tensor) -> Tensor:
        """Inverse STFT, frame t centred on sample t * hop: sum_t w f_t / sum_t w^2 over own frames."""
        window = self.head.istft.window.to(spectrum.real.dtype)[:, None]
        signal = self._add(torch.fft.irfft(spectrum, len(window), dim=1) * window)
        envelope = self._add(window.square() * ~padded)
        beyond = ~lengths_to_mask(lengths_samples, signal.shape[1])
        return (signal / envelope.masked_fill(beyond, 1.0)).masked_fill(beyond, 0.0)

    def _add(self, frames: Tensor) -> Tensor:
        """Add overlapping frames [B, n_fft, T]; half a window is cut at each end."""
        _, n_fft, count = frames.shape
        hop = self.mel_spec.hop_length
        size = (1, (count - 1) * hop + n_fft)
        added = F.fold(frames, size, kernel_size=(1, n_fft), stride=(1, hop))[:, 0, 0]
        return added[:, n_fft // 2 : size[1] - n_fft // 2]

    @property
    def arch(self) -> dict[str, int]:
        """The sizes that `trainable` takes."""
        first = self.backbone.convnext[0].pwconv1
        return {
            "dim": first.in_features,
            "intermediate_dim": first.out_features,
            "num_layers": len(self.backbone.convnext),
        }


def load(source: Path | str | None) -> VocosVocoder:
    """The Vocos in a folder (`save` wrote it), or on the Hugging Face hub (an id with a slash)."""
    if source is None:
        raise ValueError("vocoder 'vocos': expected weights, got none; name 'tiny', a folder or a hub id")
    if not Path(source).is_dir():
        files = [download(str(source), name, remedy="a local folder of it") for name in PUBLISHED_FILES]
        return _from_published(*files)
    folder = Path(source)
    if (folder / "vocoder.json").is_file():
        return _from_folder(folder)
    return _from_published(*(folder / name for name in PUBLISHED_FILES))


def _from_folder(folder: Path) -> VocosVocoder:
    from safetensors.torch import load_file

    config = json.loads((folder / "vocoder.json").read_text())
    weights = folder / "vocoder.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: expected the weights of vocoder.json beside it, found none")
    vocoder = VocosVocoder.trainable(MelSpec(**config["mel_spec"]), **config["arch"])
    vocoder.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return vocoder.eval().requires_grad_(False)


def _from_published(config: Path, weights: Path) -> VocosVocoder:
    """A Vocos as its package publishes it: config.yaml and pytorch_model.bin."""
    import yaml
    from vocos import Vocos

    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: expected the weights of config.yaml beside it, found none")
    parts = yaml.safe_load(config.read_text(encoding="utf-8"))
    foreign = [part["class_path"] for part in parts.values() if not part["class_path"].startswith("vocos.")]
    if foreign:  # Vocos would import and call whatever stands there
        raise ValueError(f"{config}: expected classes of the vocos package, got {foreign}; do not use this file")
    vocos = Vocos.from_hparams(str(config))
    vocos.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    mel = getattr(vocos.feature_extractor, "mel_spec", None)
    if mel is None:
        extractor = type(vocos.feature_extractor).__name__
        raise ValueError(f"{config}: expected a Vocos for mels, got one for {extractor}; name a mel Vocos")
    spec = MelSpec(
        sample_rate_hz=mel.sample_rate,
        n_fft=mel.n_fft,
        hop_length=mel.hop_length,
        win_length=mel.win_length,
        n_mels=mel.n_mels,
    )
    return VocosVocoder(vocos.backbone, vocos.head, spec)


def save(vocoder: VocosVocoder, folder: Path, **card: Any) -> None:
    """Write `vocoder.json` (with `card` in it) and `vocoder.safetensors` (parameters in float16) to `folder`.

    Each file is written whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in vocoder.state_dict().items()}
    weights |= {name: weights[name].half() for name, _ in vocoder.named_parameters()}
    config = {"vocoder": "vocos", "arch": vocoder.arch, "mel_spec": asdict(vocoder.mel_spec), **card}
    write_tensors(folder / "vocoder.safetensors", weights)
    text = json.dumps(config, indent=1) + "\n"
    write_whole(folder / "vocoder.json", lambda path: path.write_text(text, encoding="utf-8"))
