"""RLHF for generated mel spectrograms: fine-tune flow-matching speech models with the gradient of a reward.

    from rlhf_mel import RLHFConfig, RLHFTrainer, load_policy, load_vocoder

    policy = load_policy("tiny")
    RLHFTrainer(policy, reward_models=["mos"], vocoder=load_vocoder("tiny"), args=RLHFConfig(max_steps=20)).train()

Names are imported when they are first used: `import rlhf_mel` itself is instant. Functions that share the name of their
module (`rlhf_mel.evaluate.evaluate`, `rlhf_mel.sound.sound`) are imported from there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_mel.audio import MelSpec, load_audio, log_mel
    from rlhf_mel.cfm import CFM
    from rlhf_mel.checkpoints import load_policy, save_policy
    from rlhf_mel.config import RLHFConfig
    from rlhf_mel.data import PromptDataset, load_prompts
    from rlhf_mel.policy import rollout
    from rlhf_mel.recognizer import load_recognizer
    from rlhf_mel.rewards import Rewards, load_reward
    from rlhf_mel.trainer import RLHFTrainer
    from rlhf_mel.types import Audio, Prompts, Rollout, Scores
    from rlhf_mel.vocoders import load_vocoder

_HOME = {
    "audio": ("MelSpec", "load_audio", "log_mel"),
    "cfm": ("CFM",),
    "checkpoints": ("load_policy", "save_policy"),
    "config": ("RLHFConfig",),
    "data": ("PromptDataset", "load_prompts"),
    "policy": ("rollout",),
    "recognizer": ("load_recognizer",),
    "rewards": ("Rewards", "load_reward"),
    "trainer": ("RLHFTrainer",),
    "types": ("Audio", "Prompts", "Rollout", "Scores"),
    "vocoders": ("load_vocoder",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CFM",
    "Audio",
    "MelSpec",
    "PromptDataset",
    "Prompts",
    "RLHFConfig",
    "RLHFTrainer",
    "Rewards",
    "Rollout",
    "Scores",
    "load_audio",
    "load_policy",
    "load_prompts",
    "load_recognizer",
    "load_reward",
    "load_vocoder",
    "log_mel",
    "rollout",
    "save_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rlhf_mel' has no attribute {name!r}")
    return getattr(import_module(f"rlhf_mel.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
