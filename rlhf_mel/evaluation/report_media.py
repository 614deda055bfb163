"""Sounds and mels of a report, inside the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.speech.audio import MelSpec, log_mel

MEL_RANGE = 10.0
"""Nepers (87 dB) from black to the brightest of a prompt's pictures."""


def read_wav(path: Path) -> tuple[Float[Tensor, " s"], int]:
    """The first channel of a wav file in [-1, 1], and its sample rate in Hz."""
    import soundfile  # loads a C library

    waveform, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(waveform[:, 0].copy()), int(rate_hz)


def mel_of(waveform: Float[Tensor, " s"], rate_hz: int) -> Float[Tensor, "n m"]:
    """Log mel of a waveform, of at least one frame."""
    spec = MelSpec(sample_rate_hz=rate_hz)
    missing = max(spec.n_fft - len(waveform), 0)
    return log_mel(torch.nn.functional.pad(waveform, (0, missing))[None], spec)[0]


def image(mel: Float[Tensor, "n m"], brightest: float, alt: str) -> str:
    """HTML of a mel's picture, low frequencies below; `brightest`: the log magnitude that is white."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, mel.T.numpy(), vmin=brightest - MEL_RANGE, vmax=brightest, cmap="magma", origin="lower", format="png")
    return f'<img alt="{alt}" src="data:image/png;base64,{_base64(file)}">'


def player(waveform: Float[Tensor, " s"], rate_hz: int) -> str:
    """HTML that plays a waveform, as 16-bit FLAC inside the page."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, waveform.numpy(), rate_hz, format="FLAC", subtype="PCM_16")
    return f'<audio controls preload="metadata" src="data:audio/flac;base64,{_base64(file)}"></audio>'


def _base64(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode("ascii")
