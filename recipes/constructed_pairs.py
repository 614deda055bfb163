"""Pairs of clips with a known better one, offline: the bundled reference clips, each degraded twice (degrade.py).

Who prefers which is a hidden rule, and no person: the ratio of the speech to what was added to it, in dB,

    quality = -10 log10(10^(-snr_db / 10) + 10^(-direct_db / 10)),   40 dB at most

of the noise and of the room's reverberation; the other conditions are not used. Copies that differ by less than 3 dB
are drawn again, as hardly anyone could tell. A share of the answers (`--noise`) is turned around. Levels are random,
+-6 dB, and have no part in the rule. --out gets `train/`, and `heldout/` of other sentences, whose answers are all
right; both are data sets of load_preferences.

Leaves out: real preferences, which no package has.
Hardware: any; 300 pairs in half a minute.
    python recipes/constructed_pairs.py --out data/constructed
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import degrade
import numpy as np
import soundfile

from rlhf_mel.data.preferences.load import write_preferences
from rlhf_mel.speech.audio import load_audio
from rlhf_mel.storage import ASSETS

CLEAN_DB = 40.0
LEVEL_DB = 6.0
LEAST_DIFFERENCE_DB = 3.0
HELD_OUT = 6
"""Of the reference clips."""


def reference_clips() -> list[tuple[str, str, np.ndarray]]:
    """Text, voice and waveform of the bundled reference clips, in the order of their texts."""
    rows: dict[str, Any] = {}
    for split in ("train", "tuning", "heldout"):
        for line in (ASSETS / f"prompts/{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["reference_text"]] = (row["voice"], row["reference_audio"])
    return [
        (text, voice, load_audio(ASSETS / "prompts" / file).double().numpy())
        for text, (voice, file) in sorted(rows.items())
    ]


def quality_db(labels: dict[str, Any]) -> float:
    """The hidden rule; see the module. `labels`: what degrade.py says that it did."""
    ratios_db = [labels["noise"]["snr_db"]] if "noise" in labels else []
    ratios_db += [labels["room"]["direct_db"]] if "room" in labels else []
    added = sum(10 ** (-ratio / 10) for ratio in ratios_db)
    return CLEAN_DB if added == 0 else min(CLEAN_DB, -10 * math.log10(added))


def degraded(speech: np.ndarray, others: list[np.ndarray], rng: np.random.Generator) -> tuple[bytes, float]:
    """A FLAC file of the clip with noise, a room, both or neither, at a random level; its quality."""
    labels: dict[str, Any] = {}
    for name in ("room", "noise"):
        if rng.random() < 0.6:
            speech, labels[name] = degrade.CONDITIONS[name](speech, rng, lambda: others[rng.integers(len(others))])
    speech = speech * 10 ** (rng.uniform(-LEVEL_DB, LEVEL_DB) / 20)
    file = io.BytesIO()
    soundfile.write(file, speech * min(1.0, 0.99 / np.abs(speech).max()), degrade.SAMPLE_RATE_HZ, format="FLAC")
    return file.getvalue(), quality_db(labels)


def pairs(
    clips: list[tuple[str, str, np.ndarray]], count: int, noise: float, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Rows of preferences.py, and whether each answer is right."""
    others = [speech for _, _, speech in clips]
    for row in range(count):
        text, voice, speech = clips[row % len(clips)]
        (one, one_db), (other, other_db) = (degraded(speech, others, rng) for _ in range(2))
        while abs(one_db - other_db) < LEAST_DIFFERENCE_DB:
            other, other_db = degraded(speech, others, rng)
        right = rng.random() >= noise
        chosen, rejected = (one, other) if (one_db > other_db) == right else (other, one)
        yield {
            "id": f"{row:04d}",
            "prompt": text,
            "voice": voice,
            "chosen": {"bytes": chosen, "path": None},
            "rejected": {"bytes": rejected, "path": None},
            "right": right,
            "quality_difference_db": abs(one_db - other_db),
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=300, help="to learn from")
    parser.add_argument("--heldout_pairs", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.1, help="share of the answers to learn from that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    clips = reference_clips()
    order = rng.permutation(len(clips))
    for split, kept, count, noise in (
        ("train", order[HELD_OUT:], args.pairs, args.noise),
        ("heldout", order[:HELD_OUT], args.heldout_pairs, 0.0),
    ):
        rows = pairs([clips[place] for place in kept], count, noise, rng)
        about = f"Constructed: bundled synthetic speech, degraded; {noise:.0%} of the answers are wrong. No people."
        print(f"{count} pairs in {write_preferences(rows, args.out / split, licence='apache-2.0', about=about)}")


if __name__ == "__main__":
    main()
