"""Equally loud by BS.1770, drawn as they are."""

from __future__ import annotations

import math
import re

import pytest
import torch
from pair_tables import RATE_HZ, tone
from torch.testing import assert_close

from rlhf_mel.annotate.media import clips_html, equally_loud, waveform_svg
from rlhf_mel.speech.audio import loudness_lufs


def float_lufs(clip: Tensor, rate_hz: int) -> float:
    return float(loudness_lufs(clip, rate_hz))


@pytest.mark.parametrize("rate_hz", [16_000, 24_000, 44_100, 48_000])
def test_loudness_is_calibrated_as_the_recommendation_says(rate_hz: int) -> None:
    # BS.1770-4, annex 1: a sine of 997 Hz at 0 dB FS in one channel reads -3.01 LKFS. Its meters may be 0.1 off.
    sine = tone(997, 3, 1.0, rate_hz)
    assert float_lufs(sine, rate_hz) == pytest.approx(-3.01, abs=0.1)
    quieter = float_lufs(sine * 0.1, rate_hz)  # 20 dB
    assert quieter == pytest.approx(float_lufs(sine, rate_hz) - 20, abs=1e-6)


def test_pauses_do_not_count_and_short_clips_are_measured() -> None:
    sine = tone(997, 10)
    paused = torch.cat([sine, torch.zeros(10 * RATE_HZ)])  # blocks of silence are gated; ungated it would be 3 LU less
    assert float_lufs(paused, RATE_HZ) == pytest.approx(float_lufs(sine, RATE_HZ), abs=0.1)
    assert float_lufs(tone(1000, 0.1), RATE_HZ) == pytest.approx(float_lufs(tone(1000, 2), RATE_HZ), abs=0.1)
    assert float_lufs(torch.zeros(100), RATE_HZ) == -math.inf


def test_a_louder_copy_is_played_as_loud() -> None:
    clip = tone(500) + 0.1 * torch.randn(len(tone(500)), generator=torch.Generator().manual_seed(0))
    first, second, other = equally_loud([clip, 2 * clip, tone(300, 0.9)], RATE_HZ)
    assert_close(first, second)
    assert [float_lufs(heard, RATE_HZ) for heard in (first, other)] == pytest.approx([-23, -23], abs=1e-4)


def test_a_peak_lowers_all_clips_alike() -> None:
    sharp = 0.01 * tone(300, 2)
    sharp[1000] = 0.9  # its speech at -23 LUFS would put this sample far above full scale
    loud, quiet = equally_loud([sharp, tone(300, 2)], RATE_HZ)
    assert float(loud.abs().max()) == pytest.approx(0.98) and float(quiet.abs().max()) < 0.1
    assert float_lufs(loud, RATE_HZ) == pytest.approx(float_lufs(quiet, RATE_HZ), abs=1e-4)


def test_silence_stays_silence() -> None:
    silent, heard = equally_loud([torch.zeros(1000), tone(300)], RATE_HZ)
    assert not silent.any() and float_lufs(heard, RATE_HZ) == pytest.approx(-23, abs=1e-4)


def test_the_waveform_is_an_outline_of_its_extremes() -> None:
    # Two stretches, [0.5, -1] and [0, 0.25]: above 0.5 and 0.25, then back below -1 and 0; SVG counts downwards.
    drawn = waveform_svg(torch.tensor([0.5, -1.0, 0.0, 0.25]), columns=2)
    assert '<path d="M0 -0.500L1 -0.250L1 -0.000L0 1.000Z"/>' in drawn and 'viewBox="0 -1 1 2"' in drawn
    assert waveform_svg(torch.tensor([0.1])).count("L") == 1


def test_views_share_one_scale_of_time() -> None:
    views = clips_html({"A": tone(200, 0.6), "B": tone(300, 0.9)}, RATE_HZ)
    assert [re.search(r"width:([\d.]+)%", views[label]).group(1) for label in "AB"] == ["66.67", "100.00"]  # type: ignore[union-attr]
    for label, view in views.items():
        assert f'alt="mel of {label}"' in view and view.count("<audio") == view.count("<svg") == view.count("<img") == 1
