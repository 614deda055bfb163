"""How many mel frames speech takes: what a row asks for, and the rules where it asks for nothing.

`flow.policy.with_durations` is the place that asks, once a rollout; policies answer with what is here.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf_mel.speech.f5_text import f5_reference_text
from rlhf_mel.speech.token_cache import CachedTokenizer
from rlhf_mel.types import Prompts

DRAWN_FRAMES = 16
"""Drawn total durations are multiples of it (0.17 s), so that takes of one length can be solved together."""


def total_frames(
    prompts: Prompts, reference_frames: Int[Tensor, " b"], tokenizer: CachedTokenizer
) -> Int[Tensor, " b"]:
    """Frames of reference and speech: those settled, else those that rows ask for, else by text."""
    if prompts.durations_frames is not None:
        return prompts.durations_frames
    if prompts.generated_frames is not None:
        return reference_frames + prompts.generated_frames
    return frames_by_text(prompts, reference_frames, tokenizer)


def frames_by_text(
    prompts: Prompts, reference_frames: Int[Tensor, " b"], tokenizer: CachedTokenizer
) -> Int[Tensor, " b"]:
    """Reference frames (1 + spoken length of text / that of the transcript), at least one more than the reference.

    A drawn length is rounded up to a total of whole DRAWN_FRAMES.
    """
    timed = timed_tokenizers(prompts, tokenizer)
    spoken = [one.spoken_length(text) for one, text in zip(timed, prompts.texts, strict=True)]
    reference_spoken = [tokenizer.spoken_length(text) for text in prompts.reference_texts]
    rows = zip(reference_frames.tolist(), spoken, reference_spoken, strict=True)
    totals = [frames + max(1, int(frames * length / reference)) for frames, length, reference in rows]
    if prompts.timing_seeds is not None:
        totals = [-(-total // DRAWN_FRAMES) * DRAWN_FRAMES for total in totals]
    return torch.tensor(totals, device=reference_frames.device)


def timed_tokenizers(prompts: Prompts, tokenizer: CachedTokenizer) -> list[CachedTokenizer]:
    """The tokenizer with the timing that was drawn for each prompt, if one was."""
    if prompts.timing_seeds is None:
        return [tokenizer] * len(prompts)
    return [tokenizer.drawn(seed) for seed in prompts.timing_seeds.tolist()]


def f5_total_frames(reference_samples: int, hop_length: int, reference_text: str, text: str) -> int:
    """Frames of reference and speech by f5-tts's inference: as many bytes a frame as the reference.

    R + int(R / bytes of the reference's text * bytes of the text / speed), R = samples // hop; speed is 1, and 0.3
    below 10 bytes.
    """
    reference_frames = reference_samples // hop_length
    text_bytes, reference_bytes = (len(side.encode("utf-8")) for side in (text, f5_reference_text(reference_text)))
    speed = 0.3 if text_bytes < 10 else 1.0
    return reference_frames + int(reference_frames / reference_bytes * text_bytes / speed)


def clamped_frames(
    duration: int | Int[Tensor, " ..."], ids: Int[Tensor, "b t"], lens: Int[Tensor, " b"], max_duration: int
) -> list[int]:
    """What f5-tts's CFM.sample makes of its `duration`: at least one more than the reference `lens` or the text has."""
    wanted = torch.as_tensor(duration, device=ids.device).expand(len(ids))
    least = torch.maximum((ids != -1).sum(dim=-1), lens) + 1
    fitted: list[int] = torch.maximum(least, wanted).clamp(max=max_duration).tolist()
    return fitted
