"""What CFM is given, as what it computes with: sound as mels, text as ids, prompts checked and timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_mel.speech.audio import MelSpec, log_mel
from rlhf_mel.speech.durations import timed_tokenizers
from rlhf_mel.speech.text import Tokenizer, tokens_to_ids
from rlhf_mel.speech.token_cache import CachedTokenizer
from rlhf_mel.types import Prompts

Text = Tensor | Sequence[str] | Sequence[Sequence[str]]
"""Ids [b, t] padded with -1, b strings, or b lists of tokens."""


def as_mel(sound: Tensor, mel_spec: Any, channels: int) -> Float[Tensor, "b n m"]:
    """Mel [b, n, m] as it is, waveform [b, s] as its log mel.

    Args:
        mel_spec: a MelSpec, or a module from waveform to log mel [b, m, n].

    Raises:
        ValueError: another shape.
    """
    if sound.ndim == 3 and sound.shape[-1] == channels:
        return sound
    if sound.ndim != 2:
        raise ValueError(
            f"expected mel [batch, frames, {channels}] or waveform [batch, samples], got {list(sound.shape)}"
        )
    if isinstance(mel_spec, MelSpec):
        return log_mel(sound, mel_spec)
    channels_first: Tensor = mel_spec(sound)
    return channels_first.transpose(1, 2)


def as_ids(
    text: Text, batch: int, frames: int | Tensor, vocab: Mapping[str, int] | None, tokenizer: Tokenizer | None
) -> Int[Tensor, "b t"]:
    """Ids padded with -1; without a vocabulary those of UTF-8 bytes, as in f5-tts.

    Args:
        frames: of all items, or [b] of each; a tokenizer whose tokens stand for stretches of time asks for them.

    Raises:
        ValueError: not `batch` texts.
    """
    if len(text) != batch:
        raise ValueError(f"text: expected {batch} items, one for each sound, got {len(text)}")
    if isinstance(text, Tensor):
        return text
    if vocab is None:
        rows = [torch.tensor(list("".join(item).encode("utf-8")), dtype=torch.long) for item in text]
        return pad_sequence(rows, batch_first=True, padding_value=-1)
    if tokenizer is not None and all(isinstance(item, str) for item in text):
        counts = torch.as_tensor(frames).expand(batch).tolist()
        return tokens_to_ids([tokenizer(str(item), count) for item, count in zip(text, counts, strict=True)], vocab)
    return tokens_to_ids(text, vocab, strict=False)  # f5-tts: what is unknown becomes id 0


def prompt_ids(
    prompts: Prompts,
    reference_frames: Int[Tensor, " b"],
    total_frames: Int[Tensor, " b"],
    vocab: Mapping[str, int],
    tokenizer: CachedTokenizer,
) -> Int[Tensor, "b t"]:
    """Ids padded with -1 of reference text and text, one after the other, in `reference_frames` of `total_frames`."""
    texts = zip(prompts.reference_texts, prompts.texts, strict=True)
    frames = zip(reference_frames.tolist(), total_frames.tolist(), strict=True)
    tokens = [
        timed.prompt(reference_text.strip(), text.strip(), *counts)
        for timed, (reference_text, text), counts in zip(
            timed_tokenizers(prompts, tokenizer), texts, frames, strict=True
        )
    ]
    return tokens_to_ids(tokens, vocab)


def reference_mels(prompts: Prompts, mel_spec: MelSpec) -> list[Float[Tensor, "n m"]]:
    """Log mel of each clip at its own length: padding would change the last frames."""
    clips = zip(prompts.reference_audio, prompts.reference_lengths_samples.tolist(), strict=True)
    return [log_mel(clip[None, :length], mel_spec)[0] for clip, length in clips]


def check_prompts(prompts: Prompts, mel_spec: MelSpec, tokenizer: Tokenizer) -> None:
    """Refuse clips of another rate or without a voice, and texts without words.

    Raises:
        ValueError: with the rows it is about.
    """
    if prompts.sample_rate_hz != mel_spec.sample_rate_hz:
        raise ValueError(
            f"reference_audio: expected {mel_spec.sample_rate_hz} Hz, got"
            f" {prompts.sample_rate_hz} Hz; resample it with rlhf_mel.speech.audio.resample"
        )
    lengths = prompts.reference_lengths_samples.tolist()
    if min(lengths) < mel_spec.n_fft or max(lengths) > prompts.reference_audio.shape[1]:
        raise ValueError(
            f"reference_lengths_samples: expected {mel_spec.n_fft} (a clip that has a voice) to"
            f" {prompts.reference_audio.shape[1]} (the audio's width), got {lengths}"
        )
    for field in ("texts", "reference_texts"):
        empty = [row for row, text in enumerate(getattr(prompts, field)) if not tokenizer(text.strip())]
        if empty:
            raise ValueError(f"{field}: expected words, got nothing to say in rows {empty}; remove those rows")
