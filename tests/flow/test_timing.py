"""Drawn rhythm: its distribution, and that all that goes over a rollout again takes the same one."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rlhf_mel.data.prompts import load_prompts
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import load_policy
from rlhf_mel.flow.noise import item_generator, seeded
from rlhf_mel.flow.policy import rollout
from rlhf_mel.flow.sde import SDE
from rlhf_mel.flow.sde_rollout import replay, sde_rollout
from rlhf_mel.samplers.best_of_n import better
from rlhf_mel.speech.text import PhonemeTokenizer, Timing, load_tokenizer
from rlhf_mel.types import Prompts, Rollout

TIMING = Timing(pace_std=0.1, local_std=0.2, local_correlation=0.4)


@pytest.fixture(scope="module")
def policy() -> CFM:
    policy = load_policy("tiny")
    likely = load_tokenizer("phoneme")
    assert isinstance(likely, PhonemeTokenizer)
    policy.tokenizer = PhonemeTokenizer(likely.weights, likely.units_per_phoneme, TIMING)
    return policy


def four_takes() -> Prompts:
    prompts = load_prompts("tiny", split="heldout")
    return prompts.collate([prompts[0]] * 4)


def generators() -> list[torch.Generator]:
    return [item_generator(7, take) for take in range(4)]


def test_factors_have_the_moments_that_the_timing_says():
    # log factor = pace + state, both normal but held to 2.5 sigma, whose variance is then
    # P(|z| < a) - 2 a phi(a) + 2 a^2 P(z > a) = 0.9866 (a = 2.5); the states are an AR(1) of that variance
    a, normal = 2.5, statistics.NormalDist()
    held = (2 * normal.cdf(a) - 1) - 2 * a * normal.pdf(a) + 2 * a * a * (1 - normal.cdf(a))
    logs = torch.tensor([TIMING.draw(20, seed) for seed in range(20_000)], dtype=torch.float64).log()
    spread = math.sqrt(2 / 20_000)  # standard error of a variance, relative, where draws are independent
    assert_close(logs.var(0).mean().item(), held * (0.1**2 + 0.2**2), rtol=4 * spread, atol=0)
    centred = logs - logs.mean(0)
    for lag in (1, 2):
        covariance = (centred[:, lag:] * centred[:, :-lag]).mean().item()
        assert_close(covariance, held * (0.1**2 + 0.2**2 * 0.4**lag), rtol=6 * spread, atol=0)


def test_a_drawn_text_keeps_its_phonemes_and_a_reference_its_likely_timing():
    likely = load_tokenizer("phoneme")
    tokens = PhonemeTokenizer(likely.weights, likely.units_per_phoneme, TIMING, seed=5).prompt(
        "oh no.", "hello.", 60, 160
    )
    assert tokens[:30] == likely("oh no.", 60) and len(tokens) == 80
    order = [token for token, before in zip(tokens[30:], [None, *tokens[30:]], strict=False) if token != before]
    assert order == likely.phonemes("hello.")
    assert tokens[30:] != likely("hello.", 100)


def test_takes_of_one_prompt_last_as_long_as_their_draws(policy: CFM):
    prompts = four_takes()
    takes = rollout(policy, prompts, steps=1, cfg_strength=0.0, grad_steps=0, generator=generators())
    frames = prompts.reference_lengths_samples[0].item() // 256 + 1
    for take, generator in enumerate(generators()):
        drawn = policy.tokenizer.drawn(int(torch.randint(2**62, (), generator=generator)))
        ratio = drawn.spoken_length(prompts.texts[0]) / policy.tokenizer.spoken_length(prompts.reference_texts[0])
        total = math.ceil((frames + int(frames * ratio)) / 16) * 16
        assert takes.lengths_frames[take] == total - frames
    assert len(set(takes.lengths_frames.tolist())) > 1
    alone = rollout(policy, prompts.select([2]), steps=1, cfg_strength=0.0, grad_steps=0, generator=generators()[2:3])
    assert_close(alone.mel[0], takes.mel[2, : alone.mel.shape[1]], rtol=1e-3, atol=1e-3)


def test_given_rhythms_are_not_drawn_again(policy: CFM):
    prompts = replace(four_takes(), timing_seeds=torch.tensor([3, 3, 9, 9]))
    takes = rollout(policy, prompts, steps=1, cfg_strength=0.0, grad_steps=0, generator=seeded(1))
    assert takes.lengths_frames[0] == takes.lengths_frames[1] and takes.lengths_frames[2] == takes.lengths_frames[3]
    assert len(set(takes.lengths_frames.tolist())) == 2


def test_a_replay_has_the_rhythm_of_the_rollout(policy: CFM):
    """The probability ratio of the first update is one: states, tokens and lengths are those that were drawn."""
    _, trajectories = sde_rollout(
        policy, four_takes(), sde=SDE(), window=range(1), steps=2, cfg_strength=0.0, generator=seeded(2)
    )
    assert len(trajectories) > 1
    for trajectory in trajectories:
        transitions, _ = replay(policy, trajectory)
        assert_close(transitions[0].mean, trajectory.means[0], rtol=1e-4, atol=1e-4)


def test_the_better_of_two_takes_keeps_its_own_length():
    first = Rollout(torch.ones(2, 5, 3), torch.tensor([5, 4]))
    second = Rollout(torch.full((2, 7, 3), 2.0), torch.tensor([3, 7]))
    best = better(first, second, torch.tensor([True, False]))
    assert best.lengths_frames.tolist() == [3, 4] and best.mel.shape == (2, 4, 3)
    assert best.mel[0, 0, 0] == 2 and best.mel[1, 0, 0] == 1
