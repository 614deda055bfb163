"""BigVGAN: transposed convolutions and periodic activations from mel to waveform; that of F5TTS_Base_bigvgan.

Lee et al., "BigVGAN: A universal neural vocoder with large-scale training" (2022, arXiv:2206.04658). The network is the
class of the `bigvgan` package (extra `bigvgan`); weights are read here, as tensors only. Float32 even under autocast.
Each length of a batch is run alone, since padding would reach the last samples through 30 convolutions.
"""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.storage import download
from rlhf_mel.vocoders import LengthwiseVocoder

CONFIG, WEIGHTS = "config.json", "bigvgan_generator.pt"


class BigVGANVocoder(LengthwiseVocoder):
    """A frozen BigVGAN; see the module docstring and `load`."""

    def __init__(self, generator: Any) -> None:
        super().__init__(mel_spec_of(generator.h))
        self.generator = generator
        self.eval().requires_grad_(False)

    @override
    def _vocode(self, mel: Tensor) -> Tensor:
        waveform: Tensor = self.generator(mel.transpose(1, 2))
        return waveform[:, 0]


def mel_spec_of(config: Any) -> MelSpec:
    """The mels of a BigVGAN's config."""
    nyquist_hz = config["sampling_rate"] / 2
    highest_hz = config.get("fmax") or nyquist_hz
    return MelSpec(
        sample_rate_hz=config["sampling_rate"],
        n_fft=config["n_fft"],
        hop_length=config["hop_size"],
        win_length=config["win_size"],
        n_mels=config["num_mels"],
        kind="bigvgan",
        f_min_hz=config.get("fmin") or 0.0,
        f_max_hz=None if highest_hz == nyquist_hz else highest_hz,
    )


def build(config: dict[str, Any]) -> Any:
    """A generator with random weights."""
    try:
        from bigvgan import BigVGAN
        from bigvgan.env import AttrDict
    except ImportError as error:
        raise ImportError(
            f"vocoder 'bigvgan': expected the bigvgan package, got: {error}; pip install 'rlhf-mel[bigvgan]'"
        ) from error
    return BigVGAN(AttrDict(config), use_cuda_kernel=False)


def load(source: Path | str | None) -> BigVGANVocoder:
    """The BigVGAN in a folder (config.json, bigvgan_generator.pt), or on the Hugging Face hub."""
    if source is None:
        raise ValueError(
            "vocoder 'bigvgan': expected weights, got none; name a folder or nvidia/bigvgan_v2_24khz_100band_256x"
        )
    if Path(source).is_dir():
        config, weights = Path(source) / CONFIG, Path(source) / WEIGHTS
    else:
        remedy = "a local folder of it"
        config, weights = (download(str(source), name, remedy=remedy) for name in (CONFIG, WEIGHTS))
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: expected the weights of {CONFIG} beside it, found none")
    generator = build(json.loads(config.read_text(encoding="utf-8")))
    state = torch.load(weights, map_location="cpu", weights_only=True)["generator"]
    with redirect_stdout(None):  # it announces what it removes
        if not any(name.endswith("weight_g") for name in state):  # published without weight norm
            generator.remove_weight_norm()
            generator.load_state_dict(state)
        else:
            generator.load_state_dict(state)
            generator.remove_weight_norm()
    return BigVGANVocoder(generator)
