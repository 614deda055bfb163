"""report.html: a run on one page, for eyes and ears; no network, nothing beside it needed.

Read from the run's folder: `summary.json`, `metrics.jsonl`, `config.yaml`, `samples/index.json` and its wav files (see
run_folder.py). The page says first what the judges make of the reward; then the numbers before and after, the trained
reward apart from what no one trained on; the course of training; and what the same prompts and noise sound like.
Pictures are inline SVG and PNG, sounds are FLAC (lossless), all inside the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf_mel.evaluation.report_curves import _finite, curves
from rlhf_mel.evaluation.report_media import image, mel_of, player, read_wav
from rlhf_mel.evaluation.report_page import PAGE
from rlhf_mel.evaluation.verdict import (
    CONFIRMED,
    NO_RISE,
    NOT_CONVINCED,
    NOT_IMPROVED,
    NOT_MEASURED,
    OK,
    TOO_FEW,
    UNDECIDED,
    WORSE,
    enough_in_words,
    voices_in_words,
)
from rlhf_mel.speech.measures import JUDGE, MEASURES, measure, shown_everywhere

MAX_SAMPLES = 8


MAX_BYTES = 5_500_000
"""Samples beyond this are left out, and the page says so."""


REFERENCE_S = 5.0
"""Seconds of a reference clip that are kept: enough to know the voice."""


NOT_SHOWN = ("reward", "reward_std")


EXPLAINED: Mapping[str, str] = {
    CONFIRMED: "The reward rose on prompts it was not trained on, a judge that was not trained on hears it too, "
    "and every guard that was measured held: each with 95 % confidence.",
    NOT_CONVINCED: "The reward rose, but a judge or guard that was not trained on does not confirm it. Listen before "
    "you trust it: this is what reward hacking looks like.",
    TOO_FEW: "The reward rose. Whether a judge that was not trained on hears it, at what cost, these prompts cannot "
    "tell: an interval below reaches over its limit. That is no confirmation.",
    NOT_IMPROVED: "The interval of the reward's change on held-out prompts does not lie above 0.",
}


NO_VERDICT = "no held-out prompts"


def write_report(output_dir: str | Path) -> Path:
    """Write `output_dir`/report.html and return its path.

    Raises:
        FileNotFoundError: there is no summary.json; a run writes it at its end.
    """
    folder = Path(output_dir)
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'summary.json'}: expected the summary of a finished run, found none; name its output_dir"
        )
    summary = json.loads((folder / "summary.json").read_text())
    log = _read_log(folder / "metrics.jsonl")
    config = folder / "config.yaml"
    sections = [
        _headline(summary),
        _table(summary),
        _course(summary, log),
        _samples(folder / "samples"),
        _details("Configuration", config.read_text()) if config.is_file() else "",
    ]
    title = f"{summary.get('algorithm', 'run')}: {summary.get('verdict', {}).get('overall', NO_VERDICT)}"
    page = folder / "report.html"
    page.write_text(PAGE.replace("{title}", escape(title)).replace("{body}", "\n".join(sections)), encoding="utf-8")
    return page


def _read_log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def _headline(summary: Mapping[str, Any]) -> str:
    overall = summary.get("verdict", {}).get("overall", NO_VERDICT)
    explained = EXPLAINED.get(overall, "Nothing was heard before and after, so nothing can be said.")
    tone = {CONFIRMED: "good", NOT_CONVINCED: "bad"}.get(overall, "plain")
    facts = {
        "algorithm": summary.get("algorithm"),
        "updates": summary.get("steps"),
        "minutes": f"{summary['seconds'] / 60:.1f}" if summary.get("seconds") is not None else None,
        "device": summary.get("device"),
        "seed": summary.get("seed"),
        "policy": summary.get("policy"),
    }
    items = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value is not None
    )
    return (
        f'<header><h1><span class="{tone} mark"></span>{escape(overall[:1].upper() + overall[1:])}</h1>'
        f"<p>{explained}</p>{_evidence(summary)}<dl>{items}</dl></header>"
    )


def _evidence(summary: Mapping[str, Any]) -> str:
    """The reward and the judge from before to after, and which guards failed, in a line."""
    before, after = summary.get("before") or {}, summary.get("after") or {}
    said = summary.get("verdict", {})
    pairs = [
        f"{label} <b>{_number(before.get(name), 2)} → {_number(after.get(name), 2)}</b> "
        f"{_change(_entries(said).get(name, {}), 2)}"
        for name, label in (("reward", "Trained reward"), (JUDGE, f"judge ({measure(JUDGE).label})"))
        if name in before
    ]
    evidence = f'<p class="evidence">{", ".join(pairs)}.</p>' if pairs else ""
    evidence += _by_voice(said)
    enough = f"<p>{escape(enough_in_words(said).capitalize())}.</p>" if said.get("overall") == TOO_FEW else ""
    failed = _guards_that(said, WORSE, "Limit not met", "bad") + _guards_that(said, UNDECIDED)
    return evidence + failed + _guards_that(said, NOT_MEASURED, "Not measured, so not guarded") + enough


def _by_voice(said: Mapping[str, Any]) -> str:
    """The changes of reward and judge in each voice, where they are all the policy has."""
    labels = {"reward": "trained reward", JUDGE: measure(JUDGE).label}
    parts = [
        f"{label}{voices_in_words(_entries(said).get(name, {}))}"
        for name, label in labels.items()
        if _entries(said).get(name, {}).get("by_voice")
    ]
    return f"<p>By voice: {escape('; '.join(parts))}.</p>" if parts else ""


def _guards_that(said: Mapping[str, Any], status: str, text: str = "Undecided", tone: str = "") -> str:
    named = [
        escape(measure(name).label.split(",")[0])
        for name, entry in _entries(said).items()
        if entry.get("status") == status
    ]
    return f'<p class="{tone}">{text}: {", ".join(named)}.</p>' if named else ""


def _entries(said: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the verdict says of each measure."""
    judge = said.get("judge") or {}
    return {"reward": said.get("reward") or {}, judge.get("measure", JUDGE): judge, **(said.get("guards") or {})}


def _table(summary: Mapping[str, Any]) -> str:
    before, after = summary.get("before") or {}, summary.get("after") or {}
    if not before or not after:
        return ""
    entries = _entries(summary.get("verdict", {}))
    floors = summary.get("verdict", {}).get("noise_floor") or {}
    rewards = [name for name in before if name.startswith("rewards/") and name.endswith("/mean")]
    judges = [
        name for name in before if not name.startswith("rewards/") and name not in (*NOT_SHOWN, "dropped_rollouts")
    ]
    judges.sort(key=lambda name: (name not in MEASURES, [*MEASURES, name].index(name)))
    total = ["reward"] if len(rewards) > 1 else []
    dropped = max(before.get("dropped_rollouts") or 0, after.get("dropped_rollouts") or 0)
    note = f'<p class="bad">{dropped:g} prompts had no finite reward and are not in its mean.</p>' if dropped else ""
    if len(rewards) == 1:
        entries[rewards[0]] = entries["reward"]
        floors = {rewards[0]: floors["reward"], **floors} if "reward" in floors else floors
    return f"""<section><h2>Before and after, on held-out prompts</h2>
<p>{_counted(entries["reward"])}</p>
<div class="wide"><table>
<thead><tr><th>measure</th><th>before</th><th>after</th><th>change</th><th>95 % interval</th>
<th title="the policy before training, heard with another sampling seed">another seed</th>
<th>limit</th><th></th></tr></thead>
<tbody class="trained"><tr><th colspan="8">Trained on: the reward</th></tr>
{"".join(_row(name, before, after, entries.get(name, {}), floors) for name in [*total, *rewards])}</tbody>
<tbody><tr><th colspan="8">Never trained on: judges and guards</th></tr>
{"".join(_row(name, before, after, entries.get(name, {}), floors) for name in judges)}
{"".join(_unmeasured(name, entries[name]) for name in entries if name in MEASURES and name not in before)}</tbody>
</table></div>{note}</section>"""


def _counted(reward: Mapping[str, Any]) -> str:
    """What intervals are made of."""
    prompts, clusters = reward.get("prompts"), reward.get("clusters")
    if not prompts:
        return ""
    voices = "" if clusters == prompts else f" in {clusters} voices, by which the intervals are clustered"
    return (
        f"Paired over {prompts} prompts{voices}. “Another seed” is the policy before training, heard once more with "
        "other noise: what chance alone does to a mean."
    )


def _row(
    name: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    entry: Mapping[str, Any],
    floors: Mapping[str, Mapping[str, Any]],
) -> str:
    known = measure(name)
    status = entry.get("status", "")
    # Coloured is what the verdict rests on: a rise that it counts, a limit that is not met.
    improved = status == OK and "high" in entry and known.guard is None
    tone = "bad" if status in (WORSE, NO_RISE) else "good" if improved else ""
    share = known.guard is not None and known.guard.relative
    change = entry["change"] if share and "change" in entry else _difference(before.get(name), after.get(name))
    chance = floors.get(name, {}).get("change")
    return (
        f"<tr><td>{escape(known.label)}</td><td>{_number(before.get(name), known.digits)}</td>"
        f"<td>{_number(after.get(name), known.digits)}</td>"
        f'<td class="{tone}">{_amount(change, known.digits, share and "change" in entry)}</td>'
        f"<td>{_interval(entry, known.digits, share)}</td><td>{_amount(chance, known.digits, share)}</td>"
        f'<td class="words">{escape(entry.get("limit", ""))}</td>'
        f'<td class="words {tone}">{escape(": ".join(filter(None, [status, entry.get("reason")])))}</td></tr>'
    )


def _unmeasured(name: str, entry: Mapping[str, Any]) -> str:
    return (
        f"<tr><td>{escape(measure(name).label)}</td>{'<td></td>' * 5}"
        f'<td class="words">{escape(entry.get("limit", ""))}</td><td class="words">not measured</td></tr>'
    )


def _change(entry: Mapping[str, Any], digits: int) -> str:
    """The interval of a change, small, behind its numbers."""
    interval = _interval(entry, digits, share=False)
    return f'<small title="95 % interval of the change">{interval}</small>' if interval else ""


def _interval(entry: Mapping[str, Any], digits: int, share: bool) -> str:
    if not (_finite(entry.get("low")) and _finite(entry.get("high"))):
        return ""
    return f"{_amount(entry['low'], digits, share)} to {_amount(entry['high'], digits, share)}"


def _amount(change: Any, digits: int, share: bool) -> str:
    """A change with its sign; as a share of the mean before in percent."""
    return (
        f"{_number(100 * change, 1, signed=True)} %"
        if share and _finite(change)
        else _number(change, digits, signed=True)
    )


def _difference(before: Any, after: Any) -> float | None:
    return after - before if _finite(before) and _finite(after) else None


def _number(value: Any, digits: int, *, signed: bool = False) -> str:
    if not _finite(value):
        return "–"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def _course(summary: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    trained = [line for line in log if _finite(line.get("reward"))]
    if not trained:
        return ""
    return (
        "<section><h2>The course of training</h2><p>Left: the reward, on training prompts as it went (line and spread)"
        " and on held-out prompts (dots). Right: the judge that was not trained on, held-out prompts.</p>"
        f'<figure class="wide">{curves(summary, log, trained)}</figure></section>'
    )


def _samples(folder: Path) -> str:
    if not (folder / "index.json").is_file():
        return ""
    index = json.loads((folder / "index.json").read_text())
    cards: list[str] = []
    for sample in index[:MAX_SAMPLES]:
        card = _card(folder, sample)
        if cards and sum(map(len, cards)) + len(card) > MAX_BYTES:
            break
        cards.append(card)
    left_out = len(index) - len(cards)
    more = f"<p>{left_out} more are in <code>{escape(folder.name)}/</code>.</p>" if left_out else ""
    return (
        "<section><h2>Listen</h2><p>The same text, voice and noise, spoken before and after training.</p>"
        f"{''.join(cards)}{more}</section>"
    )


def _card(folder: Path, sample: Mapping[str, Any]) -> str:
    sounds = {kind: read_wav(folder / sample[kind]) for kind in ("reference", "before", "after")}
    pictures = {kind: mel_of(*sounds[kind]) for kind in ("before", "after")}
    brightest = max(picture.max().item() for picture in pictures.values())
    columns = [
        f"<div><h4>{kind}</h4>{image(pictures[kind], brightest, f'mel, {kind} training')}"
        f"{player(*sounds[kind])}{_scores(sample.get(f'scores_{kind}') or {}, sample.get(f'transcript_{kind}'))}</div>"
        for kind in ("before", "after")
    ]
    waveform, rate_hz = sounds["reference"]
    cut = len(waveform) > REFERENCE_S * rate_hz
    who = f"voice {sample['voice']}" if sample.get("voice") is not None else "reference voice"
    reference = (
        f'<div class="reference"><span>{escape(who)}{f", first {REFERENCE_S:g} s" if cut else ""}</span>'
        f"{player(waveform[: int(REFERENCE_S * rate_hz)], rate_hz)}</div>"
    )
    return (
        f"<article><h3>{escape(sample['text'])} <small>{escape(str(sample.get('id', '')))}</small></h3>"
        f'<div class="pair">{"".join(columns)}</div>{reference}</article>'
    )


def _scores(scores: Mapping[str, Any], transcript: str | None) -> str:
    shown = [name for name in scores if name.startswith("rewards/")]
    shown += [name for name in shown_everywhere() if name in scores]
    values = (f"<b>{_number(scores[name], 2)}</b> {escape(measure(name).name)}" for name in shown)
    heard = f"<p>heard as “{escape(transcript)}”</p>" if transcript else ""
    return f'<p class="scores">{_join(values)}</p>{heard}'


def _join(values: Iterable[str]) -> str:
    return "".join(f"<span>{value}</span>" for value in values)


def _details(title: str, text: str) -> str:
    return f"<section><details><summary>{title}</summary><pre>{escape(text)}</pre></details></section>"
