"""What is measured of generated speech, once: by judges of an evaluation, guards of a verdict, tables and reports.

| measure            | what                                                                               | better |
|--------------------|------------------------------------------------------------------------------------|--------|
| dnsmos_ovrl, _sig, _bak | DNSMOS P.835 (Reddy et al. 2022, arXiv 2110.01763): overall, speech, background | high |
| cer                | character error rate of the recognizer's greedy transcript, (S + D + I) / N        | low    |
| wer                | word error rate of Whisper's transcript (recipes/compare.py)                       | low    |
| voice_similarity   | cosine of the recognizer's voice embeddings of the generated and the reference mel | high   |
| level_dbfs         | 10 log10 mean power of the speech frames; a full-scale sine is -3.01               | same   |
| silence_ratio      | share of 20 ms frames without speech                                               | same   |
| duration_s         | 20 ms times the frames with speech                                                 | same   |
| f0_std_semitones   | standard deviation of the pitch of voiced frames: monotone speech is low           | same   |
| clipping_ratio     | share of samples at full scale, |x| >= 0.999                                       | low    |

A frame has no speech if it is more than 40 dB below the clip's loud level (the 95th percentile of its frames), or below
-60 dBFS. DNSMOS depends on the level, 0.05 for 6 dB on one clip: the guard on the level bounds that.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import jiwer
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_mel.speech.audio import MelSpec, log_mel, resample
from rlhf_mel.speech.recognizer import Recognizer, normalize_text
from rlhf_mel.types import Audio, Prompts

JUDGE_SAMPLE_RATE_HZ = 16_000
"""What DNSMOS hears, and what is enough for pitch."""


DNSMOS_WINDOW_S = 9.01


FRAME_S = 0.02


QUIET_POWER_RATIO = 1e-4
"""-40 dB relative to the loud frames of the clip."""


SILENCE_POWER = 1e-6
"""-60 dBFS."""


Judge = Callable[[Audio], Mapping[str, Float[Tensor, " b"]]]
"""A pure function of the sound: measures by name, a value an item."""


RecognizerJudge = Callable[[Recognizer, Audio, Prompts, Sequence[str]], Mapping[str, Float[Tensor, " b"]]]
"""The same of a recognizer, the sound, its prompts, and what the recognizer's `transcribe` says of it."""


@dataclass(frozen=True)
class Guard:
    """The range of the mean change of a measure that is allowed, in its unit or as a share of its mean before."""

    low: float = -math.inf
    high: float = math.inf
    relative: bool = False
    may_be_missing: bool = False
    """Whether a clip may lose the measure (monotone clips have no pitch); else a value that became NaN is a fault."""

    @property
    def limit(self) -> str:
        """In words."""
        unit = "{:g} %" if self.relative else "{:g}"
        low, high = (unit.format(abs(end) * (100 if self.relative else 1)) for end in (self.low, self.high))
        if self.low == -self.high:
            return f"within ±{high}"
        return f"drop of at most {low}" if self.high == math.inf else f"rise of at most {high}"


@dataclass(frozen=True)
class Measure:
    """A line of MEASURES: who measures it, and what tables, reports and verdicts say of it."""

    label: str
    better: Literal["higher", "lower", ""] = ""
    """'' where a change is not good or bad by itself."""
    digits: int = 3
    short: str = ""
    """Where the label is too long: heads of columns, samples of a report."""
    shown: Literal["everywhere", "tables", "report"] = "everywhere"
    """'tables': in those of a report and of recipes/compare.py, not on the console nor beside a sample; 'report': in a
    report's table alone. summary.json has all."""
    guard: Guard | None = None
    effect: float | None = None
    """Of the judge, who must hear the improvement: the rise that one wants to be told from none."""
    judge: Judge | None = None
    """Who measures it, by its name in MEASURES; one judge may measure several. None: another program does."""
    recognizer_judge: RecognizerJudge | None = None
    """The same where a recognizer is needed."""

    @property
    def name(self) -> str:
        """What the head of a column says."""
        return self.short or self.label

    @property
    def worse(self) -> Literal["higher", "lower", "either", ""]:
        """Which change is one for the worse: against `better`, else where a guard has its limits."""
        if self.better:
            return "lower" if self.better == "higher" else "higher"
        if self.guard is None:
            return ""
        if math.isinf(self.guard.low):
            return "higher"
        return "lower" if math.isinf(self.guard.high) else "either"


JUDGE = "dnsmos_ovrl"
"""Who has to hear what the reward claims."""


def measure(name: str) -> Measure:
    """The line of MEASURES; of a reward its name; of a measure of one's own that too."""
    if name == "reward":
        return Measure("Weighted sum", "higher")
    if name.startswith("rewards/"):
        return Measure(name.split("/")[1], "higher")
    return MEASURES.get(name, Measure(name))


def default_judges() -> list[Judge]:
    """The judges of MEASURES that need nothing but the sound, each once."""
    return list(dict.fromkeys(known.judge for known in MEASURES.values() if known.judge is not None))


def recognizer_judges() -> list[RecognizerJudge]:
    """The judges of MEASURES that need a recognizer, each once."""
    judges = (known.recognizer_judge for known in MEASURES.values())
    return list(dict.fromkeys(judge for judge in judges if judge is not None))


def shown_everywhere() -> list[str]:
    """The measures of MEASURES that the console and the samples of a report name, in their order."""
    return [name for name, known in MEASURES.items() if known.shown == "everywhere"]


def clips(audio: Audio) -> list[Float[Tensor, " _"]]:
    """The waveform of each item, at its own length: float32, on the CPU, without gradient."""
    rows = audio.waveform.detach().float().cpu()
    return [row[:length] for row, length in zip(rows, audio.lengths_samples.tolist(), strict=True)]


def dnsmos(audio: Audio) -> dict[str, Float[Tensor, " b"]]:
    """DNSMOS P.835 of each clip, 1 to 5: the numbers of the package `speechmos`, without the P.808 model it runs too.

    As there, a clip shorter than 9.01 s is repeated by doubling it, and the mean is over windows of 9.01 s, 1 s apart.
    """
    raw = [_dnsmos_windows(clip, audio.sample_rate_hz) for clip in clips(audio)]
    model = _dnsmos_model()
    scores = [model.get_polyfit_val(*model.onnx_sess.run(None, {"input_1": rows})[0].T, False) for rows in raw]
    names = ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl")
    return {name: torch.tensor([float(clip[i].mean()) for clip in scores]) for i, name in enumerate(names)}


def _dnsmos_windows(clip: Tensor, sample_rate_hz: int) -> np.ndarray:
    """What DNSMOS hears of a clip [S]: float32 [windows, 144160] at 16 kHz, clamped to what it takes."""
    if clip.numel() == 0 or not bool(clip.isfinite().all()):
        raise ValueError("dnsmos: expected a finite waveform, got an empty one, NaN or infinity")
    resampled = resample(clip[None], sample_rate_hz, JUDGE_SAMPLE_RATE_HZ)[0].clamp(-1, 1).numpy()
    window = int(DNSMOS_WINDOW_S * JUDGE_SAMPLE_RATE_HZ)
    doublings = max(0, math.ceil(math.log2(window / len(resampled))))
    resampled = np.tile(resampled, 2**doublings)
    hops = int(len(resampled) // JUDGE_SAMPLE_RATE_HZ - DNSMOS_WINDOW_S) + 1
    starts = [hop * JUDGE_SAMPLE_RATE_HZ for hop in range(hops)]
    return np.stack([resampled[start : start + window] for start in starts if start + window <= len(resampled)])


@functools.cache
def load_librosa() -> Any:
    """librosa, imported when it is needed: slowly, and by one process at a time.

    Numba compiles some of its functions as they are imported, and keeps them in two files each. Processes that do so at
    once leave files of one beside those of another, and whoever calls such a function is killed (numba/numba#10128).
    """
    from filelock import FileLock

    user = os.getuid() if hasattr(os, "getuid") else 0
    with FileLock(Path(tempfile.gettempdir()) / f"rlhf_mel-librosa-{user}.lock"):
        for name in ("core", "feature", "sequence", "util"):
            import_module(f"librosa.{name}")
    return import_module("librosa")


@functools.cache
def _dnsmos_model() -> Any:
    """The package's P.835 model and its polynomials."""
    from onnxruntime import InferenceSession, SessionOptions

    load_librosa()  # which the package imports
    from speechmos import dnsmos as package

    class Primary(package.DNSMOS):  # type: ignore[misc]  # speechmos has no types
        def __init__(self) -> None:
            model = Path(package.__file__).parent / "dnsmos_models/sig_bak_ovr.onnx"
            options = SessionOptions()
            options.enable_cpu_mem_arena = False  # would keep the largest batch: 0.8 GB for eight clips
            self.onnx_sess = InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    return Primary()


def signal(audio: Audio) -> dict[str, Float[Tensor, " b"]]:
    """Level, silence, duration, pitch and clipping of each clip; see the module's docstring."""
    measured = [_signal(clip, audio.sample_rate_hz) for clip in clips(audio)]
    return {name: torch.tensor([clip[name] for clip in measured]) for name in measured[0]}


def _signal(waveform: Tensor, sample_rate_hz: int) -> dict[str, float]:
    power, speech = speech_frames(waveform, sample_rate_hz)
    speech_power = power[speech].sum().item() / max(int(speech.sum()), 1)
    return {
        "level_dbfs": 10 * math.log10(speech_power + 1e-20),
        "silence_ratio": 1 - speech.double().mean().item(),
        "duration_s": FRAME_S * int(speech.sum()),
        "f0_std_semitones": f0_std_semitones(waveform, sample_rate_hz),
        "clipping_ratio": (waveform.abs() >= 0.999).double().mean().item(),
    }


def speech_frames(
    waveform: Float[Tensor, " s"], sample_rate_hz: int
) -> tuple[Float[Tensor, " frames"], Bool[Tensor, " frames"]]:
    """Power of each whole frame of 20 ms, and which of them hold speech.

    Raises:
        ValueError: the waveform is shorter than a frame.
    """
    frame = round(FRAME_S * sample_rate_hz)
    if len(waveform) < frame:
        raise ValueError(f"expected at least {frame} samples ({FRAME_S:g} s), got {len(waveform)}")
    power = waveform.double().unfold(0, frame, frame).square().mean(-1)
    loud = power.quantile(0.95).item()
    return power, power > max(loud * QUIET_POWER_RATIO, SILENCE_POWER)


def f0_std_semitones(waveform: Float[Tensor, " s"], sample_rate_hz: int) -> float:
    """Standard deviation of the pitch contour; NaN without voiced frames."""
    semitones = pitch_contour(waveform, sample_rate_hz)
    voiced = semitones[~np.isnan(semitones)]
    return float(voiced.std()) if len(voiced) else math.nan


def pitch_contour(waveform: Tensor, sample_rate_hz: int) -> np.ndarray:
    """12 log2 f0 of a waveform [S] every 16 ms (pYIN, Mauch & Dixon 2014), NaN where it is unvoiced.

    Frames more than an octave from the median are errors of the pitch tracker, and NaN too.
    """
    librosa = load_librosa()

    resampled = resample(waveform[None], sample_rate_hz, JUDGE_SAMPLE_RATE_HZ)[0].numpy()
    f0_hz, voiced, _ = librosa.pyin(
        resampled, fmin=60, fmax=500, sr=JUDGE_SAMPLE_RATE_HZ, frame_length=1024, hop_length=256
    )
    if not voiced.any():
        return np.full(len(f0_hz), math.nan)
    semitones = np.where(voiced, 12 * np.log2(f0_hz), math.nan)
    return np.where(np.abs(semitones - np.nanmedian(semitones)) < 12, semitones, math.nan)


def character_error_rates(texts: Sequence[str], transcripts: Sequence[str]) -> list[float]:
    """(substitutions + deletions + insertions) / characters of each text, both in the recognizer's letters."""
    return [jiwer.cer(normalize_text(text), transcript) for text, transcript in zip(texts, transcripts, strict=True)]


def voice_similarity(recognizer: Recognizer, audio: Audio, prompts: Prompts) -> Float[Tensor, " b"]:
    """Cosine between the voice of the generated mel and that of the reference clip."""
    mel, lengths_frames = reference_mels(prompts, recognizer.mel_spec)
    references = recognizer.voice_embedding(mel.to(audio.mel.device), lengths_frames.to(audio.mel.device))
    generated = recognizer.voice_embedding(audio.mel, audio.lengths_frames)
    return torch.cosine_similarity(generated, references, dim=-1)


def recognized(
    recognizer: Recognizer, audio: Audio, prompts: Prompts, transcripts: Sequence[str]
) -> dict[str, Float[Tensor, " b"]]:
    """`cer` of the transcripts and `voice_similarity` to the reference clips."""
    rates = torch.tensor(character_error_rates(prompts.texts, transcripts))
    return {"cer": rates, "voice_similarity": voice_similarity(recognizer, audio, prompts)}


def reference_mels(prompts: Prompts, spec: MelSpec) -> tuple[Float[Tensor, "b n m"], Int[Tensor, " b"]]:
    """Mels of the reference clips, and the frames of each; one by one, or padding reaches the last frames."""
    mels = [
        log_mel(resample(clip[None, :length], prompts.sample_rate_hz, spec.sample_rate_hz), spec)[0]
        for clip, length in zip(prompts.reference_audio, prompts.reference_lengths_samples.tolist(), strict=True)
    ]
    lengths_frames = torch.tensor([len(mel) for mel in mels], device=mels[0].device)
    return torch.nn.utils.rnn.pad_sequence(mels, batch_first=True), lengths_frames


MEASURES: Mapping[str, Measure] = {
    "dnsmos_ovrl": Measure("DNSMOS overall", "higher", short="DNSMOS", effect=0.05, judge=dnsmos),
    "dnsmos_sig": Measure("DNSMOS speech", "higher", shown="report", judge=dnsmos),
    "dnsmos_bak": Measure("DNSMOS background", "higher", shown="report", judge=dnsmos),
    "cer": Measure("Character error rate", "lower", short="CER", guard=Guard(high=0.01), recognizer_judge=recognized),
    "wer": Measure("Word error rate", "lower", short="WER"),
    "voice_similarity": Measure(
        "Voice similarity to the reference",
        "higher",
        short="voice",
        guard=Guard(low=-0.02),
        recognizer_judge=recognized,
    ),
    "level_dbfs": Measure(
        "Level of speech, dBFS",
        digits=2,
        short="level, dBFS",
        shown="tables",
        guard=Guard(low=-1.5, high=1.5),
        judge=signal,
    ),
    "silence_ratio": Measure("Share of silence", short="silence", shown="tables", guard=Guard(high=0.05), judge=signal),
    "duration_s": Measure(
        "Seconds of speech",
        digits=2,
        short="speech, s",
        shown="tables",
        guard=Guard(low=-0.1, high=0.1, relative=True),
        judge=signal,
    ),
    "f0_std_semitones": Measure(
        "Pitch variation, semitones",
        digits=2,
        short="pitch spread",
        shown="tables",
        guard=Guard(low=-0.2, relative=True, may_be_missing=True),
        judge=signal,
    ),
    "clipping_ratio": Measure("Share of clipped samples", "lower", 4, shown="report", judge=signal),
}
"""In the order of tables. Who adds a judge adds a line: evaluation, console, report, verdict and comparison read it."""
