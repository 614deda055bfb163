"""What recipes/compare.py makes of its runs: updates for a budget, seconds to a reward, the table and the plot.

A run is a line of runs.jsonl, a mapping with `name`, `seed`, `price_s` (seconds of an update, alone on the device),
`updates`, `curve` (means over the held-out prompts after so many `updates`) and `measures` (by name a value a prompt,
of the last evaluation); with `error` if it ended early.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_mel.evaluation.evaluate import EvaluationResult
from rlhf_mel.evaluation.intervals import mean_interval
from rlhf_mel.evaluation.verdict import WORSE as FAILED
from rlhf_mel.evaluation.verdict import verdict
from rlhf_mel.speech.measures import MEASURES, Measure

Run = Mapping[str, Any]

BASE = "base"
SHARES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""When a run is evaluated, as shares of its updates: more often at the start, where fast methods differ."""
RIVAL = "flow_grpo"
"""Whose final reward the others are timed to."""

TRAINED = {"rewards/mos": Measure("DistillMOS", "higher", 2), "rewards/intelligibility": Measure("log p", "higher")}
"""What the runs are trained on."""
SAYS_THE_SAME = frozenset({"duration_s"})
"""No judge of its own: seconds of speech fall where the share of silence rises, as frames are given."""


def columns() -> dict[str, Measure]:
    """Measures in the table, in its order."""
    return TRAINED | {name: known for name, known in MEASURES.items() if known.shown != "report"}


def affordable_updates(seconds: float, price_s: float) -> int:
    """Whole updates of `price_s` seconds each in a budget, at least 1."""
    return max(1, int(seconds / price_s + 1e-9))


def evaluation_points(updates: int) -> list[int]:
    """After which of the updates a run is evaluated."""
    return sorted({max(1, round(share * updates)) for share in SHARES})


def seconds_to_reach(seconds: Sequence[float], rewards: Sequence[float], level: float) -> float | None:
    """When the curve through these points first reaches `level`, by straight lines between them; None: never."""
    for k, reward in enumerate(rewards):
        if reward >= level:
            if k == 0:
                return seconds[0]
            share = (level - rewards[k - 1]) / (reward - rewards[k - 1])
            return seconds[k - 1] + share * (seconds[k] - seconds[k - 1])
    return None


def from_base(runs: Sequence[Run]) -> list[Run]:
    """The runs with curves that begin at no update, where the policy is the base."""
    starts = {run["seed"]: run["curve"] for run in runs if run["name"] == BASE}
    return [{**run, "curve": [*starts[run["seed"]], *run["curve"]]} if run["updates"] else run for run in runs]


def curve_of(runs: Sequence[Run]) -> tuple[list[float], np.ndarray]:
    """Seconds [n] of the evaluations that all runs of a method reached, and their rewards [runs, n]."""
    points = min((run["curve"] for run in runs), key=len)
    seconds = [point["updates"] * runs[0]["price_s"] for point in points]
    return seconds, np.array([[point["reward"] for point in run["curve"][: len(points)]] for run in runs])


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each method, the methods as they come."""
    names = dict.fromkeys(run["name"] for run in runs)
    return {name: [run for run in runs if run["name"] == name] for name in names}


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a method, best reward first: means over seeds, seconds to the rival's reward, judges and guards."""
    methods = by_name(runs)
    bases = {run["seed"]: run for run in methods[BASE]}
    goal = curve_of(methods[RIVAL])[1].mean(0)[-1] if RIVAL in methods else math.nan
    rows = [_row(name, own, bases, goal) for name, own in methods.items()]
    return sorted(rows, key=lambda row: -row["reward"])


def _row(name: str, runs: Sequence[Run], bases: Mapping[int, Run], goal: float) -> dict[str, Any]:
    seconds, rewards = curve_of(runs)
    measured = {key: [float(np.nanmean(run["measures"][key])) for run in runs] for key in runs[0]["measures"]}
    return {
        "name": name,
        "runs": len(runs),
        "updates": runs[0]["updates"],
        "price_s": runs[0]["price_s"],
        "reward": float(rewards[:, -1].mean()),
        "reward_std": float(rewards[:, -1].std(ddof=1)) if len(runs) > 1 else math.nan,
        "seconds_to_rival": seconds_to_reach(seconds, rewards.mean(0).tolist(), goal) if len(seconds) > 1 else None,
        "measures": {key: float(np.mean(values)) for key, values in measured.items()},
        "worse": worse_than_base(runs, bases),
        "fails": {} if name == BASE else failed_guards(runs, bases),
        "ended_early": sum("error" in run for run in runs),
    }


def worse_than_base(runs: Sequence[Run], bases: Mapping[int, Run]) -> dict[str, float]:
    """The judges on which a method is worse than the base with the same noise: by how much.

    A prompt's change is the mean over seeds of run minus base; pairs with a NaN do not count. Worse is a mean over
    prompts whose 95 % interval lies to the side of 0 that `Measure.worse` names. It is of these runs and voices: seeds
    and voices are too few to say what others would do.
    """
    judges = {key: known.worse for key, known in columns().items() if key not in TRAINED and key not in SAYS_THE_SAME}
    worse = {}
    for key, side in judges.items():
        if not side or key not in runs[0]["measures"]:  # no WER without Whisper
            continue
        pairs = [np.subtract(run["measures"][key], bases[run["seed"]]["measures"][key]) for run in runs]
        interval = mean_interval(np.ma.masked_invalid(pairs).mean(0).compressed())
        if (interval.low > 0 and side != "lower") or (interval.high < 0 and side != "higher"):
            worse[key] = interval.change
    return worse


def failed_guards(runs: Sequence[Run], bases: Mapping[int, Run]) -> dict[str, int]:
    """Guards of measures.py that fail against the base with the same noise (verdict.py): in how many of the runs."""
    counts: dict[str, int] = {}
    for run in runs:
        guards = verdict(_heard(bases[run["seed"]]), _heard(run))["guards"]
        for guard, found in guards.items():
            counts[guard] = counts.get(guard, 0) + (found["status"] == FAILED)
    return {guard: count for guard, count in counts.items() if count}


def _heard(run: Run) -> EvaluationResult:
    return EvaluationResult(run["measures"], [], 24_000, [])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `summary`, in Markdown."""
    shown = {key: known for key, known in columns().items() if any(key in row["measures"] for row in rows)}
    heads = ["method", "updates", "s an update", "reward", f"s to {RIVAL}'s", *(known.name for known in shown.values())]
    lines = [[*heads, "worse than base", "guards that fail"], ["---"] * (len(heads) + 2)]
    for row in rows:
        reached, trained = row["seconds_to_rival"], row["updates"] > 0
        spread = "" if math.isnan(row["reward_std"]) else f" ± {row['reward_std']:.3f}"
        worse = [
            f"{shown[key].name.split(',')[0]} {change:+.{shown[key].digits}f}" for key, change in row["worse"].items()
        ]
        fails = [f"{guard} {count}/{row['runs']}" for guard, count in row["fails"].items()]
        early = [f"ended early {row['ended_early']}/{row['runs']}"] if row["ended_early"] else []
        lines.append(
            [
                f"`{row['name']}`",
                str(row["updates"]) if trained else "-",
                f"{row['price_s']:.3f}" if trained else "-",
                f"{row['reward']:.3f}{spread}",
                "-" if not trained else "never" if reached is None else f"{reached:.1f}",
                *(f"{row['measures'].get(key, math.nan):.{known.digits}f}" for key, known in shown.items()),
                ", ".join(worse) or "-",
                ", ".join([*early, *fails]) or "-",
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(runs: Sequence[Run], file: Path) -> None:
    """Held-out reward over seconds: the mean of the seeds, a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    trained = [(name, own) for name, own in by_name(runs).items() if own[0]["updates"] > 0]
    others = [(name, own) for name, own in by_name(runs).items() if own[0]["updates"] == 0]
    colours = pyplot.get_cmap("tab20")(np.linspace(0, 1, 20))
    for (name, own), colour in zip(trained, colours, strict=False):
        seconds, rewards = curve_of(own)
        axes.plot(seconds, rewards.mean(0), marker=".", color=colour, label=name)
        axes.fill_between(seconds, rewards.min(0), rewards.max(0), color=colour, alpha=0.12, linewidth=0)
    for (name, own), style in zip(others, ("dotted", "dashed", "dashdot", (0, (1, 4))), strict=False):
        axes.axhline(curve_of(own)[1].mean(), color="black", linestyle=style, label=name)
    axes.set_xlabel("seconds of updates, alone on the device")
    axes.set_ylabel("held-out reward")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def best_settings(runs: Sequence[Run], base: Run, *, cer_slack: float) -> dict[str, Run]:
    """Of each method's tuning runs the one with the highest reward whose CER is near the base's, or the highest of all.

    Runs that ended early do not count.
    """
    best: dict[str, Run] = {}
    for name, own in by_name([run for run in runs if "error" not in run]).items():
        kept = [run for run in own if run["curve"][-1]["cer"] <= base["curve"][-1]["cer"] + cer_slack]
        best[name] = max(kept or own, key=lambda run: run["curve"][-1]["reward"])
    return best
