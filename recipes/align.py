"""Find where each phoneme of the corpus is heard, and fit the durations that the phoneme tokenizer predicts.

Writes `alignment.jsonl` beside the corpus's metadata (a line a clip: `{"id", "phonemes", "units"}`, one unit = two mel
frames = 21.3 ms) and `durations.json` into --out (linear weights, see rlhf_mel/speech/text.py).

Viterbi training (Rabiner, A tutorial on hidden Markov models, 1989): start from proportional durations; repeat: fit a
softmax over phonemes to the frames as aligned, then take the most probable monotonic alignment,
    D[t, s] = max(D[t-1, s], D[t-1, s-1]) + log p(phoneme_s | frame_t).
Frames are seen through the bundled recognizer: its fifth block, and the mel itself.

Leaves out: several pronunciations of a word, phonemes that a voice drops.
Hardware: a GPU, or two CPU cores.
    python recipes/align.py --data data/corpus --out rlhf_mel/assets
Number to expect: printed for each round, the share of units that moved to another phoneme, and at the end how well
the fitted durations predict those of held-out clips (R^2).
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing.pool
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus_data import Corpus, load_corpus
from torch import Tensor, nn

from rlhf_mel.speech.audio import log_mel
from rlhf_mel.speech.recognizer import Recognizer, load_recognizer
from rlhf_mel.speech.text import TOKENS, UNIT_FRAMES, PhonemeTokenizer, duration_features, spread


@torch.no_grad()
def frame_features(recognizer: Recognizer, corpus: Corpus) -> list[Tensor]:
    """For each clip float16 [units, D]: what the recognizer's fifth block makes of it, and the mel of the unit."""
    heard: list[Tensor] = []
    hook = recognizer.blocks[4].register_forward_hook(lambda _, __, output: heard.append(output))
    features = []
    for row in range(len(corpus)):
        mel = log_mel(corpus.clip(row)[None])
        heard.clear()
        recognizer(mel, torch.tensor([mel.shape[1]], device=mel.device))
        hidden = F.layer_norm(heard[0][0], heard[0].shape[-1:])
        pairs = F.pad(mel[0], (0, 0, 0, mel.shape[1] % UNIT_FRAMES)).unflatten(0, (-1, UNIT_FRAMES)).mean(1)
        features.append(torch.cat([hidden, (pairs + 5) / 3], dim=-1).half())
    hook.remove()
    return features


def most_probable(log_probs: np.ndarray) -> np.ndarray:
    """Units of each of S states in order, [S], on the best monotonic path through log p [T, S]; each at least 1."""
    length, states = log_probs.shape
    best = np.full(states, -np.inf)
    best[0] = log_probs[0, 0]
    moved = np.zeros((length, states), dtype=bool)
    for t in range(1, length):
        entered = np.concatenate([[-np.inf], best[:-1]])
        moved[t] = entered > best
        best = np.maximum(best, entered) + log_probs[t]
    units = np.zeros(states, dtype=np.int64)
    state = states - 1
    for t in range(length - 1, -1, -1):
        units[state] += 1
        state -= int(moved[t, state])
    return units


def fit_frames(features: Tensor, phoneme: Tensor, seed: int, steps: int = 600, batch: int = 4096) -> nn.Module:
    """A two-layer softmax from unit [N, D] to phoneme [N]."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(features.shape[1], 256), nn.GELU(), nn.Linear(256, len(TOKENS)))
    model.to(features.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(features), (batch,), device=features.device)
        loss = F.cross_entropy(model(features[rows].float()), phoneme[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def realign(
    model: nn.Module, features: Sequence[Tensor], ids: Sequence[Tensor], workers: multiprocessing.pool.Pool
) -> list[np.ndarray]:
    log_probs = []
    for units, phonemes in zip(features, ids, strict=True):
        log_probs.append(model(units.float()).log_softmax(-1)[:, phonemes.to(units.device)].cpu().numpy())
    return workers.map(most_probable, log_probs, chunksize=64)


def fit_durations(
    phonemes: Sequence[Sequence[str]], units: Sequence[np.ndarray], ridge: float = 5.0
) -> dict[str, float]:
    """Weights whose sum over `duration_features` is the least-squares duration, relative to a clip's mean."""
    rows = [(feature, d) for line, of in zip(phonemes, units, strict=True)
            for feature, d in zip(duration_features(line), of / of.mean(), strict=True)]  # fmt: skip
    names = sorted({name for features, _ in rows for name in features})
    place = {name: index for index, name in enumerate(names)}
    gram, moment = np.zeros((len(names), len(names))), np.zeros(len(names))
    for features, duration in rows:
        index = [place[name] for name in features]
        gram[np.ix_(index, index)] += 1
        moment[index] += duration
    weights = np.linalg.solve(gram + ridge * np.eye(len(names)), moment)
    return {name: round(float(weight), 4) for name, weight in zip(names, weights, strict=True)}


def explained(weights: dict[str, float], phonemes: Sequence[Sequence[str]], units: Sequence[np.ndarray]) -> float:
    """R^2 of the predicted relative durations."""
    true = np.concatenate([of / of.mean() for of in units])
    predicted = [
        sum(weights.get(name, 0.0) for name in names) for line in phonemes for names in duration_features(line)
    ]
    return float(1 - ((true - predicted) ** 2).mean() / true.var())


def fit_timing(clips: Sequence[tuple[str, str]], units: Sequence[np.ndarray]) -> dict[str, float]:
    """How two takes of one sentence differ, from (voice, text) and units of each clip: see speech.text.Timing.

    Each take differs from the mean by 1 / sqrt(2) of what two differ by. Phonemes of less than four units are left out
    of the local deviation, which one unit more or less would hide.
    """
    takes = collections.defaultdict(list)
    for clip, of in zip(clips, units, strict=True):
        takes[clip].append(of)
    paces, local, neighbours = [], [], []
    for first, second in (of for of in takes.values() if len(of) == 2):
        paces.append(np.log(first.sum() / second.sum()))
        off = np.log(first / first.sum()) - np.log(second / second.sum())
        long = first + second >= 8
        local += off[long].tolist()
        neighbours += (off[1:] * off[:-1])[long[1:] & long[:-1]].tolist()
    variance = float(np.square(local).mean())
    timing = {
        "pace_std": float(np.std(paces)) / 2**0.5,
        "local_std": (variance / 2) ** 0.5,
        "local_correlation": float(np.mean(neighbours)) / variance,
    }
    return {name: round(value, 4) for name, value in timing.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    corpus = load_corpus(args.data, args.device)
    tokenizer, place = PhonemeTokenizer(), {token: index for index, token in enumerate(TOKENS)}
    phonemes = [tokenizer.phonemes(text) for text in corpus.texts]
    ids = [torch.tensor([place[phoneme] for phoneme in line]) for line in phonemes]
    features = frame_features(load_recognizer("tiny", device=args.device), corpus)
    units = [np.array(spread(tokenizer.durations(line), len(of))) for line, of in zip(phonemes, features, strict=True)]
    frames, labels = torch.cat(features), _labels(ids, units, args.device)
    workers = multiprocessing.get_context("spawn").Pool()
    for round_ in range(args.rounds):
        model = fit_frames(frames, labels, args.seed)
        units = realign(model, features, ids, workers)
        before, labels = labels, _labels(ids, units, args.device)
        print(f"round {round_ + 1}: {(labels != before).float().mean():.3f} of the units moved", flush=True)

    with open(args.data / "alignment.jsonl", "w", encoding="utf-8") as file:
        for name, line, of in zip(corpus.ids, phonemes, units, strict=True):
            file.write(json.dumps({"id": name, "phonemes": line, "units": of.tolist()}) + "\n")
    sides = {held_out: corpus.rows(held_out=held_out) for held_out in (False, True)}
    train, test = ([(phonemes[row], units[row]) for row in sides[side]] for side in (False, True))
    weights = fit_durations(*zip(*train, strict=True))
    unit_share = float(np.mean([len(line) / of.sum() for line, of in train]))
    print(f"durations: R^2 {explained(weights, *zip(*test, strict=True)):.3f} on held-out clips")
    timing = fit_timing(
        [(corpus.voices[row], corpus.texts[row]) for row in sides[False]], [units[row] for row in sides[False]]
    )
    print(f"timing: {timing}")
    card = {"units_per_phoneme": round(1 / unit_share, 3), "timing": timing, "weights": weights}
    (args.out / "durations.json").write_text(json.dumps(card, indent=0) + "\n")


def _labels(ids: Sequence[Tensor], units: Sequence[np.ndarray], device: str) -> Tensor:
    """Phoneme of each unit of the corpus."""
    spoken = [line.repeat_interleave(torch.as_tensor(of)) for line, of in zip(ids, units, strict=True)]
    return torch.cat(spoken).to(device)


if __name__ == "__main__":
    main()
