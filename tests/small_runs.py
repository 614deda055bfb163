"""Small real runs of the trainer, for the tests of all that it drives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import soundfile
import torch
from problems import tiny_cfm
from torch import Tensor, nn

from rlhf_mel.data.prompts import PromptDataset
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.text import CharTokenizer
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.training.trainer import RLHFTrainer
from rlhf_mel.types import Audio, Prompts

TEXTS = ("abc", "a bad", "fed", "had a cab", "jog")


SPEC: MelSpec = tiny_cfm().mel_spec


class Voice(nn.Module):
    """A vocoder with a weight: waveform = tanh(gain * mean of the mel channels), each frame held for one hop."""

    differentiable = True
    sample_rate_hz = SPEC.sample_rate_hz
    mel_spec = SPEC

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        return (self.gain * mel.mean(-1)).tanh().repeat_interleave(SPEC.hop_length, dim=1)


class Near(nn.Module):
    """A reward with a weight: -mean (w - target)^2 over an item's samples."""

    name = "near"
    differentiable = True
    domain = "waveform"
    sample_rate_hz = None
    needs: frozenset[str] = frozenset()
    range = (-float("inf"), 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.tensor(0.1))

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        rows = zip(audio.waveform, audio.lengths_samples.tolist(), strict=True)
        return torch.stack([-(row[:length] - self.target).square().mean() for row, length in rows])


def write_dataset(folder: Path) -> PromptDataset:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    soundfile.write(folder / "voice.wav", (0.1 * torch.randn(2000, generator=generator)).numpy(), 24_000)
    rows = [
        {"id": f"p{n}", "text": text, "voice": "v", "reference_audio": "voice.wav", "reference_text": "abc"}
        for n, text in enumerate(TEXTS)
    ]
    return PromptDataset(rows, root=folder, mel_spec=SPEC)


def policy() -> CFM:
    return tiny_cfm(tokenizer=CharTokenizer())


def trainer(
    folder: Path, dataset: PromptDataset, callbacks: Any = None, peft: Any = None, reward: Any = None, **options: Any
) -> RLHFTrainer:
    defaults: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        num_eval_prompts=0,
        recognizer="none",
        sampling_steps=3,
        beta=0.5,
        disable_tqdm=True,
        reward_models=["mos"],
    )
    return RLHFTrainer(
        policy(),
        reward_models=reward or Near(),
        args=RLHFConfig(**{**defaults, **options}),
        vocoder=Voice(),
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=peft,
        callbacks=callbacks,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the one number that is a measurement of the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "step_time"} for line in lines]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def quietness(completions: list[Any], **columns: Any) -> list[float]:
    """A black box: no more than floats comes back."""
    return [-float((waveform**2).mean()) for waveform in completions]
