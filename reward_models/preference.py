"""What people prefer, learnt from their choices: a Bradley-Terry score of the mel, or of a Whisper encoder's features.

    P(one is preferred to the other) = sigma(score of the one - score of the other)

in nats, without a zero or an end: only differences between clips mean something. recipes/reward_model.py trains one
from a preference data set, and the folder it writes is a reward by its path, `--reward_models runs/my_reward`;
speech/preference_model.py has the network, and says why a louder copy scores the same.

An ensemble's score is mean - k * deviation over its members (`uncertainty_penalty` k): where the members disagree,
usually far from the clips that people heard, the score falls (Coste et al., "Reward model ensembles help mitigate
overoptimization", arXiv 2310.02743, penalise the variance in this way).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_mel.speech.audio import log_mel, samples_to_frames
from rlhf_mel.speech.preference_model import load_preference_model
from rlhf_mel.speech.whisper_features import SAMPLE_RATE_HZ
from rlhf_mel.types import Audio, Prompts


class Preference(nn.Module):
    """A trained preference model as a frozen reward."""

    name: str = "preference"
    differentiable = True
    domain: Literal["waveform", "mel"] = "mel"
    sample_rate_hz: int | None = None
    needs: frozenset[str] = frozenset()
    range = (-math.inf, math.inf)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the reward `preference`."""

        folder: str | Path
        """What recipes/reward_model.py wrote; given by --reward_models itself where that is a path."""
        uncertainty_penalty: float = 0.0
        """k of mean - k * deviation over an ensemble's members; 0: their mean."""
        hears: str = "mel"
        """Of a model on the mel: 'mel', the policy's own, or 'waveform', the mel of what the vocoder made of it."""
        name: str = "preference"
        """How metrics call it; two in one run need two names."""

        def __post_init__(self) -> None:
            if not isinstance(self.folder, str | Path) or not Path(self.folder).is_dir():
                raise ValueError(
                    f"folder of reward 'preference': expected a folder with config.json, got {str(self.folder)!r}; "
                    "train one with recipes/reward_model.py"
                )
            k: Any = self.uncertainty_penalty
            if isinstance(k, bool) or not isinstance(k, int | float) or not 0 <= k < math.inf:
                raise ValueError(
                    f"uncertainty_penalty of reward 'preference': expected a number of at least 0, got {k!r}"
                )
            if self.hears not in ("mel", "waveform"):
                raise ValueError(f"hears of reward 'preference': expected 'mel' or 'waveform', got {self.hears!r}")
            if not isinstance(self.name, str) or not self.name.strip():
                raise ValueError(f"name of reward 'preference': expected a name, got {self.name!r}")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.network = load_preference_model(config.folder)
        self.name = config.name
        members = self.network.config.num_members
        if config.uncertainty_penalty > 0 and members < 2:
            raise ValueError(
                f"uncertainty_penalty of reward 'preference': expected an ensemble, got one member in {config.folder}; "
                "train one with --num_members 3, or remove the option"
            )
        on_mel = self.network.config.body == "mel"
        self.domain = "mel" if on_mel and config.hears == "mel" else "waveform"
        if self.domain == "waveform":
            self.sample_rate_hz = self.network.mel_spec.sample_rate_hz if on_mel else SAMPLE_RATE_HZ

    def train(self, mode: bool = True) -> Preference:
        """A judge does not learn: always in evaluation mode."""
        return super().train(False)

    def score(self, audio: Audio, prompts: Prompts) -> Float[Tensor, " b"]:
        """Mean score of the members, less their deviation times `uncertainty_penalty`.

        Raises:
            ValueError: mels of another kind than the model was trained on.
        """
        scores = self.scores(audio)
        mean = scores.mean(1)
        if self.config.uncertainty_penalty == 0:
            return mean
        # Members that agree exactly have a deviation without a gradient: a square root at 0.
        return mean - self.config.uncertainty_penalty * (scores.var(1) + 1e-12).sqrt()

    def scores(self, audio: Audio) -> Float[Tensor, "b members"]:
        """The score of each member; their deviation is the uncertainty."""
        if self.domain == "waveform" and self.network.config.body == "mel":
            mel, lengths_frames = self._mels(audio)
            audio = replace(audio, mel=mel, lengths_frames=lengths_frames)
        scores: Tensor = self.network(audio)
        return scores

    def _mels(self, audio: Audio) -> tuple[Float[Tensor, "b n m"], Int[Tensor, " b"]]:
        """Mels of the waveforms: each cut before, as padding would reach its last frames."""
        rows = zip(audio.waveform, audio.lengths_samples.tolist(), strict=True)
        mels = [log_mel(row[None, :length], self.network.mel_spec)[0] for row, length in rows]
        lengths = samples_to_frames(audio.lengths_samples, self.network.mel_spec)
        return nn.utils.rnn.pad_sequence(mels, batch_first=True), lengths.to(torch.long)


reward_model = Preference
