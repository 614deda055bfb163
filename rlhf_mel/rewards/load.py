"""Rewards by name: a file of reward_models/, or one's own by "package.module:Name"."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
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
    """The reward model called `spec`: "mos", "package.module:Name", a reward model, its class or a plain function.

    Args:
        options: fields of the Config of its class, or keyword arguments of a class without one (see options.py).

    Raises:
        ValueError: no such name, the message lists the known ones; no such option, or a wrong value of one.
        TypeError: what was found is not a reward.
    """
    reward: Any = find_reward(spec) if isinstance(spec, str) else spec
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
    return load_object(name if ":" in name else f"reward_models.{name}:reward_model", "reward")


def check_name(name: str) -> None:
    """Raise ValueError for a name without a colon that is no file of reward_models/; nothing is imported."""
    known = known_rewards()
    if ":" not in name and name not in known:
        raise ValueError(
            f"unknown reward {name!r}: expected one of {known}, or 'package.module:Name' for your own"
            f"{did_you_mean(name, known)}"
        )
