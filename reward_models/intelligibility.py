"""How well the words can be made out: the bundled recognizer's log-likelihood of the text, per character.

    score = log p(text | mel) / characters <= 0,    p by CTC, the sum over all alignments (see speech/recognizer.py)

0 is certain; at -0.1 a character has a probability of 0.9. Below it is not bounded, and not clipped: where clipped it
would have no gradient, and the worst speech would not be mended.

It hears the mel, as `cer` of the evaluation does, and not the vocoder's sound: no vocoder stands in the gradient's way,
and the reward and what reports on it agree. What only a mel can say, and no sound, it does not notice. Nor is the
recognizer's `cer` a judge that was not trained on, beside this reward: a listener to the sound is, such as Whisper.

A text that needs more frames than there are has no likelihood: its score is -inf, so its row has no reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from rlhf_mel.speech.recognizer import load_recognizer
from rlhf_mel.types import Audio, Prompts


class Intelligibility(nn.Module):
    """The recognizer as a frozen reward model."""

    name = "intelligibility"
    differentiable = True
    domain = "mel"
    sample_rate_hz: int | None = None
    needs = frozenset({"text"})
    range = (-math.inf, 0.0)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the reward `intelligibility`."""

        recognizer: str | Path = "tiny"
        """Who listens: 'tiny' (bundled), or a folder that recipes/train_recognizer.py wrote; of the policy's mels."""

        def __post_init__(self) -> None:
            if not isinstance(self.recognizer, str | Path):
                raise ValueError(
                    f"recognizer of reward 'intelligibility': expected 'tiny' or a folder, got {self.recognizer!r}; "
                    "name one"
                )
            if str(self.recognizer) != "tiny" and not Path(self.recognizer).is_dir():
                raise ValueError(
                    "recognizer of reward 'intelligibility': expected 'tiny' or a folder with recognizer.json, got "
                    f"{str(self.recognizer)!r}; train one with recipes/train_recognizer.py"
                )

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or self.Config()
        self.recognizer = load_recognizer(self.config.recognizer)

    def train(self, mode: bool = True) -> Intelligibility:
        """A judge does not learn: always in evaluation mode."""
        return super().train(False)

    def score(self, audio: Audio, prompts: Prompts) -> Float[Tensor, " b"]:
        """Log-likelihood of each text, in nats a character: at most 0, -inf where it cannot be said in the time.

        Raises:
            ValueError: the recognizer is of other mels, or a text is not of letters (see `normalize_text`).
        """
        heard, given = self.recognizer.mel_spec.n_mels, audio.mel.shape[-1]
        if given != heard:
            raise ValueError(
                f"reward 'intelligibility': expected mels of {heard} channels, got {given}; name a recognizer of the "
                "policy's mels"
            )
        return -self.recognizer.ctc_loss(audio.mel, audio.lengths_frames, prompts.texts)


reward_model = Intelligibility
