"""Noise from seeds: one rule for every way to sample, distinct for each item, the global generator untouched."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from torch import Tensor

from rlhf_mel import cli
from rlhf_mel.evaluation import evaluate as evaluate_module
from rlhf_mel.evaluation.evaluate import EvaluationResult, evaluate
from rlhf_mel.flow.noise import branched, item_generator, item_noise, seeded
from rlhf_mel.pipeline import Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.training import trainer as trainer_module

SEED = 7


class Frames(small_runs.Voice):
    """A vocoder that lets a mel be read from its waveform: each of 8 channels is held for 8 of a hop's 64 samples."""

    def forward(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        return mel.repeat_interleave(8, dim=-1).flatten(1) + 0 * self.gain


def stand_still(policy: Any) -> Any:
    """The policy with velocity 0: its mel is the noise that it began with."""
    own = policy.velocity
    policy.velocity = lambda x, t, cond: 0 * own(x, t, cond)
    return policy


def test_a_seed_and_a_row_are_the_same_noise_on_the_command_line_in_an_evaluation_and_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "default_judges", list)  # they are slow, and not asked for here
    dataset = small_runs.write_dataset(tmp_path / "data").head(3)
    prompts = dataset.collate([dataset[row] for row in range(3)])

    arguments = Namespace(batch_size=1, device="cpu", steps=2, cfg=2.0, sway=-1.0, seed=SEED)
    spoken = list(cli.speak(arguments, stand_still(small_runs.policy()), Frames(), dataset))

    policy, rewards = stand_still(small_runs.policy()), Rewards([small_runs.Near()])
    evaluated = evaluate(policy, Frames(), rewards, prompts, sampling=Sampling(steps=3), seed=SEED, batch_size=2)

    written: list[EvaluationResult] = []
    monkeypatch.setattr(trainer_module, "write_samples", lambda folder, prompts, before, after: written.append(before))
    monkeypatch.setattr(small_runs, "Voice", Frames)
    options: dict[str, Any] = dict(seed=SEED, beta=0.0, num_eval_prompts=3, max_steps=1, sampling_steps=4)
    run = small_runs.trainer(tmp_path / "run", dataset, **options)
    stand_still(run.policy)
    run.train()

    assert len(spoken) == len(evaluated.waveforms) == len(written[0].waveforms) == 3
    for row, waveform in enumerate(spoken):
        assert torch.equal(waveform, evaluated.waveforms[row])
        assert torch.equal(waveform, written[0].waveforms[row])
        # And it is that of item_generator, from the frame on where the reference of 32 frames ends.
        frames = 32 + len(waveform) // 64 + 1
        noise = item_noise([frames], 8, [item_generator(SEED, row)], torch.device("cpu"), torch.float32)
        assert torch.equal(waveform.view(-1, 64)[:, ::8], noise[0, 32:-1])


def test_branched_generators_are_distinct_and_leave_their_parent_where_it_was() -> None:
    parent, untouched = seeded(3), seeded(3)
    first, second = (torch.randn(4, generator=child) for child in branched(parent, 2))
    (again,) = branched(parent, 1)
    assert torch.equal(torch.randn(4, generator=again), first)  # the first child, however many there are
    assert not torch.equal(first, second)
    assert torch.equal(torch.randn(4, generator=parent), torch.randn(4, generator=untouched))
