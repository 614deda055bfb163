"""What config.yaml says of the parts of a run that RLHFTrainer was given in Python, and not by names in its config.

What has a name is written by it: a class or function of a module as "module:Name", a reward with a Config with its
options too. What has none is described, so that a second run from the file stops at that part instead of taking
another in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_mel.data.preferences.load import PreferenceDataset
from rlhf_mel.data.prompts import PromptDataset
from rlhf_mel.rewards.base import RewardSpec
from rlhf_mel.rewards.combine import Rewards


def given_parts(**parts: Any) -> dict[str, Any]:
    """Fields of RLHFConfig by name, and what was given for each; None: the config names it."""
    fields: dict[str, Any] = {name: source(part) for name, part in parts.items() if part is not None}
    if not isinstance(parts.get("policy"), str | Path | None):
        fields |= {"policy_model": None, "policy_vocab": None, "policy_weights": None}
    return fields


def given_rewards(given: RewardSpec | Sequence[RewardSpec] | Rewards | None, rewards: Rewards) -> dict[str, Any]:
    """`reward_models`, `reward_weights` and `reward_kwargs` of what was given; empty where the config names them."""
    if given is None:
        return {}
    specs: Sequence[Any] = rewards.models if isinstance(given, Rewards) else _as_list(given)
    names = [source(spec) for spec in specs]
    options = {name: _options(model) for name, model in zip(names, rewards.models, strict=True) if _options(model)}
    return {"reward_models": names, "reward_weights": rewards.weights, "reward_kwargs": options or None}


def source(part: Any) -> str:
    """The name that a config can give to a part, or what it is where it has none."""
    if isinstance(part, str | Path):
        return str(part)
    if isinstance(part, PromptDataset | PreferenceDataset):
        return part.name
    named = part if hasattr(part, "__qualname__") else type(part)
    module, name = named.__module__, named.__qualname__
    if module == f"reward_models.{getattr(part, 'name', None)}":
        return str(part.name)
    rebuilt = named is part or _options(part)
    if rebuilt and module != "__main__" and "<" not in name:
        return f"{module}:{name}"
    return f"{module}.{name}, given in Python"


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _options(model: Any) -> dict[str, Any]:
    """The options of a reward that was built from its Config; empty where it has none."""
    config = getattr(model, "config", None)
    if not dataclasses.is_dataclass(config) or not isinstance(config, getattr(type(model), "Config", ())):
        return {}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
