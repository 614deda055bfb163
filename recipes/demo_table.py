"""Does the demo's verdict hang on a seed or on a processor? The demo over seeds and instruction sets, as a table.

Runs `accelerate launch recipes/drlx.py` once for each seed with all that the processor offers, and once limited to AVX2
(PyTorch and its two libraries of kernels; ONNX Runtime, which hears DNSMOS, knows no such limit), one after the other,
and writes a line a run and the spread. docs/demo.md holds what it wrote.
Hardware: two CPU cores, nothing beside it; ten runs take as long as ten demos.
    python recipes/demo_table.py --out runs/demo_table
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMITS: Mapping[str, Mapping[str, str]] = {
    "full": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""What a run is told of the processor."""
SHOWN = {"cer": "CER", "voice_similarity": "voice", "level_dbfs": "level, dB", "f0_std_semitones": "pitch spread, %"}


def run(seed: int, limit: str, out: Path) -> dict[str, Any]:
    """One demo: its summary, and the seconds of the whole command. A finished one is not run again."""
    folder = out / f"{limit.lower()}_{seed}"
    timing = folder / "seconds.json"
    if not timing.exists():
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "recipes/drlx.py")]
        started = time.monotonic()
        subprocess.run(
            [*launch, "--seed", str(seed), "--output_dir", str(folder)],
            check=True,
            env={**os.environ, **LIMITS[limit]},
            cwd=ROOT,
        )
        timing.write_text(json.dumps(time.monotonic() - started))
    summary = json.loads((folder / "summary.json").read_text())
    return {"seed": seed, "limit": limit, "seconds": json.loads(timing.read_text()), "verdict": summary["verdict"]}


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line a run: minutes, changes with their intervals, what the guards say; then how often each verdict came."""
    heads = ["seed", "instructions", "minutes", "reward", "DNSMOS", *SHOWN.values(), "verdict"]
    rows = [heads, ["---"] * len(heads), *(_row(one) for one in runs)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    counts = Counter(one["verdict"]["overall"] for one in runs).most_common()
    verdicts = ", ".join(f"{verdict}: {count} of {len(runs)}" for verdict, count in counts)
    return f"{table}\n{verdicts}. {_minutes(runs)}\n"


def _row(one: Mapping[str, Any]) -> list[str]:
    said = one["verdict"]
    guards = [_change(said["guards"][name], 100 if "%" in SHOWN[name] else 1) for name in SHOWN]
    changes = [_change(said["reward"]), _change(said["judge"]), *guards]
    return [str(one["seed"]), one["limit"], f"{one['seconds'] / 60:.1f}", *changes, said["overall"]]


def _change(entry: Mapping[str, Any], scale: float = 1) -> str:
    change, low, high = (scale * entry[key] for key in ("change", "low", "high"))
    digits = 0 if scale > 1 else 3 if abs(high - low) < 0.1 else 2
    mark = {"worse": " **worse**", "undecided": " (undecided)"}.get(entry["status"], "")
    return f"{change:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{mark}"


def _minutes(runs: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for limit in LIMITS:
        minutes = [one["seconds"] / 60 for one in runs if one["limit"] == limit]
        if minutes:
            spread = f"{min(minutes):.1f} to {max(minutes):.1f}"
            parts.append(f"{limit}: median {statistics.median(minutes):.1f} minutes, {spread}")
    return "; ".join(parts) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--limits", nargs="+", choices=LIMITS, default=list(LIMITS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    runs = []
    for seed in args.seeds:
        for limit in args.limits:
            runs.append(run(seed, limit, out))
            (out / "table.md").write_text(markdown(runs), encoding="utf-8")
    print(markdown(runs))


if __name__ == "__main__":
    main()
