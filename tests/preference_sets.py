"""Small copies of public preference data sets, with the features that their cards state, made by `datasets` itself.

Clips are tones: `tone(3)` differs from `tone(4)` in pitch. Cards were read; the data sets were not downloaded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import Audio, Dataset, Features, List, Value

RATE_HZ = 24_000
BROKEN = b"RIFF no audio at all"
CLIP = {"bytes": Value("binary"), "path": Value("string")}


def samples(number: int, seconds: float = 0.25, rate_hz: int = RATE_HZ, gain: float = 0.3) -> np.ndarray:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return (gain * np.sin(2 * math.pi * (150 + 10 * number) * time_s)).astype(np.float32)


def tone(number: int, seconds: float = 0.25, rate_hz: int = RATE_HZ, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    whole = np.round(samples(number, seconds, rate_hz) * 32767).astype(np.int16)  # alike in every kind of file
    soundfile.write(buffer, whole, rate_hz, format=kind, subtype="PCM_16")
    return buffer.getvalue()


def clip(number: int, **options: Any) -> dict[str, Any]:
    return {"bytes": tone(number, **options), "path": f"{number}.wav"}


def table(rows: Sequence[Mapping[str, Any]], features: Mapping[str, Any], rates_hz: Mapping[str, int] = {}) -> Dataset:
    """A Dataset with these features; "audio" stands for an Audio feature."""
    plain = Features({name: CLIP if kind == "audio" else kind for name, kind in features.items()})
    made = Dataset.from_dict({name: [row.get(name) for row in rows] for name in features}, features=plain)
    for name in (name for name, kind in features.items() if kind == "audio"):
        made = made.cast_column(name, Audio(sampling_rate=rates_hz.get(name)))
    return made


TEXT, NUMBER, WHOLE, TRUTH = Value("string"), Value("float64"), Value("int64"), Value("bool")


def audio_alpaca() -> Dataset:
    """declare-lab/audio-alpaca: prompt, chosen, rejected, strategy."""
    rows = [
        {"prompt": "One.", "chosen": clip(0), "rejected": clip(1), "strategy": "1"},
        {"prompt": "Two.", "chosen": clip(2), "rejected": clip(3), "strategy": "2"},
    ]
    return table(rows, {"prompt": TEXT, "chosen": "audio", "rejected": "audio", "strategy": TEXT})


SPEECHJUDGE = {
    "index": TEXT,
    "subset": TEXT,
    "language_setting": TEXT,
    "chosen": TRUTH,
    "prompt": "audio",
    "prompt_text": TEXT,
    "target_text": TEXT,
    "audioA": "audio",
    "audioB": "audio",
    "rater": List(TEXT),
    "audioA_text_accuracy": List(TEXT),
    "audioB_text_accuracy": List(TEXT),
    "naturalness_annotation": List(TEXT),
    "naturalness_label": TEXT,
    "gemini-2.5-flash": TEXT,
}


def speechjudge_row(index: int, label: str, annotations: Sequence[str], **changed: Any) -> dict[str, Any]:
    row = {
        "index": str(index),
        "subset": "regular",
        "language_setting": "en2en",
        "chosen": index % 2 == 0,  # a quality flag, not a clip
        "prompt": clip(90, seconds=1.0),
        "prompt_text": "What is said there.",
        "target_text": f"Sentence {index}.",
        "audioA": clip(2 * index),
        "audioB": clip(2 * index + 1),
        "rater": [f"r{place}" for place in range(len(annotations))],
        "naturalness_annotation": list(annotations),
        "naturalness_label": label,
    }
    return {**row, **changed}


def speechjudge() -> Dataset:
    """RMSnow/SpeechJudge-Data: A wins 2:0, B wins 2:1, two kinds of ties, one clip broken."""
    rows = [
        speechjudge_row(0, "A", ["A+2", "A+1"]),
        speechjudge_row(1, "B", ["B+2", "A+1", "B+1"]),
        speechjudge_row(2, "Tie", ["Tie (both not good)", "Tie (both very good)"]),
        speechjudge_row(3, "A", ["A+1", "A+1"], audioB={"bytes": BROKEN, "path": "broken.wav"}),
        speechjudge_row(4, "B", ["B+1", "Tie (missing reason)"]),
    ]
    return table(rows, SPEECHJUDGE)


def datapointai() -> Dataset:
    """datapointai/tts-human-preferences-small, without most of the settings of the voices."""
    features = {"prompt": TEXT, "audio_a": "audio", "audio_b": "audio", "strategy": TEXT, "strategy_detail": TEXT}
    features |= {f"audio_{side}_{name}": TEXT for side in "ab" for name in ("voice_name", "model_id")}
    features |= {"audio_a_speed": NUMBER, "audio_b_speed": NUMBER}
    features |= {"weighted_results_audio_a": NUMBER, "weighted_results_audio_b": NUMBER, "num_annotations": WHOLE}
    features["detailed_results"] = List({"display_position": TEXT, "time_taken_ms": WHOLE, "winner": TEXT})
    vote = {"display_position": "left", "time_taken_ms": 1200, "winner": "audio_a"}
    rows = [
        {"weighted_results_audio_a": 0.8, "weighted_results_audio_b": 0.2, "num_annotations": 15},
        {"weighted_results_audio_a": 0.25, "weighted_results_audio_b": 0.75, "num_annotations": 12},
    ]
    clips = [{"audio_a": clip(2 * index), "audio_b": clip(2 * index + 1)} for index in range(2)]
    common = {"strategy": "1_model_gap", "detailed_results": [vote]}
    made = [{"prompt": f"Text {index}.", **common, **clips[index], **row} for index, row in enumerate(rows)]
    return table(made, features, {"audio_a": 44_100, "audio_b": 44_100})


def rapidata(address: str) -> Dataset:
    """Rapidata/text-2-audio-human-preference-benchmark: URLs, two axes, no texts; Natural has no votes in row 1."""
    details = List({"userDetails": {"age": TEXT, "country": TEXT}, "votedFor": TEXT})
    features: dict[str, Any] = {"audio1": TEXT, "audio2": TEXT, "model1": TEXT, "model2": TEXT}
    for axis in ("Friendly", "Natural"):
        features |= {f"{axis}_weighted_score_audio_{side}": NUMBER for side in (1, 2)}
        features[f"{axis}_detailedResults"] = details
    answer = {"userDetails": {"age": "18-29", "country": "DZ"}, "votedFor": "056_x.mp3"}
    rows = []
    for index, (friendly, natural) in enumerate([(0.3243, 0.9), (1.0, None)]):
        row = {"audio1": f"{address}/{2 * index}.wav", "audio2": f"{address}/{2 * index + 1}.wav"}
        row |= {"model1": "minimax_speech-02-turbo", "model2": "google_gemini-2.5-pro-tts"}
        for axis, share in (("Friendly", friendly), ("Natural", natural)):
            row[f"{axis}_weighted_score_audio_1"] = share
            row[f"{axis}_weighted_score_audio_2"] = None if share is None else 1 - share
            row[f"{axis}_detailedResults"] = None if share is None else [answer] * 4
        rows.append(row)
    return table(rows, features)


AXES = ("intelligibility", "expressiveness", "voice_quality", "liveliness", "hallucinations", "noise")


def speecharena() -> Dataset:
    """ai4bharat/SpeechArenaBench: B wins, both good, both bad, A wins, a stranger is named."""
    side = dict.fromkeys(AXES, WHOLE)
    features = {name: TEXT for name in ("academic_prompt_id", "sentence", "model_a", "model_b")}
    features |= {"audio_a": "audio", "audio_b": "audio", "preference_model": TEXT, "user_id": TEXT}
    features |= {"gender": TEXT, "language": TEXT}
    features["fine_grained_eval"] = {"detailed_ratings_a": side, "detailed_ratings_b": side}
    answers = ["Speech 2.8 HD", "Bulbul V3 Beta, Speech 2.8 HD", "Tie / No Preference", "Bulbul V3 Beta", "Sonic 3"]
    rows = []
    for index, answer in enumerate(answers):
        good, bad = dict.fromkeys(AXES, 5), dict.fromkeys(AXES, 1)
        ratings = {"detailed_ratings_a": good, "detailed_ratings_b": {**bad, "noise": 5}}
        row = {"academic_prompt_id": f"p{index}", "sentence": f"वाक्य {index}.", "user_id": f"u{index}"}
        row |= {"model_a": "Bulbul V3 Beta", "model_b": "Speech 2.8 HD", "preference_model": answer}
        row |= {"audio_a": clip(2 * index), "audio_b": clip(2 * index + 1), "fine_grained_eval": ratings}
        rows.append(row)
    return table(rows, features)


def votes_and_clips() -> tuple[Dataset, Dataset]:
    """As datapointai/text-to-speech-human-preferences-315k: votes by text and models, clips apart (names are ours)."""
    texts = {"p0": "Hello there.", "p1": "Good night."}
    models = ("alpha", "beta")
    clips = [
        {"audio": clip(2 * place + side), "prompt_id": prompt, "prompt": text, "model": models[side]}
        for place, (prompt, text) in enumerate(texts.items())
        for side in range(2)
    ]
    votes = [("p0", "alpha"), ("p0", "alpha"), ("p0", "beta"), ("p1", "beta"), ("p2", "beta")]
    rows = [
        {"prompt_id": prompt, "model_a": "alpha", "model_b": "beta", "winner": winner, "annotator_id": f"w{place}"}
        for place, (prompt, winner) in enumerate(votes)
    ]
    vote_table = table(rows, {name: TEXT for name in ("prompt_id", "model_a", "model_b", "winner", "annotator_id")})
    return vote_table, table(clips, {"audio": "audio", "prompt_id": TEXT, "prompt": TEXT, "model": TEXT})


def ljs_mos() -> Dataset:
    """stefantaubert/ljs-mos-120: a row a rating, in two dimensions; no texts.

    LJ1 naturalness: gt 5 and 4, wg 4 and 3, impl 3.4 once; LJ2: gt 2 by w0 and wg 2 by w1.
    """
    ratings = [
        ("LJ1", "gt", 0, "naturalness", 5, "w0"),
        ("LJ1", "gt", 0, "naturalness", 4, "w1"),
        ("LJ1", "wg", 1, "naturalness", 4, "w0"),
        ("LJ1", "wg", 1, "naturalness", 3, "w1"),
        ("LJ1", "impl", 2, "naturalness", 3.4, "w0"),
        ("LJ1", "gt", 0, "intelligibility", 1, "w0"),
        ("LJ1", "wg", 1, "intelligibility", 3, "w0"),
        ("LJ2", "gt", 3, "naturalness", 2, "w0"),
        ("LJ2", "wg", 4, "naturalness", 2, "w1"),
    ]
    names = ("file", "condition", "audio", "score_dimension", "score", "worker_id")
    rows = [dict(zip(names, rating, strict=True)) for rating in ratings]
    rows = [{**row, "audio": clip(row["audio"])} for row in rows]
    features = {"audio": "audio", "file": TEXT, "condition": TEXT, "score_dimension": TEXT, "score": NUMBER}
    return table(rows, {**features, "worker_id": TEXT})


def write_clips(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"{number}.wav").write_bytes(tone(number))
