"""Flow-KTO: utilities and the reference point by hand, labels of pairs and of rollouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from forward_problems import Movable, prompts
from forward_problems import pipeline as movable_pipeline
from pair_problems import (
    generator,
    moved,
    pairs,
    parts,
    plain,
)

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.flow_kto import kto_loss, reference_point
from rlhf_mel.flow.reference import ReferencePolicy


@pytest.mark.parametrize(
    ("utility", "good", "bad"),
    [
        # x = 1 - 0.5 = 0.5 and -1 - 0.5 = -1.5, judged as good: U(x); as bad: U(-x)
        ("kahneman_tversky", 1 - 1 / (1 + math.exp(-0.5)), 1 - 1 / (1 + math.exp(-1.5))),
        ("loss_averse", 1 + math.log(1 + math.exp(-0.5)), 1 + math.log(1 + math.exp(-1.5))),
        ("risk_seeking", 1 - math.log(1 + math.exp(0.5)), 1 - math.log(1 + math.exp(1.5))),
    ],
)
def test_kto_by_hand(utility: str, good: float, bad: float) -> None:
    """A desirable clip of r = 1, an undesirable one of r = -1, z_0 = 0.5, lambdas 2 and 3; and labels of one half."""
    gains = torch.tensor([[1.0, -1.0]]) - 0.5
    losses = kto_loss(gains, torch.tensor([1.0, 0.0]), utility=utility, weights=(2.0, 3.0))
    assert losses[0].tolist() == pytest.approx([2 * good, 3 * bad])
    half = kto_loss(gains, torch.tensor([0.5, 0.5]), utility=utility, weights=(2.0, 3.0))
    one = kto_loss(gains, torch.tensor([1.0, 1.0]), utility=utility, weights=(2.0, 3.0))
    other = kto_loss(gains, torch.tensor([0.0, 0.0]), utility=utility, weights=(2.0, 3.0))
    torch.testing.assert_close(half, (one + other) / 2)


def test_the_reference_point_is_a_mean_above_0_without_gradient() -> None:
    rewards = torch.tensor([[1.0, 4.0], [-1.0, 0.0]], requires_grad=True)
    assert reference_point(rewards).item() == 1.0 and not reference_point(rewards).requires_grad
    assert reference_point(-rewards).item() == 0.0


def test_kto_takes_a_pair_as_two_labels() -> None:
    """Soft label 0.8: the chosen clip is desirable with 0.8, the rejected one with 0.2."""
    trained, reference = moved()
    pipeline = parts(trained, ReferencePolicy(reference))
    algorithm: Any = load_algorithm("flow_kto", {"desirable_weight": 2.0}, beta=20.0)
    collected = algorithm.collect_pairs(pipeline, pairs(), generator())
    torch.testing.assert_close(collected.desirable, torch.tensor([1.0, 0.8, 0.6, 0.0, 0.2, 0.4]))
    assert collected.weights.tolist() == [1.0, 2.0, 0.5] * 2
    loss, logged = algorithm.loss(pipeline, collected, generator(7))
    errors, of_reference = plain(trained, reference, pairs(), generator(7), 1)
    rewards = -10.0 * (errors - of_reference)[0]
    x = rewards - rewards.mean().clamp(min=0)
    d = collected.desirable
    each = 2 * d * (1 - x.sigmoid()) + (1 - d) * (1 - (-x).sigmoid())
    assert loss.item() == pytest.approx((collected.weights * each).sum().item() / 7, rel=1e-4)  # 2 * 3.5
    assert logged["reference_point"].item() == pytest.approx(max(rewards.mean().item(), 0.0), rel=1e-3, abs=1e-5)


def test_kto_labels_rollouts_by_the_mean_of_their_group() -> None:
    """Rewards [1, 2, 6] with mean 3: bad, bad, good; [4, 4, 4]: nothing; every rollout counts, none has a partner."""

    def listener(completions: list[Any], **columns: Any) -> list[float]:
        return [1.0, 2.0, 6.0, 4.0, 4.0, 4.0]

    pipeline = movable_pipeline(Movable(0.1), listener)
    algorithm: Any = load_algorithm("flow_kto", {"online": True}, beta=1.0)
    collected = algorithm.collect(pipeline, prompts(6, 3), generator())
    assert collected.desirable.tolist() == [0, 0, 1, 0, 0, 0] and collected.weights.tolist() == [1, 1, 1, 0, 0, 0]
    assert collected.metrics["dropped_clips"].tolist() == [False] * 3 + [True] * 3
    assert list(collected.clips.draw_ids) == list(range(6))
    _, logged = algorithm.loss(pipeline, collected, generator(1))
    assert len(logged["rewards/chosen"]) == 1 and len(logged["rewards/rejected"]) == 2
