"""Pairs to label: what can be used, in which order, and which clip is on the left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pair_tables import encoded, own_cache, pair_rows, tone  # noqa: F401

from rlhf_mel.annotate.tasks import Pairs, load_pairs, plan

KNOWN = [(f"id{row}", row) for row in range(23)]


def test_an_order_has_every_pair_once_and_depends_on_seed_and_name_alone() -> None:
    tasks = plan(KNOWN, "ann", seed=5, check_share=0.2)
    assert tasks == plan(KNOWN, "ann", seed=5, check_share=0.2)
    pairs = [task.id for task in tasks if not task.check]
    assert sorted(pairs) == sorted(key for key, _ in KNOWN)
    others = (plan(KNOWN, "ben", seed=5), plan(KNOWN, "ann", seed=6))
    assert all([task.id for task in other if not task.check] != pairs for other in others)


def test_sides_are_balanced_wherever_an_annotator_stops() -> None:
    for name in ("ann", "ben", "cem", "dan"):
        sides = [task.left_clip for task in plan(KNOWN, name, check_share=0)]
        for count in range(1, len(sides) + 1):
            left = Counter(sides[:count])
            assert abs(left["a"] - left["b"]) <= 2  # two of every four
            if count % 4 == 0:
                assert left["a"] == left["b"]
    first = {tuple(task.left_clip for task in plan(KNOWN, f"annotator {n}", check_share=0)[:4]) for n in range(60)}
    assert len(first) == 6  # all ways to order two a and two b: 4! / (2! 2!)


def test_attention_checks_are_the_same_for_all_and_never_first() -> None:
    plans = [plan(KNOWN, name, seed=1, check_share=0.2) for name in ("ann", "ben", "cem")]
    checks = [{(task.id, task.check) for task in tasks if task.check} for tasks in plans]
    assert len(checks[0]) == 5 and checks[0] == checks[1] == checks[2]  # 0.2 * 23 = 4.6
    assert all(not tasks[0].check for tasks in plans)
    assert all(task.id == f"check-id{task.row}-{task.check}" for task in plans[0] if task.check)
    assert not any(task.check for task in plan(KNOWN, "ann", check_share=0))


def test_a_pair_is_known_by_what_it_is_not_by_where_it_lies() -> None:
    rows = pair_rows(3)
    ids = Pairs(rows).ids
    assert list(ids.values()) == [0, 1, 2] and len(ids) == 3
    moved = Pairs([rows[2], {**rows[0], "id": "another", "voice": "w"}]).ids
    assert [list(ids)[2], next(iter(ids))] == list(moved)
    other_text = Pairs([{**rows[0], "prompt": "other"}]).ids
    swapped = Pairs([{**rows[0], "audio_a": rows[0]["audio_b"], "audio_b": rows[0]["audio_a"]}]).ids
    assert len({*ids, *other_text, *swapped}) == 5


def test_rows_that_cannot_be_labelled_are_counted_by_reason() -> None:
    good, *rows = pair_rows(7)
    rows[0]["audio_b"] = {"bytes": b"RIFF, but no more", "path": None}
    rows[1]["prompt"] = "  "
    rows[2]["audio_b"] = rows[2]["audio_a"]
    rows[3] = {**good, "id": "again"}
    rows[4]["audio_b"] = encoded(tone(300, rate_hz=16_000), 16_000)
    rows[5]["reference_audio"] = {"bytes": None, "path": "nowhere.wav"}
    pairs = Pairs([good, *rows], name="mine")
    assert list(pairs.ids.values()) == [0, 5] and pairs.mixed_rates == [5]
    assert pairs.dropped == {
        "with audio that does not decode": [1, 6],
        "without a text in 'prompt'": [2],
        "with the same clip twice": [3],
        "equal to an earlier row": [4],
    }
    notes = "\n".join(pairs.notes())
    assert "2 of 7 rows left out, with audio that does not decode (rows 1, 6)" in notes
    assert "row 1, audio_b: audio in memory: expected audio that libsndfile reads" in notes
    assert "1 of 7 rows hold clips of different sample rates, played at the highest (rows 5)" in notes


def test_nothing_to_label_is_an_error_that_says_why() -> None:
    rows = pair_rows(2)
    for row in rows:
        row["prompt"] = None
    with pytest.raises(ValueError, match=r"mine: .* none among 2 rows: 2 of 2 rows left out, without a text"):
        Pairs(rows, name="mine")
    with pytest.raises(ValueError, match=r"mine: expected the columns 'prompt' and .*'audio_a'.* got \['text', 'x'\]"):
        Pairs([{"text": "a", "x": 1}], name="mine")
    with pytest.raises(ValueError, match="has no rows"):
        load_pairs([])


def test_any_source_of_preferences_can_be_labelled(tmp_path: Path) -> None:
    from datasets import Audio, Dataset

    rows = pair_rows(3)
    expected = list(Pairs(rows).ids)
    names = {"audio_a": "chosen", "audio_b": "rejected"}
    ranked = [{names.get(name, name): value for name, value in row.items()} for row in rows]
    assert list(load_pairs(rows).ids) == list(load_pairs(ranked).ids) == expected
    table = Dataset.from_list(rows)
    for name in ("audio_a", "audio_b", "reference_audio"):
        table = table.cast_column(name, Audio())
    table.to_parquet(tmp_path / "pairs.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (table, tmp_path / "pairs.parquet", tmp_path / "saved"):
        assert list(load_pairs(source).ids) == expected
    renamed = table.rename_columns({"prompt": "text", "audio_a": "first", "audio_b": "second"})
    columns = {"prompt": "text", "audio_a": "first", "audio_b": "second"}
    assert list(load_pairs(renamed, columns=columns).ids) == expected
    with pytest.raises(ValueError, match=r"expected columns \['third'\], got"):
        load_pairs(renamed, columns={**columns, "audio_b": "third"})


def test_decoded_arrays_are_taken_and_never_printed() -> None:
    def decoded(row: dict[str, Any]) -> dict[str, Any]:
        return row | {
            "audio_a": {"array": tone(200).numpy(), "sampling_rate": 24_000},
            "audio_b": {"array": tone(300).numpy(), "sampling_rate": None},
        }

    rows = [decoded(row) for row in pair_rows(12)]
    with pytest.raises(ValueError, match="12 of 12 rows left out, with audio that does not decode") as caught:
        load_pairs(rows)
    assert len(str(caught.value)) < 1000
    rows[3]["audio_b"]["sampling_rate"] = 24_000
    assert list(load_pairs(rows).ids.values()) == [3]
