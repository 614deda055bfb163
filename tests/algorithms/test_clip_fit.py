"""What is shared by a pair, what is stored, that a clip is what it is alone; pairs of a policy's own rollouts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from forward_problems import Movable, prompts
from forward_problems import pipeline as movable_pipeline
from pair_problems import (
    CHOSEN,
    NAMES,
    REFERENCES,
    REJECTED,
    Following,
    alone,
    generator,
    gradient,
    movable_pairs,
    moved,
    pairs,
    parts,
)
from problems import tiny_policy, tiny_prompts
from torch import Tensor

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.families.clip_fit import fit_of, starting_noise
from rlhf_mel.algorithms.families.pairs import Pairs, clip_prompts, pairs_of, select_pairs
from rlhf_mel.data.preferences.load import PairBatch
from rlhf_mel.flow.noise import item_generator, item_generators
from rlhf_mel.flow.policy import rollout, with_durations
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.metrics import pool
from rlhf_mel.speech.text import PhonemeTokenizer, Timing, load_tokenizer
from rlhf_mel.types import Audio


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_items_alone(name: str) -> None:
    """Errors and their gradient of three pairs of four durations."""
    trained, reference = moved()
    pipeline = parts(trained, ReferencePolicy(reference))
    algorithm: Any = load_algorithm(name, {"num_noise_samples": 2}, beta=20.0)
    noise = item_generators(generator(3), 3)
    collected = pairs_of(trained, pairs(), algorithm.config)
    together = fit_of(trained, pipeline.reference, collected.clips, algorithm.config.draws, noise or [])
    together.excess.sum().backward()
    whole, sums = gradient(trained), torch.zeros(())
    noise = item_generators(generator(3), 3)
    assert noise is not None
    for row in range(3):
        single = pairs_of(trained, select_pairs(pairs(), [row]), algorithm.config)
        one = fit_of(trained, pipeline.reference, single.clips, algorithm.config.draws, [noise[row]])
        for key in ("errors", "excess", "anchors"):
            torch.testing.assert_close(
                getattr(one, key), getattr(together, key)[:, [row, row + 3]], rtol=2e-4, atol=1e-5
            )
        one.excess.sum().backward()
        sums = sums + gradient(trained)
    torch.testing.assert_close(sums, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_reference_frames_change_nothing(name: str) -> None:
    """`Movable` has no attention: what stands in frames that do not count must reach neither loss nor gradient."""
    trained = Following(0.3)
    pipeline = movable_pipeline(trained)
    trained.theta.data += 0.2

    def run(batch: PairBatch, pasted: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        algorithm: Any = load_algorithm(name, {"num_noise_samples": 2}, beta=5.0)
        trained.pasted, trained.theta.grad = pasted, None
        loss, logged = algorithm.loss(pipeline, algorithm.collect_pairs(pipeline, batch, generator()), generator(2))
        loss.backward()
        assert trained.theta.grad is not None
        return loss.detach(), trained.theta.grad, logged

    want, got = run(movable_pairs(), 3.0), run(movable_pairs(padding=50.0), -70.0)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and want[1].abs() > 1e-3
    assert all(torch.equal(got[2][key], want[2][key]) for key in want[2])
    louder = movable_pairs()
    louder = replace(louder, chosen=replace(louder.chosen, mel=louder.chosen.mel + 1.0))
    assert not torch.equal(run(louder, 3.0)[0], want[0])


def test_a_pair_shares_time_and_noise_frame_by_frame() -> None:
    """With v = 0 and mels of 0, u = -x_0 in the counted frames: the errors say what noise was there."""

    class Still(Following):
        def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return 0 * x + 0 * self.theta

    trained = Still()
    batch = movable_pairs(chosen=(3, 2, 40), rejected=(3, 2, 25))
    silent = replace(
        batch,
        chosen=replace(batch.chosen, mel=0 * batch.chosen.mel),
        rejected=replace(batch.rejected, mel=0 * batch.rejected.mel),
    )
    algorithm: Any = load_algorithm("flow_dpo", {"num_noise_samples": 2}, beta=1.0)
    pipeline = movable_pipeline(trained)
    collected = algorithm.collect_pairs(pipeline, silent, generator())
    fit = algorithm.fit(pipeline, collected.clips, generator(4))
    assert torch.equal(fit.errors[:, :2], fit.errors[:, 3:5]) and len(set(fit.errors.flatten().tolist())) == 8
    drawn = item_generators(generator(4), 3)
    assert drawn is not None
    torch.rand(2, generator=drawn[2])  # times come first
    for k in range(2):
        x0 = torch.randn(42, 2, generator=drawn[2])
        assert fit.errors[k, 2].item() == pytest.approx(x0[2:].square().mean().item(), rel=1e-5)
        assert fit.errors[k, 5].item() == pytest.approx(x0[2:27].square().mean().item(), rel=1e-5)


def test_guidance_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    encode = Movable.encode

    def watched(self: Movable, prompts: Any, *, cfg_strength: float = 2.0) -> Any:
        seen.append(cfg_strength)
        return encode(self, prompts, cfg_strength=cfg_strength)

    monkeypatch.setattr(Movable, "encode", watched)
    pipeline = movable_pipeline(Following(), cfg_strength=1.5)
    for options, want in (({}, 0.0), ({"loss_cfg_strength": 0.7}, 0.7)):
        algorithm: Any = load_algorithm("flow_dpo", options, beta=1.0)
        collected = algorithm.collect_pairs(pipeline, movable_pairs(), generator())
        seen.clear()
        algorithm.loss(pipeline, collected, generator())
        assert set(seen) == {0.0, want}  # noise is drawn without any


def test_clips_that_the_policy_does_not_fill_are_refused() -> None:
    """`Movable` with the frames of the prompt, whatever the clip has."""
    trained = Movable()
    trained.durations = lambda prompts: torch.full((len(prompts),), 4)  # type: ignore[method-assign]
    algorithm: Any = load_algorithm("flow_dpo", {}, beta=1.0)
    pipeline = movable_pipeline(trained)
    collected = algorithm.collect_pairs(pipeline, movable_pairs(), generator())
    with pytest.raises(ValueError, match=r"expected as many frames as the policy generates, \[2, 2.*got \[3, 2, 3"):
        algorithm.loss(pipeline, collected, generator())


# Noise that is known.

SEEDS: dict[str, Any] = dict(
    chosen_seeds=torch.tensor([3, 4, 5]), rejected_seeds=torch.tensor([6, 7, 3]), rows=torch.tensor([10, 0, 2])
)


def test_stored_noise_is_where_the_sampling_began() -> None:
    """What `policy.rollout` starts from with item_generator(seed, row), as `rlhf-mel sample` and `pairs` call it."""
    trained = tiny_policy()
    asked = clip_prompts(pairs())
    seeds = zip([3, 4, 5, 6, 7, 3], [10, 0, 2] * 2, strict=True)
    sampled = rollout(
        trained,
        asked,
        steps=2,
        grad_steps=0,
        generator=[item_generator(seed, row) for seed, row in seeds],
        return_trajectory=True,
    )
    algorithm: Any = load_algorithm("flow_dpo", {"stored_noise": True, "num_noise_samples": 2}, beta=1.0)
    pipeline = parts(trained, ReferencePolicy(trained))
    collected = algorithm.collect_pairs(pipeline, pairs(**SEEDS), generator())
    assert sampled.trajectory is not None and collected.clips.noise is not None
    for clip, noise in enumerate(collected.clips.noise):
        assert torch.equal(noise, sampled.trajectory[0, clip, : len(noise)])
        assert len(noise) == (*REFERENCES, *REFERENCES)[clip] + (*CHOSEN, *REJECTED)[clip]
    fit = algorithm.fit(pipeline, collected.clips, generator(7))
    drawn = item_generators(generator(7), 3)
    assert drawn is not None
    t = torch.rand(2, generator=drawn[1])[0] / 2
    v, u = alone(trained.eval(), pairs(), 1, "rejected", collected.clips.noise[4], t)
    assert fit.errors[0, 4].item() == pytest.approx((v - u).square().mean().item(), rel=1e-5)


def test_stored_noise_knows_of_the_rhythm_that_was_drawn_before_it() -> None:
    """A policy that draws rhythms takes a number from the generator first, and its condition follows the rhythm."""
    likely = load_tokenizer("phoneme")
    assert isinstance(likely, PhonemeTokenizer)
    timing = Timing(pace_std=0.1, local_std=0.2, local_correlation=0.4)
    tokenizer = PhonemeTokenizer(likely.weights, likely.units_per_phoneme, timing)
    vocabulary = {token: index for index, token in enumerate(sorted({*likely("a bed. decade. feed me.")}))}
    trained = tiny_policy(dict(text_num_embeds=len(vocabulary)))
    trained.tokenizer, trained.vocab_char_map = tokenizer, vocabulary
    texts = ["a bed."]
    own = replace(tiny_prompts().select([0]), texts=texts, reference_texts=["feed me."], durations_frames=None)
    sampled = rollout(
        trained, own, steps=1, grad_steps=0, generator=[item_generator(8, 1)], return_trajectory=True, cfg_strength=0.0
    )
    clip = Audio(torch.zeros(1, 1), sampled.lengths_frames, 24_000, sampled.mel, sampled.lengths_frames)
    one = torch.ones(1)
    seed = torch.tensor([8])
    batch = PairBatch(own, clip, clip, one, one, one, seed, seed + 1, torch.tensor([1]))
    algorithm: Any = load_algorithm("flow_dpo", {"stored_noise": True}, beta=1.0)
    collected: Pairs = algorithm.collect_pairs(parts(trained, None), batch, generator())
    assert sampled.trajectory is not None and collected.clips.noise is not None
    assert torch.equal(collected.clips.noise[0], sampled.trajectory[0, 0])
    rhythm = int(torch.randint(2**62, (), generator=item_generator(8, 1)))
    assert collected.clips.prompts.timing_seeds is not None
    assert collected.clips.prompts.timing_seeds[0] == rhythm
    fresh: Any = load_algorithm("flow_dpo", {}, beta=1.0)
    assert fresh.collect_pairs(parts(trained, None), batch, generator()).clips.prompts.timing_seeds is None


def test_rhythms_and_noise_of_starting_noise_are_per_item() -> None:
    """Noise is that of each item's generator, whatever it is grouped with."""
    trained = tiny_policy()
    asked = with_durations(trained, clip_prompts(pairs()))
    together = starting_noise(trained, asked, [generator(n) for n in range(6)])[0]
    for row in (1, 5):
        one = starting_noise(trained, asked.select([row]), [generator(row)])[0][0]
        assert torch.equal(one, together[row])


# Online.


def test_the_best_and_the_worst_of_each_group_are_compared() -> None:
    """Rewards [1, 3, 2, NaN], [5, 5, 5, 5] and [NaN, NaN, 0, NaN]: one pair, two of no weight."""
    nan = float("nan")

    def listener(completions: list[Any], **columns: Any) -> list[float | None]:
        return [1.0, 3.0, 2.0, None, 5.0, 5.0, 5.0, 5.0, None, None, 0.0, None]

    trained = Movable(0.1)
    pipeline = movable_pipeline(trained, listener)
    algorithm: Any = load_algorithm("flow_dpo", {"online": True, "margin_scale": 0.5}, beta=1.0)
    assert algorithm.needs_groups and not algorithm.learns_from_pairs
    assert not load_algorithm("flow_dpo", beta=1.0).needs_groups
    collected: Pairs = algorithm.collect(pipeline, prompts(12, 4), generator())
    spoken = pipeline.sample(prompts(12, 4), generator())
    assert torch.equal(collected.clips.rollouts.mel[0], spoken.mel[1])  # the best
    assert torch.equal(collected.clips.rollouts.mel[3], spoken.mel[0])  # the worst
    assert collected.weights.tolist() == [1.0, 0.0, 0.0] and collected.margins.tolist() == [2.0, 0.0, 0.0]
    assert collected.metrics["dropped_pairs"].tolist() == [False, True, True]
    assert collected.metrics["dropped_rollouts"].sum() == 4
    assert collected.metrics["reward"].nan_to_num(nan=-1.0)[:4].tolist() == [1.0, 3.0, 2.0, -1.0] and nan != 0
    loss, _ = algorithm.loss(pipeline, collected, generator(1))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.5 * 2)), rel=1e-5)  # one pair, at r = 0
    pooled = pool([{name: value.flatten().tolist() for name, value in collected.metrics.items()}])
    assert pooled["dropped_pairs"] == 2 and pooled["dropped_rollouts"] == 4


def test_without_any_difference_there_is_a_loss_of_0_with_a_gradient_of_0() -> None:
    """So that no process of a distributed run waits for the gradients of another."""

    def same(completions: list[Any], **columns: Any) -> list[float]:
        return [2.0] * len(completions)

    for name in NAMES:
        trained = Movable(0.1)
        pipeline = movable_pipeline(trained, same)
        algorithm: Any = load_algorithm(name, {"online": True}, beta=0.0 if name == "sft_chosen" else 1.0)
        collected = algorithm.collect(pipeline, prompts(4, 2), generator())
        loss, _ = algorithm.loss(pipeline, collected, generator(1))
        loss.backward()
        assert loss.item() == 0 and trained.theta.grad is not None and trained.theta.grad.item() == 0


def test_online_stored_noise_is_the_rollouts_own() -> None:
    trained = tiny_policy()
    group = torch.zeros(3, dtype=torch.long)

    def loudness(completions: list[Any], **columns: Any) -> list[float]:
        return [2.0, 0.0, 1.0]

    pipeline = parts(trained, ReferencePolicy(trained), reward=loudness)
    algorithm: Any = load_algorithm("flow_dpo", {"online": True, "stored_noise": True}, beta=1.0)
    collected: Pairs = algorithm.collect(pipeline, tiny_prompts(group_ids=group), generator(9))
    sampled = rollout(
        trained, tiny_prompts(), steps=3, grad_steps=0, cfg_strength=0.0, generator=generator(9), return_trajectory=True
    )
    assert sampled.trajectory is not None and collected.clips.noise is not None
    assert torch.equal(collected.clips.noise[0], sampled.trajectory[0, 0, :30])
    assert torch.equal(collected.clips.noise[1], sampled.trajectory[0, 1, :24])
