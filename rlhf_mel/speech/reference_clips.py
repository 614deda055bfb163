"""Reference clips as f5-tts's inference prepares them: pauses shortened, at most 12 s, edges trimmed, loud enough.

1. Parts louder than -50 dBFS are joined, each with up to 1 s of the pause on either side (a pause: windows of 1 s at or
   below the threshold), until 6 s are reached and the next part would pass 12 s.
2. Where that is over 12 s still, the same from the original with pauses of 0.1 s and -40 dBFS; then a cut at 12 s.
3. Leading and trailing 10 ms chunks below -42 dBFS go, 50 ms of digital silence are appended.
4. A clip below 0.1 rms is brought to 0.1.

Thresholds and arithmetic (16-bit samples, milliseconds, levels of whole numbers) are those of f5-tts 1.1.22 and of the
pydub that it calls, to the sample (tests/test_reference.py), for mono clips: upstream averages stereo later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.speech.audio import MAX_REFERENCE_DURATION_S, resample

FULL_SCALE = 32768


LONGEST_MS = round(1000 * MAX_REFERENCE_DURATION_S)


ENOUGH_MS = 6000


KEPT_PAUSE_MS = 1000


EDGE_DBFS = -42.0


LEAST_RMS = 0.1


Samples = npt.NDArray[np.int16]


Span = tuple[int, int]
"""Start and end in milliseconds."""


@dataclass(frozen=True)
class Clip:
    """16-bit mono samples that are counted in milliseconds."""

    samples: Samples
    rate_hz: int

    @property
    def length_ms(self) -> int:
        """Whole milliseconds, rounded."""
        return round(1000 * len(self.samples) / self.rate_hz)

    def cut(self, start_ms: int, end_ms: int) -> Clip:
        """Samples between two moments; half a millisecond of silence more where the length was rounded up."""
        start, end = (int(ms * (self.rate_hz / 1000)) for ms in (max(start_ms, 0), min(end_ms, self.length_ms)))
        samples = self.samples[start:end]
        return Clip(np.pad(samples, (0, max(end - start - len(samples), 0))), self.rate_hz)

    def join(self, other: Clip) -> Clip:
        """This clip, then the other, of the same sample rate."""
        return Clip(np.concatenate((self.samples, other.samples)), self.rate_hz)

    @property
    def level(self) -> int:
        """Root mean square, a whole number of 16-bit steps."""
        return int(np.sqrt(np.mean(self.samples.astype(np.float64) ** 2))) if len(self.samples) else 0


def prepare_reference(
    waveform: Float[Tensor, " s"], rate_hz: int, sample_rate_hz: int = 24_000
) -> Float[Tensor, " prepared"]:
    """The clip at `rate_hz` as F5-TTS would hear it, at `sample_rate_hz`; see the module."""
    samples = (waveform.numpy() * FULL_SCALE).round().clip(-FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    clip = shorten(Clip(samples, rate_hz))
    clip = trim_edges(clip).join(Clip(np.zeros(550 * rate_hz // 11_025 + 1, np.int16), rate_hz))  # pydub's 50 ms
    prepared = torch.from_numpy(clip.samples.astype(np.float32) / FULL_SCALE)
    rms = prepared.square().mean().sqrt()
    if 0 < rms < LEAST_RMS:
        prepared = prepared * LEAST_RMS / rms
    return resample(prepared[None], rate_hz, sample_rate_hz)[0]


def shorten(clip: Clip) -> Clip:
    """Parts with speech, joined up to 12 s."""
    joined = _join_parts(clip, pause_ms=1000, threshold_dbfs=-50.0)
    if joined.length_ms > LONGEST_MS:
        joined = _join_parts(clip, pause_ms=100, threshold_dbfs=-40.0)
    return joined.cut(0, LONGEST_MS) if joined.length_ms > LONGEST_MS else joined


def _join_parts(clip: Clip, *, pause_ms: int, threshold_dbfs: float) -> Clip:
    joined = clip.cut(0, 0)
    for start, end in speech_spans(clip, pause_ms=pause_ms, threshold_dbfs=threshold_dbfs):
        part = clip.cut(start, end)
        if joined.length_ms > ENOUGH_MS and joined.join(part).length_ms > LONGEST_MS:
            break
        joined = joined.join(part)
    return joined


def speech_spans(clip: Clip, *, pause_ms: int, threshold_dbfs: float, step_ms: int = 10) -> list[Span]:
    """What lies between pauses, with up to 1 s of each pause; neighbours share what both would take."""
    spans = [
        [start - KEPT_PAUSE_MS, end + KEPT_PAUSE_MS]
        for start, end in _between(_pauses(clip, pause_ms, threshold_dbfs, step_ms), clip.length_ms)
    ]
    for before, after in pairwise(spans):
        if after[0] < before[1]:
            before[1] = after[0] = (before[1] + after[0]) // 2
    return [(start, end) for start, end in spans]


def _pauses(clip: Clip, pause_ms: int, threshold_dbfs: float, step_ms: int) -> list[Span]:
    """Windows of `pause_ms` at or below the threshold, begun every `step_ms`; what touches is one pause."""
    threshold = FULL_SCALE * 10 ** (threshold_dbfs / 20)
    quiet = [ms for ms in _steps(clip.length_ms - pause_ms, step_ms) if clip.cut(ms, ms + pause_ms).level <= threshold]
    pauses: list[list[int]] = []
    before = None
    for ms in quiet:
        if before is not None and (ms == before + step_ms or ms <= before + pause_ms):
            pauses[-1][1] = ms + pause_ms
        else:
            pauses.append([ms, ms + pause_ms])
        before = ms
    return [(start, end) for start, end in pauses]


def _steps(last_ms: int, step_ms: int) -> Iterator[int]:
    """0, step, 2 step ..., and the last."""
    if last_ms >= 0:
        yield from range(0, last_ms + 1, step_ms)
        if last_ms % step_ms:
            yield last_ms


def _between(pauses: Sequence[Span], length_ms: int) -> list[Span]:
    starts = [0, *(end for _, end in pauses)]
    ends = [*(start for start, _ in pauses), length_ms]
    spans = list(zip(starts, ends, strict=True))
    if spans[-1][0] == length_ms:
        spans.pop()
    return spans[1:] if spans and spans[0] == (0, 0) else spans


def trim_edges(clip: Clip) -> Clip:
    """Without the quiet 10 ms chunks at both ends."""
    clip = clip.cut(_quiet_lead_ms(clip), clip.length_ms)
    reversed_clip = Clip(clip.samples[::-1], clip.rate_hz)
    return clip.cut(0, clip.length_ms - _quiet_lead_ms(reversed_clip))


def _quiet_lead_ms(clip: Clip, chunk_ms: int = 10) -> int:
    threshold = FULL_SCALE * 10 ** (EDGE_DBFS / 20)
    lead_ms = 0
    while lead_ms < clip.length_ms and clip.cut(lead_ms, lead_ms + chunk_ms).level < threshold:
        lead_ms += chunk_ms
    return min(lead_ms, clip.length_ms)
