"""The command line of a run: TRL's parser over YAML, and what of TRL's ModelConfig a flow has."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft import LoraConfig

from rlhf_mel.lookup import did_you_mean
from rlhf_mel.training.config import RLHFConfig

if TYPE_CHECKING:
    from trl import ModelConfig

LORA_FIELDS = frozenset(
    {
        "use_peft",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
    }
)
"""The fields of TRL's `ModelConfig` that mean something for a flow."""


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[RLHFConfig, ModelConfig]:
    """The command line (default: `sys.argv`), over `--config file.yaml`, over the defaults.

    Raises:
        ValueError: an unknown key, or an invalid value.
    """
    from trl import ModelConfig, TrlParser

    parser = TrlParser((RLHFConfig, ModelConfig), allow_abbrev=False)  # type: ignore[arg-type]
    config, model_config, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(_unknown_keys(unknown))
    check_model_config(model_config)
    return config, model_config


def _unknown_keys(remaining: Sequence[str]) -> str:
    """The message for keys that no field takes, each with the nearest known ones."""
    from trl import ModelConfig

    known = [f.name for dataclass_type in (RLHFConfig, ModelConfig) for f in dataclasses.fields(dataclass_type)]
    keys = [item.removeprefix("--").split("=")[0] for item in remaining if item.startswith("--")] or list(remaining)
    lines = [f"unknown option {key!r}{did_you_mean(key, known)}" for key in keys]
    return "; ".join(lines) + "; `python recipes/drlx.py --help` lists all"


def check_model_config(model_config: ModelConfig) -> None:
    """Raise if a field of TRL's `ModelConfig` is set that only language models have."""
    from trl import ModelConfig

    default = ModelConfig()
    foreign = [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.name not in LORA_FIELDS and getattr(model_config, f.name) != getattr(default, f.name)
    ]
    if foreign:
        raise ValueError(
            f"{foreign} have no effect on a speech policy: of TRL's ModelConfig only {sorted(LORA_FIELDS)} are "
            "used; name the policy by --policy"
        )


def lora_config(model_config: ModelConfig) -> LoraConfig | None:
    """TRL's `get_peft_config` without its language-model task type; default targets: those of `lora.add_lora`."""
    from trl import get_peft_config

    config = get_peft_config(model_config)
    if config is None:
        return None
    assert isinstance(config, LoraConfig)
    config.task_type = None
    if isinstance(config.target_modules, str) and re.fullmatch(r"[\w.]+", config.target_modules):
        # TRL takes a list of one for a string, which peft would read as a pattern for the whole name.
        config.target_modules = {config.target_modules}  # type: ignore[assignment]  # peft makes a set of a list too
    return config
