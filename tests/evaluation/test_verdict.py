"""The verdict: what each interval makes of a reward, a judge and a guard, and how often chance alone is confirmed."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from rlhf_mel.evaluation.evaluate import EvaluationResult
from rlhf_mel.evaluation.verdict import CONFIRMED, NOT_CONVINCED, NOT_IMPROVED, TOO_FEW, in_words, verdict

STEADY = {
    "cer": 0.1,
    "voice_similarity": 0.9,
    "level_dbfs": -20.0,
    "silence_ratio": 0.1,
    "duration_s": 2.0,
    "f0_std_semitones": 3.0,
}
T3 = 3.182446
"""Student's t(3) at 97.5 %: four prompts."""


def result(voices: str = "", closed: bool = False, **measures: Any) -> EvaluationResult:
    """Four prompts; measures that are not given are steady."""
    base = {name: [value] * 4 for name, value in STEADY.items()} | {"reward": [3.0] * 4, "dnsmos_ovrl": [3.0] * 4}
    measures = {name: values for name, values in {**base, **measures}.items() if values is not None}
    return EvaluationResult(measures, [], 24_000, [], list(voices), closed)


def spread(centre: float, deviation: float) -> list[float]:
    """Four values with this mean; their mean has a standard error of half the deviation."""
    return [centre + deviation * z for z in (-(1.5**0.5) / 2**0.5, 0.0, 0.0, 1.5**0.5 / 2**0.5)]


UP = {"reward": spread(3.5, 0.1), "dnsmos_ovrl": spread(3.2, 0.1)}


def test_confirmed() -> None:
    said = verdict(result(), result(**UP))
    assert said["overall"] == CONFIRMED
    assert {guard["status"] for guard in said["guards"].values()} == {"ok"}
    # Differences 0.5 -+ 0.0866 and 0.5, 0.5: deviation sqrt(2 * 0.0075 / 3) = 0.0707, over sqrt(4).
    error = math.sqrt(2 * 0.75 * 0.01 / 3) / 2
    assert said["reward"]["standard_error"] == pytest.approx(error)
    assert said["reward"]["low"] == pytest.approx(0.5 - T3 * error)
    assert said["judge"]["measure"] == "dnsmos_ovrl" and said["judge"]["low"] == pytest.approx(0.2 - T3 * error)
    assert "prompts_needed" not in said
    json.dumps(said)


def test_the_interval_decides_and_not_the_mean() -> None:
    # The mean rises by 0.5 each time; the interval's half is T3 * 0.354 * deviation: 0.5 at a deviation of 0.444.
    assert verdict(result(), result(**{**UP, "reward": spread(3.5, 0.44)}))["overall"] == CONFIRMED
    assert verdict(result(), result(**{**UP, "reward": spread(3.5, 0.45)}))["overall"] == NOT_IMPROVED
    assert verdict(result(), result(**{**UP, "reward": [math.nan] * 4}))["overall"] == NOT_IMPROVED


@pytest.mark.parametrize(
    ("centre", "deviation", "status", "overall"),
    [
        (3.2, 0.17, "ok", CONFIRMED),  # 0.2 -+ 0.191
        (3.2, 0.18, "undecided", TOO_FEW),  # 0.2 -+ 0.202
        (3.0, 0.043, "no rise", NOT_CONVINCED),  # 0 -+ 0.0484: below the 0.05 that is asked for
        (3.0, 0.045, "undecided", TOO_FEW),  # 0 -+ 0.0506
    ],
)
def test_the_judge(centre: float, deviation: float, status: str, overall: str) -> None:
    said = verdict(result(), result(**{**UP, "dnsmos_ovrl": spread(centre, deviation)}))
    assert (said["judge"]["status"], said["overall"]) == (status, overall)


@pytest.mark.parametrize(
    ("name", "limit", "width"),
    [
        ("cer", 0.11, 0.002),
        ("voice_similarity", 0.88, 0.002),
        ("level_dbfs", -18.5, 0.1),
        ("level_dbfs", -21.5, 0.1),
        ("silence_ratio", 0.15, 0.01),
        ("duration_s", 1.8, 0.02),  # -10 %
        ("duration_s", 2.2, 0.02),
        ("f0_std_semitones", 2.4, 0.02),  # -20 %
    ],
)
def test_each_guard_within_beyond_and_across_its_limit(name: str, limit: float, width: float) -> None:
    inward = math.copysign(2 * T3 * width, STEADY[name] - limit)
    for centre, status, overall in (
        (limit + inward, "ok", CONFIRMED),
        (limit - inward, "worse", NOT_CONVINCED),
        (limit + inward / 8, "undecided", TOO_FEW),
    ):
        said = verdict(result(), result(**{**UP, name: spread(centre, width)}))
        assert (said["guards"][name]["status"], said["overall"]) == (status, overall)


def test_too_few_names_how_many_would_do() -> None:
    # Deviation of the judge's differences 0.0707. The effect of 0.05 is 0.03 away: t(n - 1) 0.0707 / sqrt(n) <= 0.03
    # first at n = 24 (0.0299; 23: 0.0306).
    said = verdict(result(), result(**{**UP, "dnsmos_ovrl": spread(3.02, 0.1)}))
    assert said["overall"] == TOO_FEW and said["prompts_needed"] == said["clusters_needed"] == 24
    assert in_words(said)[-1] == "about 24 prompts would tell (here: 4)"


def test_one_prompt_is_too_few_for_anything() -> None:
    before, after = ({"reward": [r], "dnsmos_ovrl": [r]} for r in (3.0, 4.0))
    said = verdict(EvaluationResult(before, [], 24_000, []), EvaluationResult(after, [], 24_000, []))
    assert said["overall"] == TOO_FEW and said["prompts_needed"] is None


def test_voices_that_disagree_are_no_confirmation() -> None:
    # +0.2 in one voice, +0.6 in the other; the reward rises nearly alike in both
    up = {"reward": [3.45, 3.55, 3.46, 3.56], "dnsmos_ovrl": [3.19, 3.21, 3.59, 3.61]}
    assert verdict(result(), result(**up))["overall"] == CONFIRMED
    said = verdict(result("aabb"), result("aabb", **up))
    assert (said["overall"], said["judge"]["clusters"]) == (TOO_FEW, 2)
    assert said["judge"]["high"] == pytest.approx(0.4 + 12.7062 * 0.2)  # t(1), and the error of two means 0.4 apart
    assert "voices would tell" in in_words(said)[-1]


def test_voices_that_are_all_there_are_are_told_apart() -> None:
    up = {"reward": [3.4, 3.5, 3.6, 3.7], "dnsmos_ovrl": [3.18, 3.22, 3.48, 3.52]}
    said = verdict(result("aabb", closed=True), result("aabb", closed=True, **up))
    assert (said["overall"], said["judge"]["clusters"]) == (CONFIRMED, 4)
    # by voice 0.2 and 0.5; two prompts 0.04 apart have a standard error of 0.02
    by_voice = said["judge"]["by_voice"]
    assert by_voice["a"]["change"] == pytest.approx(0.2) and by_voice["b"]["high"] == pytest.approx(
        0.5 + 12.7062 * 0.02
    )
    assert in_words(said)[1].endswith(": ok (a +0.2, b +0.5)")


def test_a_fall_in_one_of_the_voices_is_no_confirmation() -> None:
    # +0.5 in eleven prompts of one voice, -0.1 -+ 0.01 in one of two: the mean rises by 0.37, its interval is above 0.
    names = ["a"] * 11 + ["b"] * 3
    heard = [0.5] * 11 + [-0.11, -0.1, -0.09]
    before, after = (
        EvaluationResult({"reward": reward, "dnsmos_ovrl": dnsmos}, [], 24_000, [], names, True)
        for reward, dnsmos in (([0.0] * 14, [0.0] * 14), (np.linspace(1, 2, 14).tolist(), heard))
    )
    said = verdict(before, after)
    assert said["judge"]["low"] > 0.05 and (said["judge"]["status"], said["overall"]) == ("no rise", NOT_CONVINCED)


def test_not_measured_is_said_and_the_judge_must_be() -> None:
    said = verdict(result(cer=None), result(**UP, cer=None))
    assert said["guards"]["cer"]["status"] == "not measured" and said["overall"] == CONFIRMED
    assert in_words(said)[-1] == "not measured: cer"
    without = verdict(result(dnsmos_ovrl=None), result(**{**UP, "dnsmos_ovrl": None}))
    assert without["overall"] == NOT_CONVINCED and "dnsmos_ovrl: not measured" in in_words(without)


def test_what_can_no_longer_be_measured_is_worse_but_pitch_may_go() -> None:
    said = verdict(result(), result(**UP, voice_similarity=[math.nan, 0.9, 0.9, 0.9]))
    assert said["guards"]["voice_similarity"]["status"] == "worse" and said["overall"] == NOT_CONVINCED
    said = verdict(result(), result(**{**UP, "dnsmos_ovrl": [math.nan, 3.2, 3.2, 3.2]}))
    assert said["overall"] == NOT_CONVINCED
    gone = EvaluationResult({k: v for k, v in result(**UP).measures.items() if k != "cer"}, [], 24_000, [])
    said = verdict(result(), gone)
    assert said["guards"]["cer"] == {
        "status": "worse",
        "limit": "rise of at most 0.01",
        "reason": "not measured any more",
    }


@pytest.mark.parametrize(("lost", "status"), [(0, "ok"), (2, "ok"), (3, "worse"), (20, "worse")])
def test_pitch_may_be_lost_in_a_tenth_of_the_prompts(lost: int, status: str) -> None:
    def twenty(pitch: list[float], rise: float) -> EvaluationResult:
        scores = [rise + 0.01 * row for row in range(20)]
        return EvaluationResult({"reward": scores, "f0_std_semitones": pitch}, [], 24_000, [])

    said = verdict(twenty([3.0] * 20, 0.0), twenty([math.nan] * lost + [3.0] * (20 - lost), 1.0))
    assert said["guards"]["f0_std_semitones"]["status"] == status
    assert lost < 3 or f"{lost} of 20" in said["guards"]["f0_std_semitones"]["reason"]


def test_a_reward_that_is_lost_has_not_improved() -> None:
    said = verdict(result(), result(**{**UP, "reward": [math.nan, 3.5, 3.6, 3.4]}))
    assert said["overall"] == NOT_IMPROVED and said["reward"]["reason"] == "not finite any more on 1 prompts"


def test_one_prompt_whose_reward_fell_is_no_rise() -> None:
    before, after = (EvaluationResult({"reward": [r]}, [], 24_000, []) for r in (3.0, 1.0))
    assert verdict(before, after)["overall"] == NOT_IMPROVED


def test_a_voice_of_one_prompt_cannot_be_told_apart() -> None:
    names = ["a"] * 11 + ["b"]
    before = EvaluationResult({"reward": [0.0] * 12, "dnsmos_ovrl": [0.0] * 12}, [], 24_000, [], names, True)
    up = {"reward": np.linspace(1, 2, 12).tolist(), "dnsmos_ovrl": [*np.linspace(0.4, 0.5, 11).tolist(), -0.3]}
    said = verdict(before, EvaluationResult(up, [], 24_000, [], names, True))
    assert said["judge"]["low"] > 0 and said["judge"]["reason"] == "fewer than two prompts of b"
    assert said["overall"] == TOO_FEW


def test_equal_changes_of_a_few_prompts_prove_nothing() -> None:
    before, after = (EvaluationResult({"reward": [r] * 2}, [], 24_000, []) for r in (0.0, 0.0001))
    assert verdict(before, after)["overall"] == NOT_IMPROVED


def test_two_evaluations_are_of_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="of the same prompts, got 4 and 3 of 'reward'"):
        verdict(result(), EvaluationResult({"reward": [1.0] * 3}, [], 24_000, []))
    with pytest.raises(ValueError, match="got other voices"):
        verdict(result("aabb"), result("abab"))


def test_the_noise_floor_is_what_another_seed_does() -> None:
    said = verdict(result(), result(**UP), result(dnsmos_ovrl=spread(3.03, 0.1), duration_s=[2.1] * 4))
    assert said["noise_floor"]["dnsmos_ovrl"]["change"] == pytest.approx(0.03)
    assert said["noise_floor"]["duration_s"]["change"] == pytest.approx(0.05)  # a share, as its guard is
    assert verdict(result(), result(**UP))["noise_floor"] == {}


@pytest.mark.parametrize("prompts", [8, 16, 50])
@pytest.mark.parametrize("voices", [1, 3])
def test_no_effect_is_confirmed_in_at_most_three_percent(prompts: int, voices: int) -> None:
    """The reward rises, the judge hears nothing but noise, 0.1 a prompt and 0.1 a voice; nothing else is measured.

    2.5 % by construction; the share of 4,000 draws has a standard error of 0.25 %.
    """
    rng = np.random.default_rng(prompts + voices)
    names = [str(row % voices) for row in range(prompts)]

    def draw(reward: float) -> EvaluationResult:
        by_voice = rng.normal(size=(2, voices)) * (voices > 1)
        noise = 0.1 * (rng.normal(size=(2, prompts)) + by_voice[:, np.arange(prompts) % voices])
        return EvaluationResult({"reward": reward + noise[0], "dnsmos_ovrl": noise[1]}, [], 24_000, [], names)

    before = EvaluationResult({"reward": [0.0] * prompts, "dnsmos_ovrl": [0.0] * prompts}, [], 24_000, [], names)
    confirmed = [verdict(before, draw(2.0))["overall"] == CONFIRMED for _ in range(4_000)]
    assert np.mean(confirmed) <= 0.03
