"""README's Python runs as it stands, but for fewer updates and prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text("utf-8"), re.DOTALL)


def block(start: str) -> str:
    (found,) = [code for code in BLOCKS if start in code]
    return found


def test_every_block_is_python() -> None:
    for code in BLOCKS:
        compile(code, "README.md", "exec")


def test_training_and_sampling_run(tmp_path: Path) -> None:
    training = block("RLHFTrainer(")
    for said, here in (
        ("max_steps=15", "max_steps=1, num_eval_prompts=1, per_device_train_batch_size=1, use_cpu=True"),
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
