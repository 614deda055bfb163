"""HiFi-GAN as transformers has it, for policies with 80-band mels: SpeechT5HifiGan and FastSpeech2ConformerHifiGan.

Kong et al., "HiFi-GAN: Generative adversarial networks for efficient and high fidelity speech synthesis" (2020,
arXiv:2010.05646). Mels here are natural logarithms; SpeechT5's are decimal ones, so they are divided by ln 10 first.
Its own mels are also centred, ours of kind "bigvgan" are those of the HiFi-GAN paper: the first and the last two frames
differ. Float32 even under autocast; each length of a batch is run alone, as in bigvgan.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.storage import download
from rlhf_mel.vocoders import LengthwiseVocoder

DECIMAL = ("SpeechT5HifiGan",)
"""Classes whose mels are decimal logarithms."""


class HifiGanVocoder(LengthwiseVocoder):
    """A frozen HiFi-GAN of transformers; `mel_spec` unless its config tells enough (see mel_spec_of)."""

    def __init__(self, model: Any, mel_spec: MelSpec | None = None) -> None:
        super().__init__(mel_spec or mel_spec_of(model.config, type(model).__name__))
        self.model = model
        upsampled = math.prod(model.config.upsample_rates)
        if (self.mel_spec.hop_length, self.mel_spec.n_mels) != (upsampled, model.config.model_in_dim):
            raise ValueError(
                f"HifiGanVocoder: expected mels of {model.config.model_in_dim} bands every {upsampled} samples, got"
                f" {self.mel_spec.n_mels} every {self.mel_spec.hop_length}; pass the mel_spec that it was trained on"
            )
        if self.mel_spec.kind != "bigvgan":
            raise ValueError(f"HifiGanVocoder: expected 'bigvgan' mels (T frames, T hops), got {self.mel_spec.kind!r}")
        self.scale = 1 / math.log(10) if type(model).__name__ in DECIMAL else 1.0
        self.eval().requires_grad_(False)

    @override
    def _vocode(self, mel: Tensor) -> Tensor:
        waveform: Tensor = self.model(mel * self.scale)
        return waveform


def mel_spec_of(config: Any, class_name: str) -> MelSpec:
    """Mels of a HiFi-GAN's config: four hops a window, as published ones have; SpeechT5's bands are 80 to 7600 Hz."""
    hop_length = math.prod(config.upsample_rates)
    edges_hz: dict[str, Any] = dict(f_min_hz=80.0, f_max_hz=7600.0) if class_name == "SpeechT5HifiGan" else {}
    return MelSpec(
        sample_rate_hz=config.sampling_rate,
        n_fft=4 * hop_length,
        hop_length=hop_length,
        win_length=4 * hop_length,
        n_mels=config.model_in_dim,
        kind="bigvgan",
        **edges_hz,
    )


def load(source: Path | str | None) -> HifiGanVocoder:
    """The HiFi-GAN in a folder that transformers' save_pretrained wrote, or on the Hugging Face hub."""
    import transformers

    if source is None:
        raise ValueError("vocoder 'hifigan': expected weights, got none; name a folder or microsoft/speecht5_hifigan")
    folder = Path(source)
    config = folder / "config.json"
    if not folder.is_dir():
        config = download(str(source), "config.json", remedy="a local folder of it")
    names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ["none"]
    if names[0] not in (known := ("SpeechT5HifiGan", "FastSpeech2ConformerHifiGan")):
        raise ValueError(f"{source}: expected a HiFi-GAN of transformers, one of {list(known)}, got {names[0]!r}")
    return HifiGanVocoder(getattr(transformers, names[0]).from_pretrained(str(source)))
