"""CFM: F5-TTS's conditional flow matching, with gradients through the whole of sampling.

    v(x, t) = f(x, t, mel, text) + s (f(x, t, mel, text) - f(x, t, nothing)),    s >= 0: guidance

Constructor, `sample`, `forward`, state_dict and numbers are those of f5-tts 1.1.22 (Chen et al. 2024,
arXiv:2410.06885); `sample(cache=False)` lets gradients flow, as proposed in F5-TTS pull request 1299. Here
the text embedding is computed once a solve in both modes, with its graph, and handed to the velocity as an
argument: it depends on neither x nor t, so the gradient is exact, and no module state can go stale.
Time convention: see path.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf_mel.f5.backbones._base import embed_with_and_without
from rlhf_mel.f5.condition import Condition, guided, velocity_by
from rlhf_mel.f5.masks import chance, fit_durations, kept_frames, mel_spec_from_f5, spans, uniform
from rlhf_mel.f5.speed.sampling import FastVelocity, compile_blocks
from rlhf_mel.flow import ode, recompute
from rlhf_mel.flow.noise import Generators, item_generators, item_noise
from rlhf_mel.flow.path import interpolate, velocity
from rlhf_mel.flow.policy import require_gradients, velocity_as_now
from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.modules import modules_of
from rlhf_mel.speech.audio import MelSpec, log_mel, samples_to_frames
from rlhf_mel.speech.text import Tokenizer, tokens_to_ids
from rlhf_mel.types import Prompts

Text = Tensor | Sequence[str] | Sequence[Sequence[str]]
"""Ids [B, N] padded with -1, B strings, or B lists of tokens."""


FULL_LOAD = 4096
"""Frames of a batch from which on a GPU takes as long for two halves, one after the other, as for the whole."""


class CFM(nn.Module):
    def __init__(
        self,
        transformer: nn.Module,
        sigma: float = 0.0,
        odeint_kwargs: Mapping[str, Any] | None = None,
        audio_drop_prob: float = 0.3,
        cond_drop_prob: float = 0.2,
        num_channels: int | None = None,
        mel_spec_module: MelSpec | nn.Module | None = None,
        mel_spec_kwargs: Mapping[str, Any] | None = None,
        frac_lengths_mask: tuple[float, float] = (0.7, 1.0),
        vocab_char_map: Mapping[str, int] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
    ):
        """Arguments of f5-tts, and:

        mel_spec_module: a MelSpec, or a module from waveform [B, S] to log mel [B, M, T].
        odeint_kwargs: {"method": "euler"} unless given.
        tokenizer: strings are tokenised by it, and prompts can be encoded.
        """
        super().__init__()
        if tokenizer is not None and vocab_char_map is None:
            raise ValueError("CFM: expected a vocabulary with the tokenizer, got none; pass vocab_char_map")
        self.transformer: Any = transformer
        self.dim = transformer.dim
        self.sigma = sigma
        self.odeint_kwargs = dict(odeint_kwargs or {"method": "euler"})
        self.audio_drop_prob, self.cond_drop_prob = audio_drop_prob, cond_drop_prob
        self.frac_lengths_mask = frac_lengths_mask
        self.vocab_char_map, self.tokenizer = vocab_char_map, tokenizer
        spec: Any = mel_spec_module or mel_spec_from_f5(mel_spec_kwargs or {})
        self.mel_spec = spec
        own_channels = spec.n_mels if isinstance(spec, MelSpec) else spec.n_mel_channels
        self.num_channels: int = num_channels or own_channels
        self.voices: tuple[str, ...] = ()
        """All voices that the policy can speak in, by the names in prompts; empty: it clones any."""
        self.fast: FastVelocity | None = None
        """What computes velocities without gradients in eval mode; see `speed_up`."""

    def speed_up(self, *, compiled: bool = True, cuda_graphs: bool = True) -> CFM:
        """Make a policy on a GPU fast, from now on: compiled blocks, CUDA graphs (speed/sampling.py). Returns itself.

        The first velocities of each kind are slow, while PyTorch compiles. Numbers stay, to rounding. A copy of the
        weights in the dtype of autocast and the graphs' memory are held: docs/benchmarks.md.
        """
        if compiled:
            compile_blocks(self.transformer)
        self.fast = FastVelocity(compiled=compiled, cuda_graphs=cuda_graphs)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def sample(
        self,
        cond: Tensor,
        text: Text,
        duration: int | Tensor,
        *,
        lens: Tensor | None = None,
        steps: int = 32,
        cfg_strength: float = 1.0,
        sway_sampling_coef: float | None = None,
        seed: int | None = None,
        max_duration: int = 65536,
        vocoder: Callable[[Tensor], Tensor] | None = None,
        use_epss: bool = True,
        no_ref_audio: bool = False,
        duplicate_test: bool = False,
        t_inter: float = 0.1,
        edit_mask: Tensor | None = None,
        cache: bool = True,
        generator: Generators = None,
        grad_steps: ode.GradSteps = None,
        checkpoint: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Mel [B, T, M] (or the vocoder's waveform) and the solver's states [steps + 1, B, T, M].

        cond: reference mel [B, T_ref, M] or waveform [B, S]; `lens` [B]: its frames, all unless given.
        duration: frames of reference plus generated speech; raised to fit the text.
        edit_mask: bool [B, T_ref], True where the reference is kept (speech editing).
        cache: True samples without gradients and leaves the model in eval mode, as f5-tts does. False keeps
            the graph and the caller's train/eval mode; call eval() first unless dropout is wanted.
        seed: the same noise for every item, as in f5-tts; the global generator is not touched.
        generator: distinct noise for each item; without it and without seed, the global generator.
        grad_steps, checkpoint: see ode.solve.

        A batch of unequal durations is masked as in f5-tts: not what each item gives alone (policy.rollout).
        """
        if cache:
            if any(module.training for module in modules_of(self)):  # eval() takes milliseconds
                self.eval()
        else:
            require_gradients("CFM.sample(cache=False)", remedy="pass cache=True to sample without gradients")
        with torch.set_grad_enabled(not cache):
            mel = self._as_mel(cond).to(self.dtype)
            ids = self._as_ids(text, len(mel), duration)
            lens = (torch.full((len(mel),), mel.shape[1]) if lens is None else lens).to(mel.device)
            lengths = fit_durations(duration, ids, lens, max_duration)
            reference = F.pad(mel, (0, 0, 0, max(lengths) - mel.shape[1]))
            condition = self._condition(
                torch.zeros_like(reference) if no_ref_audio else reference,
                kept_frames(lens, edit_mask, max(lengths)),
                ids,
                lengths,
                cfg_strength,
            )
            if seed is not None:  # f5-tts seeds anew before each item
                generator = [torch.Generator(self.device).manual_seed(seed) for _ in lengths]
            noise = self.prior(condition, generator)
            t_start = 0.0
            if duplicate_test:  # begin at time t_inter, with the reference said a second time
                again = F.pad(mel, (0, 0, mel.shape[1], max(lengths) - 2 * mel.shape[1]))
                noise, t_start, steps = (
                    interpolate(noise, again, t_inter),
                    t_inter,
                    int(steps * (1 - t_inter)),
                )
            t = self.timesteps(steps, sway_sampling_coef=sway_sampling_coef, use_epss=use_epss, t_start=t_start)
            states = self._solve(condition, noise, t, grad_steps, checkpoint)
            out = self.finalize(states[-1], condition)
            return (out if vocoder is None else vocoder(out.transpose(1, 2))), torch.stack(states)

    def _solve(
        self, condition: Condition, noise: Tensor, t: Tensor, grad_steps: ode.GradSteps, checkpoint: bool
    ) -> list[Tensor]:
        options = {"method": "dopri5", **self.odeint_kwargs}  # torchdiffeq's own default
        return ode.solve(
            velocity_as_now(self, condition),
            noise,
            t,
            method=options.pop("method"),
            grad_steps=grad_steps,
            checkpoint=checkpoint,
            preserve_rng_state=self.training,
            odeint_kwargs=options,
        )

    def forward(
        self,
        inp: Tensor,
        text: Text,
        *,
        lens: Tensor | None = None,
        noise_scheduler: None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Flow-matching loss on data: (scalar loss, mel shown to the backbone, predicted velocity).

        A random span of each mel `inp` [B, T, M] (or waveform [B, S]) of `lens` [B] frames is hidden; the
        loss is the squared error of the velocity there. `generator`: for span, noise, time, dropped conditions.
        """
        if noise_scheduler is not None:
            raise ValueError(f"noise_scheduler: expected None (f5-tts has none either), got {noise_scheduler!r}")
        x1 = self._as_mel(inp)
        batch, frames, _ = x1.shape
        ids = self._as_ids(text, batch, frames if lens is None else lens)
        lens = (torch.full((batch,), frames) if lens is None else lens).to(x1.device)
        mask = lengths_to_mask(lens, frames)
        draw = partial(uniform, batch, generator, x1.device)
        shortest, longest = self.frac_lengths_mask
        fractions = shortest + (longest - shortest) * draw()
        hidden = mask & spans(lens, fractions, draw(), frames)
        noise_device = x1.device if generator is None else generator.device
        x0 = torch.randn(x1.shape, generator=generator, device=noise_device, dtype=x1.dtype).to(x1.device)
        t = draw().to(x1.dtype)
        known = x1.masked_fill(hidden.unsqueeze(-1), 0.0)
        drop_both = chance(self.cond_drop_prob, generator)
        drop_audio = chance(self.audio_drop_prob, generator) or drop_both
        pred = self.transformer(
            x=interpolate(x0, x1, t),
            cond=known,
            text=ids,
            time=t,
            mask=mask,
            drop_audio_cond=drop_audio,
            drop_text=drop_both,
        )
        error = (pred - velocity(x0, x1)).square().mean(dim=-1)
        return (error * hidden).sum() / hidden.sum(), known, pred

    def durations(self, prompts: Prompts) -> Tensor:
        """Long [B]: `durations_frames`, else reference frames (1 + spoken length of text / transcript).

        All that can be wrong with prompts is found here, before any is solved.
        """
        self._check_prompts(prompts)
        references = samples_to_frames(prompts.reference_lengths_samples, self.mel_spec)
        totals = prompts.durations_frames
        if totals is None:
            lengths = [
                list(map(self._tokenize.spoken_length, side)) for side in (prompts.texts, prompts.reference_texts)
            ]
            rows = zip(references.tolist(), *lengths, strict=True)
            ruled = [frames + max(1, int(frames * length / said)) for frames, length, said in rows]
            totals = torch.tensor(ruled, device=references.device)
        ids = self._prompt_ids(prompts, references, torch.maximum(totals, references + 1))
        least = torch.maximum(references + 1, (ids != -1).sum(dim=1).to(references.device))
        if bool((totals < least).any()):
            raise ValueError(
                f"durations_frames: expected at least {least.tolist()}, more than the reference has and a frame for"
                f" each token of both texts, got {totals.tolist()}; shorten the texts or raise durations_frames"
            )
        return totals

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Condition:
        """Prompts of one total duration, ready for `velocity`; policy.rollout groups prompts of several."""
        durations = self.durations(prompts)
        lengths = durations.tolist()
        if len(set(lengths)) > 1:
            raise ValueError(
                f"encode: expected prompts of one total duration, got {lengths} frames: padding would change"
                " what each item gives alone; call policy.rollout, which groups them"
            )
        mels = self._reference_mels(prompts)
        reference = pad_sequence(mels, batch_first=True)
        reference = F.pad(reference, (0, 0, 0, lengths[0] - reference.shape[1]))
        references = torch.tensor([len(mel) for mel in mels], device=self.device)
        ids = self._prompt_ids(prompts, references, durations).to(self.device)
        return self._condition(reference, lengths_to_mask(references, lengths[0]), ids, lengths, cfg_strength)

    def prior(self, cond: Condition, generator: Generators = None) -> Tensor:
        """Standard normal noise [B, T, M], zero beyond each item's duration."""
        generators = item_generators(generator, len(cond.lengths_frames))
        return item_noise(cond.lengths_frames, self.num_channels, generators, self.device, self.dtype)

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Guided velocity [B, T, M] at x [B, T, M] and t (a scalar or [B]); branches in one batch."""
        if x.shape != cond.reference.shape:
            raise ValueError(f"x: expected {list(cond.reference.shape)} as encoded, got {list(x.shape)}")
        if self.fast is not None and not torch.is_grad_enabled() and not self.training:
            return guided(partial(self.fast, self.transformer), x, t, cond)
        return guided(self.transformer.velocity, x, t, cond)

    def velocity_terms(self, cond: Condition) -> list[tuple[Condition, float]]:
        """`cond` as [(part, factor)], the guided velocity being the sum of factor * velocity(part).

        Its branches apart, where one fills a GPU by itself: half the memory of a gradient, for no more time.
        """
        if not cond.guidance or cond.known.shape[:2].numel() < 2 * FULL_LOAD:
            return [(cond, 1.0)]
        halves = zip(cond.known.chunk(2), cond.text.chunk(2), strict=True)
        mask = None if cond.mask is None else cond.mask.chunk(2)[0]
        prompted, free = (cond._replace(known=known, text=text, mask=mask, guidance=0.0) for known, text in halves)
        return [(prompted, 1.0 + cond.guidance), (free, -cond.guidance)]

    @property
    def fast_gradients(self) -> bool:
        """Whether gradients come from CUDA graphs; see `speed_up`."""
        return self.fast is not None and self.fast.has_gradients

    def differentiate(
        self, run: recompute.Rerun, leaves: Sequence[Any], weights: recompute.Weights, cotangent: Tensor
    ) -> Sequence[Tensor | None]:
        """`recompute.differentiate` of this policy's velocity in eval mode; see `speed_up`."""
        if self.fast is None:
            return recompute.differentiate(run, leaves, weights, cotangent)
        return self.fast.differentiate(self.transformer, velocity_by, run, leaves, weights, cotangent)

    def timesteps(
        self,
        steps: int,
        *,
        sway_sampling_coef: float | None = None,
        use_epss: bool = True,
        t_start: float = 0.0,
    ) -> Tensor:
        return ode.timesteps(
            steps,
            sway_sampling_coef=sway_sampling_coef,
            use_epss=use_epss,
            t_start=t_start,
            device=self.device,
            dtype=self.dtype,
        )

    def finalize(self, x1: Tensor, cond: Condition) -> Tensor:
        """Log mel [B, T, M]: the reference where it was kept, the flow's end elsewhere."""
        return torch.where(cond.kept.unsqueeze(-1), cond.reference, x1)

    def _condition(
        self, reference: Tensor, kept: Tensor, ids: Tensor, lengths: list[int], cfg_strength: float
    ) -> Condition:
        frames = reference.shape[1]
        durations = torch.tensor(lengths, device=reference.device)
        inside = lengths_to_mask(durations, frames)
        mask = None if min(lengths) == frames else inside
        known = reference.masked_fill(~kept.unsqueeze(-1), 0.0)
        known_lengths = None if mask is None else durations
        guidance = cfg_strength if cfg_strength >= 1e-5 else 0.0
        if guidance:
            known = torch.cat((known, torch.zeros_like(known)))
            text = embed_with_and_without(self.transformer, ids, frames, known_lengths)
            mask = None if mask is None else torch.cat((mask, mask))
        else:
            text = self.transformer.embed_text(ids, frames, known_lengths)
        return Condition(
            reference=reference,
            kept=kept,
            generated=inside & ~kept,
            known=known,
            text=text,
            mask=mask,
            rope=self.transformer.rope(frames, reference.device),
            lengths_frames=tuple(lengths),
            guidance=guidance,
        )

    def _as_mel(self, sound: Tensor) -> Tensor:
        """Mel [B, T, M] as it is, waveform [B, S] as its log mel."""
        if sound.ndim == 3 and sound.shape[-1] == self.num_channels:
            return sound
        if sound.ndim != 2:
            raise ValueError(
                f"expected mel [batch, frames, {self.num_channels}] or waveform [batch, samples],"
                f" got {list(sound.shape)}"
            )
        if isinstance(self.mel_spec, MelSpec):
            return log_mel(sound, self.mel_spec)
        return self.mel_spec(sound).transpose(1, 2)

    def _as_ids(self, text: Text, batch: int, frames: int | Tensor) -> Tensor:
        if len(text) != batch:
            raise ValueError(f"text: expected {batch} items, one for each sound, got {len(text)}")
        ids = text if isinstance(text, Tensor) else self._text_ids(text, torch.as_tensor(frames).expand(batch).tolist())
        return ids.to(self.device)

    def _text_ids(self, text: Sequence[str] | Sequence[Sequence[str]], frames: Sequence[int]) -> Tensor:
        vocab = self.vocab_char_map
        if vocab is None:  # f5-tts without a vocabulary reads UTF-8 bytes
            rows = [torch.tensor(list("".join(item).encode("utf-8")), dtype=torch.long) for item in text]
            return pad_sequence(rows, batch_first=True, padding_value=-1)
        if self.tokenizer is not None and all(isinstance(item, str) for item in text):
            return tokens_to_ids([self.tokenizer(str(item), of) for item, of in zip(text, frames, strict=True)], vocab)
        return tokens_to_ids(text, vocab, strict=False)  # f5-tts: what is unknown becomes id 0

    @property
    def _tokenize(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "CFM: expected a tokenizer to read prompts with, got none;"
                " pass tokenizer=load_tokenizer(name), or use load_policy"
            )
        return self.tokenizer

    def _prompt_ids(self, prompts: Prompts, references: Tensor, totals: Tensor) -> Tensor:
        """Ids [B, N] of reference text and text, one after the other, in `references` of `totals` [B] frames."""
        rows = zip(prompts.reference_texts, prompts.texts, references.tolist(), totals.tolist(), strict=True)
        tokens = [self._tokenize.prompt(said.strip(), text.strip(), *frames) for said, text, *frames in rows]
        return tokens_to_ids(tokens, self.vocab_char_map or {})

    def _reference_mels(self, prompts: Prompts) -> list[Tensor]:
        """Log mel [T_b, M] of each clip at its own length: padding would change the last frames."""
        clips, lengths = prompts.reference_audio.to(self.device), prompts.reference_lengths_samples.tolist()
        return [
            log_mel(clip[None, :length], self.mel_spec)[0].to(self.dtype)
            for clip, length in zip(clips, lengths, strict=True)
        ]

    def _check_prompts(self, prompts: Prompts) -> None:
        if prompts.sample_rate_hz != self.mel_spec.sample_rate_hz:
            raise ValueError(
                f"reference_audio: expected {self.mel_spec.sample_rate_hz} Hz, got"
                f" {prompts.sample_rate_hz} Hz; resample it with rlhf_mel.speech.audio.resample"
            )
        lengths = prompts.reference_lengths_samples.tolist()
        if min(lengths) < self.mel_spec.n_fft or max(lengths) > prompts.reference_audio.shape[1]:
            raise ValueError(
                f"reference_lengths_samples: expected {self.mel_spec.n_fft} (a clip that has a voice) to"
                f" {prompts.reference_audio.shape[1]} (the audio's width), got {lengths}"
            )
        for field in ("texts", "reference_texts"):
            lacking = [row for row, text in enumerate(getattr(prompts, field)) if not self._tokenize(text.strip())]
            if lacking:
                raise ValueError(f"{field}: expected words, got nothing to say in rows {lacking}; remove those rows")
