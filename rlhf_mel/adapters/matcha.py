"""Matcha-TTS as a policy: another package's flow behind the six methods of a Policy.

    mu = encoder(text), each column held for its predicted duration;  x_0 ~ temperature N(0, 1)
    dx/dt = decoder.estimator(x, mask, mu, t, speaker);               log mel = x_1 std + mean

Mehta et al., "Matcha-TTS: A fast TTS architecture with conditional flow matching" (2023, arXiv:2309.03199). Unlike in
F5-TTS, channels come before frames, text decides the duration, there is no reference clip and no classifier-free
guidance (`cfg_strength` is accepted and changes nothing), mels are normalised by the data's mean and deviation, and
frames are padded to a multiple of four for the U-Net. Matcha's own `synthesise` and `decoder.forward` run under
inference_mode; the encoder and the estimator are called here, which do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf_mel.flow import ode
from rlhf_mel.flow.noise import Generators, item_generators, item_noise
from rlhf_mel.flow.policy import evaluating
from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.types import Prompts

MATCHA_MEL = MelSpec(sample_rate_hz=22_050, n_mels=80, kind="bigvgan", f_max_hz=8000.0)
"""The mels of the published Matcha-TTS checkpoints, and of the HiFi-GANs beside them."""


FRAME_MULTIPLE = 4
"""The decoder halves the frame rate twice."""


ToIds = Callable[[str], Sequence[int]]
"""A text to the ids of Matcha's symbols, blanks between them included (matcha.text.text_to_sequence, intersperse)."""


class MatchaCondition(NamedTuple):
    """What the estimator needs to know of a batch; n is a multiple of four."""

    mu: Float[Tensor, "b m n"]
    """The encoder's mean of each frame, with its graph."""
    mask: Float[Tensor, "b 1 n"]
    """1 within each item's duration."""
    speakers: Float[Tensor, "b d"] | None
    generated: Bool[Tensor, "b n"]
    """The same as the mask; nothing is copied from a reference."""


class MatchaPolicy(nn.Module):
    """A `matcha.models.matcha_tts.MatchaTTS`, which is trained in place.

    Its duration predictor has no gradient of its own (durations are whole frames), but reads the encoder: where the
    encoder's weights are trained, durations move too.
    """

    tokenizer = None
    voices: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        to_ids: ToIds,
        *,
        temperature: float = 0.667,
        length_scale: float = 1.0,
        mel_spec: MelSpec = MATCHA_MEL,
    ):
        """temperature: deviation of the noise; length_scale: above 1 is slower (both: defaults of Matcha's command)."""
        super().__init__()
        self.model: Any = model
        self.to_ids = to_ids
        self.temperature, self.length_scale = temperature, length_scale
        self.mel_spec = mel_spec
        if self.model.n_feats != mel_spec.n_mels:
            raise ValueError(
                f"MatchaPolicy: expected a model of {mel_spec.n_mels} bands, as mel_spec says, got"
                f" {self.model.n_feats}; pass the mel_spec that it was trained on"
            )

    def durations(self, prompts: Prompts) -> Int[Tensor, " b"]:
        """Frames: those settled, else those that rows ask for, else what the duration predictor says, no dropout."""
        for given in (prompts.durations_frames, prompts.generated_frames):
            if given is not None:
                return given
        with torch.no_grad(), evaluating(self):
            *_, token_frames = self._encode_text(prompts)
        return token_frames.sum(dim=1).clamp(min=1).long()

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> MatchaCondition:
        """Prompts of one duration; where it is not the predictor's, every token is stretched alike.

        Raises:
            ValueError: several durations, or no column 'speaker' for a model of several voices.
        """
        durations = self.durations(prompts).to(self.model.mel_mean.device)
        if len(set(durations.tolist())) > 1:
            raise ValueError(f"encode: expected prompts of one duration, got {durations.tolist()}; call policy.rollout")
        means, speakers, token_frames = self._encode_text(prompts)
        frames = -(-int(durations[0]) // FRAME_MULTIPLE) * FRAME_MULTIPLE
        inside = lengths_to_mask(durations, frames)
        path = alignment(token_frames, durations, frames).to(means.dtype)
        mask = inside[:, None].to(means.dtype)
        return MatchaCondition(means @ path * mask, mask, speakers, inside)

    def prior(self, cond: MatchaCondition, generator: Generators = None) -> Float[Tensor, "b n m"]:
        """temperature x standard normal, also in the frames that are padding: the decoder masks them."""
        batch, channels, frames = cond.mu.shape
        generators = item_generators(generator, batch)
        weights = self.model.mel_mean  # not cond: under autocast that may be of half precision
        return self.temperature * item_noise([frames] * batch, channels, generators, weights.device, weights.dtype)

    def velocity(
        self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: MatchaCondition
    ) -> Float[Tensor, "b n m"]:
        """dx/dt at x and t (a scalar or [b]); zero in padding."""
        estimated: Tensor = self.model.decoder.estimator(x.transpose(1, 2), cond.mask, cond.mu, t, cond.speakers)
        return estimated.transpose(1, 2)

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Float[Tensor, " k"]:
        """Matcha's own grid is the uniform one, sway_sampling_coef=None."""
        weights = self.model.mel_mean
        return ode.timesteps(
            steps, sway_sampling_coef=sway_sampling_coef, use_epss=False, device=weights.device, dtype=weights.dtype
        )

    def finalize(self, x1: Float[Tensor, "b n m"], cond: MatchaCondition) -> Float[Tensor, "b n m"]:
        """Log mel, no longer normalised."""
        log_mel: Tensor = x1 * self.model.mel_std + self.model.mel_mean
        return log_mel

    def _encode_text(self, prompts: Prompts) -> tuple[Tensor, Tensor | None, Tensor]:
        """Means [B, M, N], speakers [B, D] and whole frames of each token [B, N]."""
        rows = [torch.as_tensor(list(self.to_ids(text)), dtype=torch.long) for text in prompts.texts]
        device = self.model.mel_mean.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = pad_sequence(rows, batch_first=True).to(device)
        speakers = self._speakers(prompts)
        means, log_frames, mask = self.model.encoder(ids, lengths, speakers)
        return means, speakers, ((log_frames.exp() * mask).ceil() * self.length_scale)[:, 0].detach()

    def _speakers(self, prompts: Prompts) -> Tensor | None:
        if self.model.n_spks <= 1:
            return None
        if "speaker" not in prompts.columns:
            raise ValueError(
                f"MatchaPolicy: expected a column 'speaker' (0 to {self.model.n_spks - 1}) for a model of several"
                f" voices, got columns {sorted(prompts.columns)}"
            )
        rows = torch.tensor(list(prompts.columns["speaker"]), device=self.model.mel_mean.device).long()
        speakers: Tensor = self.model.spk_emb(rows)
        return speakers


def alignment(token_frames: Float[Tensor, "b t"], durations: Int[Tensor, " b"], frames: int) -> Bool[Tensor, "b t n"]:
    """Which token each frame belongs to; the last ones end at `durations`."""
    ends = token_frames.cumsum(dim=1)
    totals = ends[:, -1:].clamp(min=1)
    as_predicted = totals.long() == durations[:, None]
    ends = torch.where(as_predicted, ends, (ends * durations[:, None] / totals).round())
    before = torch.nn.functional.pad(ends, (1, 0))[:, :-1]
    frame = torch.arange(frames, device=token_frames.device)
    return (frame >= before.unsqueeze(-1)) & (frame < ends.unsqueeze(-1))
