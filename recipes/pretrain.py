"""Pretrain the bundled policy: flow matching on pairs of utterances of one voice.

Trains a DiT of F5-TTS's class (dim 256, depth 10, 12 M parameters) on phonemes, each repeated as long as it lasts
(recipes/align.py, run first) and so laid over the frames by `text_embedding_average_upsampling`, with the objective of
F5-TTS (arXiv:2410.06885, equation 5):
    x_t = (1-t) x_0 + t x_1,   loss = |v(x_t, t | known mel, text) - (x_1 - x_0)|^2 over the unknown frames.
Each item is two utterances of one voice, laid end to end: in half of the items the second is unknown, and the first
one's durations are the tokenizer's guess, as at inference; in the others a random span of 60 to 100 % is unknown. For
classifier-free guidance the known mel is dropped in 30 % of the items and the text too in half of these.

Fast because nothing waits: mels and tokens of the whole corpus live on the card, partners are picked so that a
pair fills the batch's fixed length to within 3 frames of closing silence (no padding, no masks), and a whole update
(gather, forward, backward; clipping, AdamW) is two CUDA graphs. Between them the gradients of several cards are
averaged; each card draws pairs of its own.

Leaves out: several languages, a duration model (F5-TTS's length rule is used).
Hardware: one H100 makes 44 updates a second; the bundled policy: rlhf_mel/assets/README.md. A CPU runs it, slowly.
Number to expect: recipes/audit.py on the result.
    python recipes/align.py --data data/corpus --out rlhf_mel/assets
    torchrun --nproc_per_node 3 recipes/pretrain.py --data data/wild --out runs/pretrain --updates 40000
A run may be cut in parts: `--minutes 9` stops so long after the start, `--resume` goes on from runs/pretrain/state.pt.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from corpus_data import Average, Corpus, adamw, cosine, load_corpus, set_lr
from torch import Tensor

from rlhf_mel.f5.backbones.dit import DiT
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import save_policy
from rlhf_mel.flow.path import interpolate
from rlhf_mel.speech.audio import MelSpec, log_mel
from rlhf_mel.speech.text import TOKENS, UNIT_FRAMES, PhonemeTokenizer, load_tokenizer, spread, tokens_to_ids

ARCH = dict(
    dim=256,
    depth=10,
    heads=4,
    ff_mult=3,
    text_dim=256,
    conv_layers=4,
    dropout=0.05,
    text_mask_padding=True,
    text_embedding_average_upsampling=True,
)
LENGTHS_FRAMES = (448, 608, 800)
SPARE_FRAMES = 3
"""How much of a pair's closing silence may be cut to make it fit."""
SAME_CONDITION = 0.1
"""Share of the pairs whose second clip is drawn from those of the first one's condition; in the others from all.

At 0.4 guidance of strength 2 made nearly every take of a clean reference clean.
"""
TIMING_STD = 0.15
"""Of the logarithm by which each phoneme's share of time is off: where exactly it is heard is left to the flow."""
TIMINGS = 4
"""Different ones drawn for each clip."""
BUCKETS = ("", "room", "noise", "band", "codec", "clip")
"""A clip's is its last condition, as degrade.py has them in order; the first are those without."""


@dataclass(frozen=True)
class Utterances:
    """The training clips as the card holds them, ordered by voice, then by length."""

    mel: Tensor
    """Float32 [frames of all clips, M]."""
    tokens: Tensor
    """Long [TIMINGS, tokens of all clips]: phonemes repeated as aligned, but for timings off by TIMING_STD."""
    guessed: Tensor
    """Long [tokens of all clips]: repeated as the tokenizer guesses, each clip at its own pace."""
    spans: np.ndarray
    """Long [U, 4]: first frame, frames, first token, tokens of each clip."""
    keys: np.ndarray
    """Long [U]: (voice * len(BUCKETS) + bucket) * 10_000 + frames, ascending."""


def read_alignment(
    path: Path, tokenizer: PhonemeTokenizer, vocab: dict[str, int], rng: np.random.Generator
) -> dict[str, Tensor]:
    """Clip id to long [1 + TIMINGS, tokens]: the phonemes repeated as guessed, then as aligned, timings off."""
    aligned = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        clip = json.loads(line)
        phonemes, units = clip["phonemes"], np.array(clip["units"])
        off = np.exp(TIMING_STD * rng.standard_normal((TIMINGS, len(units))))
        layouts = [tokenizer.durations(phonemes), *(units * off).tolist()]
        spreads = [spread(layout, int(units.sum())) for layout in layouts]
        tokens = [[name for name, count in zip(phonemes, of, strict=True) for _ in range(count)] for of in spreads]
        aligned[clip["id"]] = tokens_to_ids(tokens, vocab)
    return aligned


def utterances(corpus: Corpus, rows: list[int], aligned: dict[str, Tensor]) -> Utterances:
    voices = {name: index * len(BUCKETS) for index, name in enumerate(corpus.voice_names)}
    mels = {row: log_mel(corpus.clip(row)[None], MelSpec())[0] for row in rows}
    ids = {row: aligned[corpus.ids[row]] for row in rows}
    bucket = {row: BUCKETS.index(["", *corpus.labels[row].get("conditions", {})][-1]) for row in rows}
    key = {row: (voices[corpus.voices[row]] + bucket[row]) * 10_000 + len(mels[row]) for row in rows}
    rows = sorted(rows, key=lambda row: key[row])
    frames, tokens = np.array([len(mels[row]) for row in rows]), np.array([ids[row].shape[1] for row in rows])
    flat = torch.cat([ids[row] for row in rows], dim=1).to(corpus.samples.device)
    return Utterances(
        mel=torch.cat([mels[row] for row in rows]),
        tokens=flat[1:],
        guessed=flat[0],
        spans=np.stack([np.cumsum(frames) - frames, frames, np.cumsum(tokens) - tokens, tokens], axis=1),
        keys=np.array([key[row] for row in rows]),
    )


def draw_pairs(clips: Utterances, batch: int, length_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Long [batch, 8]: spans of two clips of one voice, together `length_frames` to `+ SPARE_FRAMES` long."""
    pairs = np.empty((0, 8), dtype=np.int64)
    groups, frames = clips.keys // 10_000, clips.spans[:, 1]
    while len(pairs) < batch:
        first = rng.integers(len(groups), size=6 * batch)
        other = groups[rng.integers(len(groups), size=len(first))] % len(BUCKETS)  # as often as in the corpus
        any_condition = groups[first] // len(BUCKETS) * len(BUCKETS) + other
        group = np.where(rng.random(len(first)) < SAME_CONDITION, groups[first], any_condition)
        wanted = group * 10_000 + np.maximum(length_frames - frames[first], 1)
        low = np.searchsorted(clips.keys, wanted)
        high = np.searchsorted(clips.keys, wanted + SPARE_FRAMES + 1)
        found = (high > low) & (frames[first] < length_frames)
        second = (low + rng.random(len(low)) * (high - low)).astype(np.int64)[found]
        pairs = np.concatenate([pairs, np.concatenate([clips.spans[first[found]], clips.spans[second]], axis=1)])
    return pairs[:batch]


def lay_end_to_end(
    values: Tensor, start_a: Tensor, length_a: Tensor, start_b: Tensor, length_b: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """values[start_a:][:length_a] then values[start_b:][:length_b], [B, length, ...]; which places are filled."""
    place = torch.arange(length, device=values.device)[None]
    index = torch.where(place < length_a[:, None], start_a[:, None] + place, (start_b - length_a)[:, None] + place)
    filled = place < (length_a + length_b)[:, None]
    return values[torch.where(filled, index, 0)], filled


def unknown_frames(first_frames: Tensor, length_frames: int) -> Tensor:
    """Bool [B, T]: in even items all after the first clip, in odd ones a random span of 60 to 100 %."""
    batch, device = len(first_frames), first_frames.device
    place = torch.arange(length_frames, device=device)[None]
    span = length_frames * (0.6 + 0.4 * torch.rand(batch, 1, device=device))
    start = (length_frames - span) * torch.rand(batch, 1, device=device)
    after_first = place >= first_frames[:, None]
    random_span = (place >= start) & (place < start + span)
    return torch.where((torch.arange(batch, device=device) % 2 == 0)[:, None], after_first, random_span)


def flow_matching_loss(dit: DiT, clips: Utterances, pairs: Tensor, length_frames: int) -> Tensor:
    """The objective above for pairs [B, 8]; static shapes, no host synchronisation."""
    mel_a, frames_a, text_a, tokens_a, mel_b, frames_b, text_b, tokens_b = pairs.unbind(1)
    mel, _ = lay_end_to_end(clips.mel, mel_a, frames_a, mel_b, frames_b, length_frames)
    batch, device = len(pairs), mel.device
    timing = torch.randint(TIMINGS, (batch,), device=device) * clips.guessed.numel()
    starts = (text_a + timing, tokens_a, text_b + timing, tokens_b)
    text, spoken = lay_end_to_end(clips.tokens.flatten(), *starts, length_frames)
    guess, _ = lay_end_to_end(clips.guessed, text_a, tokens_a, text_b, tokens_b, length_frames)
    in_reference = torch.arange(length_frames, device=device) < tokens_a[:, None]
    as_at_inference = (torch.arange(batch, device=device) % 2 == 0)[:, None]  # see unknown_frames
    within = torch.arange(length_frames, device=device) < length_frames // UNIT_FRAMES  # so that each has two frames
    text = torch.where(spoken & within, torch.where(in_reference & as_at_inference, guess, text), -1)
    unknown = unknown_frames(frames_a, length_frames)
    untexted = batch * 15 // 100  # the first rows lose text and known mel, as many again the known mel alone
    lost_mel = torch.arange(batch, device=device) < 2 * untexted
    known = mel.masked_fill((unknown | lost_mel[:, None])[..., None], 0.0)
    unknown = unknown | (torch.arange(batch, device=device) < untexted)[:, None]

    uniform = torch.rand(batch, device=device)
    # three quarters logit-normal (Stable Diffusion 3, arXiv:2403.03206), one quarter uniform for the ends
    t = torch.where(uniform < 0.25, uniform * 4, torch.sigmoid(torch.randn(batch, device=device)))
    noise = torch.randn_like(mel)
    embeddings = [
        dit.embed_text(text[:untexted], length_frames, drop_text=True),
        dit.embed_text(text[untexted:], length_frames),
    ]
    v = dit.velocity(interpolate(noise, mel, t), known, torch.cat(embeddings), t)
    error = (v.float() - (mel - noise)).square().mean(-1)
    return (error * unknown).sum() / unknown.sum()


def flat_gradients(dit: DiT) -> Tensor:
    """One row of zeros that the gradients of all weights are views of."""
    weights = list(dit.parameters())
    flat = torch.zeros(sum(weight.numel() for weight in weights), device=weights[0].device)
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)
    return flat


class Update:
    """One optimizer step at one length; on CUDA captured once as two graphs and replayed."""

    def __init__(
        self, dit: DiT, clips: Utterances, optimizer, average: Average, gradients: Tensor, length: int, batch: int
    ) -> None:
        self.dit, self.clips, self.optimizer, self.average = dit, clips, optimizer, average
        self.gradients, self.length, self.batch = gradients, length, batch
        self.device = clips.mel.device
        self.pairs = torch.zeros(batch, 8, dtype=torch.long, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.skipped = torch.zeros((), dtype=torch.long, device=self.device)
        self.backward, self.apply = self._backward, self._apply

    def _backward(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = flow_matching_loss(self.dit, self.clips, self.pairs, self.length)
        self.gradients.zero_()
        loss.backward()
        self.loss.copy_(loss.detach())

    def _average_over_cards(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.gradients)
            self.gradients /= torch.distributed.get_world_size()

    def _apply(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.dit.parameters(), 1.0, foreach=True)
        self.skipped += ~norm.isfinite()
        nothing = torch.zeros_like(self.gradients)
        self.gradients.copy_(torch.where(norm.isfinite(), self.gradients, nothing))  # else one bad batch ends all
        self.optimizer.step()

    def capture(self, rng: np.random.Generator) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._load(rng)
                self._backward()
                self._average_over_cards()
                self._apply()
        torch.cuda.current_stream().wait_stream(stream)
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph, part in zip(graphs, (self._backward, self._apply), strict=True):
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread asks for its events
                part()
        self.backward, self.apply = (graph.replay for graph in graphs)

    def _load(self, rng: np.random.Generator) -> None:
        drawn = torch.from_numpy(draw_pairs(self.clips, self.batch, self.length, rng))
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()
        self.pairs.copy_(drawn, non_blocking=True)

    def __call__(self, rng: np.random.Generator) -> None:
        self._load(rng)
        self.backward()
        self._average_over_cards()
        self.apply()
        self.average.update()


def agreed(over: bool) -> bool:
    """What the first card says, on all of them."""
    if not torch.distributed.is_initialized():
        return over
    said = [over]
    torch.distributed.broadcast_object_list(said)
    return said[0]


def save(out: Path, policy: CFM, average: Average, optimizer, steps: int) -> None:
    """Weights, their average and the optimizer to state.pt; the averaged policy to policy/."""
    state = {"steps": steps, "optimizer": optimizer.state_dict()}
    state |= {"online": policy.transformer.state_dict(), "averaged": average.averaged}
    torch.save(state, out / "state.tmp")
    (out / "state.tmp").rename(out / "state.pt")
    average.swap()
    save_policy(policy, out / "policy", dtype=torch.float16)
    average.swap()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=40_000, help="the whole schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier, so long after the start")
    parser.add_argument("--frames", type=int, default=24_576, help="mel frames a batch, of each card")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    begin = time.monotonic()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if args.device.startswith("cuda"):
        torch.cuda.set_device(rank)
    if world > 1:
        torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)  # the same on every card: timings, and which length is next
    vocab = {token: index for index, token in enumerate(TOKENS)}
    corpus = load_corpus(args.data, args.device)
    tokenizer = load_tokenizer("phoneme")
    aligned = read_alignment(args.data / "alignment.jsonl", tokenizer, vocab, rng)
    clips = utterances(corpus, corpus.rows(held_out=False), aligned)
    dit = DiT(text_num_embeds=len(TOKENS), **ARCH).to(args.device).train()
    policy = CFM(dit, vocab_char_map=vocab, tokenizer=tokenizer)
    policy.voices = tuple(corpus.voice_names)
    optimizer = adamw(dit.parameters(), args.learning_rate, (0.9, 0.98), weight_decay=0.01)
    average, steps = Average(dit, 0.9995), 0
    if args.resume:
        state = torch.load(args.out / "state.pt", map_location=args.device, weights_only=True)
        dit.load_state_dict(state["online"])
        optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(average.averaged, state["averaged"])
        steps = average.updates = state["steps"]
    print(f"{corpus.duration_h:.2f} h, {len(clips.keys)} clips, {sum(p.numel() for p in dit.parameters()):,} weights")

    pairs_rng = np.random.default_rng([args.seed, rank, steps])
    torch.manual_seed(args.seed + 1000 * rank + steps)  # noise, times, dropout
    gradients = flat_gradients(dit)
    updates = [
        Update(dit, clips, optimizer, average, gradients, length, args.frames // length) for length in LENGTHS_FRAMES
    ]
    if args.device.startswith("cuda"):
        set_lr(optimizer, 0.0 if args.resume else 1e-5)
        for block in dit.transformer_blocks:
            block.compile(dynamic=False)
        for update in updates:
            update.capture(pairs_rng)
        print(f"captured after {time.monotonic() - begin:.1f} s", flush=True)

    last, logged = time.monotonic(), steps
    while steps < args.updates and not (steps % 100 == 0 and agreed(time.monotonic() - begin > 60 * args.minutes)):
        set_lr(optimizer, args.learning_rate * cosine(steps / args.updates, floor=0.005))
        updates[int(rng.integers(len(updates)))](pairs_rng)
        steps += 1
        if rank == 0 and time.monotonic() - last > 10:
            losses = " ".join(f"{update.loss.item():.4f}" for update in updates)
            rate = (steps - logged) / (time.monotonic() - last)
            skipped = sum(int(update.skipped) for update in updates)
            print(
                f"{time.monotonic() - begin:7.1f} s  step {steps}  {rate:.1f} steps/s  loss {losses}"
                f"  {skipped} without a finite gradient",
                flush=True,
            )
            last, logged = time.monotonic(), steps
    if rank == 0:
        save(args.out, policy, average, optimizer, steps)
        print(f"{steps} steps, {time.monotonic() - begin:.0f} s in this part; policy in {args.out / 'policy'}")


if __name__ == "__main__":
    main()
