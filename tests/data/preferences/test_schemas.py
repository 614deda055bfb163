"""Every schema of human preferences in use, by small copies with its features: who won, by how much, what goes."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import preference_sets as sets
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, load_dataset

from rlhf_mel.data.preferences.load import PreferenceDataset, load_preferences
from rlhf_mel.data.preferences.schemas import parse_columns
from rlhf_mel.data.preferences.verdicts import read_label, winner_verdicts

WAYS = ("memory", "save_to_disk", "parquet", "stream")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(table: Dataset, way: str, folder: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """All pairs of a table that went one of the WAYS, and what was dropped."""
    source: Any = table
    if way == "save_to_disk":
        source = folder / "saved"
        table.save_to_disk(source)
    elif way in ("parquet", "stream"):
        source = folder / "set"
        source.mkdir()
        table.to_parquet(source / "train.parquet")
    loaded = load_preferences(source, streaming=way == "stream", **options)
    found = list(loaded)
    return found, dict(loaded.counts)


def won(row: dict[str, Any]) -> tuple[bytes, bytes]:
    return row["chosen"]["bytes"], row["rejected"]["bytes"]


@pytest.mark.parametrize("way", WAYS)
def test_trl(way: str, tmp_path: Path) -> None:
    found, dropped = rows(sets.audio_alpaca(), way, tmp_path, keep=["strategy"])
    assert [row["prompt"] for row in found] == ["One.", "Two."] and not dropped
    assert [won(row) for row in found] == [(sets.tone(0), sets.tone(1)), (sets.tone(2), sets.tone(3))]
    assert [(row["soft_label"], row["weight"], row["strategy"]) for row in found] == [(1.0, 1.0, "1"), (1.0, 1.0, "2")]


@pytest.mark.parametrize("way", WAYS)
def test_speechjudge(way: str, tmp_path: Path) -> None:
    """Row 0: A+2, A+1: 2 of 2 votes, (2 + 1) / 2. Row 1: B+2, A+1, B+1: 2 of 3, (2 - 1 + 1) / 3.

    Row 4: B+1 and a tie, which is half a vote for each and no strength: 1.5 of 2, (1 + 0) / 2.
    """
    found, dropped = rows(sets.speechjudge(), way, tmp_path)
    assert [won(row) for row in found] == [
        (sets.tone(0), sets.tone(1)),
        (sets.tone(3), sets.tone(2)),
        (sets.tone(9), sets.tone(8)),
    ]
    assert [row["soft_label"] for row in found] == pytest.approx([1.0, 2 / 3, 0.75])
    assert [row["margin"] for row in found] == pytest.approx([1.5, 2 / 3, 0.5])
    assert [row["weight"] for row in found] == [2, 3, 2]
    assert dropped == {"tie": 1, "undecodable": 1}
    first = found[0]
    assert first["prompt"] == "Sentence 0." and first["reference_text"] == "What is said there."
    assert first["reference_audio"]["bytes"] == sets.tone(90, seconds=1.0)
    assert (first["id"], first["annotator"]) == ("0", "r0, r1")


def test_the_label_of_speechjudge_may_not_contradict_its_votes() -> None:
    contradicted = [sets.speechjudge_row(0, "A", ["B+1", "B+2"]), sets.speechjudge_row(1, "B", ["B+1"])]
    table = sets.table(contradicted, sets.SPEECHJUDGE)
    assert load_preferences(table).counts["without an answer"] == 1


@pytest.mark.parametrize("way", WAYS)
def test_datapointai(way: str, tmp_path: Path) -> None:
    found, dropped = rows(sets.datapointai(), way, tmp_path)
    assert [won(row) for row in found] == [(sets.tone(0), sets.tone(1)), (sets.tone(3), sets.tone(2))]
    assert [(row["soft_label"], row["weight"]) for row in found] == [(0.8, 15), (0.75, 12)]
    assert not dropped and "axis" not in found[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Clips 0.wav to 3.wav over HTTP."""
    folder = tmp_path / "served"
    folder.mkdir()
    sets.write_clips(folder, 4)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


@pytest.mark.parametrize("way", WAYS)
def test_rapidata(way: str, tmp_path: Path, server: str) -> None:
    """Row 0 Friendly 0.3243: the second clip with 0.6757; Natural 0.9: the first. Row 1: Friendly alone was asked."""
    table = sets.rapidata(server)
    with pytest.raises(ValueError, match=r"expected a text for each pair, .* pass require_text=False"):
        load_preferences(table, fetch_urls=True)
    with pytest.raises(ValueError, match=r"in column 'audio1', got URLs: 'http.*; pass fetch_urls=True"):
        load_preferences(table, require_text=False)
    found, dropped = rows(table, way, tmp_path, require_text=False, fetch_urls=True)
    assert [(row["axis"], row["soft_label"]) for row in found] == [
        ("Friendly", pytest.approx(0.6757)),
        ("Natural", pytest.approx(0.9)),
        ("Friendly", 1.0),
    ]
    clips = [(Path(row["chosen"]["path"]).read_bytes(), Path(row["rejected"]["path"]).read_bytes()) for row in found]
    tones = [sets.tone(number) for number in range(4)]
    assert clips == [(tones[1], tones[0]), (tones[0], tones[1]), (tones[2], tones[3])]
    assert dropped == {"without an answer": 1} and {row["weight"] for row in found} == {4}


def test_one_axis_of_several(server: str) -> None:
    table, options = sets.rapidata(server), {"require_text": False, "fetch_urls": True}
    natural = load_preferences(table, axis="Natural", **options)
    assert [row["axis"] for row in natural] == ["Natural"]
    assert natural.counts == {"of another axis": 2, "without an answer": 1}
    with pytest.raises(ValueError, match=r"expected pairs, got 0 of 2 rows.*axes seen: \['Friendly', 'Natural'\]"):
        load_preferences(table, axis="Noise", **options)


def test_a_url_that_is_gone_is_counted(server: str) -> None:
    (row,) = sets.rapidata(server).select([0])
    table = [row, {**row, "audio1": f"{server}/gone.wav"}]
    loaded = load_preferences(table, axis="Friendly", require_text=False, fetch_urls=True)
    assert len(loaded) == 1 and loaded.counts == {"of another axis": 2, "undecodable": 1}


@pytest.mark.parametrize("way", WAYS)
def test_speecharena(way: str, tmp_path: Path) -> None:
    found, dropped = rows(sets.speecharena(), way, tmp_path)
    assert [won(row) for row in found] == [(sets.tone(1), sets.tone(0)), (sets.tone(6), sets.tone(7))]
    assert [row["annotator"] for row in found] == ["u0", "u3"] and found[0]["prompt"] == "वाक्य 0."
    assert dropped == {"tie (both good)": 1, "tie (no preference)": 1, "without an answer": 1}
    kept, dropped = rows(sets.speecharena(), "memory", tmp_path, ties="keep")
    assert [row["soft_label"] for row in kept] == [1, 0.5, 0.5, 1] and dropped == {"without an answer": 1}


def test_an_axis_of_speecharena_is_whose_rating_is_higher() -> None:
    table = sets.speecharena()
    heard = load_preferences(table, axis="liveliness")
    # 5 against 1, in every row, whoever won over all
    assert [(row["soft_label"], row["margin"], row["axis"]) for row in heard] == [(1.0, 4.0, "liveliness")] * 5
    with pytest.raises(ValueError, match=r"0 of 5 rows; dropped: 5 tie"):
        load_preferences(table, axis="noise")  # 5 against 5
    with pytest.raises(ValueError, match=r"no ratings of 'warmth', got \['intelligibility'"):
        load_preferences(table, axis="warmth")


def test_names_of_models_are_not_split_at_their_own_commas() -> None:
    row = {"model_a": "Voice, fast", "model_b": "Other", "winner": "Voice, fast"}
    assert [verdict.share for verdict in winner_verdicts(row, None)] == [1.0]
    assert [verdict.share for verdict in winner_verdicts({**row, "winner": "Model B"}, None)] == [0.0]
    assert [verdict.share for verdict in winner_verdicts({**row, "model_b": "Voice, fast"}, None)] == [None]


@pytest.mark.parametrize("way", ["memory", "configurations"])
def test_votes_joined_to_clips(way: str, tmp_path: Path) -> None:
    """p0: alpha has 2 of 3 votes; p1: beta's one; p2 is not among the clips."""
    votes, clips = sets.votes_and_clips()
    if way == "memory":
        loaded = load_preferences(votes, audio_from=clips)
    else:
        for name, table in (("responses", votes), ("audio", clips)):
            (tmp_path / name).mkdir()
            table.to_parquet(tmp_path / name / "train.parquet")
        configs = [f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("audio", "responses")]
        (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\nconfigs:\n" + "\n".join(configs) + "\n---\n")
        loaded = load_preferences(str(tmp_path), config="responses", audio_from="audio")
        with pytest.raises(ValueError, match=r"It has the configurations \['audio', 'responses'\]: config="):
            load_preferences(str(tmp_path), config="audio")
    assert [won(row) for row in loaded] == [(sets.tone(0), sets.tone(1)), (sets.tone(3), sets.tone(2))]
    assert [(row["prompt"], row["soft_label"], row["weight"], row["annotator"]) for row in loaded] == [
        ("Hello there.", pytest.approx(2 / 3), 3, "w0, w1, w2"),
        ("Good night.", 1, 1, "w3"),
    ]
    assert loaded.counts == {"merged into an earlier row": 2, "of clips that are not in the table": 1}


def test_two_folders_of_one_name_are_two(tmp_path: Path) -> None:
    """`datasets` 5.2 alone gives the rows of the first for both, and for one that was written anew."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*.parquet'\n---\n"
    for place, text in (("first", "One."), ("second", "Two."), ("first", "Three.")):
        folder = tmp_path / place / "pairs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card)
        row = {"prompt": text, "chosen": sets.clip(0), "rejected": sets.clip(1)}
        features = {"prompt": sets.TEXT, "chosen": "audio", "rejected": "audio"}
        sets.table([row], features).to_parquet(folder / "train.parquet")
        assert [row["prompt"] for row in load_preferences(folder)] == [text]


def test_votes_joined_by_the_ids_of_clips() -> None:
    clips = [{"sample": f"c{number}", "sound": sets.clip(number), "text": "Hello."} for number in range(2)]
    votes = [{"left": "c0", "right": "c1", "better": "c1"}, {"left": "c1", "right": "c0", "better": "c1"}]
    columns = {"audio_a": "left", "audio_b": "right", "winner": "better", "clip": "sound", "clip_id": "sample"}
    loaded = load_preferences(votes, audio_from=clips, columns=columns)
    assert [(won(row), row["weight"]) for row in loaded] == [((sets.tone(1), sets.tone(0)), 2)]
    with pytest.raises(ValueError, match=r"expected one clip 'c1', got rows \[1, 2\]; add clip_id=COLUMN"):
        load_preferences(votes, audio_from=[*clips, clips[1]], columns=columns)
    with pytest.raises(ValueError, match="need the whole table, got streaming=True"):
        load_preferences(votes, audio_from=clips, columns=columns, streaming=True)


def margins(loaded: PreferenceDataset) -> list[tuple[int, int, float]]:
    """Numbers of the tones of chosen and rejected, and the margin."""
    known = {sets.tone(number): number for number in range(10)}
    return [(known[row["chosen"]["bytes"]], known[row["rejected"]["bytes"]], row["margin"]) for row in loaded]


@pytest.mark.parametrize("way", ["memory", "save_to_disk", "parquet"])
def test_scores_within_a_text(way: str, tmp_path: Path) -> None:
    """Means of LJ1: gt (5 + 4) / 2 = 4.5, wg 3.5, impl 3.4; so 1.0, 1.1 and 0.1. LJ2: 2 and 2 is a tie."""
    source: Any = sets.ljs_mos()
    if way != "memory":
        source = tmp_path / "set"
        sets.ljs_mos().save_to_disk(source) if way == "save_to_disk" else write_parquet(sets.ljs_mos(), source)
    options: dict[str, Any] = {"axis": "naturalness", "require_text": False}
    loaded = load_preferences(source, **options)
    assert margins(loaded) == [(0, 1, pytest.approx(1.0)), (0, 2, pytest.approx(1.1)), (1, 2, pytest.approx(0.1))]
    assert loaded.counts == {"tie (scores too near)": 1, "of another axis": 2}
    # 3.5 - 3.4 is 0.10000000000000009: still within a margin of 0.1
    assert margins(load_preferences(source, tie_margin=0.1, **options)) == margins(loaded)[:2]


def write_parquet(table: Dataset, folder: Path) -> None:
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")


def test_scores_within_a_listener() -> None:
    """w0 heard 5, 4 and 3.4 in LJ1 and 2 in LJ2; w1 heard 4, 3 and 2. Pairs of both listeners have soft labels."""
    options: dict[str, Any] = {"axis": "naturalness", "require_text": False}
    one_page = load_preferences(sets.ljs_mos(), within=["prompt", "listener"], **options)
    # gt over wg by 1 for w0 and by 1 for w1: one pair of two answers
    assert margins(one_page) == [(0, 1, pytest.approx(1.0)), (0, 2, pytest.approx(1.6)), (1, 2, pytest.approx(0.6))]
    assert [row["weight"] for row in one_page] == [2, 1, 1]
    assert [row.get("annotator") for row in one_page] == ["w0, w1", "w0", "w0"]
    listeners = load_preferences(sets.ljs_mos(), within="listener", annotators="keep", **options)
    assert len(listeners) == 4 * 3 // 2 + 3 * 2 // 2


def test_scores_within_a_year_and_of_a_column_of_choice() -> None:
    table = [
        {"wav": sets.clip(number), "mos": str(score), "year": year, "sentence": "Same."}
        for number, (score, year) in enumerate([(4.0, 2016), (2.0, 2016), (3.0, 2018), (1.0, 2018), (5.0, None)])
    ]
    loaded = load_preferences(table, within="year")
    assert margins(loaded) == [(0, 1, 2.0), (2, 3, 2.0)]
    assert loaded.counts == {"without a value of `within`": 1}
    with pytest.raises(ValueError, match=r"within: expected 'prompt', 'listener' or one of \['wav', 'mos', "):
        load_preferences(table, within="test")
    without_text = [{key: value for key, value in row.items() if key != "sentence"} for row in table]
    with pytest.raises(ValueError, match="scores are comparable only within a text, a test or a listener"):
        load_preferences(without_text, require_text=False)


def test_scores_joined_to_clips() -> None:
    scores = [{"filename": f"{number}.wav", "mos": 5 - number, "sentence": "Same."} for number in range(3)]
    clips = [{"file": f"{number}.wav", "audio": sets.clip(number)} for number in range(2)]
    loaded = load_preferences(scores, audio_from=clips)
    assert margins(loaded) == [(0, 1, 1.0)] and loaded.counts == {"of clips that are not in the table": 1}


def test_large_groups_are_thinned_evenly_and_by_seed() -> None:
    """20 clips have 190 pairs; in a circle each meets the next 3: 60 pairs, 6 for each clip."""
    table = [{"audio": sets.clip(number), "score": number, "text": "Same."} for number in range(20)]
    loaded = load_preferences(table, pairs_per_clip=3)
    clips = [sets.tone(number) for number in range(20)]
    met = [frozenset(clips.index(sound) for sound in won(row)) for row in loaded]
    assert len(set(met)) == len(met) == 60
    assert [sum(number in pair for pair in met) for number in range(20)] == [6] * 20
    assert loaded.counts == {"pairs left out by pairs_per_clip": 130}
    again = load_preferences(table, pairs_per_clip=3)
    assert [row["id"] for row in again] == [row["id"] for row in loaded]
    other = load_preferences(table, pairs_per_clip=3, seed=1)
    assert [row["id"] for row in other] != [row["id"] for row in loaded]


# Schemas that are not known.


def test_an_unknown_schema_is_refused_with_a_mapping_that_would_do() -> None:
    table = [{"ours": sets.clip(0), "theirs": sets.clip(1), "better": "A", "said": "Hello."}]
    with pytest.raises(ValueError) as caught:
        load_preferences(table)
    message = str(caught.value)
    assert "got ours (audio), theirs (audio), better (text), said (text)" in message
    assert "--columns chosen=ours,rejected=theirs,prompt=TEXT" in message
    assert "--columns audio_a=ours,audio_b=theirs,label=better,prompt=TEXT" in message
    columns = parse_columns("audio_a=ours, audio_b=theirs,label=better,prompt=said")
    (row,) = load_preferences(table, columns=columns)
    assert won(row) == (sets.tone(0), sets.tone(1)) and row["prompt"] == "Hello."
    (row,) = load_preferences(table, columns={"chosen": "theirs", "rejected": "ours", "prompt": "said"})
    assert won(row) == (sets.tone(1), sets.tone(0))


def test_a_column_of_another_kind_is_passed_over() -> None:
    table = [
        {"audio_a": 17, "audioA": sets.clip(0), "audio_b": sets.clip(1), "label": "B", "prompt": 3, "text": "Hello."}
    ]
    (row,) = load_preferences(table)
    assert won(row) == (sets.tone(1), sets.tone(0)) and row["prompt"] == "Hello."


def test_mappings_that_cannot_be_are_named() -> None:
    table = sets.audio_alpaca()
    with pytest.raises(ValueError, match=r"expected columns \['words'\], got prompt \(text\), chosen \(audio\)"):
        load_preferences(table, columns={"prompt": "words"})
    with pytest.raises(ValueError, match=r"expected roles of data/preferences/schemas\.py, got \['best'\]"):
        load_preferences(table, columns={"best": "chosen"})
    with pytest.raises(ValueError, match=r"adapter: expected one of .*got 'trk', did you mean trl\?"):
        load_preferences(table, adapter="trk")
    with pytest.raises(ValueError, match=r"expected the columns of adapter 'label'"):
        load_preferences(table, adapter="label")
    with pytest.raises(ValueError, match=r"expected ROLE=COLUMN,ROLE=COLUMN, got \['chosen'\]"):
        parse_columns("chosen,rejected=b")
    with pytest.raises(TypeError, match=r"got \['tie'\], did you mean ties\?"):
        load_preferences(table, tie="keep")


def test_names_of_models_are_not_taken_for_clips() -> None:
    """Pendrokar/TTS_Arena has no audio."""
    table = [{"spokentext": "Hello.", "lang": "en", "chosen": "coqui/xtts", "rejected": "parler-tts/parler_tts"}]
    with pytest.raises(ValueError, match=r"names no file in .*: 'coqui/xtts'; names of models are no audio"):
        load_preferences(table)


def test_a_class_label_is_read_by_its_names(tmp_path: Path) -> None:
    features = {"audio_a": "audio", "audio_b": "audio", "text": sets.TEXT, "preference": sets.WHOLE}
    table = [
        {"audio_a": sets.clip(2 * row), "audio_b": sets.clip(2 * row + 1), "text": "Hello.", "preference": row}
        for row in range(3)
    ]
    made = sets.table(table, features)
    with pytest.raises(ValueError, match=r"3 without an answer .*expected A, B or a tie, got 0"):
        load_preferences(made)  # 0 and 1 may mean either
    named = made.cast_column("preference", ClassLabel(names=["B", "A", "tie"]))
    found, dropped = rows(named, "stream", tmp_path)
    assert [won(row) for row in found] == [(sets.tone(1), sets.tone(0)), (sets.tone(2), sets.tone(3))]
    assert dropped == {"tie": 1}


@pytest.mark.parametrize(
    ("label", "share", "margin"),
    [
        ("A", 1.0, None),
        ("audio_b", 0.0, None),
        ("audio 2", 0.0, None),
        ("Left", 1.0, None),
        ("A+2", 1.0, 2.0),
        ("B+1", 0.0, -1.0),
        ("Tie (both very good)", 0.5, 0.0),
        ("Both bad", 0.5, 0.0),
        ("1", None, None),
        (1, None, None),
        (True, None, None),
        (None, None, None),
        ("Sonic 3", None, None),
    ],
)
def test_labels(label: Any, share: float | None, margin: float | None) -> None:
    verdict = read_label(label)
    assert (verdict.share, verdict.margin) == (share, margin)


# Only the columns in use are read.


@pytest.mark.parametrize("streaming", [True, False])
def test_other_columns_of_parquet_are_not_read(streaming: bool, tmp_path: Path) -> None:
    """The column that nothing needs is destroyed in the file: whoever reads it fails."""
    file = tmp_path / "set" / "train.parquet"
    file.parent.mkdir()
    table = sets.speecharena()
    unused = "an unused column of text"
    marked = table.add_column("unused", [unused] * len(table))
    whole = marked.data.table.cast(marked.features.arrow_schema)
    pyarrow.parquet.write_table(whole, file, compression="none", use_dictionary=False)
    length = len(unused).to_bytes(4, "little")  # of the text that follows
    broken = file.read_bytes().replace(length + unused.encode(), b"\xff\xff\xff\xff" + unused.encode())
    assert broken != file.read_bytes()
    file.write_bytes(broken)
    with pytest.raises(Exception, match=r"(?i)parquet|unexpected|error|invalid"):
        list(load_dataset(str(file.parent), split="train", streaming=True))
    loaded = load_preferences(str(file.parent), streaming=streaming)
    assert len(list(loaded)) == 2
