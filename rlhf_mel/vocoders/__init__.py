"""Vocoders: log mel to waveform, frozen. The file's name is the registry: one vocoder, one module here.

A module `rlhf_mel/vocoders/NAME.py` offers `load(source) -> Vocoder`; `source` is a folder that holds
`vocoder.json` (with `"vocoder": "NAME"`) and weights, a folder as its own package writes it, a hub id, or None for a
vocoder without weights. Weights are tensors, never pickled code.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from rlhf_mel.lookup import did_you_mean, load_object
from rlhf_mel.speech.audio import MelSpec, frames_to_samples
from rlhf_mel.storage import bundle, download


@runtime_checkable
class Vocoder(Protocol):
    """Log mel to waveform. Never trained by RLHF: its parameters take no gradient, its input may."""

    mel_spec: MelSpec
    """The only mels it understands."""
    sample_rate_hz: int
    differentiable: bool
    """Whether the waveform has a gradient with respect to the mel."""

    def __call__(
        self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b s"]:
        """Waveform of mel; each item is what it would be alone, then zero.

        Item b has exactly `frames_to_samples(lengths_frames[b])` samples: (frames - 1) * hop.
        """
        ...


def load_vocoder(name: str | Path, *, device: torch.device | str | None = None) -> Vocoder:
    """The vocoder called `name`, frozen, float32, in eval mode.

    `name`: "tiny" (bundled), a module of this package ("griffin_lim"), a folder that recipes/train_vocoder.py
    wrote, a Vocos, BigVGAN or transformers HiFi-GAN in a folder or on the hub ("charactr/vocos-mel-24khz",
    "nvidia/bigvgan_v2_24khz_100band_256x"), or your class ("my_package.my_module:MyVocoder").
    """
    vocoder = _find(name)
    placed: Vocoder = vocoder.to(device) if device is not None else vocoder
    return placed


def _find(name: str | Path) -> Any:
    folder = bundle(name) or Path(name)
    if folder.is_dir():
        return _module(_kind_of_folder(folder)).load(folder)
    name = str(name)
    if ":" in name:
        return load_object(name, "vocoder")()
    if name.count("/") == 1 and not name.startswith("."):
        return _module(_kind_of_hub_id(name)).load(name)
    return _module(name).load(None)


def _module(name: str) -> Any:
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in known:
        raise ValueError(
            f"unknown vocoder {name!r}: expected 'tiny', one of {known}, a folder with vocoder.json, "
            f"a hub id 'owner/name' or 'package.module:Class'{did_you_mean(name, known)}"
        )
    return importlib.import_module(f"{__name__}.{name}")


def _kind_of_folder(folder: Path) -> str:
    """Which module reads a folder: ours says so, others are known by their config."""
    if (folder / "vocoder.json").is_file():
        kind: str = json.loads((folder / "vocoder.json").read_text())["vocoder"]
        return kind
    if (folder / "config.yaml").is_file():
        return "vocos"
    if (folder / "config.json").is_file():
        return _kind_of_config(json.loads((folder / "config.json").read_text()))
    raise FileNotFoundError(
        f"{folder / 'vocoder.json'}: expected a vocoder's config, found none (nor config.yaml, nor config.json); train"
        f" one with recipes/train_vocoder.py --out {folder}, or reinstall the package if this is its assets folder"
    )


def _kind_of_hub_id(hub_id: str) -> str:
    for kind in ("vocos", "bigvgan", "hifigan"):
        if kind in hub_id.lower().replace("-", "").replace("_", ""):
            return kind
    remedy = "a local folder of it"
    return _kind_of_config(json.loads(download(hub_id, "config.json", remedy=remedy).read_text()))


def _kind_of_config(config: Mapping[str, Any]) -> str:
    return "bigvgan" if str(config.get("activation", "")).startswith("snake") else "hifigan"


class LengthwiseVocoder(nn.Module):
    """A frozen network whose convolutions would see padding: each length of a batch is run alone.

    A subclass has `_vocode`. Float32 (or what the weights are) even under autocast.
    """

    differentiable = True

    def __init__(self, mel_spec: MelSpec) -> None:
        super().__init__()
        self.mel_spec = mel_spec
        self.sample_rate_hz = mel_spec.sample_rate_hz

    @override
    def forward(
        self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b s"]:
        """Waveform of log mel, s = frames_to_samples(n); see `Vocoder`."""
        mel = mel.to(next(self.parameters()).dtype)
        frames = mel.shape[1]
        lengths = [frames] * len(mel) if lengths_frames is None else lengths_frames.tolist()
        width = frames_to_samples(frames, self.mel_spec)
        waveforms: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):
            rows = [row for row, length_of_row in enumerate(lengths) if length_of_row == length]
            if length:
                with torch.autocast(mel.device.type, enabled=False):
                    waveform = self._vocode(mel[rows, :length])
                waveform = torch.nn.functional.pad(waveform, (0, width - waveform.shape[1]))
            else:
                waveform = mel.new_zeros(len(rows), width)
            waveforms |= dict(zip(rows, waveform, strict=True))
        return torch.stack([waveforms[row] for row in range(len(mel))])

    def _vocode(self, mel: Tensor) -> Tensor:
        """Waveform [b, frames_to_samples(n)] of mels of one length."""
        raise NotImplementedError
