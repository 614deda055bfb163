"""Answers on disk: one SQLite file, where an answer is durable before `add` returns.

SQLite and not a text file with one answer a line: a unique index says that an annotator answers a question once,
however often a key is pressed; an undo and an answer that arrive together leave one of two states and nothing between;
and a process that dies while it writes leaves no half line that a reader would have to guess about. Each write is a
transaction of its own under `synchronous = EXTRA`, which syncs the file and, unlike FULL, also the folder that the
rollback journal is removed from, so that neither a killed process nor a power failure takes back what `add` has
returned for (https://www.sqlite.org/pragma.html#pragma_synchronous).

Nothing is deleted: an answer that was taken back stays, with the time of that.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

ANSWERS = ("a", "b", "tie", "both_bad")
"""Which clip of the pair is better, as the data set calls them (not as the page showed them)."""

_BUSY_S = 30.0
"""Seconds that a write waits for another process that is writing."""

_TABLES = f"""
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY,
    annotator TEXT NOT NULL,
    task TEXT NOT NULL,
    axis TEXT NOT NULL,
    answer TEXT NOT NULL CHECK (answer IN {ANSWERS}),
    left_clip TEXT NOT NULL CHECK (left_clip IN ('a', 'b')),
    heard_a_s REAL NOT NULL,
    heard_b_s REAL NOT NULL,
    answered_at REAL NOT NULL,
    undone_at REAL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_answer ON answers (annotator, task, axis) WHERE undone_at IS NULL;
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one annotator said of one pair on one axis."""

    annotator: str
    task: str
    """Id of the pair, or of an attention check (tasks.py)."""
    axis: str
    answer: str
    """Of ANSWERS."""
    left_clip: str
    """"a" or "b": the clip that the page showed on the left."""
    heard_a_s: float = 0.0
    heard_b_s: float = 0.0
    """Seconds of each clip that were played before the answer, by the page's account."""
    answered_at: float = 0.0
    """Unix time in seconds; 0: now."""


class Answers:
    """The answers of all annotators in one file, for any number of threads and processes at once.

    Raises:
        ValueError: the file is not one of this class.
        FileNotFoundError: its folder does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: expected a folder to write answers in, found none; make it first")
        try:
            with self._connected() as connection:
                connection.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path}: expected answers that `rlhf-mel annotate` wrote, or no file, got: {error}"
            ) from error

    def add(self, answer: Answer) -> bool:
        """Write an answer, durably; False, and nothing is written, where the annotator has answered that already."""
        values = {**vars(answer), "answered_at": answer.answered_at or time.time()}
        names = ", ".join(values)
        marks = ", ".join(f":{name}" for name in values)
        with self._connected() as connection:
            # Two rows of one annotator, task and axis are the only conflict that is meant; others still raise.
            cursor = connection.execute(
                f"INSERT INTO answers ({names}) VALUES ({marks}) "
                "ON CONFLICT (annotator, task, axis) WHERE undone_at IS NULL DO NOTHING",
                values,
            )
            return cursor.rowcount == 1

    def undo(self, annotator: str) -> Answer | None:
        """Take back the annotator's last answer and return it; None where there is none."""
        with self._connected() as connection:
            rows = connection.execute(
                "UPDATE answers SET undone_at = ? WHERE id = "
                "(SELECT max(id) FROM answers WHERE annotator = ? AND undone_at IS NULL) RETURNING *",
                (time.time(), annotator),
            ).fetchall()
        return _answer(rows[0]) if rows else None

    def all(self, annotator: str | None = None) -> list[Answer]:
        """Answers that stand, in the order in which they were given; of one annotator, or of all."""
        query = "SELECT * FROM answers WHERE undone_at IS NULL AND (? IS NULL OR annotator = ?) ORDER BY id"
        with self._connected() as connection:
            return [_answer(row) for row in connection.execute(query, (annotator, annotator))]

    def undone(self) -> int:
        """How many answers were taken back."""
        with self._connected() as connection:
            (count,) = connection.execute("SELECT count(*) FROM answers WHERE undone_at IS NOT NULL").fetchone()
        return int(count)

    def settle(self, settings: Mapping[str, Any]) -> Self:
        """Keep the settings that the answers are given under, or hold later ones to those kept.

        Raises:
            ValueError: the file has answers under other settings; names each that differs.
        """
        with self._connected() as connection:
            for name, value in settings.items():
                connection.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, json.dumps(value)))
            kept = {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM settings")}
        for name, value in settings.items():
            if kept[name] != value:
                raise ValueError(
                    f"{self.path}: expected {name} {kept[name]!r}, which its answers were given under, got {value!r}; "
                    "go on with that, or name another file of answers"
                )
        return self

    def settings(self) -> dict[str, Any]:
        """What `settle` kept."""
        with self._connected() as connection:
            return {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM settings")}

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each call, which any thread may make; statements commit one by one."""
        with closing(sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous = EXTRA")
            yield connection


def _answer(row: sqlite3.Row) -> Answer:
    return Answer(**{name: row[name] for name in Answer.__dataclass_fields__})
