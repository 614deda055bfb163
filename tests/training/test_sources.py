"""config.yaml of a run says what really ran: parts given in Python, options of rewards, compilation, the policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import Near, Voice, policy, trainer, write_dataset
from torch import Tensor

from reward_models.mos import Mos
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.rewards.load import load_reward
from rlhf_mel.training.arguments import parse_arguments
from rlhf_mel.training.build import as_rewards
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.training.sources import given_parts, given_rewards, source
from rlhf_mel.training.trainer import RLHFTrainer
from rlhf_mel.types import Audio, Prompts

BLACK_BOX: dict[str, Any] = dict(algorithm="awm", num_generations=2, max_steps=1)
"""A run that needs no gradient of the reward."""


class Level:
    name, differentiable, domain, sample_rate_hz = "level", False, "waveform", None
    needs: frozenset[str] = frozenset()
    range = (-200.0, 0.0)

    @dataclass(frozen=True)
    class Config:
        floor: float = -60.0
        file: str | Path = "none"

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        return torch.full((len(prompts),), self.config.floor)


def brevity(completions: list[Any]) -> list[float]:
    return [-float(len(clip)) for clip in completions]


def written(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_run_of_objects_is_not_saved_as_one_of_names(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", write_dataset(tmp_path / "data"), reward=[Near(), brevity], **BLACK_BOX)
    run.train()
    config = written(tmp_path / "run")
    assert config["policy"] == "rlhf_mel.f5.cfm.CFM, given in Python"
    assert config["vocoder"] == "small_runs.Voice, given in Python"
    assert config["reward_models"] == ["small_runs.Near, given in Python", "test_sources:brevity"]
    assert config["reward_weights"] == [1.0, 1.0] and config["train_prompts"] == "prompts"
    with pytest.raises(ValueError, match=r"unknown reward 'small_runs\.Near, given in Python'"):
        parse_arguments(["--config", str(tmp_path / "run/config.yaml")])  # and not a run towards mos


def test_rewards_of_a_run_are_saved_with_their_options(tmp_path: Path) -> None:
    models = [Mos(Mos.Config(compression_eps=2e-3)), Level(Level.Config(floor=-50.0, file=tmp_path))]
    rewards = Rewards(models, [1, 0.5])
    run = trainer(tmp_path / "run", write_dataset(tmp_path / "data"), reward=rewards, **BLACK_BOX)
    run.train()
    config = written(tmp_path / "run")
    again = Rewards(config["reward_models"], config["reward_weights"], config["reward_kwargs"])
    mos, level = again.models
    assert isinstance(mos, Mos) and mos.config == Mos.Config(compression_eps=2e-3)
    assert level.config == Level.Config(floor=-50.0, file=str(tmp_path))  # type: ignore[attr-defined]
    assert again.weights == [1, 0.5]


@pytest.mark.filterwarnings("ignore:2 fresh rollouts", "ignore:first update")  # every clip scores the same
def test_a_run_of_names_is_saved_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, bool]] = []
    speaker = policy()
    monkeypatch.setattr(type(speaker), "speed_up", lambda self, **how: compiled.append(how))
    monkeypatch.setattr("rlhf_mel.policies.load", lambda path, **how: speaker)
    monkeypatch.setattr("rlhf_mel.training.trainer.load_vocoder", lambda name: Voice())
    rows = write_dataset(tmp_path).rows
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options: dict[str, Any] = dict(
        policy="model_last.pt",
        policy_model="F5TTS_v1_Base",
        vocoder="somewhere",
        train_prompts=str(tmp_path / "train.jsonl"),
        reward_models=["test_sources:Level"],
        reward_kwargs={"test_sources:Level": {"floor": -40.0}},
        torch_compile=True,
        sampling_steps=2,
        recognizer="none",
        per_device_train_batch_size=2,
        **BLACK_BOX,
    )
    folder = tmp_path / "run"
    RLHFTrainer(args=RLHFConfig(output_dir=str(folder), use_cpu=True, num_eval_prompts=0, **options)).train()
    config = written(folder)
    assert {name: config[name] for name in options} == options
    assert compiled == [{"compiled": True, "cuda_graphs": False}]
    again, _ = parse_arguments(["--config", str(folder / "config.yaml"), "--output_dir", "unused"])
    assert again.compile_policy and again.reward_kwargs == options["reward_kwargs"]


def test_what_has_a_name_and_what_has_none(tmp_path: Path) -> None:
    assert (source(Level), source(brevity), source("mos"), source(tmp_path)) == (
        "test_sources:Level",
        "test_sources:brevity",
        "mos",
        str(tmp_path),
    )
    assert source(lambda completions: [0.0]).endswith("<lambda>, given in Python")
    assert source(load_reward("mos")) == "mos"
    assert given_rewards(None, Rewards([Level])) == {}
    assert given_parts(policy="F5TTS_v1_Base", vocoder=None) == {"policy": "F5TTS_v1_Base"}
    assert given_parts(policy=policy())["policy_model"] is None


def test_options_of_rewards_that_are_given_are_used_or_refused() -> None:
    config = RLHFConfig(output_dir="unused", reward_models=["mos"], reward_kwargs={"mos": {"compression_eps": 1e-3}})
    mos: Any = as_rewards(["mos", Level], config).models[0]
    assert mos.config.compression_eps == 1e-3
    with pytest.raises(ValueError, match=r"got those of \['mos'\]"):
        as_rewards([Level], config)
    with pytest.raises(ValueError, match="reward_kwargs: expected none beside Rewards"):
        as_rewards(Rewards([Level]), config)
