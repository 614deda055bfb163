"""`rlhf-mel annotate` where no page is needed: report, export, settings of the first start, wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pair_tables import answer_all, labelling_of, own_cache, pair_rows  # noqa: F401

from rlhf_mel import cli
from rlhf_mel.annotate.labelling import Labelling
from rlhf_mel.annotate.store import Answers
from rlhf_mel.annotate.tasks import Pairs
from rlhf_mel.data.preferences.load import load_preferences


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A parquet file of four rows, one of which does not decode."""
    from datasets import Dataset

    rows = pair_rows(4)
    rows[2]["audio_a"] = {"bytes": b"no sound", "path": None}
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def annotate(pairs: Path, *options: str) -> int:
    return cli.main(["annotate", str(pairs), "--answers", str(pairs.parent / "answers.sqlite"), *options])


def test_report_and_export(tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelling = Labelling(Pairs([row for row in pair_rows(4) if row["row"] != 2]), Answers(tmp_path / "answers.sqlite"))
    answer_all(labelling, "ann", "a"), answer_all(labelling, "ben", "b")
    assert annotate(pairs, "--report") == 0
    said = capsys.readouterr()
    assert "1 of 4 rows left out, with audio that does not decode (rows 2)" in said.err
    assert "3 pairs, axes overall, 0 answers taken back" in said.out and "ann: 3 of 3 answers" in said.out
    # three units, a against b in each: n_a = n_b = 3 of n = 6, alpha = 1 - 5 * 3 / (3 * 3)
    assert f"Krippendorff's alpha {1 - 5 * 3 / 9:.3f}, 3 pairs answered by two or more" in said.out
    assert annotate(pairs, "--export", str(tmp_path / "out")) == 0
    assert f"{tmp_path / 'out'}: 6 answers" in capsys.readouterr().out
    assert len(load_preferences(tmp_path / "out", annotators="keep")) == 6


def test_an_upload_happens_only_where_it_was_named(
    tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            asked.append({"repo_id": repo_id, **options})

        def upload_folder(self, **options: Any) -> str:
            asked.append(options)
            return "https://hub/me/mine"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    answer_all(labelling_of(tmp_path, 2), "ann")
    assert annotate(pairs, "--export", str(tmp_path / "one")) == 0 and not asked
    assert annotate(pairs, "--export", str(tmp_path / "two"), "--push_to_hub", "me/mine") == 0
    assert [(call["repo_id"], call["repo_type"]) for call in asked] == [("me/mine", "dataset")] * 2
    assert asked[0]["private"] and asked[1]["folder_path"] == tmp_path / "two"
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/mine"


def test_settings_are_those_of_the_first_start(tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert annotate(pairs, "--axes", "naturalness, similarity", "--checks", "0.5", "--seed", "7", "--report") == 0
    settings = {"axes": ["naturalness", "similarity"], "check_share": 0.5, "seed": 7}
    assert Answers(tmp_path / "answers.sqlite").settings() == settings
    assert annotate(pairs, "--report") == 0  # need not be said again
    assert "axes naturalness, similarity" in capsys.readouterr().out
    assert annotate(pairs, "--axes", "overall", "--report") == 2
    assert "expected axes ['naturalness', 'similarity']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push_to_hub", "me/mine"], "--push_to_hub, --drop_failed: expected --export FOLDER with it, got none"),
        (["--columns", "prompt"], "--columns: expected ours=theirs,ours=theirs, got 'prompt'"),
        (["--columns", "prompt=text", "--report"], "expected columns ['text'], got"),
        (["--export", "out"], "expected answers to export, got none"),
    ],
)
def test_what_cannot_be_is_named(
    pairs: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert annotate(pairs, *options) == 2
    assert message in capsys.readouterr().err


def test_no_pair_at_all_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from datasets import Dataset

    for row in (rows := pair_rows(2)):
        row["prompt"] = ""
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    assert annotate(tmp_path / "pairs.parquet") == 2
    said = capsys.readouterr().err
    assert "got none among 2 rows: 2 of 2 rows left out, without a text in 'prompt' (rows 0, 1)" in said
    assert cli.main(["annotate", str(tmp_path / "nothing"), "--answers", str(tmp_path / "a.sqlite")]) == 2
    assert "nothing" in capsys.readouterr().err
