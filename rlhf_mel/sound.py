"""From mel to sound: what the policy generated, as a reward model hears it."""

from __future__ import annotations

from rlhf_mel.audio import frames_to_samples, lengths_to_mask
from rlhf_mel.types import Audio, Rollout
from rlhf_mel.vocoders import Vocoder


def sound(vocoder: Vocoder, rollout: Rollout) -> Audio:
    """The rollout's waveform with its mel; gradients flow where the vocoder has them.

    An item of T frames has (T - 1) * hop samples (mel kind `vocos`, see audio.frames_to_samples), zero beyond them.

    Raises:
        ValueError: the vocoder's waveform is too short for the mel.
    """
    waveform = vocoder(rollout.mel, rollout.lengths_frames)
    lengths_samples = frames_to_samples(rollout.lengths_frames, vocoder.mel_spec)
    needed = int(lengths_samples.max())
    if waveform.shape[:1] != rollout.mel.shape[:1] or waveform.shape[1] < needed:
        raise ValueError(
            f"{type(vocoder).__name__}: expected a waveform [{len(rollout.mel)}, {needed} samples] for "
            f"{rollout.mel.shape[1]} frames, got {tuple(waveform.shape)}"
        )
    waveform = waveform[:, :needed]
    return Audio(
        waveform=waveform.where(lengths_to_mask(lengths_samples, needed), 0.0),
        lengths_samples=lengths_samples,
        sample_rate_hz=vocoder.sample_rate_hz,
        mel=rollout.mel,
        lengths_frames=rollout.lengths_frames,
    )
