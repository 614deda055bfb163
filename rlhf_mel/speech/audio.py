"""The one place that knows audio units: waveforms, log mels, lengths, levels and audio files.

A log mel is `log(max(1e-5, F |STFT(w)|))` with a filterbank F of `n_mels` triangles from 0 Hz to half the
sample rate, or as MelSpec says. Two kinds are in use, and they are not interchangeable (S samples, hop h):

| kind      | frames   | reflected padding | magnitude              | filterbank                    |
|-----------|----------|-------------------|------------------------|-------------------------------|
| `vocos`   | S//h + 1 | n_fft/2 a side    | abs                    | HTK scale, peak 1             |
| `bigvgan` | S//h     | (n_fft-h)/2       | sqrt(re² + im² + 1e-9) | Slaney scale, area normalised |

The numbers equal torchaudio's `MelSpectrogram(power=1)` and librosa's `melspectrogram` (tests/test_audio.py),
as the two mels of F5-TTS do. No normalisation by mean or deviation.

Waveforms are float in [-1, 1], [batch, samples]; all here is differentiable unless it reads or counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import overload

import torch
import torchaudio
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_mel.masked import lengths_to_mask

MEL_FLOOR = 1e-5
"""Smallest mel magnitude; its logarithm, -11.51, is what digital silence looks like."""


MAX_REFERENCE_DURATION_S = 12.0
"""F5-TTS's limit for a reference clip."""


@dataclass(frozen=True, kw_only=True)
class MelSpec:
    """What a log mel means; the defaults are those of every released F5-TTS checkpoint with Vocos."""

    sample_rate_hz: int = 24_000
    n_fft: int = 1024
    """Samples of one Fourier transform."""
    hop_length: int = 256
    """Samples from one frame to the next."""
    win_length: int = 1024
    """Samples of the Hann window, at most `n_fft`."""
    n_mels: int = 100
    kind: str = "vocos"
    """"vocos" or "bigvgan", see the module."""
    f_min_hz: float = 0.0
    f_max_hz: float | None = None
    """Edges of the filterbank; None: half the sample rate."""

    def __post_init__(self) -> None:
        if self.kind not in ("vocos", "bigvgan"):
            raise ValueError(f"mel kind: expected 'vocos' or 'bigvgan', got {self.kind!r}")
        if not 0 < self.hop_length <= self.win_length <= self.n_fft:
            raise ValueError(
                "mel spec: expected 0 < hop_length <= win_length <= n_fft, got "
                f"{self.hop_length}, {self.win_length}, {self.n_fft}"
            )

    @property
    def frame_rate_hz(self) -> float:
        """Frames a second."""
        return self.sample_rate_hz / self.hop_length


def log_mel(waveform: Float[Tensor, "b s"], spec: MelSpec | None = None) -> Float[Tensor, "b n m"]:
    """Log mel of a waveform; differentiable, float64 of float64 and else float32.

    Raises ValueError where there are too few samples to mirror at the edges (n_fft / 2 for `vocos`).

    Frames at the right edge look at the mirrored signal, so an item padded with zeros differs there from the
    item alone: cut first, then take the mel. Autocast is off inside: a bfloat16 filterbank costs two digits.
    """
    spec = spec or MelSpec()
    if waveform.dim() != 2:
        raise ValueError(f"log_mel: expected a waveform [batch, samples], got shape {tuple(waveform.shape)}")
    centred = spec.kind == "vocos"
    pad = (spec.n_fft if centred else spec.n_fft - spec.hop_length) // 2
    if waveform.shape[1] <= pad:
        raise ValueError(f"log_mel: expected more than {pad} samples, got {waveform.shape[1]}; pad the waveform")
    with torch.autocast(waveform.device.type, enabled=False):
        waveform = waveform if waveform.dtype == torch.float64 else waveform.float()
        window, filters = _window_and_filters(spec, waveform.device, waveform.dtype)
        padded = torch.nn.functional.pad(waveform[:, None], (pad, pad), mode="reflect")[:, 0]
        spectrum = torch.stft(
            padded, spec.n_fft, spec.hop_length, spec.win_length, window, center=False, return_complex=True
        )
        magnitude = spectrum.abs() if centred else (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()
        mel: Tensor = magnitude.transpose(1, 2) @ filters
        return mel.clamp(min=MEL_FLOOR).log()


@lru_cache(maxsize=32)
def _window_and_filters(spec: MelSpec, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Leaving inference mode: a cache first filled inside it would hold inference tensors, and every later
    # gradient through the mel would fail ("Inference tensors cannot be saved for backward").
    with torch.inference_mode(False):
        filters = torchaudio.functional.melscale_fbanks(
            n_freqs=spec.n_fft // 2 + 1,
            f_min=spec.f_min_hz,
            f_max=spec.sample_rate_hz / 2 if spec.f_max_hz is None else spec.f_max_hz,
            n_mels=spec.n_mels,
            sample_rate=spec.sample_rate_hz,
            norm=None if spec.kind == "vocos" else "slaney",
            mel_scale="htk" if spec.kind == "vocos" else "slaney",
        )
        window = torch.hann_window(spec.win_length, dtype=dtype, device=device)
        return window, filters.to(device=device, dtype=dtype)


def mel_filters(
    spec: MelSpec, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Float[Tensor, "bins m"]:
    """The filterbank F of `spec`, of n_fft/2 + 1 bins: mel = magnitude @ F. Shared: never write to it."""
    return _window_and_filters(spec, torch.device(device), dtype)[1]


@overload
def frames_to_samples(frames: int, spec: MelSpec | None = None) -> int: ...


@overload
def frames_to_samples(frames: Int[Tensor, "*b"], spec: MelSpec | None = None) -> Int[Tensor, "*b"]: ...


def frames_to_samples(frames: int | Int[Tensor, "*b"], spec: MelSpec | None = None) -> int | Int[Tensor, "*b"]:
    """Samples that a vocoder makes of `frames` mel frames, the fewest whose mel has as many frames again.

    (frames - 1) * hop for `vocos` (frame t is centred on sample t * hop), frames * hop for `bigvgan`.
    """
    spec = spec or MelSpec()
    hops = frames - 1 if spec.kind == "vocos" else frames
    return hops.clamp(min=0) * spec.hop_length if isinstance(hops, Tensor) else max(hops, 0) * spec.hop_length


@overload
def samples_to_frames(samples: int, spec: MelSpec | None = None) -> int: ...


@overload
def samples_to_frames(samples: Int[Tensor, "*b"], spec: MelSpec | None = None) -> Int[Tensor, "*b"]: ...


def samples_to_frames(samples: int | Int[Tensor, "*b"], spec: MelSpec | None = None) -> int | Int[Tensor, "*b"]:
    """Frames that `log_mel` makes of `samples` samples."""
    spec = spec or MelSpec()
    return samples // spec.hop_length + (spec.kind == "vocos")


def resample(waveform: Float[Tensor, "*b s"], from_hz: int, to_hz: int) -> Float[Tensor, "*b resampled"]:
    """A waveform at another sample rate (windowed sinc): ceil(samples * to / from) samples.

    Zero padding changes nothing within `resampled_length`; a few samples beyond it are no longer zero.
    """
    if from_hz == to_hz:
        return waveform
    dtype = waveform.dtype if waveform.dtype == torch.float64 else torch.float32
    with torch.autocast(waveform.device.type, enabled=False):
        resampled: Tensor = _resampler(from_hz, to_hz, waveform.device, dtype)(waveform.to(dtype))
        return resampled


@lru_cache(maxsize=32)
def _resampler(from_hz: int, to_hz: int, device: torch.device, dtype: torch.dtype) -> torchaudio.transforms.Resample:
    with torch.inference_mode(False):  # for the same reason as the mel filters
        return torchaudio.transforms.Resample(from_hz, to_hz, dtype=dtype).to(device)


def resampled_length(lengths_samples: Int[Tensor, " b"], from_hz: int, to_hz: int) -> Int[Tensor, " b"]:
    """Samples that `resample` makes of clips of `lengths_samples`: ceil(samples * to / from)."""
    return -(-lengths_samples * to_hz // from_hz)


def rms(waveform: Float[Tensor, "b s"], lengths_samples: Int[Tensor, " b"] | None = None) -> Float[Tensor, " b"]:
    """Root mean square over each item's own samples; its gradient is finite for silence too."""
    if lengths_samples is None:
        return (waveform.square().mean(-1) + 1e-20).sqrt()
    beyond = ~lengths_to_mask(lengths_samples, waveform.shape[-1])
    mean_square = waveform.square().masked_fill(beyond, 0.0).sum(-1) / lengths_samples.clamp(min=1)
    return (mean_square + 1e-20).sqrt()


def level_dbfs(waveform: Float[Tensor, "b s"], lengths_samples: Int[Tensor, " b"] | None = None) -> Float[Tensor, " b"]:
    """Level in dB re full scale, 20 log10(rms): a full-scale sine -3.01, digital silence -200."""
    return 20 * rms(waveform, lengths_samples).log10()


LOUDNESS_BLOCK_S = 0.4
"""Block of BS.1770, which the shortest clip has to fill."""


def loudness_lufs(waveform: Float[Tensor, " s"], rate_hz: int) -> Float[Tensor, ""]:
    """Loudness of a mono clip by ITU-R BS.1770-4 (K-weighted, gated), float64, differentiable.

    -inf of silence. A clip of less than 0.4 s is repeated to that length. It is measured at a peak of 0.1, and gated
    there: torchaudio's filters clip at full scale, which loud clips would reach.
    """
    peak = float(waveform.detach().abs().max())
    if peak == 0:
        return waveform.new_tensor(-math.inf, dtype=torch.float64)
    scaled = (waveform * (0.1 / peak)).double()
    scaled = scaled.repeat(math.ceil(LOUDNESS_BLOCK_S * rate_hz / len(scaled)))
    loudness: Tensor = torchaudio.functional.loudness(scaled[None], rate_hz) + 20 * math.log10(peak / 0.1)
    return loudness


def load_audio(
    source: str | Path | bytes,
    sample_rate_hz: int = 24_000,
    *,
    max_duration_s: float | None = MAX_REFERENCE_DURATION_S,
) -> Float[Tensor, " s"]:
    """The clip at a path, or a file's bytes, in float32, mono (mean of channels), at `sample_rate_hz`.

    Raises FileNotFoundError, or ValueError for what no policy should be conditioned on: a file that is not
    audio, an empty, silent (below -60 dBFS), clipped (over 1 % of samples at full scale) or overlong clip.
    """
    waveform, file_rate_hz = read_speech(source, max_duration_s=max_duration_s)
    return resample(waveform[None], file_rate_hz, sample_rate_hz)[0]


def read_speech(source: str | Path | bytes, *, max_duration_s: float | None = None) -> tuple[Float[Tensor, " s"], int]:
    """As load_audio, at the file's own sample rate: the waveform and that rate in Hz."""
    name = "audio in memory" if isinstance(source, bytes) else str(source)
    waveform, file_rate_hz = read_mono(source, name)
    if waveform.numel() == 0:
        raise ValueError(f"{name}: expected sound, got an empty file; record it again")
    if not torch.isfinite(waveform).all():
        raise ValueError(f"{name}: expected finite samples, got NaN or infinity; export it as 16-bit PCM")
    duration_s = waveform.numel() / file_rate_hz
    if max_duration_s is not None and duration_s > max_duration_s:
        raise ValueError(
            f"{name}: expected at most {max_duration_s:g} s, got {duration_s:.1f} s; cut the clip, "
            "or pass a larger max_duration_s"
        )
    if (level := level_dbfs(waveform[None]).item()) < -60:
        raise ValueError(f"{name}: expected speech, got silence ({level:.0f} dBFS); record it louder")
    if (clipped := (waveform.abs() >= 0.999).float().mean().item()) > 0.01:
        raise ValueError(
            f"{name}: expected at most 1 % of samples at full scale, got {clipped:.0%}: the clip is "
            "distorted; record it at a lower gain"
        )
    return waveform, file_rate_hz


def read_mono(source: str | Path | bytes, name: str) -> tuple[Tensor, int]:
    """Samples in float32, mono (mean of channels), and the sample rate in Hz; no check of level or length."""
    import soundfile  # not needed by training on tensors, and it loads a C library

    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name}: expected an audio file, found none")
    try:
        opened = BytesIO(source) if isinstance(source, bytes) else source
        samples, file_rate_hz = soundfile.read(opened, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(
            f"{name}: expected audio that libsndfile reads (wav, flac, ogg, mp3), got: {error}; convert it"
        ) from error
    return torch.from_numpy(samples).mean(1), int(file_rate_hz)
