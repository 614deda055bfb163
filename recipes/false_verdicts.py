"""How often chance alone is "confirmed": verdicts on runs without effect on the judge, by simulation.

Differences of a judge between two evaluations of one policy are drawn with mean 0: normal, with heavy tails (Student's
t, 3 degrees of freedom), or as they are (what DNSMOS says of the bundled policy heard with two seeds, from the
comparison's files, each with either sign). Prompts are in one voice, in three voices that are all there are, in three
or eight of many (each voice moves all its prompts, by as much as a prompt moves by itself). The reward rises in every
run; nothing else is measured, so that guards stop no run. Beside it: how often a real effect of 0.05 and of 0.2 is
confirmed. docs/demo.md holds what it wrote.
Hardware: any; two minutes.
    python recipes/false_verdicts.py --draws 4000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlhf_mel.evaluation.evaluate import EvaluationResult
from rlhf_mel.evaluation.verdict import CONFIRMED, verdict

JUDGED = Path(__file__).parents[1] / "docs/comparison/judged.jsonl"
DEVIATION = 0.1
"""Of a prompt's difference in DNSMOS, as measured."""
VOICES = {"one voice": (1, False), "all three": (3, True), "three of many": (3, False), "eight of many": (8, False)}
"""Voices, and whether the policy has no others."""
Noise = Callable[[np.random.Generator, int], np.ndarray]


def noises() -> dict[str, Noise]:
    """Differences of mean 0, drawn n at a time."""
    lines = [json.loads(line) for line in JUDGED.read_text().splitlines()]
    heard = {line["key"]: line["measures"]["dnsmos_ovrl"] for line in lines if "dnsmos_ovrl" in line["measures"]}
    bases = [np.array(heard[f"base_{seed}"]) for seed in (0, 1, 2)]
    real = np.concatenate([bases[0] - bases[1], bases[1] - bases[2], bases[0] - bases[2]])
    return {
        "normal": lambda rng, n: DEVIATION * rng.normal(size=n),
        "heavy tails": lambda rng, n: DEVIATION * rng.standard_t(3, size=n),
        "as measured": lambda rng, n: rng.choice(real, n) * rng.choice([-1, 1], n),
    }


def confirmed(draws: int, prompts: int, voices: str, noise: Noise, effect: float, seed: int = 0) -> float:
    """The share of `draws` runs that are confirmed where the judge's true change is `effect`."""
    rng = np.random.default_rng(seed)
    count, closed = VOICES[voices]
    rows = np.arange(prompts) % count
    names = [str(row) for row in rows]

    def result(reward: np.ndarray, judge: np.ndarray) -> EvaluationResult:
        measures = {"reward": reward.tolist(), "dnsmos_ovrl": judge.tolist()}
        return EvaluationResult(measures, [], 24_000, [], names, closed)

    before, hits = result(np.zeros(prompts), np.zeros(prompts)), 0
    for _ in range(draws):
        by_voice = DEVIATION * rng.normal(size=count) * (count > 1 and not closed)
        judge = effect + noise(rng, prompts) + by_voice[rows]
        after = result(1 + 0.1 * rng.normal(size=prompts), judge)
        hits += verdict(before, after)["overall"] == CONFIRMED
    return hits / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 16, 50])
    args = parser.parse_args()
    print("| prompts | voices | noise | no effect | effect 0.05 | effect 0.2 |\n|---|---|---|---|---|---|")
    for prompts in args.prompts:
        for voices in VOICES:
            for name, noise in noises().items():
                draws = (args.draws, args.draws // 10, args.draws // 10)
                shares = [
                    confirmed(n, prompts, voices, noise, effect)
                    for n, effect in zip(draws, (0, 0.05, 0.2), strict=True)
                ]
                cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
                print(f"| {prompts} | {voices} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
