"""Answers: on disk before `add` returns, each once, taken back but never deleted."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from rlhf_mel.annotate.store import Answer, Answers

WRITER = """
import sys
from rlhf_mel.annotate.store import Answer, Answers

answers = Answers(sys.argv[1])
for number in range(1_000_000):
    answers.add(Answer(annotator=sys.argv[2], task=str(number), axis="overall", answer="a", left_clip="b"))
    print(number, flush=True)
"""


def given(annotator: str = "ann", task: str = "t", axis: str = "overall", answer: str = "a") -> Answer:
    return Answer(annotator=annotator, task=task, axis=axis, answer=answer, left_clip="a", answered_at=1.0)


def test_a_killed_writer_loses_no_answer_that_it_was_told_is_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE, text=True)
        for name in ("ann", "ben")
    ]
    said = []
    for writer in writers:
        assert writer.stdout is not None
        said.append([int(writer.stdout.readline()) for _ in range(20)])
    for writer, numbers in zip(writers, said, strict=True):
        writer.kill()  # SIGKILL: nothing is flushed, nothing is cleaned up
        rest, _ = writer.communicate()
        numbers += [int(line) for line in rest.splitlines() if line]
    for name, numbers in zip(("ann", "ben"), said, strict=True):
        kept = [int(answer.task) for answer in Answers(path).all(name)]
        assert kept[: len(numbers)] == numbers and len(kept) <= len(numbers) + 1
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_every_write_is_synced_with_its_folder(tmp_path: Path) -> None:
    with Answers(tmp_path / "a.sqlite")._connected() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 3  # EXTRA, by SQLite's documentation
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete"


def test_a_question_is_answered_once_by_each(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "a.sqlite")
    assert answers.add(given(answer="a"))
    assert not answers.add(given(answer="b"))  # a second press of a key
    assert (
        answers.add(given("ben", answer="b")) and answers.add(given(axis="similarity")) and answers.add(given(task="u"))
    )
    assert [(a.annotator, a.task, a.axis, a.answer) for a in answers.all()] == [
        ("ann", "t", "overall", "a"),
        ("ben", "t", "overall", "b"),
        ("ann", "t", "similarity", "a"),
        ("ann", "u", "overall", "a"),
    ]
    assert [a.task for a in answers.all("ben")] == ["t"]


def test_answers_that_arrive_at_once_are_all_kept_and_each_once(tmp_path: Path) -> None:
    answers, together = Answers(tmp_path / "a.sqlite"), Barrier(8)

    def add(number: int) -> bool:
        together.wait()
        return answers.add(given(f"annotator {number % 4}"))  # four annotators, each twice, one item

    with ThreadPoolExecutor(8) as threads:
        new = list(threads.map(add, range(8)))
    assert sum(new) == 4
    assert sorted(a.annotator for a in answers.all()) == [f"annotator {n}" for n in range(4)]


def test_undo_takes_back_from_the_last_on_and_deletes_nothing(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "a.sqlite")
    for task in ("t", "u"):
        answers.add(given(task=task))
    answers.add(given("ben", task="v"))
    first, second = answers.undo("ann"), answers.undo("ann")
    assert first is not None and second is not None and (first.task, second.task) == ("u", "t")
    assert answers.undo("ann") is None and [a.annotator for a in answers.all()] == ["ben"]
    assert answers.undone() == 2
    assert answers.add(given(task="t", answer="tie")) and answers.all("ann")[0].answer == "tie"


def test_settings_are_those_of_the_first_start(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "a.sqlite").settle({"axes": ["x", "y"], "seed": 3})
    assert answers.settle({"axes": ["x", "y"]}).settings() == {"axes": ["x", "y"], "seed": 3}
    with pytest.raises(ValueError, match=r"a\.sqlite: expected seed 3, which its answers were given under, got 4"):
        answers.settle({"seed": 4})


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not a database, and long enough to be looked at as one: " + 100 * "x")
    before = other.read_bytes()
    with pytest.raises(ValueError, match=r"notes\.txt: expected answers that `rlhf-mel annotate` wrote"):
        Answers(other)
    assert other.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="expected a folder to write answers in"):
        Answers(tmp_path / "none/answers.sqlite")


def test_an_answer_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        Answers(tmp_path / "a.sqlite").add(given(answer="left"))
