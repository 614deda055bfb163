"""AlignProp: one random cut a rollout, and the gradient of a chain cut there, in closed form."""

from __future__ import annotations

import pytest
import torch
from gaussian import ELEMENTS, GaussianPolicy, MelReward, pipeline, prompts

from rlhf_mel.algorithms.alignprop import AlignProp
from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.draft import Draft

STEPS = 5


def expected_gradients(policy: GaussianPolicy, grad_steps: int) -> list[float]:
    """-d E[sum x_1] / d shift_k: the D elements, dt, and all later factors; 0 before the cut."""
    left, dt = policy.left(), policy.grid.diff().tolist()
    return [-ELEMENTS * dt[k] * left[k] if k >= STEPS - grad_steps else 0.0 for k in range(STEPS)]


@pytest.mark.parametrize("grad_steps", [1, 3, 5])
def test_the_pathwise_gradient_is_the_closed_form(grad_steps: int) -> None:
    policy = GaussianPolicy(STEPS)
    draft = Draft(Draft.Config(grad_steps=grad_steps))
    draft.loss(pipeline(policy, MelReward()), prompts(3), torch.Generator().manual_seed(0))[0].backward()
    assert policy.shift.grad.tolist() == pytest.approx(expected_gradients(policy, grad_steps), rel=1e-5)


def test_every_step_after_the_one_cut_is_in_the_chain() -> None:
    """Each rollout's gradient is one of DRaFT-K; holes in the chain, or several cuts, would give another."""
    seen = set()
    for seed in range(20):
        policy = GaussianPolicy(STEPS)
        loss, metrics = AlignProp().loss(pipeline(policy, MelReward()), prompts(2), torch.Generator().manual_seed(seed))
        loss.backward()
        seen.add(int(metrics["grad_steps"]))
        want = expected_gradients(policy, int(metrics["grad_steps"]))
        assert policy.shift.grad.tolist() == pytest.approx(want, rel=1e-5)
    assert seen == {1, 2, 3, 4, 5}


def test_the_cut_is_uniform_and_drawn_once_a_rollout() -> None:
    """400 rollouts, K in 2, 3, 4: 133 each, within 4.5 deviations sqrt(400 * 1/3 * 2/3) = 9.4."""
    alignprop = AlignProp(AlignProp.Config(min_grad_steps=2, max_grad_steps=4))
    parts, one, generator = pipeline(GaussianPolicy(STEPS), MelReward()), prompts(1), torch.Generator().manual_seed(0)
    cuts = [int(alignprop.loss(parts, one, generator)[1]["grad_steps"]) for _ in range(400)]
    counts = [cuts.count(k) for k in range(STEPS + 1)]
    assert counts[:2] == [0, 0] and counts[5] == 0
    assert all(abs(count - 400 / 3) < 4.5 * 9.4 for count in counts[2:5])


def test_the_anchor_counts_the_steps_with_gradient_only() -> None:
    """Shifted by 0.3 in the last step alone: K = 1 sees 0.3^2, K = 2 of equal steps half of it."""
    policy = GaussianPolicy(STEPS)
    parts = pipeline(policy, MelReward(), anchored=True)
    with torch.no_grad():
        policy.shift[-1] = 0.3
    for grad_steps, want in ((1, 0.09), (2, 0.045)):
        own = AlignProp(AlignProp.Config(min_grad_steps=grad_steps, max_grad_steps=grad_steps), beta=2.0)
        loss, metrics = own.loss(parts, prompts(2), torch.Generator().manual_seed(0))
        assert metrics["anchor"].tolist() == pytest.approx([want, want], rel=1e-5)
        assert loss.item() == pytest.approx(-metrics["reward"].mean().item() + 2 * want, rel=1e-5)


def test_what_cannot_be_is_refused() -> None:
    parts = pipeline(GaussianPolicy(STEPS), MelReward(differentiable=False))
    with pytest.raises(ValueError, match=r"'alignprop' follows the gradient.*reward 'mel' without a gradient"):
        load_algorithm("alignprop").check(parts)
    with pytest.raises(ValueError, match="at most the 5 sampling_steps, got 6"):
        load_algorithm("alignprop", {"max_grad_steps": 6}).check(pipeline(GaussianPolicy(STEPS), MelReward()))
    with pytest.raises(ValueError, match="at least min_grad_steps = 3, or null for all, got 2"):
        load_algorithm("alignprop", {"min_grad_steps": 3, "max_grad_steps": 2})
    with pytest.raises(ValueError, match="min_grad_steps of alignprop: expected a whole number of at least 1, got 0"):
        load_algorithm("alignprop", {"min_grad_steps": 0})
