"""Pairs of clips for the tests of what learns from preferences: for a tiny DiT, for `Movable`, and for whole runs."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile
import torch
from forward_problems import Movable, prompts
from problems import MelReward, Silent, tiny_policy, tiny_prompts
from small_runs import SPEC, TEXTS, Near, Voice, policy, write_dataset
from torch import Tensor

from rlhf_mel.data.preferences.load import PairBatch, PreferenceDataset
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.flow.noise import item_generators
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.training.trainer import RLHFTrainer
from rlhf_mel.types import Audio, Prompts

NAMES = ("flow_dpo", "flow_kto", "sft_chosen")
REFERENCES = (13, 9, 13)
"""Frames of the reference clips of `tiny_prompts`."""
CHOSEN, REJECTED = (17, 15, 12), (17, 11, 14)
"""Frames of the clips: of equal length, the chosen one longer, the rejected one longer."""
LOG2 = math.log(2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sound(lengths_frames: tuple[int, ...], seed: int, padding: float = 0.0, channels: int = 8) -> Audio:
    """Random mels of these lengths."""
    mel = torch.randn(len(lengths_frames), max(lengths_frames), channels, generator=generator(seed))
    lengths = torch.tensor(lengths_frames)
    mel[torch.arange(mel.shape[1]) >= lengths[:, None]] = padding
    return Audio(torch.zeros(len(mel), 1), lengths, 24_000, mel, lengths)


def pairs(padding: float = 0.0, **changes: Any) -> PairBatch:
    """Three pairs for a tiny DiT."""
    values: dict[str, Any] = dict(
        prompts=tiny_prompts(durations_frames=None),
        chosen=sound(CHOSEN, 1, padding),
        rejected=sound(REJECTED, 2, padding),
        soft_labels=torch.tensor([1.0, 0.8, 0.6]),
        margins=torch.tensor([0.0, 1.0, 2.0]),
        weights=torch.tensor([1.0, 2.0, 0.5]),
    )
    return PairBatch(**{**values, **changes})


def moved(lora: bool = False) -> tuple[CFM, CFM]:
    """A DiT that has moved away from its reference, and that reference as a module of its own."""
    reference = tiny_policy().requires_grad_(False)
    trained = copy.deepcopy(reference).requires_grad_(True)
    if lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trained = add_lora(trained)  # type: ignore[assignment]
    drawn = generator(5)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and (not lora or "lora_B" in name):
            with torch.no_grad():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=drawn))
    return trained, reference.eval()


def parts(trained: Any, reference: ReferencePolicy | None, cfg_strength: float = 0.0, reward: Any = None) -> Pipeline:
    return Pipeline(
        policy=trained,
        vocoder=Silent(),
        rewards=Rewards([reward or MelReward()]),  # type: ignore[list-item]
        reference=reference,
        sampling=Sampling(steps=3, cfg_strength=cfg_strength),
    )


def alone(model: CFM, batch: PairBatch, row: int, side: str, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(v, u) of one clip in its own frames, by the definitions."""
    clip: Audio = getattr(batch, side)
    length = int(clip.lengths_frames[row])
    asked = replace(batch.prompts.select([row]), durations_frames=torch.tensor([REFERENCES[row] + length]))
    cond = model.encode(asked, cfg_strength=0.0)
    x1 = torch.where(cond.kept[..., None], cond.reference, 0.0)
    x1[0, -length:] = clip.mel[row, :length]
    v = model.velocity((1 - t) * x0 + t * x1, t[None], cond)
    return v[0, -length:], (x1 - x0)[0, -length:]


def plain(trained: CFM, reference: CFM, batch: PairBatch, noise: torch.Generator, draws: int) -> Tensor:
    """Errors [2 (policy, reference), draws, 2b], each clip and draw alone; times, then noise of the longer clip."""
    trained.eval()
    own = item_generators(noise, 3)
    assert own is not None
    found = torch.zeros(2, draws, 6)
    rows: list[list[Tensor]] = [[] for _ in range(6)]
    for row, drawn in enumerate(own):
        uniform = torch.rand(draws, generator=drawn)
        for k in range(draws):
            t, longest = (k + uniform[k]) / draws, REFERENCES[row] + max(CHOSEN[row], REJECTED[row])
            x0 = torch.randn(longest, 8, generator=drawn)
            for place, (side, length) in enumerate((("chosen", CHOSEN[row]), ("rejected", REJECTED[row]))):
                start = x0[: REFERENCES[row] + length]
                errors = []
                for model in (trained, reference):
                    v, u = alone(model, batch, row, side, start, t)
                    errors.append((v - u).square().mean())
                rows[3 * place + row].append(torch.stack(errors))
    found = torch.stack([torch.stack(column) for column in rows], dim=0)  # [2b, draws, 2]
    return found.permute(2, 1, 0)


def gradient(module: torch.nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    module.zero_grad()
    return found


class Following(Movable):
    """`Movable` for clips of a data set: the frames that are asked for, and the reference's."""

    def durations(self, prompts: Prompts) -> Tensor:
        return super().durations(prompts) if prompts.generated_frames is None else prompts.generated_frames + 2


def movable_pairs(
    padding: float = 0.0, chosen: tuple[int, ...] = (3, 2, 3), rejected: tuple[int, ...] = (2, 3, 3)
) -> Any:
    """Three pairs for `Movable`."""
    return PairBatch(
        prompts=prompts(3, 1),
        chosen=sound(chosen, 1, padding, 2),
        rejected=sound(rejected, 2, padding, 2),
        soft_labels=torch.ones(3),
        margins=torch.zeros(3),
        weights=torch.ones(3),
    )


def wav(samples: int, seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    soundfile.write(buffer, (0.1 * torch.randn(samples, generator=generator(seed))).numpy(), 24_000, format="WAV")
    return {"bytes": buffer.getvalue(), "path": None}


def preference_rows() -> list[dict[str, Any]]:
    """Five pairs of noise, of 25 to 40 frames."""
    return [
        {
            "id": f"p{n}",
            "prompt": text,
            "chosen": wav(1600 + 200 * n, 10 + n),
            "rejected": wav(2500 - 150 * n, 20 + n),
            "reference_audio": wav(2000, 0),
            "reference_text": "abc",
            "soft_label": 1.0 if n else 0.75,
            "margin": float(n),
            "weight": 1.0,
            "chosen_seed": n,
            "rejected_seed": n + 1,
            "row": n,
        }
        for n, text in enumerate(TEXTS)
    ]


def preference_trainer(folder: Path, data: Any = None, peft: Any = None, **options: Any) -> RLHFTrainer:
    """A small run on `data`: a list is rows of a data set called few; None: those above, or what the options name."""
    defaults: dict[str, Any] = dict(
        output_dir=str(folder),
        algorithm="flow_dpo",
        use_cpu=True,
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        num_eval_prompts=0,
        recognizer="none",
        sampling_steps=3,
        disable_tqdm=True,
        reward_models=["mos"],
    )
    if data is None and "train_preferences" not in options:
        data = preference_rows()
    return RLHFTrainer(
        policy(),
        reward_models=Near(),
        args=RLHFConfig(**{**defaults, **options}),
        vocoder=Voice(),
        train_dataset=PreferenceDataset(data, mel_spec=SPEC, name="few") if isinstance(data, list) else data,
        eval_dataset=write_dataset(folder),
        peft_config=peft,
    )
