"""Vocoders: log mel to waveform, frozen. The file's name is the registry: one vocoder, one module here.

A module `rlhf_mel/vocoders/NAME.py` offers `load(source) -> Vocoder`; `source` is a folder that holds
`vocoder.json` (with `"vocoder": "NAME"`) and weights, a hub id, or None for a vocoder without weights.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..audio import MelSpec

ASSETS = Path(__file__).parent.parent / "assets"


@runtime_checkable
class Vocoder(Protocol):
    """Log mel to waveform. Never trained by RLHF: its parameters take no gradient, its input may."""

    mel_spec: MelSpec
    """The only mels it understands."""
    sample_rate_hz: int
    differentiable: bool
    """Whether the waveform has a gradient with respect to the mel."""

    def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        """Waveform [B, samples] of mel [B, T, M]; each item is what it would be alone, then zero.

        Item b has exactly `frames_to_samples(lengths_frames[b])` samples: (frames - 1) * hop.
        """
        ...


def load_vocoder(name: str | Path, *, device: torch.device | str | None = None) -> Vocoder:
    """The vocoder called `name`, frozen, float32, in eval mode.

    `name`: "tiny" (bundled), a module of this package ("griffin_lim"), a folder that recipes/train_vocoder.py
    wrote, a Vocos on the hub ("charactr/vocos-mel-24khz"), or your class ("my_package.my_module:MyVocoder").
    """
    vocoder = _find(name)
    return vocoder.to(device) if device is not None else vocoder


def _find(name: str | Path) -> Any:
    if str(name) == "tiny" or Path(name).is_dir():
        folder = ASSETS if str(name) == "tiny" else Path(name)
        return _module(_read_config(folder)["vocoder"]).load(folder)
    name = str(name)
    if ":" in name:
        module_name, class_name = name.split(":", 1)
        return getattr(importlib.import_module(module_name), class_name)()
    if name.count("/") == 1 and not name.startswith("."):
        return _module("vocos").load(name)
    return _module(name).load(None)


def _module(name: str) -> Any:
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in known:
        raise ValueError(
            f"unknown vocoder {name!r}: expected 'tiny', one of {known}, a folder with vocoder.json, "
            "a hub id 'owner/name' or 'package.module:Class'"
        )
    return importlib.import_module(f"{__name__}.{name}")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "vocoder.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a vocoder's config, found none; train one with recipes/train_vocoder.py "
            f"--out {folder}, or reinstall the package if this is its assets folder"
        )
    return json.loads(path.read_text())
