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
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from rlhf_mel.f5.condition import Condition, condition_on, guided, velocity_by
from rlhf_mel.f5.inputs import Text, as_ids, as_mel, check_prompts, prompt_ids, reference_mels
from rlhf_mel.f5.masks import chance, kept_frames, mel_spec_from_f5, spans, uniform
from rlhf_mel.f5.speed.sampling import FastVelocity, compile_blocks
from rlhf_mel.flow import ode, recompute
from rlhf_mel.flow.noise import Generators, item_generators, item_noise
from rlhf_mel.flow.path import interpolate, velocity
from rlhf_mel.flow.policy import require_gradients, velocity_as_now
from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.modules import modules_of
from rlhf_mel.speech.audio import MelSpec, samples_to_frames
from rlhf_mel.speech.durations import clamped_frames, total_frames
from rlhf_mel.speech.text import Tokenizer
from rlhf_mel.speech.token_cache import CachedTokenizer, cached
from rlhf_mel.types import Prompts

FULL_LOAD = 4096
"""Frames of a batch from which on a GPU takes as long for two halves, one after the other, as for the whole."""


class CFM(nn.Module):
    """F5-TTS's flow on one of its backbones: a Policy, and f5-tts's own calls; see the top of this file."""

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

        Args:
            mel_spec_module: a MelSpec, or a module from waveform [b, s] to log mel [b, m, n].
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
        bands = spec.n_mels if isinstance(spec, MelSpec) else spec.n_mel_channels
        self.num_channels: int = num_channels or bands
        self.voices: tuple[str, ...] = ()
        """All voices that the policy can speak in, by the names in prompts; empty: it clones any."""
        self.mix_durations = False
        """Whether rollouts solve items of several durations together. A CPU is no sooner for it: with gradients it has
        0.8 to 1.1 times the speed of one by one. Not measured on a GPU."""
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
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of noise and mels."""
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
        """Mel [b, n, m] (or the vocoder's waveform) and the solver's states [steps + 1, b, n, m].

        Args:
            cond: reference mel [b, frames, m] or waveform [b, s]; `lens` [b]: its frames, all unless given.
            duration: frames of reference plus generated speech; raised to fit the text.
            edit_mask: bool [b, frames], True where the reference is kept (speech editing).
            cache: True samples without gradients and leaves the model in eval mode, as f5-tts does. False keeps
                the graph and the caller's train/eval mode; call eval() first unless dropout is wanted.
            seed: the same noise for every item, as in f5-tts; the global generator is not touched.
            generator: distinct noise for each item; without it and without seed, the global generator.
            grad_steps: see ode.solve.
            checkpoint: see ode.solve.

        A batch of unequal durations is masked as in f5-tts: not what each item gives alone (policy.rollout).
        """
        if not cache:
            require_gradients("CFM.sample(cache=False)", remedy="pass cache=True to sample without gradients")
        elif any(module.training for module in modules_of(self)):  # eval() takes milliseconds
            self.eval()
        with torch.set_grad_enabled(not cache):
            mel = as_mel(cond, self.mel_spec, self.num_channels).to(self.dtype)
            ids = self._as_ids(text, len(mel), duration)
            lens = (torch.full((len(mel),), mel.shape[1]) if lens is None else lens).to(mel.device)
            lengths = clamped_frames(duration, ids, lens, max_duration)
            reference = F.pad(mel, (0, 0, 0, max(lengths) - mel.shape[1]))
            kept = kept_frames(lens, edit_mask, max(lengths))
            shown = torch.zeros_like(reference) if no_ref_audio else reference
            condition = condition_on(self.transformer, shown, kept, ids, lengths, cfg_strength)
            if seed is not None:  # f5-tts seeds anew before each item
                generator = [torch.Generator(self.device).manual_seed(seed) for _ in lengths]
            noise, t_start = self.prior(condition, generator), 0.0
            if duplicate_test:
                noise, t_start, steps = _at_repeated(mel, noise, t_inter), t_inter, int(steps * (1 - t_inter))
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

    @override
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

        A random span of each mel `inp` [b, n, m] (or waveform [b, s]) of `lens` [b] frames is hidden; the
        loss is the squared error of the velocity there. `generator`: for span, noise, time, dropped conditions.
        """
        if noise_scheduler is not None:
            raise ValueError(f"noise_scheduler: expected None (f5-tts has none either), got {noise_scheduler!r}")
        x1 = as_mel(inp, self.mel_spec, self.num_channels)
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

    @property
    def mixes_durations(self) -> bool:
        """Whether rollouts solve items of several durations together: if asked to, not by the graphs of `speed_up`."""
        return self.mix_durations and self.fast is None

    @property
    def draws_timing(self) -> bool:
        """Whether the tokenizer knows by what distribution the rhythm of takes differs."""
        return self.tokenizer is not None and cached(self.tokenizer).draws_timing

    def durations(self, prompts: Prompts) -> Int[Tensor, " b"]:
        """Frames of reference and speech: see speech.durations.total_frames.

        All that can be wrong with prompts is found here, before any is solved.

        Raises:
            ValueError: see `check_prompts`; or durations too short for reference and texts.
        """
        check_prompts(prompts, self.mel_spec, self._tokenize)
        references = samples_to_frames(prompts.reference_lengths_samples, self.mel_spec)
        totals = total_frames(prompts, references, self._tokenize)
        ids = self._prompt_ids(prompts, references, torch.maximum(totals, references + 1))
        least = torch.maximum(references + 1, (ids != -1).sum(dim=1).to(references.device))
        if bool((totals < least).any()):
            raise ValueError(
                f"durations_frames: expected at least {least.tolist()}, more than the reference has and a frame for"
                f" each token of both texts, got {totals.tolist()}; shorten the texts or raise duration_s"
            )
        return totals

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Condition:
        """Prompts, ready for `velocity`: each item gets what it gets alone, whatever the durations of the others.

        Raises:
            ValueError: see `durations`; or several durations after `speed_up`.
        """
        durations = self.durations(prompts)
        lengths = durations.tolist()
        if len(set(lengths)) > 1 and self.fast is not None:
            raise ValueError(
                f"encode: expected prompts of one total duration after speed_up, got {lengths} frames; call"
                " policy.rollout, which groups them"
            )
        mels = [mel.to(self.dtype) for mel in reference_mels(prompts.to(self.device), self.mel_spec)]
        reference = pad_sequence(mels, batch_first=True)
        reference = F.pad(reference, (0, 0, 0, max(lengths) - reference.shape[1]))
        references = torch.tensor([len(mel) for mel in mels], device=self.device)
        ids = self._prompt_ids(prompts, references, durations).to(self.device)
        kept = lengths_to_mask(references, max(lengths))
        return condition_on(self.transformer, reference, kept, ids, lengths, cfg_strength, exact=self.fast is None)

    def prior(self, cond: Condition, generator: Generators = None) -> Float[Tensor, "b n m"]:
        """Standard normal noise, zero beyond each item's duration."""
        generators = item_generators(generator, len(cond.lengths_frames))
        return item_noise(cond.lengths_frames, self.num_channels, generators, self.device, self.dtype)

    def velocity(self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: Condition) -> Float[Tensor, "b n m"]:
        """Guided velocity at x and t (a scalar or [b]); branches in one batch.

        Raises:
            ValueError: x is not of the shape that was encoded.
        """
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
    ) -> Float[Tensor, " k"]:
        """steps + 1 times from t_start to 1; see ode.timesteps."""
        return ode.timesteps(
            steps,
            sway_sampling_coef=sway_sampling_coef,
            use_epss=use_epss,
            t_start=t_start,
            device=self.device,
            dtype=self.dtype,
        )

    def finalize(self, x1: Float[Tensor, "b n m"], cond: Condition) -> Float[Tensor, "b n m"]:
        """Log mel: the reference where it was kept, the flow's end elsewhere."""
        return torch.where(cond.kept.unsqueeze(-1), cond.reference, x1)

    def _as_ids(self, text: Text, batch: int, frames: int | Tensor) -> Tensor:
        return as_ids(text, batch, frames, self.vocab_char_map, self.tokenizer).to(self.device)

    def _prompt_ids(self, prompts: Prompts, references: Tensor, totals: Tensor) -> Tensor:
        return prompt_ids(prompts, references, totals, self.vocab_char_map or {}, self._tokenize)

    @property
    def _tokenize(self) -> CachedTokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "CFM: expected a tokenizer to read prompts with, got none;"
                " pass tokenizer=load_tokenizer(name), or use load_policy"
            )
        return cached(self.tokenizer)


def _at_repeated(mel: Tensor, noise: Tensor, t: float) -> Tensor:
    """f5-tts's duplicate_test: x_t on the way from the noise to the reference said a second time, after itself."""
    frames = mel.shape[1]
    repeated = F.pad(mel, (0, 0, frames, noise.shape[1] - 2 * frames))
    return interpolate(noise, repeated, t)
