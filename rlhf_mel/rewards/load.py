"""Rewards by name: a file of reward_models/, one's own by "package.module:Name", or a trained one by its folder.

A folder is a reward if its `config.json` says which file of reward_models/ loads it, `{"reward_model": "preference"}`;
that class is built with the folder's path as its option `folder`. A name of reward_models/ is never taken for a folder.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rlhf_mel.lookup import did_you_mean, load_object
from rlhf_mel.rewards.base import RewardModel, RewardSpec, check_declarations
from rlhf_mel.rewards.function import FunctionReward
from rlhf_mel.rewards.options import build, check_options


def known_rewards() -> list[str]:
    """The names that `load_reward` takes: the modules of the package `reward_models`."""
    package = importlib.import_module("reward_models")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def load_reward(spec: RewardSpec, options: Mapping[str, Any] | None = None) -> RewardModel:
    """The reward model called `spec`: "mos", "package.module:Name", a folder, a reward model, its class or a function.

    Args:
        options: fields of the Config of its class, or keyword arguments of a class without one (see options.py).

    Raises:
        ValueError: no such name, the message lists the known ones; no such option, or a wrong value of one.
        TypeError: what was found is not a reward.
    """
    reward: Any = find_reward(spec) if isinstance(spec, str) else spec
    options = options_of(spec, options or {}) if isinstance(spec, str) else options
    name = spec if isinstance(spec, str) else str(getattr(spec, "__qualname__", type(spec).__qualname__))
    if inspect.isclass(reward):
        reward = build(reward, options or {}, name=name)
    else:
        check_options(reward, options or {}, name=name)
    if callable(getattr(reward, "score", None)):
        check_declarations(reward)
        return cast(RewardModel, reward)
    if callable(reward):
        return FunctionReward(reward)
    raise TypeError(f"reward {name!r}: expected a reward model or a function, got {type(reward).__name__}")


def find_reward(name: str) -> Any:
    """The class, object or function behind the name of a reward; nothing is built.

    Raises:
        ValueError: no such name; the message lists the known ones.
    """
    check_name(name)
    if _is_folder(name):
        name = _reward_of(name)
    return load_object(name if ":" in name else f"reward_models.{name}:reward_model", "reward")


def options_of(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the reward called `name`: those given and, where it is a folder, `folder`."""
    if not _is_folder(name):
        return options
    if "folder" in options:
        raise ValueError(f"reward {name!r}: expected options beside its folder, got 'folder' too; remove it")
    return {**options, "folder": name}


def check_name(name: str) -> None:
    """Raise ValueError for a name without a colon that is no file of reward_models/ and no folder; imports nothing."""
    known = known_rewards()
    if _is_folder(name):
        _reward_of(name)
    elif ":" not in name and name not in known:
        raise ValueError(
            f"unknown reward {name!r}: expected one of {known}, 'package.module:Name' for your own, or the folder of "
            f"a trained one{did_you_mean(name, known)}"
        )


def _is_folder(name: str) -> bool:
    return name not in known_rewards() and Path(name).is_dir()


def _reward_of(folder: str) -> str:
    """The file of reward_models/ that loads a folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"reward {folder!r}: expected a folder with config.json, as recipes/reward_model.py writes it")
    values = json.loads(path.read_text(encoding="utf-8"))
    name = values.get("reward_model") if isinstance(values, dict) else None
    if name not in known_rewards():
        raise ValueError(
            f'reward {folder!r}: expected config.json to say "reward_model": one of {known_rewards()}, got {name!r}'
        )
    return str(name)
