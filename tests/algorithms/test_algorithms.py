"""Algorithms: losses against hand computations, gradients against a plain loop over the solver's steps."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterator

import pytest
import torch
from problems import tiny_cfm
from torch import Tensor, nn

from rlhf_mel.algorithms.base import known_algorithms, load_algorithm
from rlhf_mel.algorithms.families.pathwise import draft_loss
from rlhf_mel.algorithms.refl import refl_loss, window_start
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.flow.noise import item_generators
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.masked import finite_mean, frame_mean
from rlhf_mel.metrics import frac_zero_std, pool
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.text import CharTokenizer
from rlhf_mel.types import Audio, Prompts

NAN = float("nan")
STEPS = 4
GUIDANCE = 1.5


class SquashingVocoder:
    """waveform = tanh(mean of the mel channels), each frame held for one hop."""

    differentiable = True
    sample_rate_hz = 24_000

    def __init__(self, policy: CFM) -> None:
        self.mel_spec = policy.mel_spec

    def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        return mel.mean(-1).tanh().repeat_interleave(self.mel_spec.hop_length, dim=1)


class NearTenth:
    """-mean (w - 0.1)^2 over an item's samples; best is 0.1 everywhere."""

    name = "near_tenth"
    differentiable = True
    domain = "waveform"
    sample_rate_hz = None
    needs: frozenset[str] = frozenset()
    range = (-float("inf"), 0.0)

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        rows = zip(audio.waveform, audio.lengths_samples.tolist(), strict=True)
        return torch.stack([-(row[:length] - 0.1).square().mean() for row, length in rows])


@pytest.fixture
def prompts() -> Prompts:
    """Three prompts of two total durations; two of them are one group."""
    generator = torch.Generator().manual_seed(3)
    return Prompts(
        texts=["abc", "a bad", "fed"],
        reference_audio=0.1 * torch.randn(3, 2000, generator=generator),
        reference_lengths_samples=torch.tensor([2000, 2000, 1600]),
        reference_texts=["abc", "gab", "head"],
        group_ids=torch.tensor([0, 0, 1]),
        durations_frames=torch.tensor([50, 44, 50]),
    )


def policy_and_reference(lora: bool) -> tuple[CFM, CFM]:
    """A policy that has moved away from its reference, and that reference as a module of its own."""
    reference = tiny_cfm(tokenizer=CharTokenizer()).requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    if lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy = add_lora(policy)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and (not lora or "lora_B" in name):
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy, reference.eval()


def pipeline(policy: CFM, reference: CFM | None, *, reward: object = None, lora: bool = False) -> Pipeline:
    return Pipeline(
        policy=policy,
        vocoder=SquashingVocoder(policy),
        rewards=Rewards([reward or NearTenth()]),
        reference=None if reference is None else ReferencePolicy(policy if lora else reference),
        sampling=Sampling(steps=STEPS, cfg_strength=GUIDANCE, sway_sampling_coef=-1.0),
    )


def plain_rows(policy: CFM, reference: CFM, prompts: Prompts, noise: torch.Generator, cut: int) -> Iterator[tuple]:
    """Each prompt alone: reward and anchor, by a loop over Euler steps that has gradients from step `cut` on."""
    policy.eval()
    generators = item_generators(noise, len(prompts))
    assert generators is not None
    for row in range(len(prompts)):
        alone = prompts.select([row])
        cond, cond_ref = (p.encode(alone, cfg_strength=GUIDANCE) for p in (policy, reference))
        x = policy.prior(cond, [generators[row]])
        times = policy.timesteps(STEPS, sway_sampling_coef=-1.0)
        squares = []
        for k in range(STEPS):
            x = x.detach() if k <= cut else x
            v = policy.velocity(x, times[k], cond)
            if k >= cut:
                apart = (v - reference.velocity(x, times[k], cond_ref)).square()
                squares.append((times[k + 1] - times[k]) * apart[cond.generated].mean())
            x = x + (times[k + 1] - times[k]) * v
        mel = x[cond.generated]
        reward = -(mel.mean(-1).tanh()[:-1] - 0.1).square().mean()  # T frames sound for T - 1 hops
        yield reward, sum(squares) / (1 - times[cut])


def gradient(policy: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def assert_same_gradient(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal to 1e-4 of the largest entry of each parameter: some hundred float32 roundings on the way."""
    assert got.keys() == want.keys() and got
    largest = max(grad.abs().max() for grad in want.values())
    assert largest > 1e-3
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5 * float(largest), msg=name)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("grad_steps", [1, 2, None])
def test_draft_is_autograd_through_a_plain_loop(prompts: Prompts, grad_steps: int | None, lora: bool) -> None:
    policy, reference = policy_and_reference(lora)
    policy.train()  # as the Trainer does; dropout must stay off all the same
    draft = load_algorithm("draft", {"grad_steps": grad_steps}, beta=0.7)
    loss, metrics = draft.loss(pipeline(policy, reference, lora=lora), prompts, torch.Generator().manual_seed(1))
    loss.backward()
    got = gradient(policy)
    assert policy.training

    cut = STEPS - (grad_steps or STEPS)
    rows = list(plain_rows(policy, reference, prompts, torch.Generator().manual_seed(1), cut))
    rewards, anchors = (torch.stack(values) for values in zip(*rows, strict=True))
    plain = -rewards.mean() + 0.7 * anchors.mean()
    plain.backward()

    torch.testing.assert_close(metrics["reward"], rewards.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["anchor"], anchors.detach(), rtol=1e-5, atol=1e-7)
    assert (metrics["anchor"] > 1e-4).all()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    assert_same_gradient(got, gradient(policy))


def test_draft_1_and_draft_all_have_different_gradients(prompts: Prompts) -> None:
    policy, _ = policy_and_reference(lora=False)
    grads = []
    for grad_steps in (1, None):
        draft = load_algorithm("draft", {"grad_steps": grad_steps}, beta=0.0)
        draft.loss(pipeline(policy, None), prompts, torch.Generator().manual_seed(1))[0].backward()
        grads.append(torch.cat([grad.flatten() for grad in gradient(policy).values()]))
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[1].norm()


def test_refl_jumps_along_one_velocity_to_the_end(prompts: Prompts) -> None:
    policy, reference = policy_and_reference(lora=False)
    one = prompts.select([1])
    refl = load_algorithm("refl", {"window": 0.5}, beta=0.7)
    loss, metrics = refl.loss(pipeline(policy, reference), one, torch.Generator().manual_seed(2))
    loss.backward()
    got = gradient(policy)

    policy.eval()
    noise = torch.Generator().manual_seed(2)
    step = int(torch.randint(2, 4, (), generator=noise))  # the last half of 4 steps
    assert metrics["jump_step"] == step
    cond, cond_ref = (p.encode(one, cfg_strength=GUIDANCE) for p in (policy, reference))
    times = policy.timesteps(STEPS, sway_sampling_coef=-1.0)
    x = policy.prior(cond, noise)
    with torch.no_grad():
        for k in range(step):
            x = x + (times[k + 1] - times[k]) * policy.velocity(x, times[k], cond)
    v = policy.velocity(x, times[step], cond)
    x1_hat = x + (1 - times[step]) * v
    reward = -(x1_hat[cond.generated].mean(-1).tanh()[:-1] - 0.1).square().mean()
    anchor = (v - reference.velocity(x, times[step], cond_ref)).square()[cond.generated].mean()
    (-reward + 0.7 * anchor).backward()

    torch.testing.assert_close(metrics["reward"], reward.detach()[None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["anchor"], anchor.detach()[None], rtol=1e-5, atol=1e-7)
    assert_same_gradient(got, gradient(policy))


def test_refl_visits_every_step_of_its_window(prompts: Prompts) -> None:
    policy, _ = policy_and_reference(lora=False)
    refl = load_algorithm("refl", {"window": 0.5}, beta=0.0)
    one, parts = prompts.select([1]), pipeline(policy, None)
    seeds = range(8)
    steps = {int(refl.loss(parts, one, torch.Generator().manual_seed(seed))[1]["jump_step"]) for seed in seeds}
    assert steps == {2, 3}


@pytest.mark.parametrize(("steps", "window", "first"), [(40, 0.25, 30), (16, 0.25, 12), (4, 0.1, 3), (5, 1.0, 0)])
def test_window_start(steps: int, window: float, first: int) -> None:
    assert window_start(steps, window) == first


def test_the_anchor_of_an_untrained_policy_is_exactly_zero(prompts: Prompts) -> None:
    policy, _ = policy_and_reference(lora=False)
    for parts in (pipeline(policy, copy.deepcopy(policy)), pipeline(policy, policy)):
        _, metrics = load_algorithm("draft", beta=1.0).loss(parts, prompts, torch.Generator().manual_seed(1))
        assert (metrics["anchor"] == 0).all()


class BrokenRow(NearTenth):
    """Row 0: the score is NaN, and so is its gradient even where the loss leaves the score out."""

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        scores = super().score(audio, prompts)
        return torch.cat([(scores[:1] - 1e3).sqrt(), scores[1:]])


class BrokenGradient(NearTenth):
    """Row 0: a finite score whose gradient is NaN (0 times the infinite slope of a root at 0)."""

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        scores = super().score(audio, prompts)
        return torch.cat([scores[:1] + 0 * (scores[:1] - scores[:1].detach()).sqrt(), scores[1:]])


def test_a_row_without_a_score_is_dropped_and_counted(prompts: Prompts) -> None:
    policy, reference = policy_and_reference(lora=False)
    draft = load_algorithm("draft", beta=0.0)
    loss, metrics = draft.loss(pipeline(policy, None, reward=BrokenRow()), prompts, torch.Generator().manual_seed(1))
    loss.backward()
    assert metrics["dropped_rollouts"].tolist() == [True, False, False]
    got = gradient(policy)

    rows = list(plain_rows(policy, reference, prompts, torch.Generator().manual_seed(1), STEPS - 1))
    (-(rows[1][0] + rows[2][0]) / 2).backward()
    assert_same_gradient(got, gradient(policy))


def test_a_row_whose_gradient_is_not_finite_is_dropped_and_counted(prompts: Prompts) -> None:
    policy, reference = policy_and_reference(lora=False)
    draft = load_algorithm("draft", beta=0.0)
    loss, metrics = draft.loss(
        pipeline(policy, None, reward=BrokenGradient()), prompts, torch.Generator().manual_seed(1)
    )
    loss.backward()
    assert metrics["dropped_rollouts"].tolist() == [True, False, False]
    got = gradient(policy)

    rows = list(plain_rows(policy, reference, prompts, torch.Generator().manual_seed(1), STEPS - 1))
    (-(rows[1][0] + rows[2][0]) / 3).backward()  # its score was finite: it counts in the mean
    assert_same_gradient(got, gradient(policy))


def test_a_policy_that_generates_nan_stops_the_run(prompts: Prompts) -> None:
    policy, _ = policy_and_reference(lora=False)
    with torch.no_grad():
        policy.transformer.proj_out.bias.fill_(NAN)
    with pytest.raises(FloatingPointError, match="mel that is not finite"):
        load_algorithm("draft").loss(pipeline(policy, None), prompts, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["draft", "refl"])
def test_a_part_without_gradient_is_refused(name: str) -> None:
    policy, _ = policy_and_reference(lora=False)

    def loudness(completions: list, **columns: object) -> list[float]:
        return [0.0] * len(completions)

    algorithm = load_algorithm(name)
    with pytest.raises(ValueError, match=f"'{name}' follows the gradient.*reward 'loudness' without a gradient"):
        algorithm.check(pipeline(policy, None, reward=loudness))
    parts = pipeline(policy, None)
    parts.vocoder.differentiable = False
    with pytest.raises(ValueError, match="the vocoder without a gradient"):
        algorithm.check(parts)
    parts.vocoder.differentiable = True
    algorithm.check(parts)


def test_draft_refuses_more_gradient_steps_than_there_are() -> None:
    policy, _ = policy_and_reference(lora=False)
    with pytest.raises(ValueError, match="at most the 4 sampling_steps, got 5"):
        load_algorithm("draft", {"grad_steps": 5}).check(pipeline(policy, None))


@pytest.mark.parametrize("name", known_algorithms())
def test_every_algorithm_keeps_the_contract(name: str) -> None:
    algorithm = importlib.import_module(f"rlhf_mel.algorithms.{name}").algorithm
    assert algorithm.name == name and isinstance(algorithm.reward_gradient, bool)
    assert dataclasses.is_dataclass(algorithm.Config)
    assert isinstance(load_algorithm(name), algorithm)


def test_losses_by_hand() -> None:
    rewards, anchor = torch.tensor([1.0, NAN, 4.0]), torch.tensor([0.1, 0.2, 0.6])
    assert draft_loss(rewards, anchor, beta=2.0).item() == pytest.approx(-2.5 + 2 * 0.3)
    assert refl_loss(rewards, anchor, beta=0.0, margin=None).item() == pytest.approx(-2.5)
    # relu(3 - 1) = 2 and relu(3 - 4) = 0
    assert refl_loss(rewards, anchor, beta=1.0, margin=3.0).item() == pytest.approx((2 + 0) / 2 + 0.3)


def test_means_by_hand() -> None:
    assert finite_mean(torch.tensor([2.0, NAN, float("inf"), 5.0])).item() == 3.5
    nothing = torch.tensor([NAN], requires_grad=True)
    finite_mean(nothing).backward()
    assert nothing.grad is not None and nothing.grad.item() == 0
    values = torch.tensor([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0]])
    assert frame_mean(values, torch.tensor([2, 1])).tolist() == [2.0, 4.0]
    # group 7: 1 and 1; group 8: 2 and 3
    assert frac_zero_std(torch.tensor([1.0, 2.0, 1.0, 3.0]), torch.tensor([7, 8, 7, 8])).item() == 0.5
    # a reward that is missing makes no difference
    assert frac_zero_std(torch.tensor([1.0, 2.0, NAN, 3.0]), torch.tensor([7, 8, 7, 8])).item() == 0.5


def test_pool_counts_rollouts_alike_whatever_their_batch() -> None:
    batches = [
        {"reward": [1.0, 2.0, 3.0], "rewards/mos": [1.0, NAN, 3.0], "dropped_rollouts": [False, True, False]},
        {"reward": [6.0], "rewards/mos": [5.0], "dropped_rollouts": [True], "anchor": [0.5]},
    ]
    assert pool(batches) == {
        "reward": 3.0,
        "reward_std": pytest.approx((14 / 3) ** 0.5),  # deviations -2, -1, 0, 3: 14 / (4 - 1)
        "rewards/mos/mean": 3.0,
        "rewards/mos/std": 2.0,  # deviations -2, 0, 2: 8 / (3 - 1)
        "dropped_rollouts": 2,
        "anchor": 0.5,
    }


def test_sound_in_parts_has_the_same_scores_and_gradient(prompts: Prompts) -> None:
    policy, _ = policy_and_reference(lora=False)
    found = []
    for size in (None, 2, 1):
        parts = dataclasses.replace(pipeline(policy, None), reward_batch_size=size)
        spoken, _ = parts.rollout(prompts, torch.Generator().manual_seed(0), grad_steps=1)
        scores = parts.score(spoken, prompts)
        policy.zero_grad()
        scores.total.mean().backward()
        gradients = [weight.grad for weight in policy.parameters() if weight.grad is not None]
        found.append([scores.total.detach(), scores.breakdown["near_tenth"].detach(), *gradients])
    for other in found[1:]:
        for value, whole in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-8)
