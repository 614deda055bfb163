"""Problems whose answers are known, shared by the tests: a flow with an exact solution, and tiny models.

`LinearGaussianFlow`: mel ~ N(mean, deviation^2) in every element, noise ~ N(0, 1), path of path.py. Then
x_t ~ N(t mean, s_t^2) with s_t^2 = (1 - t)^2 + t^2 deviation^2, the marginal velocity is linear in x,

    v(x, t) = mean + (t deviation^2 - (1 - t)) / s_t^2 (x - t mean),

and its solution is x_t = t mean + s_t x_0. Of what it generates, p, a reward and an anchor of strength beta make

    argmax_q E_q[r] - beta KL(q || p) = p exp(r / beta) / Z,

for r = slope x - curvature (x - target)^2 / 2 again Gaussian (complete the square):

    precision = 1 / deviation^2 + curvature / beta,
    mean of it = (mean / deviation^2 + (slope + curvature target) / beta) / precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_mel.f5.backbones.dit import DiT
from rlhf_mel.f5.backbones.mmdit import MMDiT
from rlhf_mel.f5.backbones.unett import UNetT
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.speech.text import load_tokenizer
from rlhf_mel.storage import ASSETS
from rlhf_mel.types import Audio, Prompts


@dataclass(frozen=True)
class LinearGaussianFlow:
    mean: float = 0.7
    deviation: float = 0.4

    def scale(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 + t**2 * self.deviation**2).sqrt()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        slope = (t * self.deviation**2 - (1 - t)) / self.scale(t) ** 2
        return self.mean + slope * (x - t * self.mean)

    def solution(self, x0: Tensor, t: Tensor) -> Tensor:
        return t * self.mean + self.scale(t) * x0

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t of each element of x."""
        scale = self.scale(t)
        return -((x - t * self.mean) / scale).square() / 2 - scale.log() - math.log(2 * math.pi) / 2

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t of each element of x."""
        return (t * self.mean - x) / self.scale(t) ** 2

    def tilted(
        self, beta: float, *, slope: float = 0.0, curvature: float = 0.0, target: float = 0.0
    ) -> LinearGaussianFlow:
        """The flow to p exp(r / beta), the KL-regularised optimum of r = slope x - curvature (x - target)^2 / 2."""
        precision = self.deviation**-2 + curvature / beta
        mean = (self.mean / self.deviation**2 + (slope + curvature * target) / beta) / precision
        return LinearGaussianFlow(mean, precision**-0.5)


TINY: Mapping[str, Any] = dict(
    dim=32,
    depth=2,
    heads=2,
    dim_head=16,
    ff_mult=2,
    mel_dim=8,
    text_num_embeds=20,
    text_dim=16,
    conv_layers=2,
    dropout=0.1,
)
"""A DiT of 60,000 weights."""

TINY_UNETT: Mapping[str, Any] = dict(
    dim=16,
    depth=4,
    heads=2,
    dim_head=8,
    ff_mult=2,
    mel_dim=8,
    text_num_embeds=20,
    text_dim=8,
    conv_layers=1,
    dropout=0.1,
)
TINY_MMDIT: Mapping[str, Any] = dict(
    dim=16, depth=2, heads=2, dim_head=8, ff_mult=2, mel_dim=8, text_num_embeds=20, dropout=0.1
)

V1: Mapping[str, Any] = dict(text_mask_padding=True, pe_attn_head=None)
V0: Mapping[str, Any] = dict(text_mask_padding=False, pe_attn_head=1)
"""The two sets of flags that F5-TTS released weights for."""

MEL: Mapping[str, Any] = dict(n_mel_channels=8, n_fft=256, hop_length=64, win_length=256)
VOCABULARY: Mapping[str, int] = {token: index for index, token in enumerate(" abcdefghijklmnopqr.")}


SAMPLE_RATE_HZ = 24_000


def vibrato(semitones: Tensor | float, hz: float = 120.0, seconds: float = 2.0) -> Tensor:
    """A tone of five harmonics whose pitch swings three times a second by `semitones` to each side of `hz`."""
    t = torch.arange(round(seconds * SAMPLE_RATE_HZ), dtype=torch.float64) / SAMPLE_RATE_HZ
    f0_hz = hz * 2 ** (semitones * torch.sin(2 * math.pi * 3 * t) / 12)
    phase = 2 * math.pi * torch.cumsum(f0_hz, 0) / SAMPLE_RATE_HZ
    return 0.1 * torch.stack([torch.sin(k * phase) / k for k in range(1, 6)]).sum(0)


def reference_of(voice: str) -> Path:
    """One of the bundled reference clips of a voice."""
    return min((ASSETS / "prompts/references").glob(f"{voice}_*.flac"))


def reinitialise(module: nn.Module, seed: int = 0) -> None:
    """Random weights everywhere: AdaLN-zero starts with nearly every gradient zero, and tests would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        if name.endswith("norm.weight"):
            noise = 1 + noise
        if "grn" in name:
            noise = noise * fan_in**0.5 * 0.3
        with torch.no_grad():
            parameter.copy_(noise.half())  # so that half precision on disk loses nothing


def tiny_dit(**options: Any) -> DiT:
    model = DiT(**{**TINY, **V1, **options})
    reinitialise(model)
    return model


def tiny_cfm(dit: Mapping[str, Any] | None = None, **options: Any) -> CFM:
    options = {"mel_spec_kwargs": MEL, "vocab_char_map": dict(VOCABULARY), **options}
    return CFM(tiny_dit(**(dit or {})), **options)


def tiny_policy(dit: Mapping[str, Any] | None = None) -> CFM:
    """A CFM that can read prompts: characters of VOCABULARY, frames of 64 samples at 24 kHz."""
    return tiny_cfm(dit, tokenizer=load_tokenizer("char"))


def tiny_prompts(**changes: Any) -> Prompts:
    """Three prompts: references of 13, 9 and 13 frames (hop 64), 30, 24 and 30 frames in all."""
    lengths = torch.tensor([800, 560, 800])
    audio = torch.randn(3, 800, generator=torch.Generator().manual_seed(2)) / 10
    audio[1, 560:] = 0.0
    fields = dict(
        texts=["bad cab", "a fig", "decade"],
        reference_audio=audio,
        reference_lengths_samples=lengths,
        reference_texts=["feed me", "jam", "a bed"],
        durations_frames=torch.tensor([30, 24, 30]),
    )
    return Prompts(**{**fields, **changes})


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes allocated at one moment while `function` runs, over those before: the CPU allocator's own log."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


BACKBONES: Mapping[str, tuple[type[nn.Module], Mapping[str, Any]]] = {
    "DiT": (DiT, TINY),
    "UNetT": (UNetT, TINY_UNETT),
    "MMDiT": (MMDiT, TINY_MMDIT),
}
"""Name to our class and its tiny arguments."""


def tiny_backbone(name: str, **options: Any) -> nn.Module:
    backbone, arguments = BACKBONES[name]
    model = backbone(**{**arguments, **options})
    reinitialise(model)
    return model


# What f5-tts was asked, and what this package is asked again: flags of the DiT, options of the CFM, and the call.
EVERYTHING = dict(qk_norm="rms_norm", long_skip_connection=True)
AVERAGE = dict(text_embedding_average_upsampling=True)
MASKED = dict(attn_mask_enabled=True)
UNEQUAL = dict(rows=2, lens=[16, 11], duration=[40, 31])

DIT_CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "v1": (V1, {}),
    "v0": (V0, {}),
    "v1 packed": (V1, dict(cfg_infer=True)),
    "v0 masked": (V0, dict(mask=[24, 17])),
    "v1 masked packed": (V1, dict(mask=[24, 17], cfg_infer=True)),
    "attention mask": ({**V1, **MASKED}, dict(mask=[24, 17])),
    "average": ({**V1, **AVERAGE}, {}),
    "average masked": ({**V1, **AVERAGE}, dict(mask=[24, 17])),
    "qk_norm and long skip": ({**V1, **EVERYTHING}, {}),
    "no audio": (V1, dict(drop_audio_cond=True)),
    "no text": (V0, dict(drop_text=True)),
    "one time an item": (V1, dict(time=[0.1, 0.8], mask=[24, 17])),
}

SAMPLE_CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "v1 cfg 0": (V1, {}, dict(cfg_strength=0.0)),
    "v1 cfg 2": (V1, {}, {}),
    "v0 cfg 0": (V0, {}, dict(cfg_strength=0.0)),
    "v0 cfg 2": (V0, {}, {}),
    "v1 batch cfg 0": (V1, {}, dict(rows=2, cfg_strength=0.0)),
    "v1 batch": (V1, {}, dict(rows=2)),
    "v0 batch": (V0, {}, dict(rows=2)),
    "v1 unequal": (V1, {}, UNEQUAL),
    "v0 unequal": (V0, {}, UNEQUAL),
    "average": ({**V1, **AVERAGE}, {}, {}),
    "average unequal": ({**V1, **AVERAGE}, {}, UNEQUAL),
    "attention mask unequal": ({**V1, **MASKED}, {}, UNEQUAL),
    "epss": (V1, {}, dict(steps=7)),
    "no epss": (V1, {}, dict(steps=7, use_epss=False)),
    "sway": (V1, {}, dict(sway_sampling_coef=-1.0)),
    "epss and sway": (V1, {}, dict(steps=16, sway_sampling_coef=-1.0)),
    "edit": (V1, {}, dict(rows=2, edit=[(4, 9), (0, 3)])),
    "duplicate": (V1, {}, dict(duplicate_test=True, t_inter=0.3)),
    "no reference": (V1, {}, dict(no_ref_audio=True)),
    "text outgrows duration": (V1, {}, dict(duration=5)),
    "duration clamped": (V1, {}, dict(max_duration=22)),
    "strings": (V1, {}, dict(rows=2, text=["abc d.", "no ? here"])),
    "bytes": ({**V1, "text_num_embeds": 256}, dict(vocab_char_map=None), dict(text=["hé"])),
    "waveform": (V1, {}, dict(waveform=True)),
    "midpoint": (V1, dict(odeint_kwargs=dict(method="midpoint")), {}),
    "rk4": (V1, dict(odeint_kwargs=dict(method="rk4")), {}),
    "dopri5": (V1, dict(odeint_kwargs=dict(method="dopri5", rtol=1e-9, atol=1e-9)), {}),
}
IN_FLOAT64 = ("dopri5",)
"""An adaptive solver picks its steps by an error estimate, which rounding moves: in float32 two processors differ by
1e-3 at a tolerance of 1e-4. In float64, and tight, all find the one solution."""

E2: Mapping[str, Any] = dict(text_mask_padding=False, pe_attn_head=1)
"""The flags of the E2-TTS weights that F5-TTS released."""

BACKBONE_CASES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "UNetT": ("UNetT", {}, {}),
    "UNetT, E2 flags": ("UNetT", E2, {}),
    "UNetT, E2 flags, no convolutions": ("UNetT", {**E2, "conv_layers": 0}, dict(mask=[24, 17])),
    "UNetT, packed": ("UNetT", E2, dict(mask=[24, 17], cfg_infer=True)),
    "UNetT, attention mask": ("UNetT", MASKED, dict(mask=[24, 17], cfg_infer=True)),
    "UNetT, qk_norm": ("UNetT", dict(qk_norm="rms_norm"), {}),
    "UNetT, skips added": ("UNetT", dict(skip_connect_type="add"), {}),
    "UNetT, no skips": ("UNetT", dict(skip_connect_type="none"), {}),
    "UNetT, one time an item": ("UNetT", {}, dict(time=[0.1, 0.8])),
    "UNetT, no audio": ("UNetT", {}, dict(drop_audio_cond=True)),
    "UNetT, no text": ("UNetT", {}, dict(drop_text=True)),
    "MMDiT": ("MMDiT", {}, {}),
    "MMDiT, padding kept": ("MMDiT", dict(text_mask_padding=False), dict(mask=[24, 17])),
    "MMDiT, packed": ("MMDiT", {}, dict(mask=[24, 17], cfg_infer=True)),
    "MMDiT, attention mask": ("MMDiT", MASKED, dict(mask=[24, 17], cfg_infer=True)),
    "MMDiT, qk_norm": ("MMDiT", dict(qk_norm="rms_norm"), {}),
    "MMDiT, one time an item": ("MMDiT", {}, dict(time=[0.1, 0.8])),
    "MMDiT, no audio": ("MMDiT", {}, dict(drop_audio_cond=True)),
    "MMDiT, no text": ("MMDiT", {}, dict(drop_text=True)),
}
"""One forward: backbone, its flags, the call."""

BACKBONE_SAMPLES: Mapping[str, Mapping[str, Any]] = {
    "cfg 0": dict(cfg_strength=0.0),
    "cfg 2": {},
    "batch": dict(rows=2),
    "unequal": UNEQUAL,
    "edit": dict(rows=2, edit=[(4, 9), (0, 3)]),
    "duplicate": dict(duplicate_test=True, t_inter=0.3),
    "epss": dict(steps=7),
    "sway": dict(sway_sampling_coef=-1.0),
}
"""sample() of UNetT and of MMDiT; DiT's are SAMPLE_CASES."""

GRADIENT_CASES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "DiT v1, cfg 2": ("DiT", V1, dict(rows=2)),
    "DiT v0, cfg 0": ("DiT", V0, dict(cfg_strength=0.0)),
    "DiT v1, unequal": ("DiT", {**V1, **MASKED}, UNEQUAL),
    "UNetT, cfg 2": ("UNetT", {}, UNEQUAL),
    "UNetT, cfg 0": ("UNetT", E2, dict(cfg_strength=0.0)),
    "MMDiT, cfg 2": ("MMDiT", {}, UNEQUAL),
    "MMDiT, cfg 0": ("MMDiT", {}, dict(cfg_strength=0.0)),
}
"""Gradients through sample() in float64, with f5-tts's run without its decorator."""

TRAINING_CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "everything known": (V1, dict(audio_drop_prob=0.0, cond_drop_prob=0.0)),
    "audio dropped": (V1, dict(audio_drop_prob=1.0, cond_drop_prob=0.0)),
    "both dropped": (V0, dict(audio_drop_prob=0.0, cond_drop_prob=1.0)),
}


PINYIN_TEXTS = (
    "Hello, world! It's a test.",
    "你好，世界！",
    "今天天气不错；我们去公园吧。",
    "我用 Python 3.11 写代码, 你呢?",
    "F5-TTS 的“流匹配”模型：‘很快’。",
    "银行行长在行走，重庆人很重视。",
    "不是不去，一个一样，老虎跑了。",
    "混合mixed文本text没有space。",
    "Ünïcode café naïve – 五十%",
    "アニメ 한국어 日本語 русский",
    "(Parentheses) and: 'quotes' \"here\"",
    "2026年11月24日下午3点25分",
    "GPT-4o和Claude3哪个更好用呢",
    " leading and  double spaces ",
    "嗯……啊——这个嘛、那个：好吧！",
    "他说：“OK，let's go！”然后就走了",
    "女儿绿了旅行略微",
    "😀 emoji 表情 ok",
    "...",
    "a",
    "长",
    "",
)
"""Chinese, English and others, mixed; with tone sandhi, heteronyms, quotes, digits and symbols."""


def case_inputs(seed: int = 1) -> dict[str, Tensor]:
    """Reference mel [2, 16, 8], ids [2, 9] and [2, 7] (padded), a waveform, noisy mel [2, 24, 8]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (2, 9), generator=generator)
    ids[1, 7:] = -1
    return {
        "mel": torch.randn(2, 16, 8, generator=generator),
        "ids": ids,
        "waveform": torch.randn(1, 1600, generator=generator) / 10,
        "x": torch.randn(2, 24, 8, generator=generator),
        "cond": torch.randn(2, 24, 8, generator=generator),
    }


def with_weights(dit: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """`dit` with those of `weights` that it has a place for; a larger vocabulary repeats the embedding's rows."""
    own = dit.state_dict()
    weights = {name: weight.float() for name, weight in weights.items() if name in own}
    rows = torch.arange(len(own["text_embed.text_embed.weight"]))
    embedding = weights["text_embed.text_embed.weight"]
    weights["text_embed.text_embed.weight"] = embedding[rows % len(embedding)]
    dit.load_state_dict({**own, **weights})
    return dit


def call_dit(dit: nn.Module, inputs: Mapping[str, Tensor], **call: Any) -> Tensor:
    """One forward of a DIT_CASE or BACKBONE_CASE on f5-tts's backbone or on ours."""
    mask = call.pop("mask", None)
    if mask is not None:
        mask = torch.arange(24) < torch.tensor(mask)[:, None]
    time = torch.tensor(call.pop("time", 0.35))
    return dit(inputs["x"], inputs["cond"], inputs["ids"], time, mask=mask, **call)


def ramp_loss(out: Tensor) -> Tensor:
    """A smooth scalar of all frames that weighs them all differently."""
    return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).square().mean()


def gradient_summary(module: nn.Module) -> dict[str, Tensor]:
    """Two numbers of each gradient: its norm, and its product with a ramp from -1 to 1."""
    summary = {}
    for name, parameter in module.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        ramp = torch.linspace(-1, 1, gradient.numel(), dtype=gradient.dtype)
        summary[name] = torch.stack((gradient.norm(), gradient.flatten() @ ramp))
    return summary


def call_sample(cfm: nn.Module, inputs: Mapping[str, Tensor], **call: Any) -> tuple[Tensor, Tensor]:
    """One sample() of a SAMPLE_CASE, or BACKBONE_SAMPLE, on f5-tts's CFM or on ours."""
    call = {"steps": 8, "cfg_strength": 2.0, "seed": 5, "duration": 40, **call}
    rows = call.pop("rows", 1)
    cond = inputs["waveform"] if call.pop("waveform", False) else inputs["mel"][:rows]
    for name in ("lens", "duration"):
        if isinstance(call.get(name), list):
            call[name] = torch.tensor(call[name])
    if cuts := call.pop("edit", None):
        call["edit_mask"] = torch.ones(rows, 16, dtype=torch.bool)
        for row, (start, end) in enumerate(cuts):
            call["edit_mask"][row, start:end] = False
    return cfm.sample(cond, call.pop("text", inputs["ids"][:rows]), call.pop("duration"), **call)


class Silent:
    """A vocoder whose rewards listen to the mel."""

    differentiable = True
    sample_rate_hz = 24_000
    mel_spec = tiny_policy().mel_spec

    def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        return mel.new_zeros(len(mel), mel.shape[1] * self.mel_spec.hop_length)


@dataclass
class MelReward:
    """scale * sum of the mel, or -scale * sum of (mel - target)^2; no gradient."""

    scale: float = 1.0
    target: float | None = None
    name: str = "mel"
    differentiable: bool = False
    domain: str = "mel"
    sample_rate_hz: int | None = None
    needs: frozenset[str] = frozenset()
    range: tuple[float, float] = (-math.inf, math.inf)

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        mel = audio.mel if self.target is None else -(audio.mel - self.target).square()
        return self.scale * mel.sum((1, 2))
