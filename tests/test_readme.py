"""The Python of README, guide and CONTRIBUTING runs as it stands, but for fewer updates and prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import MelReward
from problems import Silent, tiny_policy, tiny_prompts

from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.types import Audio

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guide.md", "CONTRIBUTING.md")
BLOCKS = [
    code for page in PAGES for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
]


def block(start: str) -> str:
    (found,) = [code for code in BLOCKS if start in code]
    return found


def test_every_block_is_python() -> None:
    for code in BLOCKS:
        compile(code, "docs", "exec")


def test_training_and_sampling_run(tmp_path: Path) -> None:
    training = block("RLHFTrainer(")
    for said, here in (
        ("max_steps=12", "max_steps=1, num_eval_prompts=1, per_device_train_batch_size=1, use_cpu=True"),
        ('"runs/mine"', repr(str(tmp_path / "mine"))),
    ):
        assert training.count(said) == 1
        training = training.replace(said, here)
    names: dict[str, Any] = {}
    exec(training, names)
    frames = names["mel"].shape[1]
    assert names["waveform"].shape == (1, (frames - 1) * 256)  # hops of 256 samples between frames
    assert (tmp_path / "mine/summary.json").is_file()

    names |= {"reference_mel": torch.zeros(1, 40, 100), "text": "Good morning.", "duration": 120, "loss": torch.sum}
    exec(block("cache=False").replace("steps=16", "steps=2"), names)
    assert names["mel"].shape == (1, 120, 100) and len(names["trajectory"]) == 3
    gradients = [weight.grad for weight in names["policy"].parameters() if weight.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_plain_function_is_a_reward() -> None:
    names: dict[str, Any] = {}
    exec(block("def loudness"), names)
    assert names["loudness"]([torch.tensor([0.5, -0.5]), torch.zeros(3)], 24_000, text=["a", "b"]) == [0.5, 0.0]


def contributed(start: str) -> dict[str, Any]:
    """The names that an example of CONTRIBUTING defines."""
    names: dict[str, Any] = {"__name__": "contributed"}
    exec(compile(block(start), "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    return names


def test_a_contributed_reward_is_one() -> None:
    reward = contributed("class Softness")["reward_model"]()
    waveform = torch.tensor([[0.5, -0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0]])
    audio = Audio(waveform, torch.tensor([4, 2]), 16_000, torch.zeros(2, 1, 1), torch.tensor([1, 1]))
    scores = Rewards([reward])(audio, tiny_prompts().select([0, 1]))
    assert scores.total.tolist() == [-0.25, -1.0] and list(scores.breakdown) == ["softness"]


def test_a_contributed_algorithm_follows_the_rewards_gradient() -> None:
    algorithm = contributed("class PlainDraft")["algorithm"]()
    policy = tiny_policy()
    parts = Pipeline(
        policy=policy,
        vocoder=Silent(),
        rewards=Rewards([MelReward()]),
        reference=None,
        sampling=Sampling(steps=2, cfg_strength=0.0),
    )
    algorithm.check(parts)
    loss, metrics = algorithm.loss(parts, tiny_prompts(), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(-metrics["reward"].mean().item())
    loss.backward()
    assert sum(float(weight.grad.abs().sum()) for weight in policy.parameters() if weight.grad is not None) > 0
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        algorithm.Config(grad_steps=0)


def test_a_contributed_vocoder_speaks_each_item_at_its_own_length() -> None:
    vocoder = contributed("class Hum")["load"](None)
    mel = torch.full((2, 5, 100), -1.0)
    waveform = vocoder(mel, torch.tensor([5, 3]))
    assert waveform.shape == (2, 4 * 256) and not waveform[1, 2 * 256 :].any()
    loudness = 1 / (1 + torch.tensor(1.0).exp())  # sigmoid(-1)
    assert waveform[0, 26].item() == pytest.approx(loudness.item() * torch.tensor(0.06 * 26).sin().item())
