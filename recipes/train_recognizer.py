"""Train the bundled recognizer "tiny": 2.4 M parameters that write down what a mel says and who says it.

Loss: CTC per character, plus `--voice_weight` times a cosine softmax with margin (Wang et al., CosFace, 2018) over
voices. Three voices would teach an embedding little, so each voice, moved by some mel bands (all pitches and formants
scaled alike), counts as another one: 5 x 3 classes.
Every mel is changed as generated mels differ from recorded ones, and more: tempo, level, tilt, blur, noise, and
masked bands and frames (Park et al., SpecAugment, 2019).

Leaves out: a language model, real voices, noise and rooms, punctuation and digits.
Hardware: one H100, 3 minutes. A CPU runs it, for a smoke test only.
Numbers to expect, printed at the end for held-out clips and kept in recognizer.json: after 2.2 minutes (5,905 updates)
a character error rate of 7.3 % (joe), 3.0 % (slt), 2.9 % (rms); cosine of two clips of one voice 0.97, of two -0.09.
    PYTHONPATH=. python recipes/train_recognizer.py --data data/corpus --out rlhf_mel/assets --minutes 3

`--resume FOLDER` starts from the recognizer in FOLDER with a fresh optimizer.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jiwer
import torch
import torch.nn.functional as F
from corpus_data import Average, Clock, Corpus, adamw, cosine, load_corpus, set_lr
from torch import Tensor, nn

from rlhf_mel.speech.audio import MEL_FLOOR, MelSpec, log_mel
from rlhf_mel.speech.recognizer import (
    SUBSAMPLING,
    VOICE_DIM,
    Recognizer,
    ctc_nll,
    encode,
    load_recognizer,
    normalize_text,
    save_recognizer,
)

BAND_SHIFTS = (0, -6, -3, 3, 6)
"""Bands by which a voice is moved to make another; 3 bands scale 500 Hz by a fifth."""
SILENCE = math.log(MEL_FLOOR)
FRAMES_STEP = 64
"""Batches are padded to multiples of it: few shapes, little padding."""


@dataclass(frozen=True)
class Mels:
    """Every mel of the corpus in one row, on the device; what is said, ready for CTC."""

    frames: Tensor
    """Float16 [N, M]."""
    spans: list[tuple[int, int]]
    """First frame and number of frames of a clip."""
    classes: Tensor
    """Long [U, longest text], zero-padded, on the device."""
    characters: list[int]
    """Length of each text; 0: it cannot be spelled, and is not used."""

    @classmethod
    def of(cls, corpus: Corpus, spec: MelSpec) -> Mels:
        mels = [log_mel(corpus.clip(row)[None], spec)[0].half() for row in range(len(corpus))]
        ends = torch.tensor([len(mel) for mel in mels]).cumsum(0).tolist()
        targets = [_encode_or_nothing(text) for text in corpus.texts]
        classes = nn.utils.rnn.pad_sequence(targets, batch_first=True).to(corpus.samples.device)
        spans = [(end - len(mel), len(mel)) for mel, end in zip(mels, ends, strict=True)]
        return cls(torch.cat(mels), spans, classes, [len(target) for target in targets])


def _encode_or_nothing(text: str) -> Tensor:
    try:
        return encode(text)
    except ValueError as error:
        print(f"skipped: {error}", flush=True)
        return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class Batch:
    """What is decided on the host: which clips, how fast, moved by how many bands. B items."""

    rows: list[int]
    rates: list[float]
    shifts: list[int]
    """Index into `BAND_SHIFTS`."""
    lengths: list[int]
    """Frames after the change of tempo."""


def batches(mels: Mels, rows: list[int], size: int, rng: random.Random) -> Iterator[Batch]:
    """Endless; clips of like length share a batch (sorted in pools of 16 batches)."""
    rows = [row for row in rows if mels.characters[row]]
    pool: list[int] = []
    while True:
        while len(pool) < 16 * size:
            pool += rng.sample(rows, len(rows))
        taken = sorted(pool[: 16 * size], key=lambda row: mels.spans[row][1])
        pool = pool[16 * size :]
        groups = [taken[start : start + size] for start in range(0, len(taken), size)]
        for group in rng.sample(groups, len(groups)):
            rates = [rng.uniform(0.85, 1.2) for _ in group]
            shifts = [rng.randrange(len(BAND_SHIFTS)) * (rng.random() < 0.6) for _ in group]
            lengths = [int((mels.spans[row][1] - 1) / rate) + 1 for row, rate in zip(group, rates, strict=True)]
            yield Batch(group, rates, shifts, lengths)


class Augment:
    """A batch of mels as the recognizer shall bear them; random on the device, no host synchronisation."""

    def __init__(self, mels: Mels, generator: torch.Generator) -> None:
        self.mels = mels
        self.generator = generator
        self.device = mels.frames.device
        bands = mels.frames.shape[1]
        source = torch.arange(bands)
        moved = [(source - shift).clamp(0, bands - 1) for shift in BAND_SHIFTS]
        self.sources = torch.stack(moved).to(self.device)
        self.tilt = torch.linspace(-0.5, 0.5, bands, device=self.device)

    def __call__(self, start: Tensor, rate: Tensor, shift: Tensor, lengths: Tensor, frames: int) -> Tensor:
        """Float32 [B, frames, M] of clips that begin at `start`: all arguments [B], on the device."""
        mel = self._at_rate(start, rate, lengths, frames)
        mel = mel.gather(2, self.sources[shift][:, None].expand_as(mel))
        mel = mel + self._uniform(-1.5, 1.0, len(mel)) + self._uniform(-2, 2, len(mel)) * self.tilt
        mel = self._blurred(mel, self._uniform(-1, 1, len(mel)).clamp(min=0))
        noise = torch.randn(mel.shape, generator=self.generator, device=self.device)
        mel = mel + noise * self._uniform(-0.4, 0.4, len(mel)).clamp(min=0)
        mel = mel.clamp(min=SILENCE)
        hidden = (
            self._spans(mel.shape[1], 3, 15, len(mel))[..., None] | self._spans(mel.shape[2], 2, 15, len(mel))[:, None]
        )
        return mel.masked_fill(hidden, -6.0)

    def _at_rate(self, start: Tensor, rate: Tensor, lengths: Tensor, frames: int) -> Tensor:
        """Frame t is the clip's frame t * rate, interpolated; beyond the end, the last frame again."""
        last = (lengths - 1)[:, None]
        place = torch.minimum(torch.arange(frames, device=self.device), last) * rate[:, None]
        left = place.long()
        table = self.mels.frames
        first = table[start[:, None] + left].float()
        second = table[(start[:, None] + left + 1).clamp(max=len(table) - 1)].float()
        return first.lerp(second, (place - left)[..., None])

    def _blurred(self, mel: Tensor, share: Tensor) -> Tensor:
        """Part `share` [B, 1, 1] of a mel smoothed over 3 frames and 3 bands."""
        smooth = F.avg_pool2d(mel[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
        return mel.lerp(smooth, share)

    def _spans(self, size: int, count: int, widest: int, batch: int) -> Tensor:
        """Bool [batch, size]: `count` random spans of up to `widest` places."""
        begin = torch.randint(size, (batch, count, 1), generator=self.generator, device=self.device)
        width = torch.randint(widest + 1, (batch, count, 1), generator=self.generator, device=self.device)
        place = torch.arange(size, device=self.device)
        return ((place >= begin) & (place < begin + width)).any(1)

    def _uniform(self, low: float, high: float, batch: int) -> Tensor:
        unit = torch.rand(batch, 1, 1, generator=self.generator, device=self.device)
        return low + (high - low) * unit


def voice_loss(embedding: Tensor, prototypes: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """Cross-entropy of 16 (cos - margin at the label), scalar (CosFace)."""
    cosines = embedding @ F.normalize(prototypes, dim=-1).T
    return F.cross_entropy(16 * (cosines - margin * F.one_hot(labels, len(prototypes))), labels)


class Trainer:
    """One update from a batch."""

    def __init__(self, recognizer: Recognizer, corpus: Corpus, args: argparse.Namespace) -> None:
        self.device = corpus.samples.device
        self.recognizer = recognizer
        self.mels = Mels.of(corpus, recognizer.mel_spec)
        self.augment = Augment(self.mels, torch.Generator(self.device).manual_seed(args.seed))
        self.voices = [corpus.voice_names.index(voice) for voice in corpus.voices]
        classes = len(corpus.voice_names) * len(BAND_SHIFTS)
        self.prototypes = nn.Parameter(torch.randn(classes, VOICE_DIM, device=self.device))
        self.voice_weight = args.voice_weight
        self.parameters = [*recognizer.parameters(), self.prototypes]
        self.optimizer = adamw(self.parameters, args.lr, (0.9, 0.98), weight_decay=0.01)

    def step(self, batch: Batch) -> Tensor:
        """[CTC per character, voice loss], on the device."""
        starts = [self.mels.spans[row][0] for row in batch.rows]
        voices = [
            self.voices[row] * len(BAND_SHIFTS) + shift for row, shift in zip(batch.rows, batch.shifts, strict=True)
        ]
        integers = torch.tensor([batch.rows, starts, batch.shifts, batch.lengths, voices])
        rows, start, shift, lengths, voice = self._send(integers)
        rate = self._send(torch.tensor(batch.rates))
        frames = -(-max(batch.lengths) // FRAMES_STEP) * FRAMES_STEP
        mel = self.augment(start, rate, shift, lengths, frames)
        log_probs, embedding, _ = self.recognizer.listen(mel, lengths)
        characters = torch.tensor([self.mels.characters[row] for row in batch.rows])
        heard = (torch.tensor(batch.lengths) + SUBSAMPLING - 1) // SUBSAMPLING
        nll = ctc_nll(log_probs, heard, self.mels.classes[rows], characters).sum() / characters.sum()
        who = voice_loss(embedding, self.prototypes, voice)
        self.optimizer.zero_grad(set_to_none=True)
        (nll + self.voice_weight * who).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return torch.stack([nll, who]).detach()

    def _send(self, values: Tensor) -> Tensor:
        """To the device without waiting for it."""
        if self.device.type != "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)


@torch.no_grad()
def evaluate(recognizer: Recognizer, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Held-out error rates for each voice, of the mel as it is and of a blurred, noisy one; cosines of voices."""
    generator = torch.Generator(corpus.samples.device).manual_seed(0)
    rows = [row for row in corpus.rows(held_out=True, slips=False) if len(_encode_or_nothing(corpus.texts[row]))]
    report: dict[str, dict[str, float]] = {}
    embeddings, speakers = [], []
    for voice in corpus.voice_names:
        said, heard, heard_damaged = [], [], []
        for row in (row for row in rows if corpus.voices[row] == voice):
            mel = log_mel(corpus.clip(row)[None], recognizer.mel_spec)
            length = torch.tensor([mel.shape[1]], device=mel.device)
            smooth = F.avg_pool2d(mel, 3, stride=1, padding=1, count_include_pad=False)
            noise = torch.randn(mel.shape, generator=generator, device=mel.device)
            said.append(normalize_text(corpus.texts[row]))
            heard += recognizer.transcribe(mel, length)
            heard_damaged += recognizer.transcribe(smooth + 0.2 * noise, length)
            embeddings.append(recognizer.voice_embedding(mel, length))
            speakers.append(voice)
        if not said:
            continue
        rates = {
            "cer": jiwer.cer(said, heard),
            "wer": jiwer.wer(said, heard),
            "cer_damaged": jiwer.cer(said, heard_damaged),
        }
        report[voice] = {name: round(float(rate), 4) for name, rate in rates.items()}
        print(f"held-out {voice} ({len(said)} clips): {report[voice]}; heard: {heard[0]!r}", flush=True)
    if len(embeddings) > 1:
        report["voice_cosines"] = voice_cosines(torch.cat(embeddings), speakers)
        print(f"held-out voices: {report['voice_cosines']}", flush=True)
    return report


def voice_cosines(embeddings: Tensor, speakers: list[str]) -> dict[str, float]:
    """Mean cosine over pairs of clips of one voice, and of two voices."""
    names = sorted(set(speakers))
    labels = torch.tensor([names.index(speaker) for speaker in speakers], device=embeddings.device)
    same = labels[:, None] == labels
    cosines = embeddings @ embeddings.T
    pairs = ~torch.eye(len(labels), dtype=torch.bool, device=embeddings.device)
    return {
        "same_voice": round(cosines[same & pairs].mean().item(), 3),
        "two_voices": round(cosines[~same].mean().item(), 3),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="corpus folder")
    parser.add_argument("--out", type=Path, required=True, help="where recognizer.json and .safetensors go")
    parser.add_argument("--minutes", type=float, default=3.0, help="wall-clock budget, reading the corpus included")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="clips an update")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--voice_weight", type=float, default=0.1)
    parser.add_argument("--dim", type=int, default=224)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--max_duration_s", type=float, default=8.0, help="longer clips are left out")
    parser.add_argument("--max_steps", type=int, help="for a smoke test")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    clock = Clock(args.minutes)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)  # for the initial weights and dropout; a recipe owns its process
    corpus = load_corpus(args.data, device)
    print(f"{len(corpus)} clips, {corpus.duration_h:.2f} h, {clock.elapsed_s:.1f} s", flush=True)
    sizes = {"dim": args.dim, "hidden_dim": 5 * args.dim // 2, "num_layers": args.num_layers}
    sizes["voice_layer"] = (args.num_layers + 1) // 2
    spec = MelSpec(sample_rate_hz=corpus.sample_rate_hz)
    recognizer = load_recognizer(args.resume) if args.resume else Recognizer(spec, Recognizer.Config(**sizes))
    recognizer.train().requires_grad_(True).to(device)
    trainer = Trainer(recognizer, corpus, args)
    average = Average(recognizer)
    rows = corpus.rows(held_out=False, max_duration_s=args.max_duration_s, slips=False)
    print(f"{len(rows)} clips to train on, mels ready at {clock.elapsed_s:.1f} s", flush=True)

    def export(**card: object) -> None:
        training = {"minutes": args.minutes, "seed": args.seed, "steps": average.updates}
        save_recognizer(recognizer, args.out, training=training, **card)

    begin_s = logged_s = saved_s = clock.elapsed_s
    for batch in batches(trainer.mels, rows, args.batch, random.Random(args.seed)):
        if (fraction := clock.fraction) >= 1 or average.updates == args.max_steps:
            break
        set_lr(trainer.optimizer, args.lr * cosine(fraction, warmup=0.05))
        losses = trainer.step(batch)
        average.update()
        if average.updates % 50 == 0 and clock.elapsed_s - logged_s > 10:
            values = " ".join(f"{value:.3f}" for value in losses.tolist())  # waits for the device
            logged_s = clock.elapsed_s
            speed = average.updates / (logged_s - begin_s)
            print(f"{logged_s:.0f} s, step {average.updates} ({speed:.1f}/s): ctc, voice {values}", flush=True)
        if clock.elapsed_s - saved_s > 60:
            average.swap()
            export()
            average.swap()
            saved_s = clock.elapsed_s
    average.swap()
    export()
    torch.set_float32_matmul_precision("highest")
    export(held_out=evaluate(recognizer.eval(), corpus))
    print(f"{average.updates} steps, {clock.elapsed_s:.0f} s in all, in {args.out}")


if __name__ == "__main__":
    main()
