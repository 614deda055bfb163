"""Pairs of one's own: seeds that make the same clips again, margins that are differences of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from problems import tiny_policy
from small_runs import SPEC, Voice, write_dataset
from torch import Tensor
from torch.testing import assert_close

from rlhf_mel import cli
from rlhf_mel.annotate.tasks import load_pairs
from rlhf_mel.data.preferences.load import load_preferences
from rlhf_mel.data.prompts import PromptDataset
from rlhf_mel.f5.checkpoints import load_policy
from rlhf_mel.flow.noise import item_generator
from rlhf_mel.flow.policy import rollout
from rlhf_mel.pipeline import Sampling, vocode
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.samplers.judges import JudgeReward, ranking, ranking_measures
from rlhf_mel.samplers.pairs import (
    HARD_TEXTS,
    PairMaker,
    PairOptions,
    chosen_places,
    push_dataset,
    read_texts,
    with_texts,
    write_pairs,
)
from rlhf_mel.speech.measures import dnsmos, recognized
from rlhf_mel.speech.recognizer import load_recognizer
from rlhf_mel.storage import ASSETS
from rlhf_mel.vocoders import load_vocoder

SAMPLING = Sampling(steps=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def loudest(completions: list[Any], **columns: Any) -> list[float]:
    return [float(abs(waveform).max()) for waveform in completions]


def maker(rewards: Rewards | None, **options: Any) -> PairMaker:
    return PairMaker(tiny_policy(), Voice(), rewards, PairOptions(**options), SAMPLING)


def heard(clip: dict[str, Any]) -> Tensor:
    samples, rate_hz = soundfile.read(BytesIO(clip["bytes"]), dtype="float32")
    assert rate_hz == SPEC.sample_rate_hz
    return torch.from_numpy(samples)


def spoken(prompts: PromptDataset, row: int, seed: int) -> Tensor:
    """What the policy says of a prompt alone, with the noise of `rlhf-mel sample`."""
    options: dict[str, Any] = dict(steps=3, grad_steps=0, generator=[item_generator(seed, row)])
    with torch.no_grad():
        said = vocode(Voice(), rollout(tiny_policy(), prompts.collate([prompts[row]]), **options))
    return said.waveform[0, : said.lengths_samples[0]]


def test_who_meets_whom() -> None:
    assert chosen_places(4, "extremes") == [(0, 3)]
    assert chosen_places(4, "adjacent") == [(0, 1), (1, 2), (2, 3)]
    assert chosen_places(4, "all") == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert chosen_places(1, "all") == chosen_places(0, "extremes") == []


def test_seeds_and_row_make_the_same_clips_again_and_margins_are_differences(tmp_path: Path) -> None:
    prompts = write_dataset(tmp_path / "prompts")
    rows = list(maker(Rewards([loudest]), n=3, seed=7).rows(prompts))
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        said = {seed: spoken(prompts, row["row"], seed) for seed in (7, 8, 9)}
        scores = {seed: float(waveform.abs().max()) for seed, waveform in said.items()}
        assert row["chosen_seed"] == max(scores, key=lambda seed: scores[seed])
        assert row["rejected_seed"] == min(scores, key=lambda seed: scores[seed])
        assert row["margin"] == pytest.approx(max(scores.values()) - min(scores.values()), rel=1e-3)
        for clip in ("chosen", "rejected"):  # 16-bit samples
            assert_close(heard(row[clip]), said[row[f"{clip}_seed"]], atol=1e-4, rtol=0)
        assert row["prompt"] == prompts.rows[row["row"]]["text"] and row["voice"] == "v"
        assert row["id"] == f"p{row['row']}-{row['chosen_seed']}-{row['rejected_seed']}"
        assert row["reference_audio"]["bytes"] == (tmp_path / "prompts/voice.wav").read_bytes()


def test_the_batch_changes_nothing(tmp_path: Path) -> None:
    prompts = write_dataset(tmp_path)
    one, two = (list(maker(Rewards([loudest]), n=3, batch_size=size).rows(prompts)) for size in (1, 4))
    for first, second in zip(one, two, strict=True):
        assert [first[name] for name in ("row", "chosen_seed", "rejected_seed")] == [
            second[name] for name in ("row", "chosen_seed", "rejected_seed")
        ]
        assert_close(heard(first["chosen"]), heard(second["chosen"]), atol=1e-4, rtol=0)


def test_what_is_not_ranked_is_counted(tmp_path: Path) -> None:
    asked = iter(range(100))

    def scores(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        # four samples of each of five prompts: ranked; equal; one finite; one missing; all missing
        table = [1.0, 2.0, 3.0, 4.0, *[5.0] * 4, math.nan, 1.0, math.inf, None, 1.0, None, 3.0, 2.0, *[None] * 4]
        return [table[next(asked)] for _ in completions]

    making = maker(Rewards([scores]), n=4)
    rows = list(making.rows(write_dataset(tmp_path)))
    assert [(row["row"], row["chosen_seed"], row["rejected_seed"], row["margin"]) for row in rows] == [
        (0, 3, 0, 3.0),
        (3, 2, 0, 2.0),
    ]
    assert making.counts == {
        "pairs": 2,
        "pairs with a margin of at most 0": 1,
        "samples without a finite score": 3 + 1 + 4,
        "prompts with fewer than two scored samples": 2,
    }


def test_pairs_are_written_and_read_as_preferences(tmp_path: Path) -> None:
    prompts = write_dataset(tmp_path / "prompts")
    making = maker(Rewards([loudest]), n=3, choose="all", min_margin=0.001)
    rows = list(making.rows(prompts))
    folder = write_pairs(iter(rows), tmp_path / "out", ranked=True, about="pairs of a test")
    assert "pairs of a test" in (folder / "README.md").read_text()
    read = load_preferences(folder, mel_spec=SPEC)
    assert len(read) == making.counts["pairs"] == len(rows)
    batch = read.collate([read[n] for n in range(len(read))])
    assert batch.margins.tolist() == pytest.approx([row["margin"] for row in rows])
    assert batch.chosen_seeds is not None and batch.chosen_seeds.tolist() == [row["chosen_seed"] for row in rows]
    assert batch.rows is not None and batch.rows.tolist() == [row["row"] for row in rows]
    assert_close(batch.chosen.waveform[0, : batch.chosen.lengths_samples[0]], heard(rows[0]["chosen"]))
    with pytest.raises(FileExistsError, match="expected no data set there, got train-00000"):
        write_pairs(iter(rows), tmp_path / "out", ranked=True, about="")


def test_unranked_pairs_go_to_people(tmp_path: Path) -> None:
    prompts = write_dataset(tmp_path / "prompts")
    rows = list(maker(None, n=2).rows(prompts))
    folders = [tmp_path / "one/pairs", tmp_path / "two/pairs"]
    write_pairs(iter(rows[:3]), folders[0], ranked=False, about="")
    write_pairs(iter(rows[3:]), folders[1], ranked=False, about="")
    # Of one name: `datasets` must not give the pairs of one for those of the other.
    texts = [[row["prompt"] for row in load_pairs(folder).rows] for folder in folders]
    assert texts == [["abc", "a bad", "fed"], ["had a cab", "jog"]]
    (row, *_) = load_pairs(folders[0]).rows
    assert (row["seed_a"], row["seed_b"], row["row"], row["id"]) == (0, 1, 0, "p0-0-1")
    assert_close(heard(row["audio_b"]), spoken(prompts, 0, 1), atol=1e-4, rtol=0)
    assert row["reference_text"] == "abc" and row["reference_audio"]["bytes"]
    with pytest.raises(ValueError, match="expected pairs to write, got none"):
        write_pairs(iter(()), tmp_path / "none", ranked=False, about="")


def test_hard_texts_are_new_and_can_be_said() -> None:
    texts = read_texts(HARD_TEXTS)
    assert len(texts) == len(set(texts)) == 88
    trained_on = read_texts(Path(__file__).parents[2] / "recipes/hard_sentences.txt")
    assert not {text.lower() for text in texts} & {text.lower() for text in trained_on}
    tokenizer = load_policy("tiny").tokenizer
    assert all(tokenizer(text) for text in texts)


def test_texts_are_said_in_the_voices_in_turn(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "other.wav", 0.1 * torch.ones(3000).numpy(), 24_000)
    first = write_dataset(tmp_path).rows[0]
    second = {**first, "voice": "w", "reference_audio": "other.wav", "reference_text": "fed", "id": "q"}
    prompts = PromptDataset([first, second], root=tmp_path, mel_spec=SPEC)
    (tmp_path / "texts.txt").write_text("# comment\n\n a bad cab \nfig\njade\n")
    said = with_texts(prompts, read_texts(tmp_path / "texts.txt"))
    assert [said[n]["text"] for n in range(3)] == ["a bad cab", "fig", "jade"]
    assert [said[n]["voice"] for n in range(3)] == ["v", "w", "v"]
    assert said.collate([said[n] for n in range(3)]).reference_lengths_samples.tolist() == [2000, 3000, 2000]
    (tmp_path / "texts.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"texts\.txt: expected a text on each line, got none"):
        read_texts(tmp_path / "texts.txt")


def test_measures_rank_with_the_better_one_higher() -> None:
    prompts = cli.load_prompts("tiny", split="heldout").head(2)
    batch = prompts.collate([prompts[0], prompts[1]])
    said = vocode(load_vocoder("tiny"), rollout(load_policy("tiny"), batch, steps=2, grad_steps=0))
    spec = load_vocoder("tiny").mel_spec
    rewards = ranking(["dnsmos_ovrl", "cer", "voice_similarity"], [1.0, 2.0, 0.0], mel_spec=spec)
    scores = rewards(said, batch)
    recognizer = load_recognizer("tiny")
    expected = recognized(recognizer, said, batch, recognizer.transcribe(said.mel, said.lengths_frames))
    assert_close(scores.breakdown["dnsmos_ovrl"], dnsmos(said)["dnsmos_ovrl"])
    assert_close(scores.breakdown["cer"], -expected["cer"].float())
    assert_close(scores.breakdown["voice_similarity"], expected["voice_similarity"])
    assert_close(scores.total, dnsmos(said)["dnsmos_ovrl"] - 2 * expected["cer"].float())


def test_what_cannot_rank_is_refused() -> None:
    assert "level_dbfs" not in ranking_measures() and {"cer", "dnsmos_ovrl"} <= set(ranking_measures())
    spec = load_vocoder("tiny").mel_spec
    with pytest.raises(ValueError, match=r"unknown reward 'dnsmos'.*or one of the measures \['dnsmos_ovrl'"):
        ranking(["dnsmos"], mel_spec=spec)
    with pytest.raises(ValueError, match="expected a recognizer of the policy's mels"):
        ranking(["cer"], mel_spec=SPEC)
    with pytest.raises(ValueError, match="measure 'cer': expected a recognizer, got none"):
        JudgeReward("cer")
    for wrong in ({"n": 1}, {"choose": "some"}, {"min_margin": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            PairOptions(**wrong)


def pairs_command(folder: Path, *options: str) -> int:
    given = ["pairs", "--limit", "1", "--n", "2", "--steps", "2", "--device", "cpu", "--out", str(folder)]
    return cli.main([*given, *options])


class Hub:
    """What is asked of the hub, without it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.asked.append((repo_id, options))

    def upload_folder(self, **options: Any) -> str:
        self.asked.append((options["repo_id"], options))
        return "https://hub/me/mine"


def test_the_command_writes_and_uploads_only_where_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert pairs_command(tmp_path / "ranked", "--texts", "hard", "--rank_by", "dnsmos_ovrl") == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'ranked'}: 1 pairs of 1 prompts, 2 samples of each" in said and not hub.asked
    assert load_preferences(tmp_path / "ranked")[0]["prompt"] == read_texts(HARD_TEXTS)[0]
    card = (tmp_path / "ranked/README.md").read_text()
    assert "policy tiny" in card and "rank_by dnsmos_ovrl" in card and "seed 0" in card
    assert pairs_command(tmp_path / "ranked") == 2  # there is a data set already
    assert "choose another folder" in capsys.readouterr().err
    assert pairs_command(tmp_path / "own", "--push_to_hub", "me/mine") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/mine"
    (_, created), (_, uploaded) = hub.asked
    assert created == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert uploaded["folder_path"] == tmp_path / "own" and uploaded["repo_type"] == "dataset"
    assert push_dataset(tmp_path, "me/mine") and len(load_pairs(tmp_path / "own")) == 1


def test_a_wrong_option_stops_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs_command(tmp_path, "--n", "1", "--policy", "nowhere") == 2
    assert "n, batch_size: expected at least 2 and 1, got 1, 8" in capsys.readouterr().err
    assert (ASSETS / "hard_texts.txt").is_file()
