"""Probabilities by hand, optima in closed form, logistic regression by scikit-learn, TRL's own loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from rlhf_mel.rewards.bradley_terry import (
    LossConfig,
    bootstrap_counts,
    davidson_log_probs,
    preference_loss,
    preference_nll,
    rao_kupper_log_probs,
    reward_metrics,
    tie_threshold,
)
from rlhf_mel.rewards.calibration import reliability


def log(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).log()


def test_rao_kupper_by_hand() -> None:
    # worths 2 and 1, theta 2: P(chosen) = 2 / (2 + 2 * 1) = 1/2, P(rejected) = 1 / (1 + 2 * 2) = 1/5,
    # P(tie) = 2 * 1 * (2^2 - 1) / ((2 + 2 * 1)(1 + 2 * 2)) = 6 / 20
    probs = torch.stack(rao_kupper_log_probs(log(2), log(2))).exp()
    torch.testing.assert_close(probs, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64))


def test_davidson_by_hand() -> None:
    # worths 4 and 1, nu 1: the root of their product is 2, so 4/7, 1/7 and 2/7
    probs = torch.stack(davidson_log_probs(log(4), log(1))).exp()
    torch.testing.assert_close(probs, torch.tensor([4 / 7, 1 / 7, 2 / 7], dtype=torch.float64))


@pytest.mark.parametrize("log_probs", [rao_kupper_log_probs, davidson_log_probs])
def test_models_of_ties_are_distributions_symmetric_and_stable(log_probs: Any) -> None:
    difference = torch.tensor([-200.0, -3.0, 0.0, 0.4, 200.0], dtype=torch.float64)
    threshold = torch.tensor(0.7, dtype=torch.float64)
    chosen, rejected, tie = log_probs(difference, threshold)
    torch.testing.assert_close(chosen.exp() + rejected.exp() + tie.exp(), torch.ones(5, dtype=torch.float64))
    other_chosen, other_rejected, other_tie = log_probs(-difference, threshold)
    torch.testing.assert_close((other_chosen, other_rejected, other_tie), (rejected, chosen, tie))
    assert all(part.isfinite().all() for part in (chosen, rejected, tie))


def test_without_ties_both_models_are_bradley_terry() -> None:
    difference = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for log_probs, threshold in ((rao_kupper_log_probs, 1e-9), (davidson_log_probs, -20.0)):
        chosen = log_probs(difference, torch.tensor(threshold, dtype=torch.float64))[0]
        torch.testing.assert_close(chosen, F.logsigmoid(difference), atol=1e-8, rtol=0)


def test_the_loss_of_a_pair_by_hand() -> None:
    # sigma(log 3) = 3/4. q = 0.8 with smoothing 0.1 becomes 0.8 * 0.9 + 0.2 * 0.1 = 0.74.
    d, q = torch.tensor([math.log(3)]), torch.tensor([0.8])
    expected = -(0.74 * math.log(3 / 4) + 0.26 * math.log(1 / 4))
    assert preference_nll(d, q, LossConfig(label_smoothing=0.1)).item() == pytest.approx(expected, rel=1e-6)


def test_a_margin_and_soft_label_put_the_optimum_at_their_sum() -> None:
    # d - m = logit(q'), the docstring's claim: with q = 0.7, m = 1.2 the best d is 1.2 + log(7/3).
    def loss(d: float) -> float:
        one = torch.tensor([[d]], dtype=torch.float64)
        given = [torch.tensor([value], dtype=torch.float64) for value in (0.7, 0.6)]
        weights = torch.ones(1, dtype=torch.float64)
        config = LossConfig(margin_scale=2.0)
        zero = torch.zeros_like(one)
        return float(
            preference_loss(one, zero, soft_labels=given[0], margins=given[1], weights=weights, config=config)[0]
        )

    best = scipy.optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x
    assert best == pytest.approx(1.2 + math.log(7 / 3), abs=1e-6)


def trl_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, coefficient: float) -> Tensor:
    """The lines of trl 1.16's RewardTrainer.compute_loss."""
    loss = -F.logsigmoid(chosen - rejected - margin).mean()
    return loss + coefficient * torch.mean((chosen + rejected) ** 2)


def test_the_loss_of_whole_labels_is_that_of_trl() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = torch.randn(3, 8, generator=generator)
    config = LossConfig(center_rewards_coefficient=0.01)
    ones = torch.ones(8)
    loss, metrics = preference_loss(
        chosen[:, None], rejected[:, None], soft_labels=ones, margins=margins, weights=ones, config=config
    )
    torch.testing.assert_close(loss, trl_loss(chosen, rejected, margins, 0.01))
    assert metrics["accuracy"].mean() == (chosen > rejected).float().mean()
    torch.testing.assert_close(metrics["margin"].mean(), (chosen - rejected).mean())
    both = torch.cat([chosen, rejected])
    assert [metrics[f"{name}_reward"] for name in ("min", "mean", "max")] == [both.min(), both.mean(), both.max()]


def test_a_weight_of_two_is_two_pairs_and_members_learn_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 3, 2, generator=generator, requires_grad=True)
    q, m = torch.tensor([1.0, 0.7, 0.9]), torch.zeros(3)
    weights, counts = torch.tensor([2.0, 1.0, 5.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    loss = preference_loss(chosen, rejected, soft_labels=q, margins=m, weights=weights, counts=counts)[0]
    # by hand: member 0 has row 0 (weight 2) twice and row 1 once; member 1 row 1 once and row 2 (weight 5) three times
    nll = preference_nll(chosen - rejected, q[:, None])
    by_hand = ((2 * 2 * nll[0, 0] + nll[1, 0]) / 8 + (nll[1, 1] + 5 * 3 * nll[2, 1]) / 8) / 2
    torch.testing.assert_close(loss, by_hand)
    twice = torch.tensor([0, 0, 1, 2, 2, 2, 2, 2])
    repeated = preference_loss(
        chosen[twice], rejected[twice], soft_labels=q[twice], margins=m[twice], weights=torch.ones(8)
    )[0]
    torch.testing.assert_close(
        preference_loss(chosen, rejected, soft_labels=q, margins=m, weights=weights)[0], repeated
    )
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert gradient[0, 1] == 0 == gradient[2, 0] and gradient[1].all()


def test_bootstrap_counts_are_poisson() -> None:
    # mean and variance 1; of 4 x 5000 draws their deviations are 0.007 and 0.012 (fourth moment of Poisson(1): 4)
    counts = bootstrap_counts(5000, 4, torch.Generator().manual_seed(0))
    assert counts.mean().item() == pytest.approx(1, abs=0.03) and counts.var().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(counts[:, 0], counts[:, 1])
    assert bootstrap_counts(3, 1, torch.Generator()).tolist() == [[1.0]] * 3


def test_ties_are_not_counted_as_right_or_wrong() -> None:
    metrics = reward_metrics(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1, 0.5, 0.6]))
    assert metrics["accuracy"].nan_to_num(-1).tolist() == [1, -1, 1]


@pytest.mark.parametrize("tie_model", ["rao_kupper", "davidson"])
def test_the_optimum_of_two_clips_is_the_share_of_answers(tie_model: Any) -> None:
    # Two parameters, three shares that sum to 1: the likelihood is greatest where the probabilities are the shares
    # w, l and t. Rao-Kupper: sigma(d - eta) = w and sigma(-d - eta) = l. Davidson: d = log(w / l), nu = t / sqrt(w l).
    w, lost, t = 0.5, 0.2, 0.3
    labels = torch.tensor([1.0] * 50 + [0.0] * 20 + [0.5] * 30, dtype=torch.float64)
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    config = LossConfig(tie_model=tie_model)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        threshold = tie_threshold(parameters[1], tie_model)
        loss = preference_nll(parameters[0].expand(100), labels, config, threshold).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    difference, threshold = parameters[0].item(), tie_threshold(parameters[1], tie_model).item()
    logit = {share: math.log(share / (1 - share)) for share in (w, lost)}
    if tie_model == "rao_kupper":
        assert difference == pytest.approx((logit[w] - logit[lost]) / 2, abs=1e-5)
        assert threshold == pytest.approx(-(logit[w] + logit[lost]) / 2, abs=1e-5)
    else:
        assert difference == pytest.approx(math.log(w / lost), abs=1e-5)
        assert threshold == pytest.approx(math.log(t / math.sqrt(w * lost)), abs=1e-5)


def test_a_linear_score_is_logistic_regression() -> None:
    # P(chosen) = sigma(w . (x_c - x_r)) is a logistic regression of the differences without intercept. A soft label q
    # is a row won with weight q and lost with weight 1 - q.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2, 3))
    q, weight = rng.uniform(0.5, 1, 200), rng.uniform(0.2, 2, 200)
    differences = x[:, 0] - x[:, 1]
    rows, labels = np.concatenate([differences] * 2), np.repeat([1, 0], 200)
    fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(
        rows, labels, sample_weight=np.concatenate([weight * q, weight * (1 - q)])
    )
    features, w = torch.from_numpy(x), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        chosen, rejected = ((features[:, side] @ w)[:, None] for side in (0, 1))
        loss = preference_loss(
            chosen,
            rejected,
            soft_labels=torch.from_numpy(q),
            margins=torch.zeros(200, dtype=torch.float64),
            weights=torch.from_numpy(weight),
        )[0]
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(w.detach().numpy(), fitted.coef_[0], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie_model": "glenn_david"}, r"tie_model: expected one of \['none', 'rao_kupper', 'davidson'\]"),
        ({"label_smoothing": 0.5}, r"label_smoothing: expected a share in \[0, 0.5\), got 0.5"),
        ({"margin_scale": -1.0}, "margin_scale: expected a number of at least 0"),
        ({"center_rewards_coefficient": math.nan}, "center_rewards_coefficient: expected a number of at least 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


def test_calibration_error_by_hand() -> None:
    # Two bins of confidence: [0.5, 0.75) holds 0.6 (right) and 0.4 (that is 0.6 for the other, wrong) and
    # [0.75, 1] holds 0.9 (right with 3/4 of the votes): (2 |0.5 - 0.6| + 1 |0.75 - 0.9|) / 3 = 0.35 / 3
    found = reliability(np.array([0.6, 0.4, 0.9]), np.array([1.0, 1.0, 0.75]), bins=2)
    np.testing.assert_allclose(found.confidence, [0.6, 0.9])
    np.testing.assert_allclose(found.accuracy, [0.5, 0.75])
    assert found.expected_calibration_error == pytest.approx(0.35 / 3)


def test_reliability_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    probabilities = rng.uniform(0.5, 1, 500)
    labels = (rng.uniform(size=500) < probabilities).astype(float)
    found = reliability(probabilities, labels, bins=5)
    share, mean = calibration_curve(labels, probabilities, n_bins=10)  # of [0, 1]: the upper half are our five
    np.testing.assert_allclose(found.accuracy, share)
    np.testing.assert_allclose(found.confidence, mean)
    assert found.expected_calibration_error < 0.1  # the labels were drawn from the probabilities


@pytest.mark.parametrize("values", [([0.5], [1.0, 0.0]), ([], []), ([math.nan], [1.0]), ([0.4], [1.1])])
def test_reliability_refuses(values: Any) -> None:
    with pytest.raises(ValueError, match="reliability: expected"):
        reliability(*(np.array(side) for side in values))
