"""Runs on preferences: resumed to the bit, evaluated and examined as all runs are; what cannot be meant is refused."""

from __future__ import annotations

import copy
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Audio as AudioFeature
from datasets import load_dataset
from pair_problems import (
    LOG2,
    generator,
    pairs,
    parts,
    preference_rows,
    preference_trainer,
    wav,
)
from peft import LoraConfig
from problems import tiny_policy
from small_runs import Near, Voice, metrics, policy, same_weights, write_dataset

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.data.preferences.load import PreferenceDataset, write_preferences
from rlhf_mel.doctor.checks import CHECKS, case_of, examine, line
from rlhf_mel.doctor.cost import frames_ratio
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.training.trainer import RLHFTrainer

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("name", "options", "lora"),
    [
        ("flow_dpo", {"stored_noise": True, "margin_scale": 0.1}, False),
        ("flow_dpo", {"num_noise_samples": 2}, True),
        ("flow_kto", {}, False),
        ("sft_chosen", {}, True),
    ],
)
def test_a_run_on_pairs_trains_and_resumes_to_the_bit(
    tmp_path: Path, name: str, options: dict[str, Any], lora: bool
) -> None:
    """5 pairs in batches of 2 and 2 micro-batches: cut inside an epoch."""
    run: dict[str, Any] = dict(
        algorithm=name,
        algorithm_kwargs=options,
        learning_rate=1e-4,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_steps=4,
        save_total_limit=None,
    )
    peft = LoraConfig(r=2) if lora else None
    whole = preference_trainer(tmp_path, peft=peft, **run)
    before = copy.deepcopy(whole.policy)
    whole.train()
    uninterrupted = metrics(tmp_path)
    assert [entry["step"] for entry in uninterrupted] == [1, 2, 3, 4, 5, 6] and uninterrupted[-1]["epoch"] > 1
    assert not same_weights(whole.policy, before)
    assert {"chosen_error", "anchor", "loss", "grad_norm"} < uninterrupted[0].keys()
    assert "train_preferences: few\n" in (tmp_path / "config.yaml").read_text()
    if name != "sft_chosen":
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} < uninterrupted[0].keys()
        assert uninterrupted[0]["rewards/margins"] == 0 != uninterrupted[-1]["rewards/margins"]
    resumed = preference_trainer(tmp_path, peft=peft, **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert metrics(tmp_path) == uninterrupted
    assert same_weights(resumed.policy, whole.policy)


def test_dpo_learns_the_pairs_and_is_heard_on_prompts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """After 30 updates on 5 pairs their order is known, at times and noise that are new each time (one label is soft).

    The evaluation and its files are those of every run.
    """
    run = preference_trainer(
        tmp_path,
        beta=200.0,
        algorithm_kwargs={"num_noise_samples": 4},
        learning_rate=1e-4,
        max_steps=30,
        per_device_train_batch_size=5,
        num_eval_prompts=2,
        logging_steps=10,
    )
    run.train()
    logged = metrics(tmp_path)
    assert logged[-1]["loss"] < 0.5 and logged[-1]["rewards/accuracies"] > 0.8
    assert {"before", "after", "verdict"} < json.loads((tmp_path / "summary.json").read_text()).keys()
    said = capfd.readouterr().out
    assert "by preferences, 5 pairs, 1 x cpu" in said and "rewards/accuracies" in said


def test_an_online_run_ranks_trains_and_resumes_to_the_bit(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    run: dict[str, Any] = dict(
        algorithm_kwargs={"online": True, "stored_noise": True},
        per_device_train_batch_size=4,
        num_generations=2,
        num_iterations=2,
        max_steps=6,
        save_steps=4,
        save_total_limit=None,
    )
    whole = preference_trainer(tmp_path, dataset, **run)
    whole.train()
    uninterrupted = metrics(tmp_path)
    assert uninterrupted[0]["reward"] == uninterrupted[1]["reward"] != uninterrupted[2]["reward"]
    assert uninterrupted[0]["rewards/margins"] == 0 < uninterrupted[1]["rewards/margins"]
    assert uninterrupted[0]["dropped_pairs"] == 0
    resumed = preference_trainer(tmp_path, dataset, **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert metrics(tmp_path) == uninterrupted
    assert same_weights(resumed.policy, whole.policy)


def test_pairs_come_by_name_as_a_table_or_as_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches, so the same numbers; config.yaml has the name, by which the run can be made again."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = str(write_preferences(preference_rows(), tmp_path / "set"))
    given: dict[str, Any] = {
        "option": str(folder),
        "path": folder,
        "table": load_dataset(folder, split="train").cast_column("chosen", AudioFeature(decode=False)),
        "rows": tuple(preference_rows()),
        "stream": load_dataset(folder, split="train").to_iterable_dataset(),
        "splits": {"train": preference_rows()},
    }
    seen = {}
    for kind, source in given.items():
        named = {"train_preferences": source} if kind == "option" else {}
        run = preference_trainer(tmp_path / kind, None if named else source, **named)
        run.train()
        seen[kind] = metrics(tmp_path / kind)
    assert all(run == seen["option"] for run in seen.values())
    assert f"train_preferences: {folder}" in (tmp_path / "option/config.yaml").read_text()
    assert f"train_preferences: {folder}" in (tmp_path / "path/config.yaml").read_text()


def test_the_recipe_without_config_is_flow_dpo_with_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = runpy.run_path(str(RECIPES / "flow_dpo.py"))
    seen: list[Any] = []

    def no_trainer(**parts: Any) -> None:
        seen.append(parts)
        raise SystemExit

    monkeypatch.setattr(recipe["drlx"], "RLHFTrainer", no_trainer)
    with pytest.raises(SystemExit):
        recipe["main"](["--train_preferences", "runs/pairs", "--max_steps", "3", "--use_cpu", "true"])
    args, peft_config = seen[0]["args"], seen[0]["peft_config"]
    assert (args.algorithm, args.beta, args.train_preferences, args.max_steps) == ("flow_dpo", 2000, "runs/pairs", 3)
    assert peft_config.r == 16


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--use_peft", "false", "--bf16", "true"]], ids=["lora", "full"])
def test_the_recipe_is_launched(tmp_path: Path, options: list[str]) -> None:
    """By accelerate, with the bundled policy, on two pairs of its own mels; and by drlx.py."""
    rows = [
        {**row, "chosen": wav(24_000 + 100 * n, n), "rejected": wav(25_000, 9 + n), "reference_audio": wav(24_000, 1)}
        | {"prompt": "Good morning.", "reference_text": "What I say there."}
        for n, row in enumerate(preference_rows()[:2])
    ]
    folder = write_preferences(rows, tmp_path / "set")
    own = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--num_eval_prompts", "1", "--use_cpu", "true"]
    own += ["--train_preferences", str(folder), "--output_dir", str(tmp_path / "run"), *options]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(RECIPES / "flow_dpo.py"), *own]
    apart = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(launch, capture_output=True, text=True, env=apart)
    assert done.returncode == 0, done.stderr
    logged = metrics(tmp_path / "run")
    assert len([entry for entry in logged if "rewards/margins" in entry]) == 2
    assert logged[0]["loss"] == pytest.approx(LOG2, rel=0.02)
    assert (tmp_path / "run/report.html").is_file() and "2 pairs" in done.stdout


def test_what_does_not_suit_the_policy_stops_the_run_at_its_start(tmp_path: Path) -> None:
    rows = preference_rows()
    rows[1]["reference_audio"] = None
    rows[3] |= {"chosen": wav(300, 1), "prompt": "had a cab " * 6}  # 32 + 5 frames for 3 + 59 letters
    with pytest.raises(
        ValueError, match=r"2 of 5 pairs of few do not suit.*\n.*row 1 \(id 'p1'\): no ref.*\n.*row 3 \(id 'p3'\): dur"
    ):
        preference_trainer(tmp_path, rows)
    other = PreferenceDataset(preference_rows(), name="other")
    with pytest.raises(ValueError, match="other: expected clips as mels of the policy"):
        preference_trainer(tmp_path, other)


def test_data_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"train_dataset: expected preferences, .* got a PromptDataset"):
        preference_trainer(tmp_path, dataset)
    with pytest.raises(ValueError, match=r"train_dataset: expected prompts, .* got a PreferenceDataset"):
        preference_trainer(tmp_path, algorithm="draft")
    with pytest.raises(ValueError, match=r"learns from pairs of clips: expected train_preferences, got none; .*online"):
        RLHFTrainer(policy(), Near(), RLHFConfig(algorithm="flow_dpo", use_cpu=True), vocoder=Voice())


def test_margins_that_are_not_there_are_refused(tmp_path: Path) -> None:
    rows = preference_rows()
    rows[2]["margin"] = None
    with pytest.raises(
        ValueError, match=r"margin_scale of flow_dpo: expected a margin in every row of few, .*in 1 of 5"
    ):
        preference_trainer(tmp_path, rows, algorithm_kwargs={"margin_scale": 0.5})


def test_stored_noise_without_seeds_is_refused(tmp_path: Path) -> None:
    algorithm: Any = load_algorithm("flow_dpo", {"stored_noise": True}, beta=1.0)
    trained = tiny_policy()
    with pytest.raises(ValueError, match="stored_noise: expected chosen_seed, rejected_seed, row in every row"):
        algorithm.collect_pairs(parts(trained, None), pairs(), generator())
    rows = preference_rows()
    del rows[3]["chosen_seed"]
    with pytest.raises(
        ValueError, match=r"stored_noise of flow_dpo: expected a chosen_seed in every row of few, .*in 1"
    ):
        preference_trainer(tmp_path, rows, algorithm_kwargs={"stored_noise": True})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(algorithm="draft", train_preferences="x"), "expected an algorithm that learns from pairs .*got 'draft'"),
        (dict(train_preferences="x", algorithm_kwargs={"online": True}), r"num_generations of at least 2, got 1"),
        (
            dict(train_preferences="x", algorithm_kwargs={"online": True}, num_generations=2),
            "expected an algorithm that learns from pairs of a data set, such as flow_dpo",
        ),
        (dict(num_generations=2), "learns from pairs of a data set: expected num_generations 1, got 2"),
        (dict(preference_kwargs="ties"), "preference_kwargs must be a mapping"),
    ],
)
def test_a_run_that_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLHFConfig(**{"algorithm": "flow_dpo", "use_cpu": True, **fields})


@pytest.mark.parametrize("online", [False, True])
def test_the_doctor_examines_such_a_run(tmp_path: Path, online: bool) -> None:
    dataset = write_dataset(tmp_path)
    options: dict[str, Any] = {"algorithm_kwargs": {"online": True}, "num_generations": 2} if online else {}
    run = preference_trainer(tmp_path, dataset if online else None, per_device_train_batch_size=4, **options)
    findings = {finding.name: finding for finding in examine(case_of(run))}
    assert list(findings) == list(CHECKS)
    skipped = {name for name, finding in findings.items() if finding.status == "skipped"}
    assert skipped == {"first ratio = 1", "SDE near ODE"} | (set() if online else {"reward spread"})
    wrong = [line(found) for found in findings.values() if found.status in ("warn", "fail") and found.name != "cost"]
    assert not wrong
    assert findings["gradient"].numbers["loss"] == pytest.approx(LOG2, rel=1e-4)
    assert findings["gradient"].numbers["gradient_norm"] > 1
    if not online:  # both clips of four pairs over those of the first two
        case = case_of(run)
        assert case.pairs is not None
        totals = case.pairs.chosen.lengths_frames + case.pairs.rejected.lengths_frames + 2 * (2000 // 64 + 1)
        assert frames_ratio(case, [0, 1]) == pytest.approx(totals.sum().item() / totals[:2].sum().item())
