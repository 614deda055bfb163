"""Where what learns from preferences comes to rest, on the Gaussian flow whose mean moves (forward_problems.py).

Clips w and l of one pair share t and noise, so with v_theta - v_ref = theta g(t) the noise drops out of Flow-DPO's

    z = (beta / D) theta g(t)^2 d,    d = sum(w - l),    D elements                      (algorithms/families/pairs.py)

and labels of a Bradley-Terry model with the reward c sum(x) are P = sigma(c d). Where soft labels are P itself, the
loss of each pair is least at z = c d, so at one t the optimum is theta = c D / (beta g^2) for whatever pairs there are.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from forward_problems import ELEMENTS, GENERATED, MELS, Movable, pipeline, prompts, push
from pair_problems import Following
from problems import LinearGaussianFlow
from scipy.optimize import brentq
from torch import Tensor

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.data.preferences.load import PairBatch
from rlhf_mel.types import Audio

SLOPE, BETA = 0.5, 6.0
"""c, and the beta of a run: theta = c D / beta = 0.5 at t = 0."""


def sounds(mel: Tensor) -> Audio:
    """Clips of these mels, all frames of each; their sound is not listened to."""
    frames = torch.full((len(mel),), mel.shape[1])
    return Audio(torch.zeros(len(mel), 1), frames, 24_000, mel, frames)


def clips(count: int, seed: int, mean: float = Movable.flow.mean) -> Tensor:
    """Mels that the flow with this mean generates."""
    drawn = torch.randn(count, GENERATED, MELS, generator=torch.Generator().manual_seed(seed))
    return mean + Movable.flow.deviation * drawn


def compared(count: int, *, hard: bool = False) -> PairBatch:
    """Pairs of the flow's own clips, labelled with P as soft labels; `hard`: by one answer drawn from P."""
    first, second = clips(count, 1), clips(count, 2)
    difference = SLOPE * (first - second).sum((1, 2))
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(3))
    wins = drawn < difference.sigmoid() if hard else difference > 0
    chosen, rejected = first.where(wins[:, None, None], second), second.where(wins[:, None, None], first)
    labels = torch.ones(count) if hard else difference.abs().sigmoid()
    return PairBatch(
        prompts=prompts(count, 1),
        chosen=sounds(chosen),
        rejected=sounds(rejected),
        soft_labels=labels,
        margins=torch.zeros(count),
        weights=torch.ones(count),
    )


def differences(batch: PairBatch) -> Tensor:
    """d of each pair."""
    return (batch.chosen.mel - batch.rejected.mel).sum((1, 2))


def trained(name: str, batch: PairBatch, *, beta: float, updates: int, rate: float, **options: Any) -> float:
    """theta after gradient steps on one batch, averaged over the second half of them."""
    policy = Following()
    parts = pipeline(policy, anchored=beta > 0)
    algorithm = load_algorithm(name, options, beta=beta)
    algorithm.check(parts)
    optimizer, generator = torch.optim.SGD([policy.theta], lr=rate), torch.Generator().manual_seed(0)
    collected, kept = algorithm.collect_pairs(parts, batch, generator), []
    for _ in range(updates):
        optimizer.zero_grad()
        algorithm.loss(parts, collected, generator)[0].backward()
        optimizer.step()
        kept.append(policy.theta.item())
    return sum(kept[updates // 2 :]) / (updates - updates // 2)


AT_NOISE: dict[str, Any] = dict(time_power=1e6)
"""Times of density (1 + p) (1 - t)^p: all within about 1e-5 of 0, where g = 1."""


def test_at_one_time_dpo_reaches_the_tilted_mean() -> None:
    """theta = c D / beta, the mean of p exp(R / beta') with beta' = (beta / D) s^2, to the rounding of the steps."""
    theta = trained("flow_dpo", compared(64), beta=BETA, updates=60, rate=0.4, **AT_NOISE)
    flow = Movable.flow
    tilted = flow.tilted(BETA / ELEMENTS * flow.deviation**2, slope=SLOPE)
    assert tilted.mean - flow.mean == pytest.approx(SLOPE * ELEMENTS / BETA) == pytest.approx(0.5)
    assert theta == pytest.approx(tilted.mean - flow.mean, rel=1e-3)


def test_label_smoothing_is_undone_by_labels_that_are_wrong_as_often() -> None:
    """Labels P' = (P - e) / (1 - 2 e), smoothed by e, are P again: the same point of rest. (Each is below 1 here.)"""
    batch, smoothing = compared(64), 0.05
    sharper = (batch.soft_labels - smoothing) / (1 - 2 * smoothing)
    kept = torch.nonzero(sharper < 1)[:, 0].tolist()
    assert len(kept) > 32
    fewer = PairBatch(
        prompts=batch.prompts.select(kept),
        chosen=sounds(batch.chosen.mel[kept]),
        rejected=sounds(batch.rejected.mel[kept]),
        soft_labels=sharper[kept],
        margins=torch.zeros(len(kept)),
        weights=torch.ones(len(kept)),
    )
    theta = trained("flow_dpo", fewer, beta=BETA, updates=80, rate=0.4, label_smoothing=smoothing, **AT_NOISE)
    assert theta == pytest.approx(SLOPE * ELEMENTS / BETA, rel=1e-3)


def rest_over_all_times(batch: PairBatch) -> float:
    """The root k of the gradient, sum over pairs and times of g^2 d (sigma(k g^2 d) - P), as theta = k D / beta."""
    d, labels = differences(batch).double(), batch.soft_labels.double()
    squares = push((torch.arange(2000).double() + 0.5) / 2000).square()[:, None]

    def gradient(k: float) -> float:
        return (squares * d * ((k * squares * d).sigmoid() - labels)).sum().item()

    return brentq(gradient, 0.0, 10.0) * ELEMENTS / BETA


def test_over_all_times_it_rests_where_the_mean_gradient_is_0() -> None:
    """g^2 goes from 1 over 1.7 to 0 here: a compromise, between the theta = c D / (beta g^2) of all times.

    Stratified draws of time in 64 pairs: the noise of the averaged theta is far below the 2 % allowed.
    """
    batch = compared(64)
    want = rest_over_all_times(batch)
    assert abs(want / (SLOPE * ELEMENTS / BETA) - 1) > 0.1, "else a wrong weight of time would not be seen"
    theta = trained("flow_dpo", batch, beta=BETA, updates=150, rate=0.4, num_noise_samples=4)
    assert theta == pytest.approx(want, rel=0.02)


def test_answers_of_people_lead_there_too() -> None:
    """One answer a pair, drawn from P: the fisher information of k is E[d^2 P (1 - P)], so theta's deviation is

    (D / beta) / sqrt(N E[d^2 P (1 - P)]) at t = 0: with 2,000 pairs 0.03; four of these.
    """
    batch = compared(2000, hard=True)
    d = differences(batch)
    information = (d.square() * (SLOPE * d).sigmoid() * (-SLOPE * d).sigmoid()).sum().item()
    deviation = ELEMENTS / BETA / information**0.5
    assert deviation < 0.04
    theta = trained("flow_dpo", batch, beta=BETA, updates=60, rate=0.4, **AT_NOISE)
    assert abs(theta - SLOPE * ELEMENTS / BETA) < 4 * deviation


def test_sft_reaches_the_mean_of_the_chosen_clips() -> None:
    """E[u - v_ref | t, x_1] = g(t) (x_1 - m), so the regression of g theta on it is the mean of the chosen x_1 - m.

    Its noise, g (1 + a (1 - t)) x_0 beside it, averages over 512 clips, 6 elements, 4 draws and 40 updates.
    """
    batch = compared(512)
    want = batch.chosen.mel.mean().item() - Movable.flow.mean
    assert want > 0.1
    theta = trained("sft_chosen", batch, beta=0.0, updates=80, rate=0.3, num_noise_samples=4)
    assert theta == pytest.approx(want, abs=0.01)


def test_the_policy_that_was_trained_speaks_the_tilted_mean() -> None:
    """What is generated, and not only theta: mean of 4,000 rollouts of 6 elements, 4 standard errors."""
    flow = Movable.flow
    theta = trained("flow_dpo", compared(64), beta=BETA, updates=60, rate=0.4, **AT_NOISE)
    mel = pipeline(Movable(theta)).sample(prompts(4000, 1), torch.Generator().manual_seed(5)).mel
    want = LinearGaussianFlow(flow.mean, flow.deviation).tilted(BETA / ELEMENTS * flow.deviation**2, slope=SLOPE).mean
    assert mel.mean().item() == pytest.approx(want, abs=4 * mel.std().item() / mel.numel() ** 0.5 + 1e-3)


@pytest.mark.parametrize("name", ["flow_dpo", "flow_kto", "sft_chosen"])
def test_on_its_own_rollouts_it_moves_towards_the_reward(name: str) -> None:
    """The larger sum is preferred always, which has no finite optimum: the mean goes up from update to update."""
    policy = Movable()
    parts = pipeline(policy, anchored=name != "sft_chosen")
    algorithm = load_algorithm(name, {"online": True}, beta=0.0 if name == "sft_chosen" else BETA)
    algorithm.check(parts)
    generator, seen = torch.Generator().manual_seed(0), [0.0]
    for _ in range(5):
        with torch.no_grad():
            collected = algorithm.collect(parts, prompts(128, 8), generator)
        for _ in range(4):  # num_iterations
            policy.theta.grad = None
            algorithm.loss(parts, collected, generator)[0].backward()
            with torch.no_grad():
                policy.theta -= 0.2 * policy.theta.grad
        seen.append(policy.theta.item())
    assert all(later > before for before, later in itertools.pairwise(seen)) and seen[-1] > 0.1
