"""What a reward makes of pairs that people judged: how often it agrees, how sure it is, and what else moves it.

    python recipes/reward_report.py --reward_models mos --preferences data/constructed/heldout --out runs/mos_report

recipes/reward_model.py says the same of the model that it trains, for the pairs that it held out. report.json has:

    accuracy        share of the pairs whose chosen clip scores higher, ties left out; 95 % interval, by prompts
    loss            mean -log sigma(score difference) (rewards/bradley_terry.py); calibration error and calibration.png
                    are of the same probabilities: of a reward that was not trained on preferences they mean little
    uncertainty     mean deviation of an ensemble's members
    plus_6_db       how often a clip's copy at +6 dB scores higher, lower, or the same (within 1 % of the scores'
                    deviation): where quality is what counts, as often higher as lower, or the same
    silence_added   the same of a copy with half a second of silence after it
    length          rank correlation of score and duration

Leaves out: judges of the sound beside the reward, which a run of drlx.py shows.
Hardware: any, a minute for 200 pairs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from rlhf_mel.data.preferences.load import PairBatch, PreferenceDataset, load_preferences, parse_columns
from rlhf_mel.evaluation.intervals import mean_interval
from rlhf_mel.metrics import pool
from rlhf_mel.rewards.bradley_terry import TIE, LossConfig, preference_nll, reward_metrics
from rlhf_mel.rewards.calibration import Reliability, reliability
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.audio import MelSpec, log_mel
from rlhf_mel.speech.measures import clips as clips_of
from rlhf_mel.types import Audio, Prompts

Score = Callable[[Audio, Prompts], Tensor]
"""Scores [b, members] of b clips."""
AUDIT_CLIPS = 64
AUDIT_GAIN_DB = 6.0
AUDIT_SILENCE_S = 0.5
TIE_SHARE = 0.01
"""Scores that differ by less than this share of their deviation are a tie of the audit."""


class Numbered(torch.utils.data.Dataset):
    """Some rows of a data set, each with its number there."""

    def __init__(self, pairs: PreferenceDataset, rows: Sequence[int]) -> None:
        self.pairs, self.rows = pairs, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, dict[str, Any]]:
        return self.rows[place], self.pairs[self.rows[place]]

    def collate(self, items: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        return {"pairs": self.pairs.collate([row for _, row in items]), "rows": torch.tensor([n for n, _ in items])}

    def batches(self, batch_size: int) -> Iterator[PairBatch]:
        for start in range(0, len(self), batch_size):
            yield self.collate([self[place] for place in range(start, min(start + batch_size, len(self)))])["pairs"]


def prompt_keys(pairs: PreferenceDataset) -> list[str]:
    """The text of each pair, without case and spacing."""
    return [" ".join(pairs[row]["prompt"].lower().split()) for row in range(len(pairs))]


def as_audio(clips: Sequence[Tensor], rate_hz: int, mel_spec: MelSpec) -> Audio:
    """Waveforms [S] as a batch, with the mel of each alone."""
    mels = [log_mel(clip[None], mel_spec)[0] for clip in clips]
    pad = torch.nn.utils.rnn.pad_sequence
    lengths, frames = (torch.tensor([len(row) for row in rows], device=clips[0].device) for rows in (clips, mels))
    return Audio(pad(list(clips), batch_first=True), lengths, rate_hz, pad(mels, batch_first=True), frames)


@dataclass(frozen=True)
class Scored:
    """Scores [n, members] of n pairs, and what was said of them [n]; on the CPU."""

    chosen: Tensor
    rejected: Tensor
    soft_labels: Tensor
    margins: Tensor
    weights: Tensor


@torch.no_grad()
def score_pairs(score: Score, pairs: Numbered, batch_size: int, device: torch.device | str = "cpu") -> Scored:
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for batch in pairs.batches(batch_size):
        batch = batch.to(device)
        sides = {"chosen": score(batch.chosen, batch.prompts), "rejected": score(batch.rejected, batch.prompts)}
        said = {name: getattr(batch, name) for name in ("soft_labels", "margins", "weights")}
        for name, value in {**sides, **said}.items():
            columns[name].append(value.cpu())
    return Scored(**{name: torch.cat(values) for name, values in columns.items()})


def figures(found: Scored, config: LossConfig, threshold: Tensor | None = None) -> dict[str, float]:
    """TRL's metrics, the loss of the mean score, and the members' mean deviation. threshold: of each member."""
    chosen, rejected = found.chosen.mean(1), found.rejected.mean(1)
    metrics = reward_metrics(chosen, rejected, found.soft_labels)
    difference = chosen - rejected - config.margin_scale * found.margins
    nll = preference_nll(difference, found.soft_labels, config, None if threshold is None else threshold.mean())
    values = {"loss": float((found.weights * nll).sum() / found.weights.sum())}
    values |= pool([{name: value.reshape(-1).tolist() for name, value in metrics.items()}])
    if found.chosen.shape[1] > 1:
        values["uncertainty"] = float(torch.cat([found.chosen, found.rejected]).std(1).mean())
    return values


def calibration(found: Scored) -> Reliability | None:
    """Of sigma(difference of the mean scores), for the pairs that are no ties; None where all are."""
    decided = found.soft_labels != TIE
    if not decided.any():
        return None
    probabilities = (found.chosen - found.rejected).mean(1).double().sigmoid()[decided]
    return reliability(probabilities.numpy(), found.soft_labels.double()[decided].numpy())


def shares(base: Tensor, changed: Tensor) -> dict[str, float]:
    """How often a changed copy [n] wins, loses or ties."""
    tie = TIE_SHARE * float(base.std()) if len(base) > 1 else 0.0
    wins, losses = ((sign * (changed - base) > tie).double().mean().item() for sign in (1, -1))
    return {"wins": wins, "losses": losses, "ties": 1 - wins - losses}


@torch.no_grad()
def audit(
    score: Score, clips: Sequence[Tensor], prompts: Prompts, mel_spec: MelSpec, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What the score makes of level, silence and length of clips [S] of these prompts; see the module."""
    rate_hz = mel_spec.sample_rate_hz

    def scored(changed: Sequence[Tensor]) -> Tensor:
        each = [
            score(as_audio([clip.to(device)], rate_hz, mel_spec), prompts.select([row]).to(device)).mean(1).cpu()
            for row, clip in enumerate(changed)
        ]
        return torch.cat(each)

    base, silence = scored(clips), torch.zeros(round(AUDIT_SILENCE_S * rate_hz))
    durations = [len(clip) / rate_hz for clip in clips]
    varied = len(set(durations)) > 1 and float(base.std()) > 0
    return {
        "plus_6_db": shares(base, scored([clip * 10 ** (AUDIT_GAIN_DB / 20) for clip in clips])),
        "silence_added": shares(base, scored([torch.cat([clip, silence]) for clip in clips])),
        "length": float(scipy.stats.spearmanr(base.numpy(), durations).statistic) if varied else math.nan,
        "clips": len(clips),
    }


def audit_clips(pairs: Numbered) -> tuple[list[Tensor], Prompts]:
    """Up to AUDIT_CLIPS clips, chosen and rejected, from all over the pairs; their prompts."""
    step = -(-2 * len(pairs) // AUDIT_CLIPS)
    batch = pairs.collate([pairs[place] for place in range(0, len(pairs), step)])["pairs"]
    rows = [*range(len(batch)), *range(len(batch))]
    return [*clips_of(batch.chosen), *clips_of(batch.rejected)], batch.prompts.select(rows)


def plot(found: Reliability, path: Path) -> None:
    """The reliability diagram, and below it how many pairs a point stands for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=1)
    upper.plot(found.confidence, found.accuracy, "o-", color="#2b8a9d")
    upper.set_ylabel("share of right answers")
    upper.set_title(f"expected calibration error {found.expected_calibration_error:.3f}", loc="left", fontsize=9)
    lower.bar(found.confidence, found.count, width=0.03, color="#2b8a9d")
    lower.set_ylabel("pairs")
    lower.set_xlabel("confidence of the model")
    figure.savefig(path, dpi=150)


def report(
    score: Score,
    pairs: Numbered,
    keys: Sequence[str],
    out: Path,
    *,
    config: LossConfig | None = None,
    threshold: Tensor | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Everything that is said of the pairs, whose prompts are `keys`; calibration.png is written to `out`."""
    found = score_pairs(score, pairs, batch_size, device)
    decided = [row for row in range(len(pairs)) if found.soft_labels[row] != TIE]
    right = (found.chosen.mean(1) > found.rejected.mean(1)).double()[decided]
    interval = mean_interval(right.numpy(), [keys[row] for row in decided])
    values: dict[str, Any] = {
        "held_out": {"pairs": len(pairs), "ties": len(pairs) - len(decided), "prompts": len(set(keys))},
        **figures(found, config or LossConfig(), threshold),
        "accuracy_interval": [max(interval.low, 0.0), min(interval.high, 1.0)],
    }
    reliable = calibration(found)
    if reliable is not None:
        values["expected_calibration_error"] = reliable.expected_calibration_error
        values["reliability"] = {name: np.asarray(column).tolist() for name, column in asdict(reliable).items()}
        plot(reliable, out / "calibration.png")
    clips, prompts = audit_clips(pairs)
    return values | {"audit": audit(score, clips, prompts, pairs.pairs.mel_spec, device)}


def summary(values: dict[str, Any]) -> str:
    """What report.json says, for the console."""
    low, high = values["accuracy_interval"]
    audited, held_out = values["audit"], values["held_out"]
    lines = [
        f"held out: {held_out['pairs']} pairs ({held_out['ties']} ties) of {held_out['prompts']} prompts",
        f"accuracy {values['accuracy']:.3f} (95 % {low:.3f} to {high:.3f}), loss {values['loss']:.3f}, expected "
        f"calibration error {values.get('expected_calibration_error', math.nan):.3f}",
    ]
    lines += [f"uncertainty {values['uncertainty']:.3f}"] if "uncertainty" in values else []
    for name in ("plus_6_db", "silence_added"):
        lines.append(f"{name}: " + ", ".join(f"{share:.0%} {what}" for what, share in audited[name].items()))
    return "\n".join([*lines, f"rank correlation with duration: {audited['length']:+.2f}"])


def write_report(values: dict[str, Any], out: Path) -> None:
    """report.json, and its summary on the console."""
    (out / "report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(summary(values), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_models", nargs="+", required=True, help="names, folders or package.module:Name")
    parser.add_argument("--reward_weights", nargs="+", type=float)
    parser.add_argument("--preferences", required=True, help="hub id, folder or file of load_preferences")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--columns", type=parse_columns, help="chosen=audio_a,rejected=audio_b")
    parser.add_argument("--axis")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    rewards = Rewards(args.reward_models, args.reward_weights).to(args.device)
    pairs = load_preferences(args.preferences, split=args.dataset_split, columns=args.columns, axis=args.axis)
    args.out.mkdir(parents=True, exist_ok=True)

    def score(audio: Audio, prompts: Prompts) -> Tensor:
        rewards.check(prompts)
        return rewards(audio, prompts).total[:, None]

    everything = Numbered(pairs, range(len(pairs)))
    write_report(report(score, everything, prompt_keys(pairs), args.out, device=args.device), args.out)


if __name__ == "__main__":
    main()
