"""Wrappers keep what a policy can do: its fast gradient is reached through each, once a step, and is the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussian import MelReward
from problems import Silent, tiny_policy, tiny_prompts
from torch import Tensor
from torch.testing import assert_close

from rlhf_mel.f5.cfm import CFM
from rlhf_mel.flow.policy import FastGradients, PolicyWrapper, rollout
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.flow.sde import SDE
from rlhf_mel.flow.sde_rollout import replay, sde_rollout
from rlhf_mel.flow.start_states import Restarted, begin_at
from rlhf_mel.pipeline import AnchoredPolicy, JumpingPolicy, Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.samplers.step_guidance import StepGuidance

OWN = tiny_prompts().select([0, 2])
"""Two prompts of one duration, so that one solve serves both."""


class Counting(CFM):
    """A CFM that says it has a fast gradient, and counts how often it is asked for."""

    asked = 0

    @property
    def fast_gradients(self) -> bool:
        return True

    def differentiate(self, *args: Any) -> Any:
        self.asked += 1
        return super().differentiate(*args)


def moved_policy(counting: bool) -> tuple[Any, ReferencePolicy]:
    """A policy in float64 and its reference, some way off."""
    policy: Any = tiny_policy().double()
    if counting:
        policy.__class__ = Counting
    reference = ReferencePolicy(policy)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return policy, reference


def pipeline(policy: Any, reference: ReferencePolicy | None) -> Pipeline:
    parts: Any = dict(vocoder=Silent(), rewards=Rewards([MelReward()]), sampling=Sampling(steps=4, cfg_strength=1.5))
    return Pipeline(policy=policy, reference=reference, **parts)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def plain(policy: Any, reference: ReferencePolicy) -> Tensor:
    return pipeline(policy, None).rollout(OWN, seeded(), grad_steps=3)[0].mel.square().sum()


def anchored(policy: Any, reference: ReferencePolicy) -> Tensor:
    spoken, anchor = pipeline(policy, reference).rollout(OWN, seeded(), grad_steps=3)
    return spoken.mel.square().sum() + 5 * anchor.sum()


def jumping(policy: Any, reference: ReferencePolicy) -> Tensor:
    spoken, anchor = pipeline(policy, reference).rollout(OWN, seeded(), grad_steps=3, jump_from=2)
    return spoken.mel.square().sum() + 5 * anchor.sum()


def restarted(policy: Any, reference: ReferencePolicy) -> Tensor:
    states = torch.randn(2, 30, policy.num_channels, generator=seeded(), dtype=torch.float64)
    start = begin_at(OWN, list(states))
    spoken, anchor = pipeline(Restarted(policy), reference).rollout(start, seeded(), grad_steps=3)
    return spoken.mel.square().sum() + 5 * anchor.sum()


def replayed(policy: Any, reference: ReferencePolicy) -> Tensor:
    """Transitions in float64 of a policy whose own dtype is given again to each velocity."""
    with torch.no_grad():
        _, (trajectory,) = sde_rollout(policy, OWN, sde=SDE(), window=range(1, 4), steps=4, generator=seeded())
    transitions, moved = replay(policy, trajectory)
    return sum((transition.mean[moved].square().sum() for transition in transitions), torch.zeros(()))


@pytest.mark.parametrize("loss", [plain, anchored, jumping, restarted, replayed])
def test_each_wrapper_reaches_the_fast_gradient_once_a_step(loss: Callable[..., Tensor]) -> None:
    gradients = []
    for counting in (False, True):
        policy, reference = moved_policy(counting)
        loss(policy, reference).backward()
        gradients.append({name: weight.grad for name, weight in policy.named_parameters()})
    # The grid of `jumping` is 0, 1, 2 and the end: three steps; the others differentiate three of four.
    assert policy.asked == 3
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        if gradient is not None:
            assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)
    assert sum(gradient is not None for gradient in gradients[0].values()) > 10


def test_step_guidance_asks_for_the_fast_gradient_of_the_state() -> None:
    spoken = []
    for counting in (False, True):
        policy, _ = moved_policy(counting)
        guidance = StepGuidance(vocoder=Silent(), rewards=Rewards([MelReward()]), scale=0.1)
        spoken.append(guidance(policy, OWN, generator=seeded(), steps=4).mel)
        assert all(weight.grad is None for weight in policy.parameters())
    assert policy.asked == 3  # of four steps the first, at noise, is not guided
    assert_close(spoken[1], spoken[0], rtol=1e-9, atol=1e-12)


def test_nothing_fast_is_asked_of_a_policy_in_train_mode_or_without_it() -> None:
    policy, reference = moved_policy(True)
    anchored(policy, reference).backward()
    assert isinstance(policy, FastGradients) and policy.asked == 3
    ordinary, reference = moved_policy(False)
    assert isinstance(ordinary, FastGradients) and not ordinary.fast_gradients
    ordinary.differentiate = None  # type: ignore[assignment, method-assign]
    anchored(ordinary, reference).backward()


def test_a_wrapper_is_the_policy_inside_but_for_what_it_changes() -> None:
    policy, reference = moved_policy(False)
    wrapped = PolicyWrapper(policy.eval())
    options: dict[str, Any] = dict(steps=3, grad_steps=0)
    expected = rollout(policy, OWN, generator=seeded(), **options).mel
    assert torch.equal(rollout(wrapped, OWN, generator=seeded(), **options).mel, expected)
    view = AnchoredPolicy(JumpingPolicy(policy, 1), reference)
    assert view.timesteps(4).tolist() == [*policy.timesteps(4)[:2].tolist(), 1.0]
    cond = view.encode(OWN)
    x = view.prior(cond, seeded())
    v, rate = view.velocity(x, torch.tensor(0.5, dtype=torch.float64), cond).split([policy.num_channels, 1], dim=-1)
    own = policy.velocity(x[..., :-1], torch.tensor(0.5, dtype=torch.float64), cond.policy)
    other = reference.velocity(x[..., :-1], torch.tensor(0.5, dtype=torch.float64), cond.extra)
    assert_close(v, own, rtol=1e-12, atol=0)
    assert_close(rate[..., 0], (own - other).square().mean(-1), rtol=1e-9, atol=1e-12)
