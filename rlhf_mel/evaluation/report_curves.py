"""Curves of a report, as inline SVG in the page's colour."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_mel.speech.measures import JUDGE, measure


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def curves(summary: Mapping[str, Any], log: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]]) -> str:
    """Reward and judge over updates as inline SVG, in the text's colour."""
    import matplotlib
    from matplotlib.figure import Figure

    text = "#010203"  # replaced by the page's own colour
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "rlhf_mel", "font.family": "sans-serif", "font.size": 9}
    style |= {key: text for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        rewards, judge = figure.subplots(1, 2, sharex=True)
        steps = [line["step"] for line in trained]
        means = [line["reward"] for line in trained]
        spread = [line.get("reward_std") or 0 for line in trained]
        rewards.plot(steps, means, color="#d9822b", linewidth=1.6)
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        rewards.fill_between(steps, low, high, color="#d9822b", alpha=0.18, linewidth=0)
        rewards.plot(*_heldout("reward", summary, log), "o", color="#d9822b", markersize=5)
        judge.plot(*_heldout(JUDGE, summary, log), "o--", color="#2b8a9d", linewidth=1, markersize=5)
        for axes, title in ((rewards, "reward (trained)"), (judge, f"{measure(JUDGE).label} (judge)")):
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel("update")
            axes.spines[["top", "right"]].set_visible(False)
            axes.patch.set_alpha(0)
        if not len(judge.lines[0].get_xdata()):
            judge.text(0.5, 0.5, "not measured", ha="center", transform=judge.transAxes)
        else:
            _at_least(judge, 0.3)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(text, "currentColor")


def _at_least(axes: Any, height: float) -> None:
    """A vertical range of at least `height`, so that noise does not fill the picture."""
    low, high = axes.get_ylim()
    if high - low < height:
        middle = (low + high) / 2
        axes.set_ylim(middle - height / 2, middle + height / 2)


def _heldout(
    name: str, summary: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> tuple[list[float], list[float]]:
    """Updates and values of a held-out measure: before, at evaluations during training, after."""
    points: dict[float, Any] = {0: (summary.get("before") or {}).get(name)}
    points |= {line["step"]: line[f"eval_{name}"] for line in log if f"eval_{name}" in line}
    points[summary.get("steps") or max(line["step"] for line in log)] = (summary.get("after") or {}).get(name)
    known = {step: value for step, value in points.items() if _finite(value)}
    return [float(step) for step in known], [float(value) for value in known.values()]
