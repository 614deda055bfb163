"""Audit a policy: is there something audible to choose between, and do judges that never met agree about it?

For each prompt of a split `--rollouts` takes are sampled. Of each: the reward `mos` (DistillMOS), the recognizer's mean
log probability of the text, DNSMOS, Whisper's transcript, level, silence, duration, pitch contour, and the voice by an
outside encoder (Resemblyzer's GE2E, Wan et al. 2018). Then, with bars that a policy worth fine-tuning clears:

    agreement    rank correlation of MOS and DNSMOS within a prompt, mean over prompts; the same with the ranks of level
                 and of silence partialled out
    best of N    what DNSMOS and Whisper's word error rate gain where MOS, or the recognizer, picks one of the takes
    spread       median distance of two takes' pitch contours over their common relative time; deviation of duration
    one step     MOS and DNSMOS of one step of the solve against all: a model with one way to speak needs no more
    voice        share of the takes that are nearer to their own voice's references than to another voice's

Leaves out: people. Intervals are over prompts (Student's t).
Hardware: sampling 16 takes of 24 prompts takes an H100 a minute, two CPU cores half an hour; judging them two CPU cores
half an hour. `--sample_only` and `--judge_only` part the two.
    pip install faster-whisper resemblyzer      # and a Whisper model in CTranslate2's format, its folder named here:
    python recipes/audit.py --whisper models/whisper-base --out runs/audit
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import scipy.stats
import soundfile
import torch
from listen import letters, load_whisper, transcript
from torch import Tensor

from rlhf_mel import load_policy, load_prompts, load_vocoder, rollout
from rlhf_mel.data.prompts import SPLITS
from rlhf_mel.flow.noise import item_generator
from rlhf_mel.pipeline import vocode
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.audio import MelSpec, log_mel, resample, samples_to_frames
from rlhf_mel.speech.measures import clips, dnsmos, pitch_contour, speech_frames
from rlhf_mel.types import Audio

Row = dict[str, Any]


@torch.no_grad()
def sample(args: argparse.Namespace) -> list[Row]:
    """Generate every take into --out as FLAC; a row each."""
    policy, vocoder = load_policy(args.policy, device=args.device), load_vocoder(args.vocoder).to(args.device)
    prompts = load_prompts(args.prompts_from, split=args.split)
    chosen = range(min(args.prompts, len(prompts)))  # voices alternate
    rows = []
    for steps, count in ((args.steps, args.rollouts), (1, args.rollouts // 4)):
        for prompt in chosen:
            batch = prompts.collate([prompts[prompt]] * count)
            generators = [item_generator(args.seed + take, prompt) for take in range(count)]
            takes = rollout(
                policy,
                batch.to(args.device),
                steps=steps,
                cfg_strength=args.cfg_strength,
                grad_steps=0,
                generator=generators,
            )
            audio = vocode(vocoder, takes)
            for take, waveform in enumerate(clips(audio)):
                name = f"{prompt:03d}_{take:02d}_{steps}.flac"
                peak = max(1.0, float(waveform.abs().max()))
                soundfile.write(args.out / name, waveform.numpy() / peak, audio.sample_rate_hz)
                row = {"file": name, "prompt": prompt, "steps": steps, "take": take, "peak": peak}
                rows.append(row | {"text": batch.texts[0], "voice": prompts[prompt]["voice"]})
        print(f"{len(rows)} takes", flush=True)
    return rows


@torch.no_grad()
def judge(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """The rows, each with what the rewards and the outside listeners say of it."""
    torch.set_num_threads(1)
    rewards, prompts = Rewards(["mos", "intelligibility"]), load_prompts(args.prompts_from, split=args.split)
    whisper, voice_of = (load_whisper(args.whisper), voice_encoder(args.prompts_from)) if args.whisper else (None, None)
    for row in rows:
        samples, rate_hz = soundfile.read(args.out / row["file"], dtype="float32")
        waveform = torch.from_numpy(samples) * row["peak"]
        length = torch.tensor([len(waveform)])
        audio = Audio(waveform[None], length, rate_hz, log_mel(waveform[None]), samples_to_frames(length, MelSpec()))
        scores = rewards(audio, prompts.collate([prompts[row["prompt"]]])).breakdown
        row |= {name: float(values) for name, values in scores.items()}
        row["dnsmos"] = float(dnsmos(audio)["dnsmos_ovrl"])
        power, speech = speech_frames(waveform, rate_hz)
        row["level_dbfs"] = 10 * math.log10(float(power[speech].mean()) + 1e-20)
        row["silence_ratio"] = 1 - float(speech.double().mean())
        row["duration_s"] = len(waveform) / rate_hz
        if row["steps"] == 1:
            continue
        if whisper is not None and voice_of is not None:
            heard = letters(transcript(whisper, waveform, rate_hz)) or " "
            row |= {"heard": heard, "wer": float(jiwer.wer(letters(row["text"]), heard))}
            row["nearest_voice"] = voice_of(waveform, rate_hz)
        if row["take"] < args.contours:
            contour = pitch_contour(waveform, rate_hz)
            row["contour"] = [None if math.isnan(value) else round(value, 3) for value in contour]
    return rows


def judge_all(rows: Sequence[Row], args: argparse.Namespace) -> list[Row]:
    """`judge` in as many processes as `--jobs` says, ten takes at a time."""
    parts = [list(rows[start : start + 10]) for start in range(0, len(rows), 10)]
    judged: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as workers:
        for part in workers.imap(functools.partial(judge, args=args), parts):
            judged += part
            print(f"{len(judged)} of {len(rows)} judged", flush=True)
    return judged


def voice_encoder(source: str) -> Callable[[Tensor, int], str]:
    """Waveform [S] to the voice whose reference clips, of all splits, it is nearest to, by Resemblyzer."""
    from resemblyzer import VoiceEncoder

    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(waveform: Tensor, rate_hz: int) -> np.ndarray:
        return encoder.embed_utterance(resample(waveform[None], rate_hz, 16_000)[0].numpy())

    known: dict[str, dict[str, np.ndarray]] = {}
    for prompts in (load_prompts(source, split=split) for split in SPLITS):
        for row in range(len(prompts)):
            batch, vectors = prompts.collate([prompts[row]]), known.setdefault(prompts[row]["voice"], {})
            if batch.reference_texts[0] not in vectors:
                vectors[batch.reference_texts[0]] = embed(batch.reference_audio[0], batch.sample_rate_hz)
    centres = {voice: np.mean(list(vectors.values()), 0) for voice, vectors in known.items()}

    def nearest(waveform: Tensor, rate_hz: int) -> str:
        vector = embed(waveform, rate_hz)
        return max(centres, key=lambda voice: float(vector @ centres[voice] / np.linalg.norm(centres[voice])))

    return nearest


Figure = Callable[[list[Row]], float]
"""Of the takes of one prompt; NaN where they have none."""


def summary(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Each figure of the module's docstring: mean over prompts, half of its 95 % interval."""
    full: dict[int, list[Row]] = {row["prompt"]: [] for row in rows}
    one_step: dict[int, list[Row]] = {row["prompt"]: [] for row in rows}
    for row in rows:
        (one_step if row["steps"] == 1 else full)[row["prompt"]].append(row)
    groups = list(full.values())
    figures = {**sound_figures(one_step), **(word_figures() if "wer" in groups[0][0] else {})}
    return {name: over_prompts(groups, figure) for name, figure in figures.items()}


def over_prompts(groups: Sequence[list[Row]], figure: Figure) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    values = np.array([value for group in groups if not math.isnan(value := figure(group))])
    if len(values) < 2:
        return math.nan, math.nan
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def column(group: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in group])


def best(group: Sequence[Row], by: str) -> Row:
    return max(group, key=lambda row: row[by])


def gain_of_best(group: Sequence[Row], by: str, name: str) -> float:
    return best(group, by)[name] - column(group, name).mean()


def sound_figures(one_step: dict[int, list[Row]]) -> dict[str, Figure]:
    """What needs no transcript; `one_step`: takes of one step of the solve, by prompt."""

    def gain_of_one_step(group: list[Row], name: str) -> float:
        return column(one_step[group[0]["prompt"]], name).mean() - column(group, name).mean()

    def agreement(group: list[Row], *others: str) -> float:
        return partial_rank_correlation(*(column(group, name) for name in ("mos", "dnsmos", *others)))

    return {
        "MOS, mean": lambda g: column(g, "mos").mean(),
        "MOS, deviation within a prompt": lambda g: column(g, "mos").std(ddof=1),
        "DNSMOS, mean": lambda g: column(g, "dnsmos").mean(),
        "DNSMOS, deviation within a prompt": lambda g: column(g, "dnsmos").std(ddof=1),
        "MOS and DNSMOS, rank correlation": agreement,
        "the same, level and silence partialled out": lambda g: agreement(g, "level_dbfs", "silence_ratio"),
        "best by MOS: DNSMOS": lambda g: gain_of_best(g, "mos", "dnsmos"),
        "pitch contours, median distance (semitones)": contour_distance,
        "duration, deviation (share)": lambda g: column(g, "duration_s").std(ddof=1) / column(g, "duration_s").mean(),
        "one step: MOS": lambda g: gain_of_one_step(g, "mos"),
        "one step: DNSMOS": lambda g: gain_of_one_step(g, "dnsmos"),
    }


def word_figures() -> dict[str, Figure]:
    """What needs Whisper's transcripts, and the voice by an outside encoder."""
    return {
        "best by MOS: WER": lambda g: gain_of_best(g, "mos", "wer"),
        "WER, mean": lambda g: column(g, "wer").mean(),
        "best by recognizer: WER": lambda g: gain_of_best(g, "intelligibility", "wer"),
        "WER of the best by recognizer": lambda g: best(g, "intelligibility")["wer"],
        "WER of the best of 8": lambda g: column(g[:8], "wer").min(),
        "WER of the best of 8 by recognizer": lambda g: best(g[:8], "intelligibility")["wer"],
        "recognizer and -WER, rank correlation": lambda g: partial_rank_correlation(
            column(g, "intelligibility"), -column(g, "wer")
        ),
        "own voice nearest (share)": lambda g: float(np.mean([row["nearest_voice"] == row["voice"] for row in g])),
    }


def partial_rank_correlation(a: np.ndarray, b: np.ndarray, *others: np.ndarray) -> float:
    """Spearman's correlation of a and b, linear effects of the ranks of `others` removed; NaN where one is constant."""
    ranks = [scipy.stats.rankdata(values) for values in (a, b, *others)]
    design = np.stack([np.ones(len(a)), *ranks[2:]], axis=1)
    left, right = (values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in ranks[:2])
    norm = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / norm) if norm > 1e-9 else math.nan


def contour_distance(group: Sequence[Row]) -> float:
    """Median over pairs of takes and 100 relative times of |difference| in semitones, where both are voiced."""
    contours = []
    for row in group:
        if contour := row.get("contour"):
            values = np.array([math.nan if value is None else value for value in contour])
            contours.append(values[np.linspace(0, len(values) - 1, 100).round().astype(int)])
    distances = [np.abs(a - b) for a, b in itertools.combinations(contours, 2)]
    return float(np.nanmedian(np.concatenate(distances))) if distances else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--whisper", type=Path, help="Whisper model folder (CTranslate2); without: no words, no voices")
    parser.add_argument("--policy", default="tiny")
    parser.add_argument("--vocoder", default="tiny")
    parser.add_argument("--prompts_from", default="tiny", help="'tiny', or a folder of prompts")
    parser.add_argument("--split", default="heldout", choices=SPLITS)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--contours", type=int, default=6, help="takes of a prompt whose pitch is tracked")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--cfg_strength", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes that judge")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--sample_only", action="store_true")
    only.add_argument("--judge_only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "takes.jsonl"
    if args.judge_only:
        rows = [json.loads(line) for line in table.read_text().splitlines()]
    else:
        rows = sample(args)
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.sample_only:
        return
    rows = judge_all(rows, args)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (mean, half) in summary(rows).items():
        print(f"{name:45} {mean:8.3f} +- {half:.3f}")


if __name__ == "__main__":
    main()
