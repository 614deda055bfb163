"""What the recipes for the bundled models share: the corpus on the device, a clock, averaged weights.

A corpus is a folder that build_corpus.py wrote: `metadata.jsonl`, a line a clip (`{"id", "file", "text",
"voice", "duration_s"}`), and audio that libsndfile reads. All of it is decoded once, in parallel, to one
int16 tensor that stays on the device (five hours at 24 kHz: 0.86 GB). Crops and mels are made there: no step
waits for the host.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from rlhf_mel.speech.audio import resample

HELD_OUT_SHARE = 0.03


@dataclass(frozen=True)
class Corpus:
    """U clips in one row of samples; `samples`, `starts` and `lengths` live on the device."""

    samples: Tensor
    """Int16 [N]: every clip, one after another."""
    starts: Tensor
    """Long [U]: where a clip begins in `samples`."""
    lengths: Tensor
    """Long [U]: samples of a clip."""
    spans: tuple[tuple[int, int], ...]
    """The same starts and lengths on the host."""
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    voices: tuple[str, ...]
    held_out: tuple[bool, ...]
    """Whether a clip is kept from training; decided by its text, so no sentence is on both sides."""
    labels: tuple[dict[str, Any], ...]
    """The lines of `metadata.jsonl`: `conditions` and `slip`, where degrade.py wrote them."""
    sample_rate_hz: int

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def duration_h(self) -> float:
        return len(self.samples) / self.sample_rate_hz / 3600

    @property
    def voice_names(self) -> list[str]:
        return sorted(set(self.voices))

    def rows(self, *, held_out: bool, max_duration_s: float = math.inf, slips: bool = True) -> list[int]:
        """The clips of one side of the split, short enough; without `slips` only those that say their text."""
        limit = max_duration_s * self.sample_rate_hz
        rows = [row for row in range(len(self)) if self.held_out[row] == held_out and self.spans[row][1] <= limit]
        return [row for row in rows if slips or self.labels[row].get("slip") is None]

    def clip(self, row: int) -> Tensor:
        """Float32 [samples] in [-1, 1]: one clip."""
        start, length = self.spans[row]
        return self.samples[start : start + length].float() / 32768


class Crops:
    """Random crops of one length, each as likely as any other; drawn without host synchronisation."""

    def __init__(self, corpus: Corpus, rows: list[int], crop_samples: int) -> None:
        long_enough = [row for row in rows if corpus.spans[row][1] >= crop_samples]
        if not long_enough:
            raise ValueError(f"crops: expected clips of at least {crop_samples} samples, got none; crop shorter")
        device = corpus.samples.device
        places = [corpus.spans[row][1] - crop_samples + 1 for row in long_enough]
        ends = torch.tensor(places).cumsum(0)
        begins = torch.tensor([corpus.spans[row][0] for row in long_enough])
        self.corpus = corpus
        self.places = int(ends[-1])
        self.ends = ends.to(device)
        # A place p within clip c stands for the crop that starts at p + offset[c].
        self.offsets = (begins - ends + torch.tensor(places)).to(device)
        self.steps = torch.arange(crop_samples, device=device)

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Float32 [batch, crop_samples] in [-1, 1]."""
        place = torch.randint(self.places, (batch,), generator=generator, device=self.ends.device)
        start = place + self.offsets[torch.searchsorted(self.ends, place, right=True)]
        return self.corpus.samples[start[:, None] + self.steps].float() / 32768


def load_corpus(path: str | Path, device: torch.device | str, sample_rate_hz: int = 24_000) -> Corpus:
    """Decode every clip of the corpus at `path` and put it on `device`.

    Threads, not processes: libsndfile and the resampler release the interpreter lock, and nothing is copied.
    """
    path = Path(path)
    lines = (path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    clips = [json.loads(line) for line in lines if line.strip()]
    if not clips:
        raise ValueError(f"{path / 'metadata.jsonl'}: expected a line a clip, got none")
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        decoded = list(workers.map(lambda clip: _decode(path / clip["file"], sample_rate_hz), clips))
    lengths = [len(clip) for clip in decoded]
    starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    texts = tuple(clip["text"] for clip in clips)
    return Corpus(
        samples=torch.from_numpy(np.concatenate(decoded)).to(device),
        starts=torch.tensor(starts, device=device),
        lengths=torch.tensor(lengths, device=device),
        spans=tuple(zip(starts, lengths, strict=True)),
        ids=tuple(clip["id"] for clip in clips),
        texts=texts,
        voices=tuple(clip["voice"] for clip in clips),
        held_out=tuple(map(is_held_out, texts)),
        labels=tuple(clips),
        sample_rate_hz=sample_rate_hz,
    )


def _decode(path: Path, sample_rate_hz: int) -> np.ndarray:
    # Read as float: decoded Vorbis and Opus can exceed full scale, and must clip then, not wrap.
    samples, file_rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(1)
    if file_rate_hz != sample_rate_hz:
        mono = resample(torch.from_numpy(mono)[None], file_rate_hz, sample_rate_hz)[0].numpy()
    return np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)


def is_held_out(text: str) -> bool:
    """A fixed `HELD_OUT_SHARE` of all texts, by the hash of their letters (not case, not commas)."""
    letters = "".join(character for character in text.lower() if character.isalpha())
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


class Clock:
    """A budget of wall-clock minutes from now; schedules follow `fraction`, so any machine ends in time."""

    def __init__(self, minutes: float) -> None:
        self.begin_s = time.monotonic()
        self.budget_s = minutes * 60

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin_s

    @property
    def fraction(self) -> float:
        """Share of the budget that is gone; the work is over at 1."""
        return self.elapsed_s / self.budget_s


def cosine(fraction: float, *, warmup: float = 0.02, floor: float = 0.01) -> float:
    """Learning-rate factor: linear to 1 within `warmup` of the budget, then half a cosine to `floor`."""
    if fraction < warmup:
        return max(fraction / warmup, 1e-3)
    down = min((fraction - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * down))


def adamw(parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], **kwargs) -> torch.optim.AdamW:
    """Fused AdamW; on CUDA with a rate that lives on the device, so that a CUDA graph sees `set_lr`."""
    parameters = list(parameters)
    device = parameters[0].device
    if device.type != "cuda":
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, **kwargs)
    rate = torch.tensor(lr, device=device)
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, fused=True, capturable=True, **kwargs)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group; asynchronous on CUDA."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class Average:
    """Exponential moving average of a module's parameters; `decay` rises to its value: early noise fades."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.updates = 0
        self.online: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.averaged: list[Tensor] = [parameter.detach().clone() for parameter in self.online]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averaged, self.online, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the online values; a second call undoes the first."""
        for averaged, online in zip(self.averaged, self.online, strict=True):
            kept = online.clone()
            online.copy_(averaged)
            averaged.copy_(kept)
