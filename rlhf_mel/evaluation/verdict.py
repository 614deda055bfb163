"""What two evaluations of the same prompts prove: the reward's rise, whether a judge hears it, and what it cost.

Every change is a paired mean over prompts with a 95 % interval (intervals.py). Where the reference voices are some of
the many that a policy can clone, intervals are clustered by voice, and speak of voices like these. A policy that speaks
in a few voices only, and was heard in all of them, has no others to speak of: there prompts are what was drawn (Abadie,
Athey, Imbens & Wooldridge 2023, "When should you adjust standard errors for clustering?"). Then every voice is reported
by itself, and a judge who hears a fall in one of them, its interval below 0, does not confirm.

| status    | reward                    | judge (DNSMOS)                      | guard, that allows a range of changes |
|-----------|---------------------------|-------------------------------------|---------------------------------------|
| ok        | the interval lies above 0 | the interval lies above 0           | the interval lies within the range    |
| no rise   | it does not               | it ends below the effect asked for  |                                       |
| worse     |                           |                                     | it lies beyond the range              |
| undecided | there is one prompt only  | else                                | it straddles the end of the range     |

The verdict is "confirmed" if all that was measured is ok, and "reward not improved" if the reward is not. If it is, and
the judge or a guard says no, or the judge did not listen, it is "reward up, judge not convinced"; if they are only
undecided, the prompts are too few to tell, and the verdict names how many would, should the change stay as it is. With
no effect on the judge "confirmed" is an event of about 2.5 %; recipes/false_verdicts.py counts it. A guard that was not
measured stops nothing, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rlhf_mel.evaluation.evaluate import EvaluationResult
from rlhf_mel.evaluation.intervals import Interval, mean_interval, needed
from rlhf_mel.speech.measures import JUDGE, MEASURES, Guard

CONFIRMED = "confirmed"


NOT_CONVINCED = "reward up, judge not convinced"


TOO_FEW = "reward up, too few prompts to tell"


NOT_IMPROVED = "reward not improved"


OK, NO_RISE, WORSE, UNDECIDED, NOT_MEASURED = "ok", "no rise", "worse", "undecided", "not measured"


def verdict(before: EvaluationResult, after: EvaluationResult, floor: EvaluationResult | None = None) -> dict[str, Any]:
    """What the evaluation after training proves beside the one before; JSON-ready.

    Args:
        floor: the policy before training, heard with another sampling seed: how far measures move by chance alone.

    Returns:
        `overall`; `reward`; `judge`; `guards` by measure: `before` and `after` (means over the prompts measured both
        times), `change` with `low`, `high` and `standard_error` (as a share where the guard is one), `prompts`,
        `clusters`, `limit`, `status`; `noise_floor` by measure: `change`, `low`, `high`; `prompts_needed` and
        `clusters_needed` where the verdict is that there are too few (None: more than can be foreseen).
    """
    _check_pair(before, after)
    reward = _reward(before, after)
    judge = _judged(before, after)
    guarded = {name: known.guard for name, known in MEASURES.items() if known.guard is not None}
    guards = {name: _guarded(name, guard, before, after) for name, guard in guarded.items()}
    overall = _overall(reward.status, judge.status, [guard.status for guard in guards.values()])
    said: dict[str, Any] = {"overall": overall, "reward": reward.as_dict, "judge": {"measure": JUDGE, **judge.as_dict}}
    said |= {"guards": {name: guard.as_dict for name, guard in guards.items()}}
    if overall == TOO_FEW:
        said |= _enough([reward, judge, *guards.values()])
    return said | {"noise_floor": {} if floor is None else _noise_floor(before, floor)}


def _overall(reward: str, judge: str, guards: list[str]) -> str:
    if reward == UNDECIDED:
        return TOO_FEW
    if reward != OK:
        return NOT_IMPROVED
    if judge in (NO_RISE, NOT_MEASURED) or WORSE in guards:
        return NOT_CONVINCED
    return TOO_FEW if UNDECIDED in (judge, *guards) else CONFIRMED


@dataclass(frozen=True)
class Finding:
    """What became of one measure."""

    status: str
    limit: str = ""
    reason: str = ""
    """Where the interval alone does not say why."""
    before: float = math.nan
    after: float = math.nan
    interval: Interval | None = None
    by_voice: Mapping[str, Interval] = field(default_factory=dict)
    """Where the voices are all there are."""
    margin: float = math.nan
    """How narrow an interval around this change would decide: +- its distance from what decides."""

    @property
    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the interval's fields beside the rest; what is empty is left out."""
        words = {"limit": self.limit, "reason": self.reason}
        entry: dict[str, Any] = {"status": self.status} | {name: text for name, text in words.items() if text}
        if self.interval is None:
            return entry
        voices = {voice: asdict(interval) for voice, interval in self.by_voice.items()}
        entry |= {"by_voice": voices} if voices else {}
        return {"before": self.before, "after": self.after, **asdict(self.interval), **entry}


def _check_pair(before: EvaluationResult, after: EvaluationResult) -> None:
    """Raise unless both are of the same prompts, as far as can be told."""
    for name in before.measures.keys() & after.measures.keys():
        if (one := len(before.measures[name])) != (other := len(after.measures[name])):
            raise ValueError(
                f"verdict: expected two evaluations of the same prompts, got {one} and {other} of {name!r}"
            )
    if list(before.voices) != list(after.voices) or before.closed != after.closed:
        raise ValueError("verdict: expected evaluations of the same prompts, got other voices; hear them again")


def _reward(before: EvaluationResult, after: EvaluationResult) -> Finding:
    """Undecided where one prompt alone rose: a reward has no effect that is asked for."""
    means, interval = _compared("reward", before, after)
    status = OK if interval.low > 0 and interval.standard_error > 0 else NO_RISE
    if interval.prompts == 1 and interval.change > 0:
        status = UNDECIDED
    reason = ""
    if lost := _lost("reward", before, after):
        status, reason = NO_RISE, f"not finite any more on {lost} prompts"
    by_voice = _by_voice("reward", before, after)
    return Finding(status, "", reason, *means, interval, by_voice)


def _judged(before: EvaluationResult, after: EvaluationResult) -> Finding:
    effect = MEASURES[JUDGE].effect or 0.0
    limit = f"above 0 (asked for: {effect:g})"
    if not _measured(JUDGE, before):
        return Finding(NOT_MEASURED, limit)
    if JUDGE not in after.measures:
        return Finding(NO_RISE, limit, "not measured any more")
    means, interval = _compared(JUDGE, before, after)
    status, reason = _heard(interval, effect), ""
    by_voice = _by_voice(JUDGE, before, after)
    if single := [voice for voice, change in by_voice.items() if change.prompts < 2]:
        status, reason = UNDECIDED, f"fewer than two prompts of {', '.join(single)}"
    if falling := [voice for voice, change in by_voice.items() if change.high < 0]:
        status, reason = NO_RISE, f"falls in {', '.join(falling)}"
    if lost := _lost(JUDGE, before, after):
        status, reason = NO_RISE, f"not measurable any more on {lost} prompts"
    margin = max(interval.change, effect - interval.change)  # either 0 or the effect would be excluded
    return Finding(status, limit, reason, *means, interval, by_voice, margin)


def _heard(interval: Interval, effect: float) -> str:
    if interval.low > 0 and interval.standard_error > 0:
        return OK
    return NO_RISE if interval.high < effect else UNDECIDED


def _guarded(name: str, guard: Guard, before: EvaluationResult, after: EvaluationResult) -> Finding:
    if not _measured(name, before):
        return Finding(NOT_MEASURED, guard.limit)
    if name not in after.measures:
        return Finding(WORSE, guard.limit, "not measured any more")
    means, interval = _compared(name, before, after, relative=guard.relative)
    status, reason = UNDECIDED, ""
    if interval.low >= guard.low and interval.high <= guard.high:
        status = OK
    elif interval.low > guard.high or interval.high < guard.low:
        status = WORSE
    lost, measured = _lost(name, before, after), int(_finite(name, before).sum())
    if lost > (MAY_BE_LOST * measured if guard.may_be_missing else 0):
        status, reason = WORSE, f"not measurable any more on {lost} of {measured} prompts"
    margin = min(abs(interval.change - guard.low), abs(guard.high - interval.change))
    return Finding(status, guard.limit, reason, *means, interval, margin=margin)


MAY_BE_LOST = 0.1
"""Share of the prompts in which a measure that may be missing, pitch, may be lost."""


def _measured(name: str, before: EvaluationResult) -> bool:
    """Whether any prompt had the measure."""
    return name in before.measures and bool(_finite(name, before).any())


def _lost(name: str, before: EvaluationResult, after: EvaluationResult) -> int:
    """Prompts that could be measured before and no longer can."""
    return int((_finite(name, before) & ~_finite(name, after)).sum())


def _finite(name: str, result: EvaluationResult) -> np.ndarray:
    finite: np.ndarray = np.isfinite(np.asarray(result.measures[name], dtype=float))
    return finite


def _compared(
    name: str, before: EvaluationResult, after: EvaluationResult, *, relative: bool = False
) -> tuple[tuple[float, float], Interval]:
    """Means over the prompts measured both times, and the interval of the change."""
    pairs = np.array([before.measures[name], after.measures[name]], dtype=float)
    kept = np.isfinite(pairs).all(0)
    means = pairs[:, kept].mean(1) if kept.any() else np.full(2, math.nan)
    scale = (abs(float(means[0])) if relative else 0.0) or 1.0
    clusters = () if before.closed else before.voices
    interval = mean_interval(np.where(kept, (pairs[1] - pairs[0]) / scale, math.nan), clusters)
    return (float(means[0]), float(means[1])), interval


def _by_voice(name: str, before: EvaluationResult, after: EvaluationResult) -> dict[str, Interval]:
    """The change in each of a policy's few voices; empty where they are some of many, or one."""
    voices = sorted(set(before.voices)) if before.closed else []
    changes = np.subtract(after.measures[name], before.measures[name])
    chosen = {voice: np.array(before.voices) == voice for voice in voices}
    return {voice: mean_interval(changes[rows]) for voice, rows in chosen.items()} if len(voices) > 1 else {}


def _enough(findings: list[Finding]) -> dict[str, int | None]:
    """Prompts and clusters for intervals as narrow as is asked for, of all that is undecided."""
    wanted = [needed(f.interval, f.margin) for f in findings if f.status == UNDECIDED and f.interval is not None]
    known = [counts for counts in wanted if counts is not None]
    if len(known) < len(wanted):
        return {"prompts_needed": None, "clusters_needed": None}
    return {"prompts_needed": max(p for p, _ in known), "clusters_needed": max(c for _, c in known)}


def _noise_floor(before: EvaluationResult, floor: EvaluationResult) -> dict[str, dict[str, float]]:
    """Of every measure of both: the change that another sampling seed makes."""
    floors = {}
    for name in before.measures:
        if name in floor.measures:
            known = MEASURES.get(name)
            relative = known is not None and known.guard is not None and known.guard.relative
            interval = _compared(name, before, floor, relative=relative)[1]
            floors[name] = {"change": interval.change, "low": interval.low, "high": interval.high}
    return floors


def in_words(said: Mapping[str, Any]) -> list[str]:
    """The verdict's evidence, a line a finding: effect, interval, noise floor, what failed, how much would do."""
    floors = said["noise_floor"]
    lines = [_sentence("reward", said["reward"], floors)]
    name = said["judge"]["measure"]
    lines.append(_sentence(name, said["judge"], floors))
    lines += [
        f"{_sentence(name, guard, floors)}; limit: {guard['limit']}"
        for name, guard in said["guards"].items()
        if guard["status"] in (WORSE, UNDECIDED)
    ]
    if unmeasured := [name for name, guard in said["guards"].items() if guard["status"] == NOT_MEASURED]:
        lines.append(f"not measured: {', '.join(unmeasured)}")
    return lines + ([enough_in_words(said)] if said["overall"] == TOO_FEW else [])


def _sentence(name: str, entry: Mapping[str, Any], floors: Mapping[str, Mapping[str, float]]) -> str:
    why = f", {entry['reason']}" if "reason" in entry else ""
    if "change" not in entry:
        return f"{name}: {entry['status']}{why}"
    by_chance = f", by another seed {floors[name]['change']:+.3g}" if name in floors else ""
    interval = f"[{entry['low']:+.3g}, {entry['high']:+.3g}]"
    return f"{name} {entry['change']:+.3g} {interval}{by_chance}: {entry['status']}{why}{voices_in_words(entry)}"


def voices_in_words(entry: Mapping[str, Any]) -> str:
    """The change in each voice, where they are told apart: " (joe +0.1, slt -0.2)"; a dash where there is none."""
    changes = {voice: interval["change"] for voice, interval in entry.get("by_voice", {}).items()}
    known = {voice: change is not None and math.isfinite(change) for voice, change in changes.items()}
    voices = [f"{voice} {change:+.2g}" if known[voice] else f"{voice} –" for voice, change in changes.items()]
    return f" ({', '.join(voices)})" if voices else ""


def enough_in_words(said: Mapping[str, Any]) -> str:
    """How many prompts, in how many voices, would tell."""
    prompts, clusters = said["prompts_needed"], said["clusters_needed"]
    if prompts is None:
        return "how many prompts would tell cannot be foreseen: a change is too near its limit"
    if said["reward"]["clusters"] == said["reward"]["prompts"]:
        return f"about {prompts} prompts would tell (here: {said['reward']['prompts']})"
    here = f"{said['reward']['prompts']} in {said['reward']['clusters']}"
    return f"about {prompts} prompts in {clusters} voices would tell (here: {here})"
