"""The comparison recipe: its arithmetic by hand, and both commands on two algorithms."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import compare
import comparison

from rlhf_mel.algorithms.base import algorithm_class, known_algorithms, load_algorithm

ROOT = Path(__file__).parents[2]


def test_a_budget_pays_for_whole_updates() -> None:
    assert [comparison.affordable_updates(*pair) for pair in ((30, 0.7), (1, 0.1), (0.3, 0.1), (1, 5))] == [
        42,
        10,
        3,
        1,
    ]
    # 5, 10, 20, 40, 70 and 100 % of 42 and of 3 updates, to the nearest, at least 1, each once
    assert comparison.evaluation_points(42) == [2, 4, 8, 17, 29, 42]
    assert comparison.evaluation_points(3) == [1, 2, 3]


def test_seconds_to_reach_a_reward_by_hand() -> None:
    seconds, rewards = [0.0, 2.0, 4.0, 8.0], [1.0, 2.0, 1.5, 3.5]
    for level, expected in ((0.5, 0.0), (1.0, 0.0), (1.5, 1.0), (2.0, 2.0), (2.5, 6.0), (3.5, 8.0)):
        assert comparison.seconds_to_reach(seconds, rewards, level) == pytest.approx(expected)
    assert comparison.seconds_to_reach(seconds, rewards, 3.6) is None


def line(
    name: str, seed: int, *rewards: float, updates: int = 0, price_s: float = 0.0, **changes: Any
) -> dict[str, Any]:
    """A run of two prompts, evaluated at even distances; the second prompt's reward is 1 more."""
    curve = [
        {"updates": updates * (k + 1) // len(rewards), "reward": reward, "cer": 0.1} for k, reward in enumerate(rewards)
    ]
    measures = {"reward": [rewards[-1] - 0.5, rewards[-1] + 0.5], "dnsmos_ovrl": [3.0, 3.2], "cer": [0.1, 0.1]}
    values = {"name": name, "seed": seed, "price_s": price_s, "updates": updates, "curve": curve, "measures": measures}
    return {**values, **changes}


def lines() -> list[dict[str, Any]]:
    worse = {"reward": [2.5, 3.5], "dnsmos_ovrl": [3.1, 3.3], "cer": [0.17, 0.171]}
    return comparison.from_base(
        [
            line("base", 0, 1.0),
            line("base", 1, 1.2),
            line("flow_grpo", 0, 1.4, 1.8, updates=10, price_s=0.5),
            line("flow_grpo", 1, 1.6, 2.2, updates=10, price_s=0.5),
            line("draft", 0, 2.5, 3.0, updates=20, price_s=0.25, measures=worse),
            line("draft", 1, 2.7, 3.4, updates=20, price_s=0.25),
        ]
    )


def test_summary_by_hand() -> None:
    draft, grpo, base = comparison.summary(lines())
    assert [row["name"] for row in (draft, grpo, base)] == ["draft", "flow_grpo", "base"]
    assert (draft["reward"], grpo["reward"], base["reward"]) == pytest.approx((3.2, 2.0, 1.1))
    assert draft["reward_std"] == pytest.approx(0.4 / math.sqrt(2))
    # Mean curves: draft (0 s, 1.1), (2.5 s, 2.6), (5 s, 3.2); Flow-GRPO ends at 2.0 after 5 s: 2.5 s * 0.9 / 1.5.
    assert draft["seconds_to_rival"] == pytest.approx(1.5) and grpo["seconds_to_rival"] == pytest.approx(5.0)
    assert draft["measures"]["cer"] == pytest.approx((0.1705 + 0.1) / 2)
    # In draft's first run alone the error rate rose, by 0.0705 ± 0.0064 (t(1) = 12.7): beyond 0.01.
    assert draft["fails"] == {"cer": 1} and grpo["fails"] == {}
    # Prompts, means over seeds: the error rate rose by 0.035 and 0.0355: ± 0.003; the judge rose.
    assert draft["worse"] == pytest.approx({"cer": 0.03525}) and grpo["worse"] == {}
    assert base["fails"] == base["worse"] == {}


def test_worse_than_base_by_hand() -> None:
    """Three prompts 0.1 apart have an interval of t(2) * 0.1 / sqrt(3) = 4.303 * 0.0577 = 0.248."""
    start = {0: 1.0, 1: 7.0}
    changes = {
        "reward": ([-1, -1, -1], [-1, -1, -1]),  # no judge
        "dnsmos_ovrl": ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1]),  # better, and so is less silence
        "silence_ratio": ([-0.1, -0.1, -0.1], [-0.1, -0.1, -0.1]),
        "wer": ([-0.1, 0.1, 0.3], [0.1, 0.1, 0.1]),  # prompts 0, 0.1, 0.2: 0.1 ± 0.248
        "voice_similarity": ([-0.2, -0.3, -0.4], [-0.3, -0.4, -0.5]),  # -0.25, -0.35, -0.45: -0.35 ± 0.248
        "cer": ([0.01, 0.02, 0.06], [0.01, 0.02, 0.06]),  # 0.03 ± 0.066; as six prompts it would be 0.03 ± 0.025
        "level_dbfs": ([1.0, 1.1, 1.2], [1.0, 1.1, 1.2]),  # 1.1 ± 0.248
        "f0_std_semitones": ([-0.4, math.nan, -0.6], [-0.4, -0.5, -0.6]),  # -0.5 ± 0.248
    }

    def worse(sign: float) -> dict[str, float]:
        def changed(seed: int) -> dict[str, list[float]]:
            return {key: [start[seed] + sign * change for change in own[seed]] for key, own in changes.items()}

        runs = [line("draft", seed, 1.0, measures=changed(seed)) for seed in start]
        bases = {seed: line("base", seed, 1.0, measures=dict.fromkeys(changes, [start[seed]] * 3)) for seed in start}
        return comparison.worse_than_base(runs, bases)

    assert worse(1) == pytest.approx({"voice_similarity": -0.35, "level_dbfs": 1.1, "f0_std_semitones": -0.5})
    assert worse(-1) == pytest.approx({"dnsmos_ovrl": -0.1, "level_dbfs": -1.1, "silence_ratio": 0.1})
    assert worse(0) == {}


def test_a_run_that_ended_early_shortens_the_curve_and_is_counted() -> None:
    short = line("draft", 1, 9.0, updates=20, price_s=0.25, error="not finite")
    short["curve"][0]["updates"] = 10
    runs = [run for run in lines() if run["name"] != "draft"]
    runs += comparison.from_base([line("base", 1, 1.2), short])[1:]
    (draft,) = [row for row in comparison.summary(runs) if row["name"] == "draft"]
    assert draft["ended_early"] == 1 and draft["reward"] == 9.0


def test_the_table() -> None:
    table = comparison.markdown(comparison.summary(lines())).splitlines()
    heads = (
        "method | updates | s an update | reward | s to flow_grpo's | DNSMOS | CER | worse than base | guards that fail"
    )
    assert table[0] == f"| {heads} |"
    assert table[2] == "| `draft` | 20 | 0.250 | 3.200 ± 0.283 | 1.5 | 3.150 | 0.135 | CER +0.035 | cer 1/2 |"
    assert table[3].endswith("| - | - |"), "DNSMOS did not rise, and is not worse"
    assert table[4] == "| `base` | - | - | 1.100 ± 0.141 | - | 3.100 | 0.100 | - | - |"


def test_the_plot_is_written(tmp_path: Path) -> None:
    comparison.plot(lines(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_tuning_prefers_reward_where_the_words_are_kept() -> None:
    def tuned(name: str, reward: float, cer: float, **changes: Any) -> dict[str, Any]:
        return line(name, 0, reward, updates=1, curve=[{"updates": 1, "reward": reward, "cer": cer}], **changes)

    runs = [tuned("a", 1.0, 0.11), tuned("a", 2.0, 0.12), tuned("a", 3.0, 0.13), tuned("b", 4.0, 0.5)]
    runs += [tuned("b", 5.0, 0.6), tuned("b", 9.0, 0.1, error="not finite")]
    best = comparison.best_settings(runs, line("base", 0, 0.5), cer_slack=0.02)
    assert {name: run["curve"][-1]["reward"] for name, run in best.items()} == {"a": 2.0, "b": 5.0}


def test_every_algorithm_is_compared_with_options_that_it_knows() -> None:
    of_rollouts = {name for name in known_algorithms() if not algorithm_class(name).learns_from_pairs}
    assert set(compare.SETTINGS) > of_rollouts
    for row, setting in compare.SETTINGS.items():
        assert (setting.algorithm is None) == (row in of_rollouts)
        for own in (setting, *compare.variants(row, setting, [1 / 3, 1, 3])):
            name = own.algorithm or row
            beta = algorithm_class(name).default_beta if own.beta is None else own.beta
            load_algorithm(name, own.options, beta=beta)


@pytest.mark.slow
def test_both_commands(tmp_path: Path) -> None:
    def recipe(*options: str) -> str:
        command = [sys.executable, str(ROOT / "recipes/compare.py"), *options, "--out", str(tmp_path), "--workers", "1"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = ["draft", "flow_grpo"]
    size = {
        "seeds": 0,
        "seconds": 1,
        "prompts": 2,
        "rollouts": 2,
        "generations": 2,
        "priced_updates": 1,
        "device": "cpu",
    }
    sizes = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    trained = recipe("train", "--algorithms", *names, *sizes)
    samplers = ["base", "best_of_8", "noise_optimisation", "step_guidance"]
    assert all(f"{name}_0" in trained for name in (*names, *samplers))
    assert "reward" not in recipe("train", "--algorithms", *names, *sizes)  # nothing is left to do
    table = recipe("judge")
    rows = {row["name"]: row for row in json.loads((tmp_path / "comparison.json").read_text())}
    assert rows.keys() == {*names, *samplers} and all(f"`{name}`" in table for name in rows)
    assert all(rows[name]["reward"] > rows["base"]["reward"] for name in samplers[1:3])
    assert rows["draft"]["updates"] == 1 and rows["draft"]["reward"] != rows["base"]["reward"]
    assert {"dnsmos_ovrl", "f0_std_semitones", "level_dbfs", "silence_ratio"} <= rows["draft"]["measures"].keys()
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
