"""Best-of-N: the expected maximum, its own noise for each candidate, and the evaluation's sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussian import ELEMENTS, FLOW, GaussianPolicy, MelReward, Silent, prompts
from problems import tiny_policy, tiny_prompts
from torch import Tensor

from rlhf_mel.evaluation.evaluate import evaluate
from rlhf_mel.flow.noise import item_generator, item_generators
from rlhf_mel.flow.policy import rollout
from rlhf_mel.pipeline import Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.samplers.best_of_n import BestOfN, candidate_generators
from rlhf_mel.types import Audio, Prompts

OPTIONS: dict[str, Any] = dict(steps=2, cfg_strength=0.0, sway_sampling_coef=None)


def loudness(completions: list, **columns: object) -> list[float]:
    """A black box: how much of each waveform is above 0."""
    return [float((completion > 0).mean()) for completion in completions]


class Hum(Silent):
    """A vocoder: each frame sounds for a hop at the mean of its channels. Without a gradient."""

    differentiable = False

    def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        return mel.mean(-1).detach().repeat_interleave(self.mel_spec.hop_length, dim=1)


@pytest.mark.parametrize(("n", "deviations"), [(1, 0.0), (2, 0.56419), (4, 1.02938), (8, 1.42360)])
def test_the_mean_of_the_best_is_the_expected_maximum(n: int, deviations: float) -> None:
    """sum x_1 ~ N(D m, D d^2), and E max of N standard normals (David & Nagaraja, Order Statistics).

    3,000 prompts, within 4.5 standard errors; the maximum has less spread than one draw.
    """
    own = BestOfN(vocoder=Silent(), rewards=Rewards([MelReward(differentiable=False)]), n=n)
    policy = GaussianPolicy(2, exact=True)
    mel = own(policy, prompts(3000), generator=torch.Generator().manual_seed(0), **OPTIONS).mel
    deviation = ELEMENTS**0.5 * FLOW.deviation
    want = ELEMENTS * FLOW.mean + deviations * deviation
    assert mel.sum((1, 2)).mean().item() == pytest.approx(want, abs=4.5 * deviation / 3000**0.5)


def test_it_keeps_the_best_of_its_own_rollouts_by_a_black_box() -> None:
    """Each candidate rolled out here one by one; three prompts of two durations."""
    policy, own = tiny_policy(), tiny_prompts()
    rewards = Rewards([loudness])
    got = BestOfN(vocoder=Hum(), rewards=rewards, n=3)(policy, own, generator=torch.Generator().manual_seed(4), steps=3)
    candidates = []
    for generators in candidate_generators(item_generators(torch.Generator().manual_seed(4), 3), 3):
        candidates.append(rollout(policy, own, generator=generators, grad_steps=0, steps=3).mel)
    assert min((candidates[i] - candidates[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1
    chosen = []
    for row, frames in enumerate(got.lengths_frames.tolist()):
        scores = [loudness([c[row, : frames - 1].mean(-1).numpy()])[0] for c in candidates]  # T frames, T - 1 hops
        chosen.append(scores.index(max(scores)))
        assert torch.equal(got.mel[row], candidates[chosen[-1]][row])
    assert len(set(chosen)) > 1, "another seed: all rows chose alike"


def test_the_best_of_one_is_plain_sampling_and_a_row_is_what_it_is_alone() -> None:
    policy, own = tiny_policy(), tiny_prompts()
    rewards = Rewards([MelReward()])
    plain = rollout(policy, own, generator=torch.Generator().manual_seed(4), grad_steps=0, steps=3)
    one = BestOfN(vocoder=Silent(), rewards=rewards, n=1)
    assert torch.equal(one(policy, own, generator=torch.Generator().manual_seed(4), steps=3).mel, plain.mel)
    best = BestOfN(vocoder=Silent(), rewards=rewards, n=4)
    together = best(policy, own, generator=[item_generator(0, row) for row in range(3)], steps=3)
    for row in range(3):
        alone = best(policy, own.select([row]), generator=[item_generator(0, row)], steps=3)
        frames = int(alone.lengths_frames)
        torch.testing.assert_close(together.mel[row, :frames], alone.mel[0], rtol=1e-4, atol=1e-5)
    best(policy, own, steps=3)  # the global generator will do


class Fails(MelReward):
    """No score below the mean of the flow; or none at all."""

    def score(self, audio: Audio, p: Prompts) -> Tensor:
        total = super().score(audio, p)
        return total.masked_fill(total < self.scale * ELEMENTS * FLOW.mean, math.nan)


def test_a_rollout_without_a_score_is_the_worst() -> None:
    """Half of all sums lie below the mean. Of 8 at least one does not, but for 1 prompt in 256."""
    policy = GaussianPolicy(2, exact=True)
    sampler = BestOfN(vocoder=Silent(), rewards=Rewards([Fails()]), n=8)
    mel = sampler(policy, prompts(256), generator=torch.Generator().manual_seed(0), **OPTIONS).mel
    assert (mel.sum((1, 2)) < ELEMENTS * FLOW.mean).sum() <= 5
    none = BestOfN(vocoder=Silent(), rewards=Rewards([Fails(scale=1e-30, target=0.0)]), n=2)
    assert none(policy, prompts(2), generator=torch.Generator().manual_seed(0), **OPTIONS).mel.isfinite().all()


def test_the_evaluation_judges_it_under_the_same_prompts_and_seeds() -> None:
    policy, rewards, own = tiny_policy(), Rewards([MelReward()]), tiny_prompts()
    options: dict[str, Any] = dict(sampling=Sampling(steps=2), judges=[], seed=3)
    plain = evaluate(policy, Hum(), rewards, own, **options)
    first = evaluate(policy, Hum(), rewards, own, sampler=BestOfN(vocoder=Hum(), rewards=rewards, n=1), **options)
    assert first.measures == plain.measures
    best = BestOfN(vocoder=Hum(), rewards=rewards, n=4)
    four = evaluate(policy, Hum(), rewards, own, sampler=best, **options)
    gain = torch.tensor(four.measures["reward"]) - torch.tensor(plain.measures["reward"])
    assert (gain >= 0).all() and gain.max() > 0.1
    small = evaluate(policy, Hum(), rewards, own, sampler=best, batch_size=2, **options)
    assert small.measures["reward"] == pytest.approx(four.measures["reward"], rel=1e-4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="n of best-of-N: expected a whole number of at least 1, got 0"):
        BestOfN(vocoder=Silent(), rewards=Rewards([loudness]), n=0)
