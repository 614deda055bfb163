"""Rewards by name: a file of reward_models/, or one's own by "package.module:Name"."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from rlhf_mel.rewards.base import RewardModel, RewardSpec, check_declarations
from rlhf_mel.rewards.function import FunctionReward


def known_rewards() -> list[str]:
    """The names that `load_reward` takes: the modules of the package `reward_models`."""
    package = importlib.import_module("reward_models")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def load_reward(spec: RewardSpec, options: Mapping[str, Any] | None = None) -> RewardModel:
    """The reward model called `spec`: "mos", "package.module:Name", a reward model, its class or a plain function.

    options: keyword arguments of its class.

    Raises:
        ValueError: no such name, the message lists the known ones; or no such option.
        TypeError: what was found is not a reward.
    """
    found: Any = _find(spec) if isinstance(spec, str) else spec
    if inspect.isclass(found):
        _check_options(spec, found, options or {})
        found = found(**(options or {}))
    elif options:
        raise ValueError(
            f"reward {spec!r}: expected a class to give options to, got {type(found).__name__}; remove them"
        )
    if callable(getattr(found, "score", None)):
        check_declarations(found)
        return found
    if callable(found):
        return FunctionReward(found)
    raise TypeError(f"reward {spec!r}: expected a reward model or a function, got {type(found).__name__}")


def _check_options(spec: RewardSpec, found: Any, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(found).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not anything and (unknown := sorted(options.keys() - set(known))):
        raise ValueError(f"reward {spec!r}: expected options among {known}, got {unknown}")


def _find(spec: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    if attribute:
        return _attribute(_import(module_name, spec), attribute, spec)
    if spec not in known_rewards():
        raise ValueError(
            f"unknown reward {spec!r}: expected one of {known_rewards()}, or 'package.module:Name' for your own"
        )
    return _attribute(importlib.import_module(f"reward_models.{spec}"), "reward_model", spec)


def _import(module_name: str, spec: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something of its own
        raise ValueError(
            f"reward {spec!r}: no module {error.name!r}; put its folder on the path, e.g. PYTHONPATH=."
        ) from error


def _attribute(module: Any, attribute: str, spec: str) -> Any:
    if not hasattr(module, attribute):
        raise ValueError(f"reward {spec!r}: module {module.__name__} has no {attribute!r}; define it there")
    return getattr(module, attribute)
