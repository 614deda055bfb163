"""Listen to the bundled models as the model card reports them: corpus, corpus through mel and vocoder, policy.

For each voice: DistillMOS, DNSMOS overall, and word and character error rates of Whisper, which nothing here was
trained or chosen on. Corpus clips are of the held-out side; the policy speaks the bundled held-out prompts.

Leaves out: confidence intervals; with 12 clips a voice one word more or less is 0.008 of the word error rate.
Hardware: two CPU cores, about three seconds a clip.
    pip install faster-whisper      # and a Whisper model in CTranslate2's format, its folder named here:
    python recipes/listen.py --data data/corpus --whisper models/whisper-tiny.en --clips 12
Number to expect: rlhf_mel/assets/README.md, "Measured".
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import torch
from corpus_data import is_held_out
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_mel import load_policy, load_prompts, load_vocoder, rollout
from rlhf_mel.flow.noise import item_generator
from rlhf_mel.pipeline import vocode
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.audio import MelSpec, load_audio, log_mel, resample, samples_to_frames
from rlhf_mel.speech.measures import clips, dnsmos
from rlhf_mel.types import Audio, Prompts

WHISPER_RATE_HZ = 16_000
SPELLED = {"mr.": "mister", "mrs.": "missus"}


def letters(text: str) -> str:
    """Lower-case words; `Mr.` and `Mrs.` spelled out, as Whisper shortens what the voice says in full."""
    words = [SPELLED.get(word, word) for word in text.lower().split()]
    return " ".join(re.sub(r"[^a-z' ]", " ", " ".join(words)).split())


def load_whisper(folder: Path) -> Any:
    """A Whisper model in CTranslate2's format, on the CPU."""
    from faster_whisper import WhisperModel

    return WhisperModel(str(folder), device="cpu", compute_type="int8")


def transcript(whisper: Any, waveform: Tensor, sample_rate_hz: int) -> str:
    """What Whisper hears in a waveform [S]."""
    samples = resample(waveform[None], sample_rate_hz, WHISPER_RATE_HZ)[0].numpy()
    segments, _ = whisper.transcribe(samples, language="en", beam_size=5)
    return " ".join(segment.text for segment in segments)


class Listener:
    """MOS models and a speech recogniser over a list of clips."""

    def __init__(self, whisper: Path, sample_rate_hz: int) -> None:
        self.whisper = load_whisper(whisper)
        self.mos = Rewards(["mos"])
        self.sample_rate_hz = sample_rate_hz

    def __call__(self, waveforms: Sequence[Tensor], texts: Sequence[str]) -> dict[str, float]:
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        padded = pad_sequence(list(waveforms), batch_first=True)
        audio = Audio(padded, lengths, self.sample_rate_hz, log_mel(padded), samples_to_frames(lengths, MelSpec()))
        heard = [letters(transcript(self.whisper, waveform, self.sample_rate_hz)) or " " for waveform in waveforms]
        said = [letters(text) for text in texts]
        with torch.no_grad():
            mos = self.mos(audio, Prompts(list(texts), padded, lengths, list(texts))).total.mean().item()
        return {
            "DistillMOS": mos,
            "DNSMOS": dnsmos(audio)["dnsmos_ovrl"].mean().item(),
            "WER": float(jiwer.wer(said, heard)),
            "CER": float(jiwer.cer(said, heard)),
        }


def speak(policy: Any, vocoder: Any, prompts: Any, rows: Sequence[int], args: argparse.Namespace) -> list[Tensor]:
    batch = prompts.collate([prompts[row] for row in rows])
    spoken = rollout(
        policy,
        batch,
        steps=args.steps,
        cfg_strength=args.cfg_strength,
        grad_steps=0,
        generator=[item_generator(args.seed, row) for row in rows],
    )
    with torch.no_grad():
        return clips(vocode(vocoder, spoken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="corpus folder of build_corpus.py")
    parser.add_argument("--whisper", type=Path, required=True, help="Whisper model folder (CTranslate2)")
    parser.add_argument("--clips", type=int, default=12, help="of each voice")
    parser.add_argument("--policy", default="tiny")
    parser.add_argument("--vocoder", default="tiny")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--cfg_strength", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    vocoder, policy = load_vocoder(args.vocoder), load_policy(args.policy)
    listen = Listener(args.whisper, vocoder.sample_rate_hz)
    prompts = load_prompts("tiny", split="heldout")
    corpus = [json.loads(line) for line in (args.data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for voice in dict.fromkeys(clip["voice"] for clip in corpus):
        held_out = [clip for clip in corpus if clip["voice"] == voice and is_held_out(clip["text"])][: args.clips]
        recorded = [load_audio(args.data / clip["file"], vocoder.sample_rate_hz) for clip in held_out]
        with torch.no_grad():
            vocoded = [vocoder(log_mel(waveform[None], vocoder.mel_spec))[0] for waveform in recorded]
        rows = [row for row in range(len(prompts)) if prompts[row]["voice"] == voice][: args.clips]
        texts = [clip["text"] for clip in held_out]
        spoken = speak(policy, vocoder, prompts, rows, args)
        said = [prompts[row]["text"] for row in rows]
        for name, waveforms, of in (
            ("corpus", recorded, texts), ("mel and vocoder", vocoded, texts), ("policy", spoken, said)
        ):  # fmt: skip
            measured = "  ".join(f"{measure} {value:.3f}" for measure, value in listen(waveforms, of).items())
            print(f"{voice:4} {name:16} {len(waveforms)} clips  {measured}", flush=True)


if __name__ == "__main__":
    main()
