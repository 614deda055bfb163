"""What comes out: a data set that load_preferences reads, with all that is known of each pair."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pair_tables import answer_all, labelling_of, own_cache, pair_rows  # noqa: F401

from rlhf_mel.annotate.export import export
from rlhf_mel.annotate.labelling import Labelling
from rlhf_mel.data.preferences.load import load_preferences


def say(labelling: Labelling, annotator: str, answers: str) -> None:
    """An answer for each pair in the order of the table, attention checks answered rightly."""
    words = {"t": "tie", "x": "both_bad"}
    while (step := labelling.next_step(annotator)) is not None:
        wanted = "a" if step.task.check else answers[step.task.row]
        choice = words.get(wanted) or ("left" if step.task.left_clip == wanted else "right")
        labelling.answer(step, choice)


def written(folder: Path) -> list[dict[str, Any]]:
    from datasets import Audio, load_dataset

    table = load_dataset(str(folder), split="train")
    for name in ("chosen", "rejected", "reference_audio"):
        table = table.cast_column(name, Audio(decode=False))
    return list(table)


def test_a_row_an_answer_with_the_better_clip_as_chosen(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 4, check_share=0.5)
    say(labelling, "ann", "abtx")
    assert export(labelling, tmp_path / "out") == [f"{tmp_path / 'out'}: 4 answers"]
    rows = sorted(written(tmp_path / "out"), key=lambda row: row["row"])
    source = labelling.pairs.rows
    for row, (chosen, rejected) in zip(rows, ("ab", "ba", "ab", "ab"), strict=True):
        place = row["row"]
        assert row["chosen"]["bytes"] == source[place][f"audio_{chosen}"]["bytes"]
        assert row["rejected"]["bytes"] == source[place][f"audio_{rejected}"]["bytes"]
        assert (row["chosen_seed"], row["rejected_seed"]) == ((10, 11) if chosen == "a" else (11, 10))
        assert row["reference_audio"]["bytes"] == source[place]["reference_audio"]["bytes"]
    assert [row["soft_label"] for row in rows] == [1.0, 1.0, 0.5, 0.5]
    assert [row["answer"] for row in rows] == ["preferred", "preferred", "tie", "both_bad"]
    assert rows[0]["pair"] == next(iter(labelling.pairs.ids))
    shared = {name: rows[1][name] for name in ("prompt", "reference_text", "voice", "id", "axis", "annotator")}
    assert shared == {
        "prompt": "sentence 1",
        "reference_text": "what the reference says",
        "voice": "v",
        "id": "p1",
        "axis": "overall",
        "annotator": "ann",
    }


def test_load_preferences_merges_the_annotators(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 3)
    for name, said in (("ann", "aat"), ("ben", "abt"), ("cem", "bbt")):
        say(labelling, name, said)
    export(labelling, tmp_path / "out")
    preferences = load_preferences(tmp_path / "out")
    assert preferences.counts["tie"] == 1  # pair 2
    found = {row["row"]: row for row in preferences.rows}
    assert found.keys() == {0, 1}
    for row in found.values():  # two of three votes
        assert row["soft_label"] == pytest.approx(2 / 3) and row["weight"] == 3
    assert (found[0]["chosen_seed"], found[1]["chosen_seed"]) == (10, 11)  # a and b won
    batch = preferences.collate(list(preferences.rows))
    assert batch.prompts.texts == [f"sentence {row}" for row in found]
    # a has 0.6 s, b 0.9 s, at 24 kHz
    assert batch.chosen.lengths_samples.tolist() == [14_400 if row == 0 else 21_600 for row in found]
    assert len(load_preferences(tmp_path / "out", ties="keep").rows) == 3


def test_who_failed_the_checks_can_be_left_out(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 5, check_share=0.4)
    answer_all(labelling, "ann")
    while (step := labelling.next_step("eve")) is not None:
        labelling.answer(step, "tie")
    assert export(labelling, tmp_path / "all") == [f"{tmp_path / 'all'}: 10 answers"]
    lines = export(labelling, tmp_path / "some", drop_failed=0.5)
    assert lines == [
        f"{tmp_path / 'some'}: 5 answers",
        "  left out: 5 answers of eve, who failed more than 50% of the attention checks",
    ]
    assert {row["annotator"] for row in written(tmp_path / "some")} == {"ann"}


def test_answers_to_rows_that_are_gone_are_counted(tmp_path: Path) -> None:
    answer_all(labelling_of(tmp_path, 4, check_share=0), "ann")
    fewer = labelling_of(tmp_path, 3, check_share=0)
    assert export(fewer, tmp_path / "out")[1] == "  left out: 1 answers to pairs that are not in pairs"


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    Path("runs/unranked").mkdir(parents=True)
    Dataset.from_list(pair_rows(3)).to_parquet("runs/unranked/train.parquet")
    page = (Path(__file__).parents[2] / "docs/annotate.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    rows = written(Path("runs/preferences"))
    # b is the longer clip of each
    assert [(row["axis"], row["annotator"], row["chosen_seed"]) for row in rows] == [("naturalness", "a rule", 11)] * 3


def test_nothing_to_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected answers to export, got none of 0"):
        export(labelling_of(tmp_path), tmp_path / "out")
    labelling = labelling_of(tmp_path)
    answer_all(labelling, "ann")
    export(labelling, tmp_path / "out")
    with pytest.raises(FileExistsError, match="choose another folder"):
        export(labelling, tmp_path / "out")
