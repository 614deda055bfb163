"""Prompt lists of every format become the same prompts; durations and clips are F5-TTS's where that is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict, IterableDatasetDict

from rlhf_mel.data.prompts import PromptDataset, PromptOptions, load_dataset_prompts, load_prompts
from rlhf_mel.speech.durations import f5_total_frames
from rlhf_mel.types import Prompts

RATE_HZ = 24_000


def tone(seconds: float, amplitude: float = 0.3) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * 220 * torch.arange(round(seconds * RATE_HZ)) / RATE_HZ)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, seconds in (("61/70968/61-70968-0000.flac", 1.0), ("121/1/121-1-0003.flac", 0.5)):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        soundfile.write(path, tone(seconds).numpy(), RATE_HZ)
    return tmp_path


CLIPS = ("61/70968/61-70968-0000.flac", "121/1/121-1-0003.flac")
TEXTS, REFERENCES = ("Good morning.", 'She said, "no".'), ("Hello there.", "早上好。")


def jsonl(folder: Path) -> Path:
    rows = zip(TEXTS, CLIPS, REFERENCES, strict=True)
    lines = [json.dumps({"text": text, "reference_audio": clip, "reference_text": said}) for text, clip, said in rows]
    (folder / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "p.jsonl"


def csv(folder: Path) -> Path:
    """With a byte order mark and Windows line ends, as spreadsheets write it."""
    quoted = [TEXTS[0], '"She said, ""no""."']
    rows = "".join(f"{text},{clip},{said}\r\n" for text, clip, said in zip(quoted, CLIPS, REFERENCES, strict=True))
    (folder / "p.csv").write_bytes(f"\ufefftext,reference_audio,reference_text\r\n{rows}".encode())
    return folder / "p.csv"


def seed_tts(folder: Path) -> Path:
    (folder / "meta.lst").write_text(
        f"utt_0|{REFERENCES[0]}|{CLIPS[0]}|{TEXTS[0]}\nutt_1|{REFERENCES[1]}|{CLIPS[1]}|{TEXTS[1]}|wavs/utt_1.wav\n",
        encoding="utf-8",
    )
    return folder / "meta.lst"


def librispeech(folder: Path) -> Path:
    (folder / "cross.lst").write_text(
        f"61-70968-0000\t1.0\t{REFERENCES[0]}\t61-70968-0029\t2.5\t{TEXTS[0]}\n"
        f"121-1-0003\t0.5\t{REFERENCES[1]}\t121-1-0004\t3.25\t{TEXTS[1]}\n",
        encoding="utf-8",
    )
    return folder / "cross.lst"


def batch(prompts: PromptDataset) -> Prompts:
    return prompts.collate([prompts[row] for row in range(len(prompts))])


@pytest.mark.parametrize("write", [jsonl, csv, seed_tts, librispeech])
def test_every_format_holds_the_same_prompts(write: Callable[[Path], Path], folder: Path) -> None:
    prompts = batch(load_prompts(write(folder), split="train"))
    assert tuple(prompts.texts) == TEXTS and tuple(prompts.reference_texts) == REFERENCES
    assert prompts.reference_lengths_samples.tolist() == [24_000, 12_000]
    torch.testing.assert_close(prompts.reference_audio[1, :12_000], tone(0.5), atol=1 / 32768, rtol=0)


def test_what_else_the_lists_say_reaches_the_rewards(folder: Path) -> None:
    seed = batch(load_prompts(seed_tts(folder), split="train")).columns
    assert seed == {"id": ["utt_0", "utt_1"], "target_audio": [None, "wavs/utt_1.wav"]}
    libri = batch(load_prompts(librispeech(folder), split="train")).columns
    assert libri["target_duration_s"] == [2.5, 3.25] and libri["voice"] == ["61", "121"]


def test_columns_are_renamed_and_durations_given(folder: Path) -> None:
    prompts = load_prompts(librispeech(folder), split="train", columns={"duration_s": "target_duration_s"})
    # 94 and 47 frames of reference; 2.5 s are 234.4 frames, 3.25 s are 304.7
    assert batch(prompts).generated_frames.tolist() == [235, 305]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"expected columns \['words'\], got \['id', .*\]; correct `columns`"):
        load_prompts(librispeech(folder), split="train", columns={"text": "words"})


def test_clips_may_lie_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    lists = tmp_path_factory.mktemp("lists")
    assert len(load_prompts(librispeech(lists), split="train", audio_root=folder)) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.lst", "utt|text|wav\n", r"a\.lst, line 1: expected 'id\|text\|wav\|text\[\|wav\]', got 3 fields"),
        ("a.lst", "61-7-0\tx\ttext\t61-7-1\ty\ttext\n", r"a\.lst, line 1: expected 'speaker-chapter-number"),
        ("a.csv", "text,reference_audio\na\n", r"a\.csv, line 2: expected 2 values"),
        ("a.csv", "text,duration_s\na,long\n", r"a\.csv, line 2: 'duration_s' must be seconds, got 'long'"),
        ("a.txt", "hello\n", r"a\.txt: expected prompts in one of \['\.csv', '\.jsonl', '\.lst', '\.tsv'\]"),
    ],
)
def test_lines_that_are_no_prompts_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name, split="train")


# datasets.


def encoded(folder: Path) -> Dataset:
    rows = {
        "sentence": list(TEXTS),
        "audio": [{"path": None, "bytes": (folder / clip).read_bytes()} for clip in CLIPS],
        "transcript": list(REFERENCES),
        "accent": ["scots", "irish"],
        "left": [1, 2],
    }
    return Dataset.from_dict(rows).cast_column("audio", Audio(sampling_rate=16_000))


COLUMNS = {"text": "sentence", "reference_audio": "audio", "reference_text": "transcript"}


def test_a_dataset_with_an_audio_feature(folder: Path) -> None:
    prompts = batch(load_dataset_prompts(encoded(folder), columns=COLUMNS, keep=["accent"]))
    assert tuple(prompts.texts) == TEXTS and prompts.columns == {"accent": ["scots", "irish"]}
    assert prompts.reference_lengths_samples.tolist() == [24_000, 12_000]  # the file's own samples, not 16 kHz
    torch.testing.assert_close(prompts.reference_audio[1, :12_000], tone(0.5), atol=1 / 32768, rtol=0)
    with pytest.raises(ValueError, match=r"expected columns \['words'\], got \['sentence'"):
        load_dataset_prompts(encoded(folder), columns={**COLUMNS, "text": "words"})
    with pytest.raises(ValueError, match="expected each column once"):
        load_dataset_prompts(encoded(folder), columns={**COLUMNS, "text": "transcript"})


def rows_of(table: Dataset) -> list[dict[str, Any]]:
    return list(table.cast_column("audio", Audio(decode=False)))


def with_samples(folder: Path) -> list[dict[str, Any]]:
    decoded = [{"array": tone(seconds).numpy(), "sampling_rate": RATE_HZ} for seconds in (1.0, 0.5)]
    return [{**row, "audio": clip} for row, clip in zip(rows_of(encoded(folder)), decoded, strict=True)]


TABLES: dict[str, Callable[[Path], Any]] = {
    "Dataset": encoded,
    "formatted": lambda folder: encoded(folder).with_format("numpy"),
    "DatasetDict": lambda folder: DatasetDict({"train": encoded(folder), "test": encoded(folder).select([0])}),
    "IterableDataset": lambda folder: encoded(folder).to_iterable_dataset(),
    "IterableDatasetDict": lambda folder: IterableDatasetDict({"train": encoded(folder).to_iterable_dataset()}),
    "rows": lambda folder: rows_of(encoded(folder)),
    "rows with samples": with_samples,
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_table_gives_the_same_prompts_and_all_columns(folder: Path, kind: str) -> None:
    prompts = batch(load_dataset_prompts(TABLES[kind](folder), columns=COLUMNS))
    assert tuple(prompts.texts) == TEXTS and tuple(prompts.reference_texts) == REFERENCES
    assert prompts.columns == {"accent": ["scots", "irish"], "left": [1, 2]}
    assert all(type(left) is int for left in prompts.columns["left"])
    assert prompts.reference_lengths_samples.tolist() == [24_000, 12_000]
    torch.testing.assert_close(prompts.reference_audio[1, :12_000], tone(0.5), atol=1 / 32768, rtol=0)
    kept = batch(load_dataset_prompts(TABLES[kind](folder), columns=COLUMNS, keep=["accent"]))
    assert list(kept.columns) == ["accent"]


def test_a_table_that_cannot_be_used_says_why(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected split 'dev', got splits \['train', 'test'\]"):
        load_dataset_prompts(TABLES["DatasetDict"](folder), split="dev", columns=COLUMNS)
    with pytest.raises(ValueError, match=r"expected a table of `datasets` or a list of rows, got int"):
        load_dataset_prompts(3)
    with pytest.raises(ValueError, match=r"expected columns \['words'\], got") as raised:
        load_dataset_prompts(with_samples(folder), columns={**COLUMNS, "text": "words"})
    assert len(str(raised.value)) < 2000
    broken = [{**row, "audio": {"array": [], "sampling_rate": RATE_HZ}} for row in with_samples(folder)]
    with pytest.raises(ValueError, match="row 0, 'reference_audio': expected samples and a sampling_rate, got shape"):
        load_dataset_prompts(broken, columns=COLUMNS)


def test_a_local_folder_of_datasets(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("set")
    encoded(folder).to_parquet(str(source / "train.parquet"))
    prompts = load_dataset_prompts(str(source), split="train", columns=COLUMNS)
    assert tuple(batch(prompts).texts) == TEXTS
    with pytest.raises(FileNotFoundError, match="expected a data set with split 'test'"):
        load_dataset_prompts(str(source), split="test", columns=COLUMNS)


# Options.


def rows(*texts: str, clip: str = CLIPS[0]) -> list[dict[str, Any]]:
    return [{"text": text, "reference_audio": clip, "reference_text": "Hello there."} for text in texts]


def test_duration_by_f5_tts_s_rule(folder: Path) -> None:
    """R = 24,000 // 256 = 93; the reference's text becomes "Hello there.  ", 14 bytes.

    "Good morning." has 13: 93 + int(93 / 14 * 13) = 179. "No." has 3, fewer than 10: 93 + int(93 / 14 * 3 / 0.3) = 159.
    The clip's mel has a frame more than R: 94 of those totals.
    """
    options = PromptOptions(duration_rule="f5")
    prompts = batch(PromptDataset(rows("Good morning.", "No."), root=folder, options=options))
    assert prompts.generated_frames.tolist() == [179 - 94, 159 - 94]  # type: ignore[union-attr]
    assert f5_total_frames(24_000, 256, "早上好。", "早上好。") == 93 + 93
    with pytest.raises(ValueError, match=r"duration_rule: expected one of \['policy', 'f5'\]"):
        PromptOptions(duration_rule="upstream")


def test_long_references_are_refused_or_prepared(folder: Path) -> None:
    soundfile.write(folder / "long.wav", tone(13.0).numpy(), RATE_HZ)
    with pytest.raises(ValueError, match=r"1 of 1 rows .*\n.*expected at most 12 s, got 13\.0 s"):
        PromptDataset(rows("a", clip="long.wav"), root=folder)
    options = PromptOptions(prepare_references=True)
    prompts = PromptDataset(rows("a", clip="long.wav"), root=folder, options=options)
    # 12 s, and pydub's 50 ms of silence, 551 samples at 11,025 Hz
    assert batch(prompts).reference_lengths_samples.tolist() == [12 * 24_000 + 550 * 24_000 // 11_025 + 1]
    assert prompts.head(1).options == options


def test_unusable_rows_are_dropped_only_when_asked_and_always_counted(folder: Path) -> None:
    mixed = [*rows("One."), *rows("Two.", clip="gone.wav"), *rows("Three.")]
    options = PromptOptions(drop_unusable=True)
    with pytest.warns(UserWarning, match=r"1 of 3 rows dropped; first: row 1 .*gone\.wav"):
        prompts = PromptDataset(mixed, root=folder, options=options)
    assert batch(prompts).texts == ["One.", "Three."] and len(prompts.dropped) == 1
    with pytest.raises(ValueError, match=r"1 of 1 rows .* cannot be used"):
        PromptDataset(rows("Two.", clip="gone.wav"), root=folder, options=options)
