"""Small tables of pairs for the tests of the labelling: tones of known length and pitch."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from rlhf_mel.annotate.labelling import Labelling
from rlhf_mel.annotate.store import Answers
from rlhf_mel.annotate.tasks import Pairs

RATE_HZ = 24_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a test file that imports it: data sets are cached in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def tone(f0_hz: float, duration_s: float = 0.6, amplitude: float = 0.25, rate_hz: int = RATE_HZ) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * f0_hz * torch.arange(round(duration_s * rate_hz)) / rate_hz)


def encoded(waveform: Tensor, rate_hz: int = RATE_HZ) -> dict[str, Any]:
    file = BytesIO()
    soundfile.write(file, waveform.numpy(), rate_hz, format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": None}


def pair_rows(count: int) -> list[dict[str, Any]]:
    """a: 200 Hz and up, 0.6 s; b: 300 Hz and up, 0.9 s."""
    return [
        {
            "prompt": f"sentence {row}",
            "audio_a": encoded(tone(200 + row)),
            "audio_b": encoded(tone(300 + row, 0.9)),
            "reference_audio": encoded(tone(250)),
            "reference_text": "what the reference says",
            "voice": "v",
            "id": f"p{row}",
            "seed_a": 10,
            "seed_b": 11,
            "row": row,
        }
        for row in range(count)
    ]


def labelling_of(folder: Path, count: int = 6, **options: Any) -> Labelling:
    """A new Labelling over the same pairs and, in one folder, the same file of answers."""
    return Labelling(Pairs(pair_rows(count)), Answers(folder / "answers.sqlite"), **options)


def answer_all(labelling: Labelling, annotator: str, clip: str = "a") -> int:
    """Prefer the same clip everywhere, of attention checks the clean one; how many answers that took."""
    count = 0
    while (step := labelling.next_step(annotator)) is not None:
        wanted = "a" if step.task.check else clip
        choice = wanted if wanted in ("tie", "both_bad") else "left" if step.task.left_clip == wanted else "right"
        assert labelling.answer(step, choice, heard_s=(0.5, 0.5))
        count += 1
    return count
