"""Prompts: what a JSONL row becomes, and that no row is lost without a word."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from rlhf_mel.data.prompts import PromptDataset, load_prompts
from rlhf_mel.data.sampler import GroupSampler
from rlhf_mel.flow.noise import mix_seed

RATE_HZ = 24_000


def write_clip(path: Path, seconds: float, hz: float = 220.0, rate_hz: int = RATE_HZ) -> None:
    time_s = torch.arange(round(seconds * rate_hz)) / rate_hz
    soundfile.write(path, (0.3 * torch.sin(2 * math.pi * hz * time_s)).numpy(), rate_hz)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(text: str = "Good morning.", clip: str = "a.wav", **more: Any) -> dict[str, Any]:
    return {"id": "x", "text": text, "voice": "v", "reference_audio": clip, "reference_text": "Hello.", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_clip(tmp_path / "a.wav", 1.0)
    write_clip(tmp_path / "b.wav", 0.5)
    return tmp_path


def test_collate_pads_clips_and_keeps_every_other_column(folder: Path) -> None:
    write_jsonl(folder / "p.jsonl", [row(accent="scots"), row("Two.", "b.wav", accent="irish")])
    prompts = load_prompts(folder / "p.jsonl", split="train")
    batch = prompts.collate([prompts[0], prompts[1], prompts[1]])
    assert batch.texts == ["Good morning.", "Two.", "Two."]
    assert batch.reference_lengths_samples.tolist() == [24_000, 12_000, 12_000]
    assert batch.reference_audio.shape == (3, 24_000)
    assert (batch.reference_audio[1, 12_000:] == 0).all() and batch.reference_audio[1, :12_000].abs().max() > 0.2
    assert batch.group_ids is not None and batch.group_ids.tolist() == [0, 1, 1]
    assert batch.generated_frames is None
    assert batch.columns == {
        "id": ["x"] * 3,
        "voice": ["v"] * 3,
        "accent": ["scots", "irish", "irish"],
    }


def test_seconds_to_generate_are_whole_frames(folder: Path) -> None:
    write_jsonl(folder / "p.jsonl", [row(duration_s=1.0), row("Two.", "b.wav", duration_s=0.5)])
    prompts = load_prompts(folder / "p.jsonl", split="train")
    batch = prompts.collate([prompts[0], prompts[1]])
    # 24,000 / 256 = 93.75 frames a second
    assert batch.generated_frames is not None and batch.generated_frames.tolist() == [94, 47]


def test_clips_of_another_rate_are_resampled(folder: Path) -> None:
    write_clip(folder / "c.wav", 1.0, rate_hz=48_000)
    write_jsonl(folder / "p.jsonl", [row(clip="c.wav")])
    prompts = load_prompts(folder / "p.jsonl", split="train")
    assert prompts.collate([prompts[0]]).reference_lengths_samples.tolist() == [24_000]


def test_a_folder_holds_one_file_a_split(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", [row()])
    write_jsonl(folder / "heldout.jsonl", [row("Held out.")])
    assert load_prompts(folder, split="heldout")[0]["text"] == "Held out."


def test_unusable_rows_are_counted_and_listed(folder: Path) -> None:
    soundfile.write(folder / "silent.wav", [0.0] * 8000, RATE_HZ)
    rows = [row(), row(text=" "), row(clip="gone.wav"), row(clip="silent.wav"), row(duration_s=-1.0)]
    write_jsonl(folder / "p.jsonl", rows)
    with pytest.raises(ValueError, match=r"4 of 5 rows of .*p.jsonl cannot be used") as caught:
        load_prompts(folder / "p.jsonl", split="train")
    for number, why in ((1, "'text'"), (2, "gone.wav"), (3, "silent"), (4, "duration_s")):
        assert any(f"row {number}" in line and why in line for line in str(caught.value).splitlines())


def test_durations_for_some_rows_only_raise(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 rows.*\n.*row 1: 'duration_s' is missing"):
        PromptDataset([row(duration_s=1.0), row()], root=folder)


def test_texts_the_policy_cannot_read_are_listed(folder: Path) -> None:
    def tokenizer(text: str) -> list[str]:
        if "7" in text:
            raise ValueError("digits are outside the vocabulary")
        return list(text)

    prompts = PromptDataset([row(), row("Seven is 7.")], root=folder)
    with pytest.raises(ValueError, match=r"1 of 2 rows.*\n.*row 1 .*digits are outside"):
        prompts.check_texts(tokenizer)


@pytest.mark.parametrize(("line", "why"), [("{'text': 1}", "not JSON"), ("[1]", "expected a JSON object")])
def test_a_broken_line_is_named(folder: Path, line: str, why: str) -> None:
    (folder / "p.jsonl").write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"p.jsonl, line 2: {why}"):
        load_prompts(folder / "p.jsonl", split="train")


def test_a_missing_file_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected 'tiny', a JSONL file, or a folder with heldout\.jsonl"):
        load_prompts(tmp_path / "none", split="heldout")


def test_head_is_the_first_rows(folder: Path) -> None:
    prompts = PromptDataset([row(str(number)) for number in range(5)], root=folder)
    assert [prompts.head(2)[number]["text"] for number in range(2)] == ["0", "1"]
    assert len(prompts.head(9)) == 5


def test_group_sampler_repeats_rows_and_reshuffles_by_epoch() -> None:
    epoch = 0
    sampler = GroupSampler(6, num_generations=2, seed=1, epoch=lambda: epoch)
    first = list(sampler)
    assert len(sampler) == len(first) == 12
    assert first[::2] == first[1::2] and sorted(first[::2]) == list(range(6))
    assert list(sampler) == first
    epoch = 1
    assert list(sampler) != first and sorted(sampler) == sorted(first)


def test_group_sampler_repeats_the_rows_of_an_update() -> None:
    sampler = GroupSampler(5, num_generations=2, seed=1, epoch=lambda: 0, num_iterations=3, rollouts_per_update=4)
    rows, once = list(sampler), list(GroupSampler(5, num_generations=2, seed=1, epoch=lambda: 0))
    assert len(sampler) == len(rows) == 3 * 12
    assert [rows[start : start + 4] for start in range(0, 36, 4)] == [
        block for block in (once[:4], once[4:8], once[8:] + once[:2]) for _ in range(3)
    ]


def test_mix_seed_depends_on_every_number_and_their_order() -> None:
    seeds = {mix_seed(*numbers) for numbers in [(0, 1), (1, 0), (0, 0), (0, 1, 0), (0, 1, 1)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
