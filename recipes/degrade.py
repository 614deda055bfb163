"""Put the clean takes of a corpus into the world: rooms, noise, narrow bands, codecs, clipping, levels, and slips.

Reads a corpus of build_corpus.py with the `alignment.jsonl` of align.py; writes another one to --out, with its own
`metadata.jsonl` and `alignment.jsonl`, and `--variants` clips for each. A line has two more fields, for measuring and
never shown to a policy: `conditions`, what was done to the sound, with its numbers ({}: nothing), and `slip`, what went
wrong with a word (null: nothing). The text stays what should have been said, and every word keeps its place in time: to
slip or not is the policy's choice, which a reward for words can change.

Conditions (--clean_share of the clips have none, the others one or more of these, by SHARES):
    room    convolved with exponentially decaying noise, RT60 0.2 to 0.7 s (Polack, La transmission de l'energie
            sonore dans les salles, 1988), direct to reverberant energy -3 to 9 dB
    noise   white, pink, brown, hum, or six other clips at once (babble), 7 to 25 dB below the speech
    band    low pass at 2.5 to 6 kHz, or 300 to 3,400 Hz
    codec   mu-law at 8 kHz (ITU-T G.711), or MP3 at its lowest quality
    clip    the loudest 0.5 to 6 % of the samples cut off
and, for all, a level of 0 +- LEVEL_STD_DB.
Slips (--slip_share of the clips, one word each): `swallow` (the word 15 to 30 dB down), `repeat` (the word before it
said again in its place), `replace` (another word of the sentence in its place), `slur` (the word over itself, 60 to
120 ms later).

Leaves out: moving speakers, packet loss, restarts of a sentence.
Hardware: any; one core degrades a minute of speech in about two seconds.
    python recipes/degrade.py --data data/corpus --out data/wild --variants 3
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio

from rlhf_mel.speech.audio import MelSpec, resample
from rlhf_mel.speech.text import UNIT_FRAMES, PhonemeTokenizer

SAMPLE_RATE_HZ = 24_000
UNIT_SAMPLES = UNIT_FRAMES * MelSpec().hop_length
SHARES = {"room": 0.35, "noise": 0.65, "band": 0.06, "codec": 0.05, "clip": 0.05}
"""Mostly what DistillMOS and DNSMOS both hear: DNSMOS does not mind narrow bands, codecs and clipping."""
NOISES = {"white": 0.7, "pink": 0.15, "brown": 0.05, "hum": 0.05, "babble": 0.05}
"""Mostly white: DistillMOS takes faint pink and brown noise for a better recording, DNSMOS does not."""
LEVEL_STD_DB = 1.5
FADE_S = 0.012

Rng = np.random.Generator
Labels = dict[str, Any]


def room(speech: np.ndarray, rng: Rng, others: Callable[[], np.ndarray]) -> tuple[np.ndarray, Labels]:
    rt60_s, direct_db = rng.uniform(0.2, 0.7), rng.uniform(-3, 9)
    n = np.arange(int(rt60_s * SAMPLE_RATE_HZ))
    tail = rng.standard_normal(len(n)) * 10 ** (-3 * n / len(n))
    tail[: int(0.004 * SAMPLE_RATE_HZ)] = 0
    tail *= 10 ** (-direct_db / 20) / np.linalg.norm(tail)
    tail[0] = 1
    size = len(speech) + len(tail)
    wet = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(tail, size), size)[: len(speech)]
    return wet * power_ratio(speech, wet), {"rt60_s": round(rt60_s, 3), "direct_db": round(direct_db, 1)}


def noise(speech: np.ndarray, rng: Rng, others: Callable[[], np.ndarray]) -> tuple[np.ndarray, Labels]:
    snr_db, kind = rng.uniform(7, 25), str(rng.choice(list(NOISES), p=list(NOISES.values())))
    if kind == "babble":
        sound = sum(np.resize(np.roll(others(), rng.integers(10_000)), len(speech)) for _ in range(6))
    elif kind == "hum":
        t, base = np.arange(len(speech)) / SAMPLE_RATE_HZ, rng.choice([50, 60])
        sound = sum(np.sin(2 * np.pi * base * k * t + rng.uniform(0, 6.3)) / k for k in range(1, 9))
        sound = sound + 0.02 * rng.standard_normal(len(speech))
    else:
        spectrum = np.fft.rfft(rng.standard_normal(len(speech)))
        slope = {"white": 0, "pink": 0.5, "brown": 1}[kind]
        sound = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 20) ** slope, len(speech))
    sound = sound * power_ratio(speech, sound) * 10 ** (-snr_db / 20)
    return speech + sound, {"kind": kind, "snr_db": round(snr_db, 1)}


def band(speech: np.ndarray, rng: Rng, others: Callable[[], np.ndarray]) -> tuple[np.ndarray, Labels]:
    low, high = (300, 3400) if rng.random() < 0.4 else (0, int(rng.uniform(2500, 6000)))
    frequency = np.fft.rfftfreq(len(speech), 1 / SAMPLE_RATE_HZ)
    edge = 0.1  # of a frequency: the width over which each side falls to nothing
    gain = np.clip((high * (1 + edge) - frequency) / (high * edge), 0, 1)
    gain *= np.clip((frequency - low * (1 - edge)) / max(low * edge, 1e-9), 0, 1)
    return np.fft.irfft(np.fft.rfft(speech) * gain, len(speech)), {"low_hz": low, "high_hz": high}


def codec(speech: np.ndarray, rng: Rng, others: Callable[[], np.ndarray]) -> tuple[np.ndarray, Labels]:
    if rng.random() < 0.5:
        narrow = at_rate(speech, SAMPLE_RATE_HZ, 8000).clip(-1, 1)
        compressed = np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256)
        compressed = np.round(compressed * 127) / 127
        narrow = np.sign(compressed) * (256 ** np.abs(compressed) - 1) / 255
        return np.resize(at_rate(narrow, 8000, SAMPLE_RATE_HZ), len(speech)), {"kind": "mu-law"}
    file = io.BytesIO()
    soundfile.write(file, speech.clip(-1, 1), SAMPLE_RATE_HZ, format="MP3", compression_level=0.99)
    file.seek(0)
    decoded = soundfile.read(file)[0]
    size = len(decoded) + len(speech)
    correlation = np.fft.irfft(np.fft.rfft(decoded, size) * np.fft.rfft(speech, size).conj(), size)
    delay = int(np.argmax(correlation))
    delay -= size if delay > size // 2 else 0
    return np.resize(np.roll(decoded, -delay), len(speech)), {"kind": "mp3"}


def at_rate(sound: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    return resample(torch.from_numpy(sound)[None].float(), from_hz, to_hz)[0].double().numpy()


def clip(speech: np.ndarray, rng: Rng, others: Callable[[], np.ndarray]) -> tuple[np.ndarray, Labels]:
    share = rng.uniform(0.005, 0.06)
    limit = np.quantile(np.abs(speech), 1 - share)
    cut = speech.clip(-limit, limit)
    return cut * power_ratio(speech, cut), {"share": round(share, 4)}


CONDITIONS = {"room": room, "noise": noise, "band": band, "codec": codec, "clip": clip}
"""In the order in which they befall speech."""


def power_ratio(wanted: np.ndarray, sound: np.ndarray) -> float:
    """The factor that gives `sound` the rms of `wanted`."""
    return math.sqrt(np.mean(np.square(wanted)) / max(np.mean(np.square(sound)), 1e-12))


def draw_conditions(rng: Rng, clean_share: float) -> list[str]:
    """None for `clean_share` of the draws, else at least one."""
    if rng.random() < clean_share:
        return []
    while True:
        drawn = [name for name in CONDITIONS if rng.random() < SHARES[name]]
        if drawn:
            return drawn


def words_of(text: str, units: list[int]) -> list[tuple[str, int, int]]:
    """(word, first sample, last sample + 1) of each word of an aligned sentence."""
    spans, place = [], 1  # the silence before the sentence
    ends = np.cumsum(units)
    parts = PhonemeTokenizer._parts(text)
    for index, part in enumerate(parts):
        count = len(PhonemeTokenizer._phonemes(part))
        if part[0].isalpha() or part[0] in "'{":
            spans.append((part, int(ends[place - 1]) * UNIT_SAMPLES, int(ends[place + count - 1]) * UNIT_SAMPLES))
        place += count + (part in (".", "?", "!") and index + 1 < len(parts))
    return spans


def slip(speech: np.ndarray, words: list[tuple[str, int, int]], rng: Rng) -> tuple[np.ndarray, Labels]:
    """One word but the first goes wrong; nothing else moves. Where no other word fits its place, it is swallowed."""
    index, kind = int(rng.integers(1, len(words))), str(rng.choice(["swallow", "repeat", "replace", "slur"]))
    word, start, end = words[index]
    end = min(end, len(speech))
    choices = [index - 1] if kind == "repeat" else [place for place in range(len(words)) if place != index]
    _, first, last = words[int(rng.choice(choices))]
    rate = (last - first) / (end - start)
    fits = 0.5 <= rate <= 2 and min(end - start, last - first) >= 2048
    kind = kind if kind == "slur" or fits else "swallow"
    if kind == "swallow":
        changed = speech[start:end] * 10 ** (-rng.uniform(15, 30) / 20)
    elif kind == "slur":
        shift = int(rng.uniform(0.06, 0.12) * SAMPLE_RATE_HZ)
        changed = 0.6 * (speech[start:end] + np.roll(speech, shift)[start:end] + np.roll(speech, -shift)[start:end])
    else:
        changed = stretched(speech[first:last], rate, end - start)
    fade = min(int(FADE_S * SAMPLE_RATE_HZ), (end - start) // 2)
    weight = np.interp(np.arange(end - start), [0, fade, end - start - fade, end - start], [0, 1, 1, 0])
    whole = speech.copy()
    whole[start:end] = weight * changed + (1 - weight) * speech[start:end]
    return whole, {"kind": kind, "word": index, "text": word}


def stretched(sound: np.ndarray, rate: float, length: int) -> np.ndarray:
    """`sound` at `rate` times its tempo, by a phase vocoder, `length` samples of it."""
    window = torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(torch.from_numpy(sound), 1024, 256, window=window, return_complex=True)
    advance = torch.linspace(0, torch.pi * 256, len(spectrum), dtype=torch.float64)[:, None]
    slower = torchaudio.functional.phase_vocoder(spectrum, rate, advance)
    return torch.istft(slower, 1024, 256, window=window, length=length).numpy()


def degrade(
    job: tuple[dict, list[int], int], *, data: Path, out: Path, files: list[str], args: argparse.Namespace
) -> dict:
    """One variant of one clip, written; its line of the metadata."""
    row, units, variant = job
    torch.set_num_threads(1)
    rng = np.random.default_rng([args.seed, variant, int.from_bytes(row["id"].encode(), "big") % 2**31])
    speech = soundfile.read(data / row["file"])[0]

    def others() -> np.ndarray:
        return soundfile.read(data / files[int(rng.integers(len(files)))])[0]

    labels: Labels = {}
    words = words_of(row["text"], units)
    slipped = None
    if rng.random() < args.slip_share and len(words) > 1:
        speech, slipped = slip(speech, words, rng)
    for name in draw_conditions(rng, args.clean_share):
        speech, labels[name] = CONDITIONS[name](speech, rng, others)
    level_db = float(np.clip(rng.standard_normal(), -2.5, 2.5)) * LEVEL_STD_DB
    speech = speech * 10 ** (level_db / 20)
    speech = speech * min(1.0, 0.99 / np.abs(speech).max())
    name = f"{row['id']}_{variant}"
    soundfile.write(out / "audio" / f"{name}.flac", speech, SAMPLE_RATE_HZ)
    more = {"conditions": labels, "slip": slipped, "level_db": round(level_db, 2)}
    return row | {"id": name, "file": f"audio/{name}.flac"} | more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", type=int, default=3)
    parser.add_argument("--clean_share", type=float, default=0.3)
    parser.add_argument("--slip_share", type=float, default=0.2)
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.data / "metadata.jsonl").read_text().splitlines()]
    aligned = {}
    for line in (args.data / "alignment.jsonl").read_text().splitlines():
        clip = json.loads(line)
        aligned[clip["id"]] = clip
    (args.out / "audio").mkdir(parents=True, exist_ok=True)
    jobs = [(row, aligned[row["id"]]["units"], variant) for row in rows for variant in range(args.variants)]
    work = partial(degrade, data=args.data, out=args.out, files=[row["file"] for row in rows], args=args)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as workers:
        made = list(workers.imap(work, jobs, chunksize=32))
    (args.out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    with open(args.out / "alignment.jsonl", "w", encoding="utf-8") as file:
        for (row, _, _), line in zip(jobs, made, strict=True):
            file.write(json.dumps(aligned[row["id"]] | {"id": line["id"]}) + "\n")
    clean = sum(not row["conditions"] for row in made) / len(made)
    slips = sum(row["slip"] is not None for row in made) / len(made)
    print(f"{len(made)} clips in {args.out}: {clean:.2f} without a condition, {slips:.2f} with a slip")


if __name__ == "__main__":
    main()
