"""Reference clips as f5-tts prepares them: pauses, edges and levels by hand; f5-tts itself where it is installed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from torch import Tensor

from rlhf_mel.speech.reference_clips import Clip, prepare_reference, shorten, speech_spans, trim_edges

RATE_HZ = 8000
"""A millisecond is eight samples."""


def vocode(*parts: tuple[float, float]) -> Tensor:
    """Seconds and amplitude of each part: 400 Hz, whose level is that of its amplitude over the root of two."""
    pieces = [
        amplitude * torch.sin(2 * math.pi * 400 * torch.arange(round(seconds * RATE_HZ)) / RATE_HZ)
        for seconds, amplitude in parts
    ]
    return torch.cat(pieces)


def clip(waveform: Tensor) -> Clip:
    return Clip((waveform.numpy() * 32768).round().astype(np.int16), RATE_HZ)


def test_a_pause_is_shared_by_its_neighbours_or_cut_to_a_second_each() -> None:
    loud = (1.0, 0.5)
    two = clip(vocode(loud, (1.5, 0.0), loud))
    # the pause is found by windows of 1 s; its 1.5 s are fewer than the second that each side may keep
    assert speech_spans(two, pause_ms=1000, threshold_dbfs=-50.0) == [(-1000, 1750), (1750, 4500)]
    apart = clip(vocode(loud, (5.0, 0.0), loud))
    assert speech_spans(apart, pause_ms=1000, threshold_dbfs=-50.0) == [(-1000, 2000), (5000, 8000)]
    assert shorten(apart).length_ms == 4000  # 5 s of pause became 2 s


def test_at_most_twelve_seconds_stay() -> None:
    loud = (4.0, 0.5)
    # with 1 s of each pause around: 5 + 6 + 5 s; after the second part 11 s are reached, the third would pass 12 s
    parted = clip(vocode(loud, (3.0, 0.0), loud, (3.0, 0.0), loud))
    assert shorten(parted).length_ms == 11_000
    assert shorten(clip(vocode((13.0, 0.5)))).length_ms == 12_000
    # no pause of a second, but several of 0.3 s: 4.15 + 4.3 s, and 12.9 s with the next
    brief = clip(vocode(loud, (0.3, 0.0), loud, (0.3, 0.0), loud))
    assert shorten(brief).length_ms == 8450


def test_edges_below_minus_42_dbfs_go_in_tens_of_milliseconds() -> None:
    """An amplitude of 0.01 is -43 dBFS, one of 0.012 is -41.4."""
    quiet, loud = (0.204, 0.01), (0.5, 0.5)
    assert trim_edges(clip(vocode(quiet, loud, quiet))).length_ms == 500 + 4 + 4  # what is left of a chunk of 10 ms
    assert trim_edges(clip(vocode((0.2, 0.012), loud))).length_ms == 700


def test_fifty_milliseconds_follow_and_quiet_clips_are_raised() -> None:
    quiet = prepare_reference(vocode((1.0, 0.05)), RATE_HZ, RATE_HZ)
    assert len(quiet) == 8000 + 400 and not quiet[-400:].any()  # 550 * 8000 / 11,025 + 1
    assert quiet.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-4)
    loud = prepare_reference(vocode((1.0, 0.5)), RATE_HZ, RATE_HZ)
    torch.testing.assert_close(loud[:8000], vocode((1.0, 0.5)), atol=0.51 / 32768, rtol=0)
    assert len(prepare_reference(vocode((1.0, 0.5)), RATE_HZ, 24_000)) == 3 * 8400


# Against f5-tts and its pydub.


def talk(seconds: float, seed: int, rate_hz: int) -> Tensor:
    """Bursts of noise and pauses of random lengths and levels."""
    generator = np.random.default_rng(seed)
    pieces = []
    while sum(map(len, pieces)) < seconds * rate_hz:
        for level, longest in ((generator.uniform(0.05, 0.3), 2.5), (10 ** generator.uniform(-4, -2), 1.8)):
            pieces.append(level * generator.standard_normal(int(generator.uniform(0.05, longest) * rate_hz)))
    return torch.from_numpy(np.concatenate(pieces)[: int(seconds * rate_hz)]).float().clamp(-0.99, 0.99)


@pytest.mark.f5_tts
@pytest.mark.parametrize(
    ("seconds", "seed", "rate_hz"),
    [
        (3.21, 0, 24_000),
        (9.87, 1, 44_100),
        (20.003, 2, 22_050),
        (31.4, 3, 16_000),
        (18.5, 4, 24_000),
        (14.1, 5, 48_000),
    ],
)
def test_prepared_as_f5_tts_prepares_it(seconds: float, seed: int, rate_hz: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("f5_tts") is None:
        pytest.skip("f5-tts is not installed")
    pytest.importorskip("pydub")
    import make_fixtures

    make_fixtures.import_f5_tts()
    inference: Any = make_fixtures.import_inference()
    soundfile.write(tmp_path / "talk.wav", talk(seconds, seed, rate_hz).numpy(), rate_hz, subtype="PCM_16")
    path, _ = inference.preprocess_ref_audio_text(str(tmp_path / "talk.wav"), "Hi.", show_info=lambda message: None)
    samples, found_hz = soundfile.read(path, dtype="float32")
    theirs = torch.from_numpy(samples)
    assert found_hz == rate_hz
    # what infer_batch_process does with it
    theirs = theirs * max(1.0, 0.1 / theirs.square().mean().sqrt().item())
    if rate_hz != 24_000:
        theirs = torchaudio.transforms.Resample(rate_hz, 24_000)(theirs)
    original, _ = soundfile.read(tmp_path / "talk.wav", dtype="float32")
    ours = prepare_reference(torch.from_numpy(original), rate_hz)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
