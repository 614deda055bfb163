"""What a run leaves behind: samples, JSON, lines of metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_mel.evaluation.evaluate import EvaluationResult
from rlhf_mel.speech.measures import shown_everywhere
from rlhf_mel.types import Prompts


def write_samples(folder: Path, prompts: Prompts, before: EvaluationResult, after: EvaluationResult) -> None:
    """samples/: what each held-out prompt sounded like before and after, its reference clip, and index.json."""
    import soundfile  # loads a C library that training itself does not need

    folder.mkdir(parents=True, exist_ok=True)
    references = [
        clip[:length] for clip, length in zip(prompts.reference_audio, prompts.reference_lengths_samples, strict=True)
    ]
    results = {"before": before, "after": after}
    index = []
    for row, text in enumerate(prompts.texts):
        names = {kind: f"{kind}_{row:03d}.wav" for kind in ("before", "after", "reference")}
        for kind, result in results.items():
            soundfile.write(folder / names[kind], result.waveforms[row].numpy(), result.sample_rate_hz)
        soundfile.write(folder / names["reference"], references[row].numpy(), prompts.sample_rate_hz)
        index.append(
            {
                "id": prompts.columns.get("id", range(len(prompts)))[row],
                "text": text,
                "voice": prompts.columns.get("voice", [None] * len(prompts))[row],
                **names,
                "scores_before": before.items[row],
                "scores_after": after.items[row],
            }
            | ({f"transcript_{k}": result.transcripts[row] for k, result in results.items() if result.transcripts})
        )
    write_json(folder / "index.json", index)


def evaluation_line(metrics: Mapping[str, float]) -> str:
    """What the console says of an evaluation; summary.json and report.html have all of it."""
    names = ("reward", *shown_everywhere())
    return metrics_line({name: metrics[name] for name in names if name in metrics})


def metrics_line(values: Mapping[str, float]) -> str:
    """Names and values with four digits, on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def json_ready(value: Any) -> Any:
    """NaN and infinity as null: they are not JSON."""
    if isinstance(value, Mapping):
        return {name: json_ready(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, NaN and infinity as null."""
    path.write_text(json.dumps(json_ready(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
