"""Flow-DPO and its control: losses by hand and against a plain loop, gradients, labels, margins, weights, options."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from forward_problems import Movable
from forward_problems import pipeline as movable_pipeline
from pair_problems import (
    CHOSEN,
    LOG2,
    NAMES,
    Following,
    generator,
    gradient,
    movable_pairs,
    moved,
    pairs,
    parts,
    plain,
    sound,
)
from problems import tiny_policy
from torch import Tensor

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.families.clip_fit import Fit
from rlhf_mel.algorithms.families.pairs import weighted_mean
from rlhf_mel.algorithms.flow_dpo import FlowDPO, dpo_loss
from rlhf_mel.algorithms.flow_kto import FlowKTO, kto_loss, reference_point
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.rewards.bradley_terry import preference_loss


def test_the_loss_by_hand() -> None:
    """-log sigma(z) = log(1 + e^-z); p = 0.8 at z = 1: 0.8 log(1 + 1/e) + 0.2 log(1 + e); smoothing 0.1: p = 0.74."""
    z = torch.tensor([[0.0, 1.0, 1.0]])
    labels = torch.tensor([1.0, 1.0, 0.8])
    up, down = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    want = torch.tensor([[LOG2, up, 0.8 * up + 0.2 * down]])
    torch.testing.assert_close(dpo_loss(z, labels), want)
    smoothed = dpo_loss(z, labels, label_smoothing=0.1)[0, 2].item()
    assert smoothed == pytest.approx(0.74 * up + 0.26 * down)


def test_the_gradient_of_the_loss_is_sigma_minus_the_label() -> None:
    z = torch.tensor([[-2.0, 0.5, 3.0]], requires_grad=True)
    labels = torch.tensor([0.9, 0.5, 0.7])
    dpo_loss(z, labels).sum().backward()
    torch.testing.assert_close(z.grad, z.detach().sigmoid() - labels)


def test_the_mean_over_pairs_is_by_their_weights() -> None:
    """(2 * mean(1, 3) + 0.5 * 4) / 2.5 = 2.4: the third has no weight, and 15 times the weights change nothing."""
    values = torch.tensor([[1.0, 4.0, 7.0], [3.0, 4.0, 7.0]], requires_grad=True)
    weights = torch.tensor([2.0, 0.5, 0.0])
    assert weighted_mean(values, weights).item() == pytest.approx(2.4)
    assert weighted_mean(values, 15 * weights).item() == pytest.approx(2.4)
    none = weighted_mean(values, torch.zeros(3))
    none.backward()
    assert none.item() == 0 and values.grad is not None and (values.grad == 0).all()


def test_it_is_the_mean_of_the_reward_model() -> None:
    """preference_loss of the same differences, labels and weights, with one member."""
    generated = generator(3)
    chosen, rejected = torch.randn(2, 5, 1, generator=generated)
    labels, weights = torch.rand(2, 5, generator=generated)
    weights = 15 * weights
    want, _ = preference_loss(chosen, rejected, soft_labels=labels, margins=torch.zeros(5), weights=weights)
    torch.testing.assert_close(weighted_mean(dpo_loss((chosen - rejected).T, labels), weights), want)


def test_implicit_rewards_by_hand() -> None:
    """-(beta / 2) (0.3 - 0.5) = 0.4 with beta 4."""
    fit = Fit(errors=torch.tensor([[0.3]]), excess=torch.tensor([[0.3 - 0.5]]), anchors=torch.zeros(1, 1))
    assert fit.rewards(4.0).item() == pytest.approx(0.4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_errors_are_those_of_each_clip_alone(lora: bool) -> None:
    """Values and gradient against a plain loop; the reference is a copy, or the policy with LoRA off."""
    trained, reference = moved(lora)
    own = ReferencePolicy(trained) if lora else ReferencePolicy(reference)
    trained.train()  # as the Trainer does; dropout must stay off all the same
    algorithm: Any = load_algorithm("flow_dpo", {"num_noise_samples": 2}, beta=20.0)
    pipeline = parts(trained, own, cfg_strength=1.5)
    collected = algorithm.collect_pairs(pipeline, pairs(), generator())
    fit = algorithm.fit(pipeline, collected.clips, generator(7))
    assert trained.training
    errors, of_reference = plain(trained, reference, pairs(), generator(7), 2)
    torch.testing.assert_close(fit.errors, errors, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fit.excess, errors - of_reference, rtol=1e-3, atol=2e-6)
    assert fit.excess.abs().min() > 1e-4

    loss, logged = algorithm.loss(pipeline, collected, generator(7))
    loss.backward()
    got = gradient(trained)
    rewards = -10.0 * (errors - of_reference)
    z = rewards[:, :3] - rewards[:, 3:]
    p = pairs().soft_labels
    want = (pairs().weights * (p * (1 + (-z).exp()).log() + (1 - p) * (1 + z.exp()).log()).mean(0)).sum() / 3.5
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
    expected = gradient(trained)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(logged["rewards/chosen"], rewards[:, :3].mean(0).detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logged["rewards/margins"], z.mean(0).detach(), rtol=1e-3, atol=1e-4)
    assert logged["rewards/accuracies"].tolist() == (z > 0).float().mean(0).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    """Central differences of theta with h = 0.02; the error of their own is about h^2, that of float32 1e-7 / h."""
    trained = Following(0.2)
    pipeline = movable_pipeline(trained)
    algorithm: Any = load_algorithm(name, {"num_noise_samples": 3}, beta=0.5 if name == "sft_chosen" else 5.0)
    collected = algorithm.collect_pairs(pipeline, movable_pairs(), generator())

    def loss(theta: float) -> Tensor:
        trained.theta.data.fill_(theta)
        value: Tensor = algorithm.loss(pipeline, collected, generator(3))[0]
        return value

    loss(0.2).backward()
    assert trained.theta.grad is not None
    with torch.no_grad():
        want = (loss(0.22) - loss(0.18)).item() / 0.04
    if name == "flow_kto":  # z_0 moves with theta as well, but has no gradient
        with torch.no_grad():
            want = frozen_point_difference(algorithm, collected, pipeline, trained)
    assert abs(want) > 1e-2
    assert trained.theta.grad.item() == pytest.approx(want, rel=5e-3)


def frozen_point_difference(algorithm: FlowKTO, collected: Any, pipeline: Pipeline, trained: Movable) -> float:
    """The same difference with z_0 held where it is at theta = 0.2."""

    def rewards(theta: float) -> Tensor:
        trained.theta.data.fill_(theta)
        return algorithm.fit(pipeline, collected.clips, generator(3)).rewards(algorithm.beta)

    point = reference_point(rewards(0.2))
    losses = [
        kto_loss(rewards(theta) - point, collected.desirable, utility="kahneman_tversky", weights=(1.0, 1.0)).mean()
        for theta in (0.22, 0.18)
    ]
    return (losses[0] - losses[1]).item() / 0.04


def test_where_policy_and_reference_are_one_the_loss_is_log_2() -> None:
    trained = tiny_policy()
    pipeline = parts(trained, ReferencePolicy(trained))
    algorithm: Any = load_algorithm("flow_dpo", {"num_noise_samples": 2}, beta=2000.0)
    batch = replace(pairs(), weights=torch.full((3,), 15.0))  # 15 votes each
    loss, logged = algorithm.loss(pipeline, algorithm.collect_pairs(pipeline, batch, generator()), generator(1))
    assert loss.item() == pytest.approx(LOG2, rel=1e-6)
    assert all((logged[f"rewards/{name}"] == 0).all() for name in ("chosen", "rejected", "margins", "accuracies"))
    assert (logged["anchor"] == 0).all() and (logged["chosen_error"] > 0.5).all()
    loss.backward()
    assert gradient(trained).abs().max() > 1


def test_a_tie_has_no_gradient_at_the_start_and_no_direction_ever() -> None:
    """p = 1/2: sigma(0) - p = 0; and elsewhere chosen and rejected can be exchanged."""
    trained, reference = moved()
    algorithm: Any = load_algorithm("flow_dpo", {}, beta=50.0)
    tie = replace(pairs(), soft_labels=torch.full((3,), 0.5))
    start = parts(trained, ReferencePolicy(trained))
    algorithm.loss(start, algorithm.collect_pairs(start, tie, generator()), generator(1))[0].backward()
    assert (gradient(trained) == 0).all()
    later = parts(trained, ReferencePolicy(reference))
    swapped = replace(tie, chosen=tie.rejected, rejected=tie.chosen)
    losses = [
        algorithm.loss(later, algorithm.collect_pairs(later, batch, generator()), generator(1))[0].item()
        for batch in (tie, swapped)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > LOG2 * 1.001


def test_margins_ask_for_more() -> None:
    """Where r is 0, z = -scale margin: the loss log(1 + e^(scale margin))."""
    trained = tiny_policy()
    pipeline = parts(trained, ReferencePolicy(trained))
    batch = replace(pairs(), weights=torch.ones(3), soft_labels=torch.ones(3))
    for options, want in (
        ({"margin_scale": 0.5}, sum(math.log(1 + math.exp(0.5 * m)) for m in (0, 1, 2)) / 3),
        ({}, LOG2),
    ):
        algorithm: Any = load_algorithm("flow_dpo", options, beta=10.0)
        collected = algorithm.collect_pairs(pipeline, batch, generator())
        assert algorithm.loss(pipeline, collected, generator(1))[0].item() == pytest.approx(want, rel=1e-6)


def test_the_winner_term_is_the_error_of_the_chosen_clips_and_so_is_sft() -> None:
    """sft_weight 3 adds 3 times the mean |v - u|^2(chosen); sft_chosen is that alone, and beta its anchor's weight."""
    trained, reference = moved()
    pipeline = parts(trained, ReferencePolicy(reference))
    batch = pairs(rejected=sound(CHOSEN, 2))  # of equal length, so that all draw the same noise
    values = []
    for name, options, beta in (
        ("flow_dpo", {}, 20.0),
        ("flow_dpo", {"sft_weight": 3.0}, 20.0),
        ("sft_chosen", {}, 0.0),
        ("sft_chosen", {}, 0.5),
    ):
        algorithm: Any = load_algorithm(name, options, beta=beta)
        collected = algorithm.collect_pairs(pipeline, batch, generator())
        values.append(algorithm.loss(pipeline, collected, generator(1)))
    without, with_term, sft, anchored = (loss.item() for loss, _ in values)
    errors, anchors = values[0][1]["chosen_error"], values[0][1]["anchor"][:3]
    mean = (batch.weights * errors).sum().item() / 3.5  # = 1 + 2 + 0.5
    assert with_term - without == pytest.approx(3 * mean, rel=1e-4) and sft == pytest.approx(mean, rel=1e-5)
    assert anchored - sft == pytest.approx(0.5 * (batch.weights * anchors).sum().item() / 3.5, rel=1e-3)
    assert not {key for key in values[2][1] if key.startswith("rewards/")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_noise_samples": 0}, "num_noise_samples of NAME: expected a whole number of at least 1, got 0"),
        ({"time_power": -0.5}, "time_power of NAME: expected a number of at least 0, got -0.5"),
        ({"loss_cfg_strength": -1.0}, "loss_cfg_strength of NAME: expected a number of at least 0, got -1.0"),
        ({"scale_rewards": "group"}, "unknown option 'scale_rewards' of algorithm 'NAME'"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        load_algorithm(name, options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("option", "value"), [("stored_noise", "yes"), ("online", 1)])
def test_what_is_on_or_off_is_a_truth_value(name: str, option: str, value: Any, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--typecheck"):
        pytest.skip("jaxtyping's own check of the type comes first")
    with pytest.raises(ValueError, match=f"{option} of {name}: expected true or false, got {value!r}"):
        load_algorithm(name, {option: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flow_dpo", {"label_smoothing": 0.5}, "label_smoothing of flow_dpo: expected below 0.5, got 0.5"),
        ("flow_dpo", {"sft_weight": -1.0}, "sft_weight of flow_dpo: expected a number of at least 0"),
        (
            "flow_kto",
            {"utility": "prospect"},
            "utility of flow_kto: expected one of .*kahneman_tversky.*, got 'prospect'",
        ),
        ("flow_kto", {"undesirable_weight": -1.0}, "undesirable_weight of flow_kto: expected a number of at least 0"),
    ],
)
def test_options_of_one_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_algorithm(name, options)


@pytest.mark.parametrize("name", ["flow_dpo", "flow_kto"])
def test_without_a_reference_there_is_nothing_to_compare_with(name: str) -> None:
    with pytest.raises(ValueError, match="expected beta above 0, got 0; 2000 is the default"):
        load_algorithm(name, beta=0.0).check(movable_pipeline(Movable(), anchored=False))
    load_algorithm("sft_chosen", beta=0.0).check(movable_pipeline(Movable(), anchored=False))
    assert FlowDPO().beta == 2000
