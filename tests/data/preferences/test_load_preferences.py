"""Preference data from every kind of source: the same pairs, nothing lost uncounted, and the batch of a loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import preference_sets as sets
import pytest
import torch
from datasets import DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from torch.utils.data import DataLoader

from rlhf_mel.data.preferences.load import PreferenceDataset, load_preferences, write_preferences
from rlhf_mel.data.preferences.sources import _refusal
from rlhf_mel.speech.audio import MelSpec, load_audio, log_mel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("rlhf_mel.data.preferences.load._SAID", set())


def pair(chosen: Any = 0, rejected: Any = 1, **more: Any) -> dict[str, Any]:
    clips = [sets.clip(given) if isinstance(given, int) else given for given in (chosen, rejected)]
    return {"prompt": "Hello.", "chosen": clips[0], "rejected": clips[1], **more}


# Sources.


def paths(folder: Path) -> list[dict[str, Any]]:
    sets.write_clips(folder, 4)
    return [
        {"prompt": f"Text {row}.", "chosen": f"{2 * row}.wav", "rejected": f"{2 * row + 1}.wav"} for row in range(2)
    ]


def in_memory(folder: Path) -> dict[str, Any]:
    return {"source": [pair(2 * row, 2 * row + 1, prompt=f"Text {row}.") for row in range(2)]}


def plain_bytes(folder: Path) -> dict[str, Any]:
    rows = [pair(sets.tone(2 * row), sets.tone(2 * row + 1), prompt=f"Text {row}.") for row in range(2)]
    return {"source": rows}


def arrays(folder: Path) -> dict[str, Any]:
    def sound(number: int) -> dict[str, Any]:  # the samples that 16 bits keep
        heard = np.round(sets.samples(number) * 32767).astype(np.float32) / 32768
        return {"array": heard, "sampling_rate": sets.RATE_HZ}

    return {"source": [pair(sound(2 * row), sound(2 * row + 1), prompt=f"Text {row}.") for row in range(2)]}


def arrays_in_a_dataset(folder: Path) -> dict[str, Any]:
    rows = [
        {
            name: {**value, "array": value["array"].tolist()} if isinstance(value, dict) else value
            for name, value in row.items()
        }
        for row in arrays(folder)["source"]
    ]
    return {"source": datasets.Dataset.from_list(rows)}


def dataset(folder: Path) -> datasets.Dataset:
    return sets.table(in_memory(folder)["source"], {"prompt": sets.TEXT, "chosen": "audio", "rejected": "audio"})


def dataset_dict(folder: Path) -> dict[str, Any]:
    return {"source": DatasetDict({"train": dataset(folder), "test": dataset(folder).select([0])})}


def formatted(folder: Path) -> dict[str, Any]:
    return {"source": dataset(folder).with_format("numpy")}


def saved_dict(folder: Path) -> dict[str, Any]:
    dataset_dict(folder)["source"].save_to_disk(folder / "saved")
    return {"source": folder / "saved"}


def parquet_file(folder: Path) -> dict[str, Any]:
    dataset(folder).to_parquet(folder / "pairs.parquet")
    return {"source": str(folder / "pairs.parquet")}


def jsonl(folder: Path) -> dict[str, Any]:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in paths(folder)))
    return {"source": folder / "pairs.jsonl"}


def folder_of_lists(folder: Path) -> dict[str, Any]:
    jsonl(folder)["source"].rename(folder / "train.jsonl")
    return {"source": folder}


def csv_elsewhere(folder: Path) -> dict[str, Any]:
    (folder / "lists").mkdir()
    lines = ["prompt,chosen,rejected", *(",".join(row.values()) for row in paths(folder))]
    (folder / "lists" / "pairs.csv").write_text("\n".join(lines))
    return {"source": folder / "lists" / "pairs.csv", "audio_root": folder}


def audiofolder(folder: Path) -> dict[str, Any]:
    place = folder / "audio"
    place.mkdir()
    renamed = [
        {"prompt": row["prompt"], "chosen_file_name": row["chosen"], "rejected_file_name": row["rejected"]}
        for row in paths(place)
    ]
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    return {"source": str(place)}


def stream(folder: Path) -> dict[str, Any]:
    return {"source": dataset(folder).to_iterable_dataset(), "streaming": True}


def stream_without_features(folder: Path) -> dict[str, Any]:
    return {"source": IterableDataset.from_generator(lambda: iter(in_memory(folder)["source"])), "streaming": True}


def streamed_list(folder: Path) -> dict[str, Any]:
    return {**in_memory(folder), "streaming": True}


def streamed_audiofolder(folder: Path) -> dict[str, Any]:
    return {**audiofolder(folder), "streaming": True}


SOURCES = (
    in_memory,
    plain_bytes,
    arrays,
    arrays_in_a_dataset,
    dataset_dict,
    formatted,
    saved_dict,
    parquet_file,
    jsonl,
    folder_of_lists,
    csv_elsewhere,
    audiofolder,
    stream,
    stream_without_features,
    streamed_list,
    streamed_audiofolder,
)


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_pairs(make: Any, tmp_path: Path) -> None:
    loaded = load_preferences(**make(tmp_path))
    batch = loaded.collate(list(loaded))
    assert list(batch.prompts.texts) == ["Text 0.", "Text 1."] and not loaded.counts
    for row, (chosen, rejected) in enumerate(zip(batch.chosen.waveform, batch.rejected.waveform, strict=True)):
        for heard, number in ((chosen, 2 * row), (rejected, 2 * row + 1)):
            torch.testing.assert_close(heard, torch.from_numpy(sets.samples(number)), atol=1 / 32768, rtol=0)


def test_a_split_is_chosen_or_named(tmp_path: Path) -> None:
    assert len(load_preferences(**dataset_dict(tmp_path), split="test")) == 1
    with pytest.raises(FileNotFoundError, match=r"expected split 'dev', got splits \['train', 'test'\]"):
        load_preferences(**dataset_dict(tmp_path), split="dev")
    with pytest.raises(FileNotFoundError, match=r"expected a data set with split 'dev' .* got: .*Bad split: dev"):
        load_preferences(**audiofolder(tmp_path), split="dev")


def test_a_stream_needs_streaming_and_empty_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected streaming=True with an iterable data set"):
        load_preferences(stream(tmp_path)["source"])
    for empty in ([], dataset(tmp_path).select([])):
        with pytest.raises(ValueError, match="data set has no rows"):
            load_preferences(empty)


# What is refused whole.


def test_a_loading_script_gets_its_own_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("import datasets\n")
    with pytest.raises(FileNotFoundError, match=r"got a loading script .* revision='refs/convert/parquet'"):
        load_preferences(str(folder))


def test_a_gated_data_set_gets_its_own_sentence() -> None:
    # in the words of `datasets` 5.2; the hub cannot be asked in a test
    error = DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub. You must be authenticated to access it.")
    said = str(_refusal("o/n", "train", error))
    assert "agree to its terms at https://huggingface.co/datasets/o/n, then run `hf auth login`" in said


def test_a_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="nobody/nothing: expected a data set with split 'train' on the hub"):
        load_preferences("nobody/nothing")


# What is dropped, and counted.


def test_bad_rows_are_counted_by_reason_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    flac = {"bytes": sets.tone(5, kind="FLAC"), "path": "5.flac"}
    rows = [
        pair(id="fine"),
        pair(2, {"bytes": sets.BROKEN, "path": "x.wav"}, id="broken"),
        pair(2, {"bytes": b"", "path": None}),
        pair(2, None),
        pair(2, {"bytes": None, "path": "/nowhere/gone.wav"}),
        pair(2, {"array": np.full(9000, np.nan), "sampling_rate": 24_000}),
        pair(2, sets.clip(3, seconds=0.02)),
        pair(4, 4, id="twice"),
        pair(5, flac),
        pair(6, 7, prompt="  "),
        pair(6, 7, prompt=None),
        pair(6, 7, soft_label=0.5),
        pair(6, 7, soft_label=1.5),
        pair(8, 9, weight=0),
    ]
    loaded = load_preferences(rows)
    assert len(loaded) == 1 and loaded[0]["id"] == "fine"
    assert loaded.counts == {
        "undecodable": 6,
        "of two identical clips": 2,
        "without text": 2,
        "tie": 1,
        "without an answer": 2,
    }
    said = capsys.readouterr().err
    assert (
        "data set (adapter 'trl'): 1 pairs of 14 rows; dropped: 6 undecodable (first: row 1 (id 'broken'): rejected:"
        in said
    )
    assert "licence not stated" in said
    streamed = load_preferences(rows, streaming=True)
    assert [row["id"] for row in streamed] == ["fine"] and streamed.counts == loaded.counts
    assert "without text" not in load_preferences(rows, require_text=False).counts


def test_headers_alone_find_the_same_but_for_what_lies_behind_them() -> None:
    """Every other byte of the audio is there: the header is fine, the file ends early."""
    half = sets.tone(5, kind="FLAC")
    cut = {"bytes": half[: len(half) // 2], "path": "cut.flac"}
    flac = {"bytes": sets.tone(2, kind="FLAC"), "path": "2.flac"}
    rows = [pair(0, 1), pair(4, cut, id="cut"), pair(2, flac), pair(3, {"bytes": sets.BROKEN, "path": "x.wav"})]
    assert load_preferences(rows).counts == {"undecodable": 2, "of two identical clips": 1}
    quick = load_preferences(rows, check_audio=False)
    assert quick.counts == {"undecodable": 1, "of two identical clips": 1}
    with pytest.raises(ValueError, match=r"rejected of pair 'cut': .*; load with check_audio=True to leave it out"):
        quick.collate([quick[0], quick[1]])


def test_no_pair_left_is_an_error_that_says_why() -> None:
    rows = [pair(0, 0), pair(1, 1), pair(2, 3, prompt="")]
    message = r"expected pairs, got 0 of 3 rows; dropped: 2 of two identical clips \(first: row 0\); 1 without text"
    with pytest.raises(ValueError, match=message):
        load_preferences(rows)
    with pytest.raises(ValueError, match=message):
        list(load_preferences(rows, streaming=True))


def test_no_message_holds_the_samples() -> None:
    """12 rows of a second once made a message of 25 MB."""
    sound = {"array": np.linspace(-1, 1, 24_000), "sampling_rate": 24_000}
    unknown = [{"left": sound, "right": sound, "text": "a"} for _ in range(12)]
    bad = [pair({"array": np.ones((2, 3, 4)), "sampling_rate": 24_000}, sound, id=np.arange(9999)) for _ in range(12)]
    silent = [pair(sound, sound, prompt=list(range(9999)), label=sound) for _ in range(12)]
    wide = [{f"a_long_name_of_a_column_{number}": sound for number in range(200)}]
    endless = [{"audio_a": sound, "audio_b": sound, "label": "A" * 10**6, "text": "a"} for _ in range(12)]
    nowhere = [pair("a" * 10**6, sound)]
    for rows in (unknown, bad, silent, wide, endless, nowhere):
        with pytest.raises(ValueError) as caught:
            load_preferences(rows)
        assert len(str(caught.value)) < 2000


def test_options_that_cannot_be_meant() -> None:
    for options, message in (
        ({"ties": "half"}, r"ties: expected one of \['drop', 'keep'\], got 'half'"),
        ({"annotators": "mean"}, r"annotators: expected one of"),
        ({"tie_margin": -1}, "tie_margin, pairs_per_clip"),
        ({"keep": ["colour"]}, r"keep: expected columns of data set, .* got \['colour'\]"),
        ({"within": "year"}, r"within, tie_margin: expected with scores of single clips, got adapter 'trl'"),
        ({"columns": {"clip": "chosen"}}, r"columns: expected roles of data/preferences/schemas\.py, got \['clip'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_preferences([pair()], **options)


# Several answers about one pair.


def answers() -> list[dict[str, Any]]:
    """The same two clips: 0 wins twice, 1 once (as a row of its own); another pair is judged once."""
    return [
        pair(0, 1, annotator="ann", margin=2.0),
        pair(1, 0, annotator="bob", margin=1.0),
        pair(0, 1, annotator="cleo", margin=2.0),
        pair(2, 3, annotator="ann"),
    ]


def test_answers_about_one_pair_are_merged_by_votes() -> None:
    """2 of 3 votes; margin (2 - 1 + 2) / 3 = 1."""
    loaded = load_preferences(answers())
    assert [(row["soft_label"], row["weight"]) for row in loaded] == [(pytest.approx(2 / 3), 3), (1, 1)]
    assert loaded[0]["margin"] == pytest.approx(1.0) and loaded[1]["margin"] is None
    assert loaded[0]["annotator"] == "ann, bob, cleo" and loaded.counts == {"merged into an earlier row": 2}
    assert loaded[0]["chosen"]["bytes"] == sets.tone(0)


def test_answers_that_cancel_are_a_tie_and_ties_are_half_a_vote_each() -> None:
    loaded = load_preferences([*answers()[:2], answers()[3]])
    assert len(loaded) == 1
    assert loaded.counts == {"merged into an earlier row": 1, "tie (annotators disagree evenly)": 1}
    heavier = load_preferences([pair(0, 1, weight=3), pair(1, 0)])
    assert [(row["soft_label"], row["weight"]) for row in heavier] == [(0.75, 4)]
    assert heavier[0]["chosen"]["bytes"] == sets.tone(0)
    kept = load_preferences([*answers()[:2]], ties="keep")
    assert [(row["soft_label"], row["weight"]) for row in kept] == [(0.5, 2)]
    with_tie = load_preferences([answers()[0], pair(1, 0, soft_label=0.5)])
    assert [(row["soft_label"], row["weight"]) for row in with_tie] == [(0.75, 2)]


def test_answers_may_stay_rows_and_other_texts_and_axes_are_other_pairs() -> None:
    assert len(load_preferences(answers(), annotators="keep")) == 4
    rows = [pair(0, 1, axis="noise"), pair(1, 0, axis="voice"), pair(1, 0, prompt="Bye.", axis="voice")]
    loaded = load_preferences(rows)
    assert [(row["axis"], row["prompt"]) for row in loaded] == [
        ("noise", "Hello."),
        ("voice", "Hello."),
        ("voice", "Bye."),
    ]
    assert [row["axis"] for row in load_preferences(rows, axis="noise")] == ["noise"]


def test_fewer_than_half_of_the_votes_exchange_the_clips_and_their_seeds() -> None:
    (row,) = load_preferences([pair(0, 1, soft_label=0.25, margin=-1.0, chosen_seed=7, rejected_seed=8, row=3)])
    assert row["chosen"]["bytes"] == sets.tone(1) and row["soft_label"] == 0.75 and row["margin"] == 1.0
    assert (row["chosen_seed"], row["rejected_seed"], row["row"]) == (8, 7, 3)


# Batches.


def test_a_batch_has_the_mel_of_each_clip_alone() -> None:
    """0.25 s and 0.5 s at 24 kHz: 6,000 and 12,000 samples, 6000 // 256 + 1 = 24 and 12000 // 256 + 1 = 47 frames."""
    rows = [
        pair(
            0,
            sets.clip(1, seconds=0.5),
            margin=2.0,
            soft_label=0.9,
            weight=4,
            chosen_seed=2**62,
            rejected_seed=1,
            row=5,
        ),
        pair(2, 3, id="b", voice="v", chosen_seed=3, rejected_seed=4, row=6),
    ]
    loaded = load_preferences(rows, keep=[])
    batch = next(iter(DataLoader(loaded, batch_size=2, collate_fn=loaded.collate)))
    assert batch.rejected.lengths_samples.tolist() == [12_000, 6_000]
    assert batch.rejected.lengths_frames.tolist() == [47, 24] and batch.rejected.mel.shape == (2, 47, 100)
    for place, number in ((0, 0), (1, 2)):
        alone = log_mel(load_audio(sets.tone(number))[None])[0]
        torch.testing.assert_close(batch.chosen.mel[place, :24], alone, rtol=0, atol=0)
    assert (batch.rejected.mel[1, 24:] == 0).all() and (batch.rejected.waveform[1, 6_000:] == 0).all()
    assert batch.soft_labels.tolist() == pytest.approx([0.9, 1.0])
    assert batch.margins.tolist() == [2.0, 0.0] and batch.weights.tolist() == [4.0, 1.0]
    assert batch.chosen_seeds is not None and batch.chosen_seeds.tolist() == [2**62, 3]
    assert batch.rows is not None and batch.rows.tolist() == [5, 6]
    assert batch.prompts.columns == {"id": [None, "b"], "voice": [None, "v"]}
    assert batch.prompts.reference_lengths_samples.tolist() == [0, 0]
    moved = batch.to("meta")
    assert (
        moved.chosen.mel.device.type == moved.prompts.reference_audio.device.type == moved.weights.device.type == "meta"
    )
    assert len(moved) == 2


def test_seeds_are_for_all_rows_or_for_none() -> None:
    loaded = load_preferences([pair(0, 1, chosen_seed=1), pair(2, 3)])
    assert loaded.collate([loaded[1]]).chosen_seeds is None
    with pytest.raises(
        ValueError, match=r"chosen_seed: expected a value in every row of a batch or in none, got \[1, None\]"
    ):
        loaded.collate([loaded[0], loaded[1]])


def test_clips_of_other_rates_are_resampled_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A tone of 160 Hz stays one: the same samples but for the edges."""
    rows = [pair(sets.clip(1, rate_hz=16_000), sets.clip(2, rate_hz=48_000)), pair(3, 4)]
    loaded = load_preferences(rows, mel_spec=MelSpec(sample_rate_hz=24_000))
    batch = loaded.collate(list(loaded))
    assert batch.chosen.lengths_samples.tolist() == [6_000, 6_000] and batch.chosen.sample_rate_hz == 24_000
    expected = torch.from_numpy(sets.samples(1))
    torch.testing.assert_close(batch.chosen.waveform[0, 500:5500], expected[500:5500], atol=2e-3, rtol=0)
    said = capsys.readouterr().err
    assert "clips at [16000, 48000] Hz are resampled to 24000 Hz; 1 pairs have clips of two rates" in said


def test_references_are_read_as_for_prompts_or_left_out() -> None:
    long = sets.clip(90, seconds=13.0)
    rows = [
        pair(0, 1, reference_audio=sets.clip(90, seconds=1.0), reference_text="There."),
        pair(2, 3, reference_audio=long, reference_text="There."),
        pair(4, 5, reference_audio=sets.clip(90, seconds=1.0), reference_text=" "),
        pair(6, 7, reference_audio=None, reference_text=None),
    ]
    loaded = load_preferences(rows)
    assert loaded.counts == {"with an unusable reference": 1, "without the reference's text": 1}
    prompts = loaded.collate(list(loaded)).prompts
    assert prompts.reference_lengths_samples.tolist() == [24_000, 0] and list(prompts.reference_texts) == ["There.", ""]
    assert len(load_preferences(rows, references=False)) == 4
    prepared = load_preferences(rows, prepare_references=True)
    # as PromptDataset: cut at 12 s, then pydub's 50 ms of silence, 551 samples at 11,025 Hz
    length = prepared.collate([prepared[1]]).prompts.reference_lengths_samples
    assert length.tolist() == [12 * 24_000 + 550 * 24_000 // 11_025 + 1]


def test_silent_and_distorted_clips_are_kept_since_they_may_be_why() -> None:
    silence = {"array": np.zeros(6_000), "sampling_rate": 24_000}
    square = {"array": np.sign(sets.samples(0) + 1e-6), "sampling_rate": 24_000}
    loaded = load_preferences([pair(0, silence), pair(1, square)])
    assert len(loaded) == 2 and bool(torch.isfinite(loaded.collate(list(loaded)).rejected.mel).all())


def test_stereo_arrays_are_mixed_to_mono() -> None:
    channels = np.stack([sets.samples(0), np.zeros(6_000, np.float32)])
    loaded = load_preferences([pair({"array": channels, "sampling_rate": 24_000}, 1)])
    heard = loaded.collate([loaded[0]]).chosen.waveform[0]
    torch.testing.assert_close(heard, torch.from_numpy(sets.samples(0) / 2), atol=1e-7, rtol=0)


# Tables and streams.


def test_rows_are_a_table() -> None:
    rows = load_preferences(answers(), annotators="keep").rows
    assert rows.column_names == ["prompt", "chosen", "rejected", "soft_label", "weight", "margin", "annotator"]
    assert rows["margin"] == [2.0, 1.0, 2.0, None] and [row["margin"] for row in rows[1:3]] == [1.0, 2.0]
    assert [row["annotator"] for row in rows.select([3, 1])] == ["ann", "bob"] and rows[-1]["annotator"] == "ann"


def test_rows_of_the_contract_need_no_loading(tmp_path: Path) -> None:
    assert len(PreferenceDataset([pair()])) == 1
    table = dataset(tmp_path)  # as it stands it would decode its audio, which needs torchcodec
    assert PreferenceDataset(table)[1]["chosen"]["bytes"] == sets.tone(2)
    with pytest.raises(ValueError, match="has no pairs"):
        PreferenceDataset([])
    with pytest.raises(
        ValueError, match=r"expected columns 'prompt', 'chosen', 'rejected', got none of \['chosen', 'rejected'\]"
    ):
        PreferenceDataset([{"prompt": "Hello."}])


def test_a_stream_is_read_as_it_is_asked_for_and_again() -> None:
    read = []

    def endless() -> Iterator[dict[str, Any]]:
        for number in range(10**9):
            read.append(number)
            yield pair(number % 50, number % 50 + 1)

    streamed = load_preferences(IterableDataset.from_generator(endless), streaming=True)
    read.clear()
    assert [row["prompt"] for row, _ in zip(streamed, range(3), strict=False)] == ["Hello."] * 3 and len(read) <= 4
    batches = iter(DataLoader(streamed, batch_size=2, collate_fn=streamed.collate))
    assert next(batches).chosen.waveform.shape == (2, 6_000)


def test_rows_of_a_stream_may_lack_columns() -> None:
    rows = [pair(0, 1, soft_label=0.9), {"prompt": "Hello.", "chosen": sets.clip(2)}, pair(3, 4)]
    streamed = load_preferences(IterableDataset.from_generator(lambda: iter(rows)), streaming=True)
    assert [row["soft_label"] for row in streamed] == [0.9, 1.0] and streamed.counts == {"undecodable": 1}


@pytest.mark.parametrize("files", [1, 2])
def test_two_workers_share_the_files_of_a_stream(files: int, tmp_path: Path) -> None:
    """Of a single file, one of them has nothing to read, which is no error."""
    folder = tmp_path / "set"
    folder.mkdir()
    features = {"prompt": sets.TEXT, "chosen": "audio", "rejected": "audio"}
    for number in range(files):
        table = sets.table([pair(2 * number, 2 * number + 1)], features)
        table.to_parquet(folder / f"train-{number}.parquet")
    streamed = load_preferences(str(folder), streaming=True)
    loader = DataLoader(streamed, batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0]["chosen"]["bytes"])
    assert sorted(loader) == sorted(sets.tone(2 * number) for number in range(files))


# The card.


def test_licence_and_terms_are_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    dataset(tmp_path).to_parquet(folder / "train.parquet")
    (folder / "README.md").write_text(
        "---\nlicense: cc-by-nc-4.0\nextra_gated_prompt: >-\n  Use it for research.\n\n  Cite us.\n---\n# A set\n"
    )
    for _ in range(2):
        loaded = load_preferences(str(folder))
    expected = "licence cc-by-nc-4.0 (not for commercial use); terms: Use it for research. Cite us."
    assert loaded.licence == expected
    assert capsys.readouterr().err.count(expected) == 1


def test_the_licence_of_a_table_in_memory_is_that_of_its_info(tmp_path: Path) -> None:
    table = dataset(tmp_path)
    table.info.license = "mit"
    assert load_preferences(table).licence == "licence mit"


# Writing, and the page about it.


def test_every_block_of_the_page_is_python() -> None:
    page = Path(__file__).parents[3] / "docs" / "preferences.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for code in blocks:
        compile(code, "docs/preferences.md", "exec")
    assert len(blocks) >= 3


def test_pairs_are_written_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_mel.data.preferences.files.SHARD_BYTES", 20_000)  # a pair has 2 * 12,044 bytes
    sets.write_clips(tmp_path, 6)
    rows = [
        pair(0, 1, margin=1.5, chosen_seed=2**62, rejected_seed=5, row=0, rank=1, good=True),
        pair(
            2, {"array": sets.samples(3), "sampling_rate": 24_000}, reference_audio=sets.clip(9), reference_text="So."
        ),
        {"prompt": "Bye.", "chosen": str(tmp_path / "4.wav"), "rejected": str(tmp_path / "5.wav"), "id": "c"},
    ]
    folder = write_preferences(rows, tmp_path / "written", licence="cc0-1.0", about="Three pairs.")
    assert sorted(file.name for file in (folder / "data").iterdir()) == [f"train-0000{n}.parquet" for n in range(3)]
    table = load_dataset(str(folder), split="train")
    assert str(table.features["chosen"]).startswith("Audio(") and table.features["chosen_seed"].dtype == "int64"
    assert table["rank"][:] == [1, None, None] and table["good"][:] == [True, None, None]
    loaded = load_preferences(folder, keep=["rank"])
    assert loaded.licence == "licence cc0-1.0" and "Three pairs." in (folder / "README.md").read_text()
    again = list(loaded)
    assert [row["prompt"] for row in again] == ["Hello.", "Hello.", "Bye."] and [row["rank"] for row in again] == [
        1,
        None,
        None,
    ]
    assert again[2]["chosen"] == {"bytes": sets.tone(4), "path": "4.wav"} and again[2]["id"] == "c"
    assert (again[0]["margin"], again[0]["chosen_seed"], again[0]["row"]) == (1.5, 2**62, 0)
    heard = loaded.collate([again[1]])
    torch.testing.assert_close(heard.rejected.waveform[0], torch.from_numpy(sets.samples(3)), atol=0, rtol=0)
    twice = write_preferences(loaded.rows, tmp_path / "twice")
    assert list(load_preferences(twice, keep=["rank"])) == again
    with pytest.raises(FileExistsError, match="expected no files of split 'train'"):
        write_preferences(rows, folder)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected pairs to write, got none"):
        write_preferences([], tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"row 1 \(id 'x'\): expected 'prompt', 'chosen', 'rejected', got no \['rejected'\]"
    ):
        write_preferences([pair(), {"prompt": "Hello.", "chosen": sets.clip(0), "id": "x"}], tmp_path / "b")
    with pytest.raises(ValueError, match=r"column 'more': expected text, numbers or truth values, got \{"):
        write_preferences([pair(more={"a": 1})], tmp_path / "c")
    assert not list(tmp_path.glob("*/README.md"))
