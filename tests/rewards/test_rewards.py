"""Rewards: declarations, names, plain functions, the weighted sum, sample rates and gradients."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import vibrato
from torch import Tensor

from rlhf_mel.rewards.base import RewardModel
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.rewards.function import FunctionReward
from rlhf_mel.rewards.load import known_rewards, load_reward
from rlhf_mel.speech.preference_model import PreferenceModel, save_preference_model
from rlhf_mel.types import Audio, Prompts

RATE_HZ = 24_000


def prompts(batch: int = 2, **columns: Any) -> Prompts:
    return Prompts(
        texts=["one", "two", "three", "four"][:batch],
        reference_audio=torch.full((batch, 6), 0.5),
        reference_lengths_samples=torch.tensor([6, 4, 5, 3][:batch]),
        reference_texts=["ah", "oh", "uh", "eh"][:batch],
        columns=columns,
    )


def audio(waveform: Tensor, lengths: list[int] | None = None, rate_hz: int = RATE_HZ) -> Audio:
    batch = len(waveform)
    lengths_samples = torch.tensor(lengths or [waveform.shape[1]] * batch)
    return Audio(waveform, lengths_samples, rate_hz, torch.zeros(batch, 2, 3), torch.full((batch,), 2))


@dataclass
class Fixed:
    """Scores given beforehand; or anything else, to see it refused."""

    values: Any
    name: str = "fixed"
    differentiable: bool = False
    domain: str = "waveform"
    sample_rate_hz: int | None = None
    needs: frozenset[str] = frozenset()
    range: tuple[float, float] = (0.0, 10.0)

    def score(self, audio: Audio, prompts: Prompts) -> Any:
        return torch.tensor(self.values) if isinstance(self.values, list) else self.values


class MeanSquare(Fixed):
    """sum w^2 over the item's own samples: gradient 2 w."""

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        self.heard = audio
        return audio.waveform.square().sum(1)


def mean_square(**declarations: Any) -> MeanSquare:
    return MeanSquare(None, **{"name": "energy", "differentiable": True, **declarations})


def test_weighted_sum_by_hand() -> None:
    rewards = Rewards([Fixed([1.0, 2.0], "a"), Fixed([3.0, 5.0], "b")], [2.0, -0.5])
    scores = rewards(audio(torch.zeros(2, 10)), prompts())
    assert scores.total.tolist() == [2 * 1 - 0.5 * 3, 2 * 2 - 0.5 * 5]
    assert {name: values.tolist() for name, values in scores.breakdown.items()} == {"a": [1, 2], "b": [3, 5]}
    assert scores.total.dtype == torch.float32


def test_weights_default_to_one() -> None:
    scores = Rewards([Fixed([1.0, 2.0], "a"), Fixed([3.0, 5.0], "b")])(audio(torch.zeros(2, 10)), prompts())
    assert scores.total.tolist() == [4.0, 7.0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_leaves_the_row_without_a_total(broken: float) -> None:
    rewards = Rewards([Fixed([broken, 1.0], "a"), Fixed([3.0, 3.0], "b")])
    scores = rewards(audio(torch.zeros(2, 10)), prompts())
    assert math.isnan(scores.total[0]) and scores.total[1] == 4.0
    assert not scores.breakdown["a"][0].isfinite()  # seen as it is
    weightless = Rewards([Fixed([broken, 1.0], "a"), Fixed([3.0, 3.0], "b")], [0.0, 1.0])
    assert weightless(audio(torch.zeros(2, 10)), prompts()).total.tolist() == [3.0, 3.0]


def test_none_skips_a_row_as_in_trl() -> None:
    def a(completions: list[np.ndarray]) -> list[float | None]:
        return [1.0, None, math.nan, None]

    def b(completions: list[np.ndarray]) -> list[float | None]:
        return [10.0, 20.0, 30.0, None]

    scores = Rewards([a, b], [1.0, 0.5])(audio(torch.zeros(4, 10)), prompts(4))
    # Row 1: b alone; row 2: nan is a failure, not a skip; row 3: nobody scored it.
    np.testing.assert_array_equal(scores.total.numpy(), np.float32([6.0, 10.0, np.nan, np.nan]))
    np.testing.assert_array_equal(scores.breakdown["a"].numpy(), np.float32([1.0, np.nan, np.nan, np.nan]))


def test_a_plain_function_gets_keywords_and_columns() -> None:
    seen: dict[str, Any] = {}

    def judge(**keywords: Any) -> list[float]:
        seen.update(keywords)
        return [len(waveform) / keywords["sample_rate_hz"] for waveform in keywords["completions"]]

    waveform = torch.arange(20.0).reshape(2, 10)
    scores = Rewards([judge])(audio(waveform, [10, 6], 10), prompts(voice=["ann", "bob"]))
    assert scores.total.tolist() == pytest.approx([1.0, 0.6])
    assert set(scores.breakdown) == {"judge"}
    assert seen["prompts"] == ["one", "two"] and seen["voice"] == ["ann", "bob"]
    assert seen["completions"][1].tolist() == [10, 11, 12, 13, 14, 15]  # without its padding
    assert seen["completions"][1].dtype == np.float32
    assert [len(clip) for clip in seen["reference_audio"]] == [6, 4]
    assert (seen["reference_texts"], seen["reference_sample_rate_hz"]) == (["ah", "oh"], 24_000)


def test_a_plain_function_gets_only_what_it_names() -> None:
    def judge(prompts: list[str], voice: list[str], scale: float = 2.0) -> list[float]:
        return [scale * len(text + name) for text, name in zip(prompts, voice, strict=True)]

    assert FunctionReward(judge).score(audio(torch.zeros(2, 4)), prompts(voice=["ann", "bo"])).tolist() == [12.0, 10.0]
    with pytest.raises(ValueError, match=r"needs \['voice'\].*completions"):
        Rewards([judge])(audio(torch.zeros(2, 4)), prompts())


def test_a_plain_function_hears_the_rate_it_asks_for() -> None:
    def judge(completions: list[np.ndarray], sample_rate_hz: int) -> list[float]:
        return [float(len(waveform)) + sample_rate_hz for waveform in completions]

    judge.sample_rate_hz = 8_000  # type: ignore[attr-defined]
    scores = Rewards([judge])(audio(torch.zeros(2, 24), [24, 10]), prompts())
    assert scores.total.tolist() == [8_008, 8_004]  # ceil(24 / 3), ceil(10 / 3)


def test_plain_functions_that_cannot_be_used() -> None:
    async def later(completions: list[np.ndarray]) -> list[float]:
        return []

    def too_few(completions: list[np.ndarray]) -> list[float]:
        return [1.0]

    with pytest.raises(TypeError, match="async"):
        load_reward(later)
    with pytest.raises(ValueError, match="'too_few' must return a list of 2 floats or None, got 1 values"):
        Rewards([too_few])(audio(torch.zeros(2, 4)), prompts())
    with pytest.raises(ValueError, match="rename"):
        Rewards([too_few])(audio(torch.zeros(2, 4)), prompts(completions=["a", "b"]))


def test_an_exception_in_a_reward_propagates() -> None:
    def broken(completions: list[np.ndarray]) -> list[float]:
        raise ZeroDivisionError("inside the reward")

    with pytest.raises(ZeroDivisionError, match="inside the reward"):
        Rewards([broken])(audio(torch.zeros(2, 4)), prompts())


def test_resampling_keeps_the_gradient_and_the_lengths() -> None:
    # 24 kHz -> 24 kHz is the identity: d sum w^2 / dw = 2 w. 24 -> 16 kHz keeps a 1 kHz tone; its energy falls to 2/3.
    time_s = torch.arange(4_800) / RATE_HZ
    tone = torch.sin(2 * math.pi * 1_000 * time_s)[None]
    same = tone.clone().requires_grad_()
    Rewards([mean_square(sample_rate_hz=RATE_HZ)])(audio(same), prompts(1)).total.sum().backward()
    torch.testing.assert_close(same.grad, 2 * tone)

    model = mean_square(sample_rate_hz=16_000)
    waveform = tone.clone().requires_grad_()
    total = Rewards([model])(audio(waveform), prompts(1)).total
    assert model.heard.sample_rate_hz == 16_000 and model.heard.lengths_samples.tolist() == [3_200]
    assert total.item() == pytest.approx(1_600, rel=0.01)
    total.sum().backward()
    # For a band-limited w, A'A w = (2/3) w away from the ends: gradient 2 * (2/3) w.
    torch.testing.assert_close(waveform.grad[0, 500:-500], 4 / 3 * tone[0, 500:-500], atol=0.01, rtol=0)


def test_batch_equals_single_after_resampling() -> None:
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.rand(size, generator=generator) - 0.5 for size in (1_000, 700))
    together = torch.nn.utils.rnn.pad_sequence([long, short], batch_first=True)
    model = mean_square(sample_rate_hz=16_000)
    score = Rewards([model])(audio(together, [1_000, 700]), prompts()).total
    assert model.heard.lengths_samples.tolist() == [667, 467]
    assert not model.heard.waveform[1, 467:].any()  # the filter's ringing beyond the end is cut
    alone = Rewards([model])(audio(short[None]), prompts(1)).total
    assert score[1].item() == pytest.approx(alone.item(), rel=1e-6)


def test_a_model_without_gradient_hears_detached_sound() -> None:
    blind = mean_square(differentiable=False, name="blind")
    waveform = torch.ones(1, 8, requires_grad=True)
    scores = Rewards([blind, mean_square()])(audio(waveform), prompts(1))
    assert not blind.heard.waveform.requires_grad and not scores.breakdown["blind"].requires_grad
    scores.total.sum().backward()
    assert waveform.grad.tolist() == [[2.0] * 8]


def test_a_declared_gradient_must_be_there() -> None:
    class Cut(MeanSquare):
        def score(self, audio: Audio, prompts: Prompts) -> Tensor:
            return super().score(audio, prompts).detach()

    cut = Rewards([Cut(None, name="cut", differentiable=True)])
    with pytest.raises(ValueError, match="'cut' declares a gradient"):
        cut(audio(torch.ones(1, 8, requires_grad=True)), prompts(1))
    assert cut(audio(torch.ones(1, 8)), prompts(1)).total.item() == 8.0


def test_mel_rewards_hear_the_mel() -> None:
    class Mel(Fixed):
        def score(self, audio: Audio, prompts: Prompts) -> Tensor:
            assert audio.sample_rate_hz == RATE_HZ  # not resampled: it does not listen
            return audio.mel.square().sum((1, 2))

    mel = torch.full((1, 2, 3), 2.0, requires_grad=True)
    heard = replace(audio(torch.zeros(1, 8)), mel=mel)
    total = Rewards([Mel(None, differentiable=True, domain="mel", sample_rate_hz=16_000)])(heard, prompts(1)).total
    assert total.item() == 24.0
    total.sum().backward()
    assert mel.grad.unique().tolist() == [4.0]


def test_scores_are_float32_under_autocast() -> None:
    class Product(MeanSquare):
        def score(self, audio: Audio, prompts: Prompts) -> Tensor:
            return (audio.waveform @ torch.full((3, 1), 1.001))[:, 0]

    with torch.autocast("cpu", torch.bfloat16):
        total = Rewards([Product(None)])(audio(torch.ones(1, 3)), prompts(1)).total
    assert total.item() == pytest.approx(3.003, abs=1e-6)  # bfloat16 would say 3.0


def make(**changes: Any) -> Callable[[], Any]:
    return lambda: Rewards([Fixed([1.0], **changes)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rewards([]), "at least one reward"),
        (lambda: Rewards("mos"), "list of at least one reward"),
        (lambda: Rewards([Fixed([1.0])], [1.0, 2.0]), r"expected 1 for \['fixed'\], got 2"),
        (lambda: Rewards([Fixed([1.0])], [math.nan]), "must be finite"),
        (lambda: Rewards([Fixed([1.0]), Fixed([2.0])]), r"\['fixed'\] more than once"),
        (lambda: Rewards(["mso"]), r"unknown reward 'mso': expected one of \[.*'mos'"),
        (lambda: Rewards(["no_such_package.module:Name"]), "PYTHONPATH"),
        (lambda: Rewards(["json:NoSuchReward"]), "module json has no 'NoSuchReward'"),
        (make(domain="spectrum"), "'waveform' or 'mel', got 'spectrum'"),
        (make(needs=frozenset({"texts"})), r"needs must be of \['reference', 'text'\]"),
        (make(sample_rate_hz=0), "sample_rate_hz must be positive"),
        (make(range=(5.0, 1.0)), r"range must be \(low, high\)"),
        (lambda: load_reward(3), "expected a reward model or a function, got int|Type-check"),  # type: ignore[arg-type]
    ],
)
def test_declarations_are_checked_when_built(build: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_a_model_that_declares_too_little() -> None:
    class Bare:
        name = "bare"

        def score(self, audio: Audio, prompts: Prompts) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(TypeError, match=r"'bare' does not declare \['differentiable', 'domain'"):
        load_reward(Bare)


@pytest.mark.parametrize("values", [[[1.0], [2.0]], [1.0], [1, 2], 3.0])
def test_the_output_must_be_one_float_a_row(values: Any) -> None:
    with pytest.raises(ValueError, match=r"'fixed': expected a float tensor of shape \(2,\)"):
        Rewards([Fixed(values)])(audio(torch.zeros(2, 4)), prompts())


def test_needs_are_checked_against_the_prompts() -> None:
    Rewards([Fixed([1.0])]).check(replace(prompts(1), texts=[" "]))
    with pytest.raises(ValueError, match="needs the text"):
        Rewards([Fixed([1.0], needs=frozenset({"text"}))]).check(replace(prompts(1), texts=[" "]))
    silent = replace(prompts(1), reference_lengths_samples=torch.tensor([0]))
    with pytest.raises(ValueError, match="needs a reference clip"):
        Rewards([Fixed([1.0], needs=frozenset({"reference"}))]).check(silent)


def test_differentiable_counts_what_has_weight() -> None:
    models = [mean_square(), Fixed([1.0])]
    assert not Rewards(models).differentiable
    assert Rewards(models, [1.0, 0.0]).differentiable


def test_your_own_reward_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards_of_a_test.py").write_text(
        "def brevity(completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        reward = load_reward("own_rewards_of_a_test:brevity")
    finally:
        sys.modules.pop("own_rewards_of_a_test", None)
    assert reward.name == "brevity" and not reward.differentiable
    assert reward.score(audio(torch.zeros(2, 7), [7, 3]), prompts()).tolist() == [-7.0, -3.0]


@pytest.mark.parametrize("name", known_rewards())
class TestContract:
    """What every file of reward_models promises; a new file is found by itself."""

    @pytest.fixture
    def spec(self, name: str, tmp_path: Path) -> str:
        """What loads it: its name, or the folder of one that has to be trained."""
        if name != "preference":
            return name
        save_preference_model(PreferenceModel(PreferenceModel.Config(num_members=2, dim=16, num_layers=1)), tmp_path)
        return str(tmp_path)

    def sounds(self, reward: RewardModel) -> Audio:
        generator = torch.Generator().manual_seed(0)
        lengths = [9_600, 6_400]
        waveform = 0.01 * torch.randn(2, 9_600, generator=generator) + vibrato(2.0, seconds=0.4).float()
        waveform[1, 6_400:] = 0
        mel = torch.randn(2, 38, 100, generator=generator)
        mel[1, 26:] = 0
        return Audio(waveform, torch.tensor(lengths), 16_000, mel, torch.tensor([38, 26]))

    def test_declares_its_file_name(self, name: str, spec: str) -> None:
        reward = load_reward(spec)
        assert isinstance(reward, RewardModel) and reward.name == name

    def test_scores_within_its_range_and_a_batch_as_its_items_alone(self, spec: str) -> None:
        rewards = Rewards([spec])
        model, both = rewards.models[0], self.sounds(rewards.models[0])
        with torch.no_grad():
            score = rewards(both, prompts()).total
            alone = rewards(
                Audio(both.waveform[1:, :6_400], torch.tensor([6_400]), 16_000, both.mel[1:, :26], torch.tensor([26])),
                prompts().select([1]),
            ).total
        assert ((score >= model.range[0]) & (score <= model.range[1])).all()
        torch.testing.assert_close(score[1:], alone, atol=1e-3, rtol=1e-3)

    def test_gradient_is_finite_and_stays_in_the_item(self, spec: str) -> None:
        rewards = Rewards([spec])
        model, both = rewards.models[0], self.sounds(rewards.models[0])
        if not model.differentiable:
            pytest.skip("declares no gradient")
        source = (both.mel if model.domain == "mel" else both.waveform).clone().requires_grad_()
        heard = replace(both, mel=source) if model.domain == "mel" else replace(both, waveform=source)
        (gradient,) = torch.autograd.grad(rewards(heard, prompts()).total[1], source)
        assert gradient.isfinite().all() and gradient[1].any() and not gradient[0].any()
        assert not gradient[1, 26 if model.domain == "mel" else 6_400 :].any()  # padding has no say


class Scaled:
    name = "scaled"
    differentiable = False
    domain = "mel"
    sample_rate_hz = None
    needs: frozenset[str] = frozenset()
    range = (-1.0, 1.0)

    def __init__(self, *, factor: float = 1.0) -> None:
        self.factor = factor

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        return self.factor * audio.mel.mean((1, 2))


def test_a_class_takes_options_and_says_which() -> None:
    assert load_reward(Scaled).factor == 1.0  # type: ignore[attr-defined]
    assert load_reward(Scaled, {"factor": 0.5}).factor == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'Scaled': expected options among \['factor'\], got 'speed'$"):
        load_reward(Scaled, {"speed": 2})
    with pytest.raises(ValueError, match="expected a class to give options to, got Scaled"):
        load_reward(Scaled(), {"factor": 2})
