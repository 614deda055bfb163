"""The recipes that construct pairs, learn a reward from them and report on it: rules by hand, small whole runs."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import constructed_pairs
import reward_model
import reward_report

from rlhf_mel.data.preferences.load import PreferenceDataset, load_preferences, write_preferences
from rlhf_mel.rewards.bradley_terry import LossConfig
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.audio import MelSpec, level_dbfs
from rlhf_mel.speech.preference_model import PreferenceModel, load_preference_model

SMALL = ["--dim", "16", "--num_layers", "1", "--num_members", "2", "--disable_tqdm", "true", "--report_to", "none"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """`datasets` tells a local folder with a card from another by its name alone: no cache of other runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("constructed")
    constructed_pairs.main(["--out", str(folder), "--pairs", "28", "--heldout_pairs", "8", "--seed", "3"])
    return folder


# Constructed pairs.


def test_the_hidden_rule_by_hand():
    # Equal ratios of 10 dB add up to twice the disturbance, 3.01 dB worse; nothing added is clean.
    quality = constructed_pairs.quality_db
    assert quality({"noise": {"snr_db": 10.0}, "room": {"direct_db": 10.0}}) == pytest.approx(10 - 10 * math.log10(2))
    assert quality({"room": {"direct_db": -3.0}}) == pytest.approx(-3.0)
    assert quality({}) == 40.0


def test_constructed_pairs_follow_the_rule_with_noise_and_no_level(data):
    # 28 answers, a tenth of them turned around: a binomial of mean 2.8 and deviation 1.6
    for split, wrong in (("train", range(0, 10)), ("heldout", range(1))):
        pairs = load_preferences(data / split, keep=["right"])
        assert sum(not row["right"] for row in pairs.rows) in wrong
    train, heldout = (load_preferences(data / split) for split in ("train", "heldout"))
    assert not set(reward_report.prompt_keys(train)) & set(reward_report.prompt_keys(heldout))
    batch = train.collate([train[row] for row in range(28)])
    levels = [level_dbfs(side.waveform, side.lengths_samples) for side in (batch.chosen, batch.rejected)]
    difference = levels[0] - levels[1]
    # levels of +-6 dB each: the mean difference of 28 pairs has a deviation of 6 sqrt(2 / 3) / sqrt(28) = 0.9 dB
    assert difference.abs().max() > 3 and abs(difference.mean()) < 4


# Training.


def test_prompts_are_held_out_whole():
    keys = [f"text {row % 7}" for row in range(50)]
    learnt, held_out = reward_model.split_by_prompt(keys, 0.3, seed=0)
    assert sorted(learnt + held_out) == list(range(50))
    assert not {keys[row] for row in learnt} & {keys[row] for row in held_out}
    assert len({keys[row] for row in held_out}) == 2  # round(0.3 * 7)
    assert reward_model.split_by_prompt(keys, 0.3, seed=0) == (learnt, held_out)
    assert reward_model.split_by_prompt(keys, 0.3, seed=1) != (learnt, held_out)
    with pytest.raises(ValueError, match="pairs of two prompts or more to hold one out, got 1"):
        reward_model.split_by_prompt(["one"] * 3, 0.3, seed=0)


def test_augmentation_is_a_gain_and_near_silence_around_the_clip():
    clip = torch.linspace(-0.1, 0.1, 2400)
    gains, lengths = [], []
    for seed in range(200):
        changed = reward_model.augmented(clip, 24_000, 12.0, 0.5, torch.Generator().manual_seed(seed))
        place = int(changed.argmin())
        gains.append(20 * math.log10(float(changed[place] / clip[0])))
        lengths.append((place, len(changed) - 2400 - place))
        outside = torch.cat([changed[:place], changed[place + 2400 :]])
        assert len(outside) < 100 or -101 < level_dbfs(outside[None]).item() < -59
    # uniform on [-12, 12] dB, mean 0 and deviation 24 / sqrt(12) = 6.9, and on [0, 12000] samples, mean 6000
    assert max(map(abs, gains)) <= 12.001 and abs(np.mean(gains)) < 4 * 6.9 / 200**0.5
    assert max(gains) > 11 and min(gains) < -11
    assert np.max(lengths) <= 12_000 and np.mean(lengths, 0) == pytest.approx([6000, 6000], abs=4 * 3464 / 200**0.5)
    torch.testing.assert_close(reward_model.augmented(clip, 24_000, 0.0, 0.0, torch.Generator()), clip)


def test_a_run_learns_and_its_folder_is_a_reward(data, tmp_path, capsys):
    out = tmp_path / "reward"
    options = ["--train_preferences", str(data / "train"), "--eval_preferences", str(data / "heldout"), *SMALL]
    options += ["--num_train_epochs", "2", "--eval_strategy", "epoch", "--center_rewards_coefficient", "0.01"]
    reward_model.main([*options, "--output_dir", str(out)])
    said = json.loads((out / "report.json").read_text())
    assert {"accuracy", "margin", "min_reward", "mean_reward", "max_reward", "loss", "uncertainty"} <= said.keys()
    assert said["learnt_from"] == {"pairs": 28, "dropped": {}} and said["held_out"]["pairs"] == 8
    assert said["audit"]["plus_6_db"] == {"wins": 0.0, "losses": 0.0, "ties": 1.0}
    assert (out / "calibration.png").stat().st_size > 5000 and "95 %" in capsys.readouterr().out
    # what was reported is what the reward says of the held-out pairs
    rewards, pairs = Rewards([str(out)]), load_preferences(data / "heldout")
    batch = pairs.collate([pairs[row] for row in range(8)])
    with torch.no_grad():
        chosen, rejected = (rewards(side, batch.prompts).total for side in (batch.chosen, batch.rejected))
    assert (chosen > rejected).float().mean().item() == pytest.approx(said["accuracy"])
    assert (chosen - rejected).mean().item() == pytest.approx(said["margin"], abs=1e-4)
    # each member's scores of the clips that it learnt from are centred
    train = load_preferences(data / "train")
    network = load_preference_model(out)
    batch = train.collate([train[row] for row in range(28)])
    with torch.no_grad():
        scores = torch.cat([network(batch.chosen), network(batch.rejected)])
    torch.testing.assert_close(scores.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    assert scores.std() > 0.01


def test_a_run_resumes_to_the_same_weights(data, tmp_path):
    options = [
        "--train_preferences",
        str(data / "train"),
        "--max_steps",
        "4",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
    ]
    options += ["--per_device_train_batch_size", "8", "--dropout", "0", *SMALL]
    for name, more in (("whole", []), ("again", ["--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-2")])):
        reward_model.main([*options, "--output_dir", str(tmp_path / name), *more])
    whole, again = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("whole", "again"))
    early = load_file(tmp_path / "whole/checkpoint-2/model.safetensors")
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5)
    assert any(not torch.allclose(early[name], value) for name, value in whole.items())
    assert isinstance(load_preference_model(tmp_path / "whole/checkpoint-2"), PreferenceModel)  # a reward, too


def test_the_best_checkpoint_is_what_is_kept(data, tmp_path):
    # Its weights are those of the end, but for the centre, which is measured last.
    options = ["--train_preferences", str(data / "train"), "--eval_preferences", str(data / "heldout"), *SMALL]
    options += ["--max_steps", "12", "--save_strategy", "steps", "--save_steps", "6", "--eval_strategy", "steps"]
    options += ["--eval_steps", "6", "--load_best_model_at_end", "true", "--metric_for_best_model", "eval_margin"]
    reward_model.main([*options, "--greater_is_better", "false", "--output_dir", str(tmp_path)])
    state = json.loads((tmp_path / "checkpoint-12/trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"]).name
    values = {line["step"]: line["eval_margin"] for line in state["log_history"] if "eval_margin" in line}
    assert values[int(best.split("-")[1])] == min(values.values()) and len(values) == 2
    kept, best_weights, other = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("", best, "checkpoint-6" if best == "checkpoint-12" else "checkpoint-12")
    )
    for name in kept.keys() - {"centre"}:
        torch.testing.assert_close(kept[name], best_weights[name], atol=0, rtol=0)
    assert any(not torch.equal(kept[name], other[name]) for name in kept.keys() - {"centre"})


def test_members_see_different_bootstraps_and_ties_have_a_threshold(data, tmp_path):
    pairs = load_preferences(data / "train")
    rows = [{**pairs[row], "soft_label": 0.5 if row % 2 else 1.0} for row in range(16)]
    write_preferences(rows, tmp_path / "ties")
    out = tmp_path / "reward"
    common = ["--train_preferences", str(tmp_path / "ties"), "--output_dir", str(out), "--max_steps", "3", *SMALL]
    reward_model.main([*common, "--tie_model", "davidson"])
    said = json.loads((out / "report.json").read_text())
    weights = load_file(out / "model.safetensors")
    assert said["learnt_from"]["pairs"] + said["held_out"]["pairs"] == 16  # ties are kept
    assert (weights["threshold"] != 0).all() and weights["threshold"][0] != weights["threshold"][1]
    reward_model.main(common)
    assert json.loads((out / "report.json").read_text())["learnt_from"]["dropped"]  # and dropped without a model
    assert (load_file(out / "model.safetensors")["threshold"] == 0).all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "train_preferences: expected a data set, got none"),
        (["--train_preferences", "x", "--max_length", "10"], r"\['max_length'\]: expected none, they have no effect"),
        (["--train_preferences", "x", "--label_smoothing", "0.6"], r"label_smoothing: expected a share in \[0, 0.5\)"),
        (["--train_preferences", "x", "--tie_model", "elo"], "tie_model: expected one of"),
        (["--train_preferences", "x", "--body", "whisper"], "encoder: expected a folder for --body whisper"),
        (["--train_preferences", "x", "--bf16", "true"], r"\['bf16'\]: expected False, scores are float32"),
        (["--train_preferences", "x", "--eval_share", "1"], "eval_share: expected a share between 0 and 1"),
        (["--train_preferences", "x", "--num_member", "2"], r"unknown options \['--num_member', '2'\]"),
        (["--train_preferences", "no/such/folder/x.parquet"], "no/such/folder"),
        (["--train_preferences", "x", "--preference_kwargs", '{"streaming": true}'], "can be shuffled, got streaming"),
    ],
)
def test_wrong_options_end_the_run_before_it_begins(argv, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        reward_model.main([*argv, "--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_run_on_a_whisper_encoder(data, tmp_path):
    from transformers import WhisperConfig, WhisperModel

    sizes = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1)
    sizes |= dict(decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=64, max_source_positions=100)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    whole = WhisperModel(WhisperConfig(**sizes, **ids))
    whole.save_pretrained(tmp_path / "whisper")
    out = tmp_path / "reward"
    options = ["--train_preferences", str(data / "train"), "--output_dir", str(out), "--max_steps", "2", *SMALL]
    options += ["--body", "whisper", "--encoder", str(tmp_path / "whisper"), "--window_s", "1"]
    reward_model.main(options)
    reward = Rewards([str(out)]).models[0]
    assert reward.domain == "waveform"
    torch.testing.assert_close(reward.network.encoder.encoder.conv1.weight, whole.encoder.conv1.weight)
    assert not any("encoder" in name for name in load_file(out / "model.safetensors"))


# The report.


def two_pairs() -> reward_report.Scored:
    return reward_report.Scored(
        chosen=torch.tensor([[1.0, 3.0], [0.0, 0.0]]),
        rejected=torch.tensor([[1.0, 1.0], [1.0, 1.0]]),
        soft_labels=torch.tensor([1.0, 0.75]),
        margins=torch.tensor([0.0, 1.0]),
        weights=torch.tensor([1.0, 3.0]),
    )


def test_figures_by_hand():
    found = reward_report.figures(two_pairs(), LossConfig(margin_scale=0.5))
    # means of the members: 2 against 1 and 0 against 1; differences less half the margin: 1 and -1.5
    one, other = math.log1p(math.exp(-1)), 0.75 * math.log1p(math.exp(1.5)) + 0.25 * math.log1p(math.exp(-1.5))
    assert found["loss"] == pytest.approx((one + 3 * other) / 4, rel=1e-6)
    assert (found["accuracy"], found["margin"]) == (0.5, 0.0)
    assert (found["min_reward"], found["mean_reward"], found["max_reward"]) == (0.0, 1.0, 2.0)
    assert found["uncertainty"] == pytest.approx(2**0.5 / 4)  # of (1, 3) it is sqrt(2), of the others 0
    reliable = reward_report.calibration(two_pairs())
    # sigma(1) both times: right with 1 and with a quarter of the votes
    assert reliable.expected_calibration_error == pytest.approx(1 / (1 + math.exp(-1)) - 0.625)
    assert reward_report.calibration(replace(two_pairs(), soft_labels=torch.tensor([0.5, 0.5]))) is None


def test_the_audit_finds_loudness_silence_and_length():
    generator = torch.Generator().manual_seed(0)
    clips = [0.1 * torch.randn(length, generator=generator) for length in (6000, 9000, 12_000, 15_000)]
    pairs = PreferenceDataset([{"prompt": "a", "chosen": None, "rejected": None}])
    prompts = replace(pairs_prompts(len(clips)))

    def level(audio, _):
        return level_dbfs(audio.waveform, audio.lengths_samples)[:, None]

    def duration(audio, _):
        return audio.lengths_samples[:, None].float()

    louder = reward_report.audit(level, clips, prompts, MelSpec())
    assert louder["plus_6_db"]["wins"] == 1 and louder["silence_added"]["losses"] == 1
    longer = reward_report.audit(duration, clips, prompts, MelSpec())
    assert longer["length"] == pytest.approx(1) and longer["silence_added"]["wins"] == 1
    assert longer["plus_6_db"] == {"wins": 0, "losses": 0, "ties": 1} and len(pairs) == 1


def pairs_prompts(count: int):
    from rlhf_mel.types import Prompts

    return Prompts(["a"] * count, torch.zeros(count, 1), torch.zeros(count, dtype=torch.long), [""] * count)


def test_shares_of_wins_by_hand():
    base = torch.tensor([0.0, 10.0, 20.0, 30.0])  # deviation 12.9: within 0.129 is a tie
    found = reward_report.shares(base, base + torch.tensor([0.1, 1.0, -1.0, -1.0]))
    assert found == {"wins": 0.25, "losses": 0.5, "ties": 0.25}


def test_any_reward_can_be_reported_on(data, tmp_path):
    heldout = str(data / "heldout")
    reward_report.main(
        ["--reward_models", "intelligibility", "--preferences", heldout, "--out", str(tmp_path), "--device", "cpu"]
    )
    said = json.loads((tmp_path / "report.json").read_text())
    rewards, pairs = Rewards(["intelligibility"]), load_preferences(data / "heldout")
    batch = pairs.collate([pairs[row] for row in range(8)])
    with torch.no_grad():
        chosen, rejected = (rewards(side, batch.prompts).total for side in (batch.chosen, batch.rejected))
    assert said["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert said["audit"]["clips"] == 16 and said["held_out"] == {"pairs": 8, "ties": 0, "prompts": 6}
