"""Options of rewards: a Config beside the class or keyword arguments, refused before a model is loaded, and listed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reward_models.mos import Mos
from rlhf_mel import cli
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.rewards.load import find_reward, known_rewards, load_reward
from rlhf_mel.rewards.options import check_options, describe
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.types import Audio, Prompts

GUIDE = Path(__file__).parents[2] / "docs/guide.md"


class Base:
    name, differentiable, domain, sample_rate_hz = "base", False, "mel", None
    needs: frozenset[str] = frozenset()
    range = (-1.0, 1.0)

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        return torch.zeros(len(prompts))


class Configured(Base):
    @dataclass(frozen=True)
    class Config:
        target: float
        """What is aimed at,
        in semitones."""
        slope: float = 2.0

        def __post_init__(self) -> None:
            if self.slope <= 0:
                raise ValueError(f"slope: expected a number above 0, got {self.slope}; raise it")

    def __init__(self, config: Config) -> None:
        self.config = config


class Keywords(Base):
    def __init__(self, weight: float, **others: Any) -> None:
        self.given = {"weight": weight, **others}


def brevity(completions: list[Any]) -> list[float]:
    return [-float(len(clip)) for clip in completions]


def test_options_become_the_config_or_the_keyword_arguments() -> None:
    reward: Any = load_reward(Configured, {"target": 0.5})
    assert reward.config == Configured.Config(target=0.5, slope=2.0)
    keywords: Any = load_reward(Keywords, {"weight": 3, "anything": "else"})
    assert keywords.given == {"weight": 3, "anything": "else"}
    mos: Any = Rewards(["mos"], options={"mos": {"compression_eps": 1e-3}}).models[0]
    assert mos.config.compression_eps == 1e-3


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (Configured, {"targt": 1}, r"among \['target', 'slope'\], got 'targt', did you mean target\?"),
        (Configured, {"slope": 1.0}, r"expected a value of \['target'\], got none"),
        (Configured, {"target": 1, "slope": 0}, "slope: expected a number above 0, got 0"),
        (Keywords, {}, r"expected a value of \['weight'\]"),
        (brevity, {"weight": 1}, r"expected a class to give options to, got function; remove \['weight'\]"),
    ],
)
def test_wrong_options_of_ones_own_reward(reward: Any, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(reward, options, name="mine")
    with pytest.raises(ValueError, match=message):
        load_reward(reward, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mos": {"compresion_eps": 1e-3}}, r"'mos': .*\['compression_eps'\], got 'compresion_eps', did you mean comp"),
        ({"mos": {"compression_eps": "1e-3"}}, "expected a number above 0, got '1e-3'; write 1.0e-3"),
        ({"mos": {"compression_eps": 0}}, "expected a number above 0, got 0"),
        ({"mos": {"compression_eps": True}}, "expected a number above 0, got True"),
        ({"intelligibility": {"recognizer": "no/such"}}, "folder with recognizer.json, got 'no/such'; train one"),
        ({"intelligibility": {"recognizer": 3}}, "expected 'tiny' or a folder, got 3"),
    ],
)
def test_a_run_refuses_wrong_options_before_it_loads_a_model(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in known_rewards():
        monkeypatch.setattr(find_reward(name), "__init__", None)  # not to be built
    with pytest.raises(ValueError, match=message):
        RLHFConfig(output_dir="unused", reward_models=["mos", "intelligibility"], reward_kwargs=options)


def test_options_of_a_folder_are_checked_without_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"reward_model": "preference"}')  # and no weights beside it
    named: Any = {"output_dir": "unused", "reward_models": [str(tmp_path)]}
    with pytest.raises(ValueError, match="uncertainty_penalty of reward 'preference': expected a number of at least 0"):
        RLHFConfig(**named, reward_kwargs={str(tmp_path): {"uncertainty_penalty": -1}})
    kept = RLHFConfig(**named, reward_kwargs={str(tmp_path): {"uncertainty_penalty": 1}}).reward_kwargs
    assert kept == {str(tmp_path): {"uncertainty_penalty": 1}}


def test_options_of_a_reward_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected options of .*got those of \['mso'\]"):
        Rewards([Configured(Configured.Config(target=0))], options={"mso": {}})


def test_options_are_described_by_their_docstrings() -> None:
    target, slope = describe(Configured)
    assert (target.name, target.meaning) == ("target", "What is aimed at, in semitones.")
    assert (slope.name, slope.default, slope.meaning) == ("slope", 2.0, "")
    assert [option.name for option in describe(Keywords)] == ["weight"]


@pytest.mark.parametrize("name", known_rewards())
def test_help_and_the_guide_list_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards"]) == 0
    listed = capsys.readouterr().out
    rows = re.findall(rf"^\| `{name}` \| `(\w+)` \| `(\S+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    options = describe(find_reward(name))
    assert options and all(option.meaning for option in options)
    assert [row[0] for row in rows] == [option.name for option in options]
    for (_, default), option in zip(rows, options, strict=True):
        assert option.meaning in listed
        if option.default is inspect.Parameter.empty:
            assert default == "required" and f"    {option.name}\n" in listed
        elif option.default is None:
            assert default == "None"
        else:
            assert type(option.default)(default) == option.default
            assert f"    {option.name} = {option.default!r}\n" in listed


def test_the_config_of_a_reward_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        Mos.Config().compression_eps = 1.0  # type: ignore[misc]
