"""RLHF for generated mel spectrograms: fine-tune flow-matching speech models with the gradient of a reward.

    from rlhf_mel import RLHFConfig, RLHFTrainer, load_policy, load_vocoder

    policy = load_policy("tiny")
    RLHFTrainer(policy, reward_models=["mos"], vocoder=load_vocoder("tiny"), args=RLHFConfig(max_steps=20)).train()

Names are imported when they are first used: `import rlhf_mel` itself is instant. Functions that share the name of their
module (`rlhf_mel.evaluation.evaluate.evaluate`) are imported from there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_mel.data.preferences.load import PreferenceDataset, load_preferences, write_preferences
    from rlhf_mel.data.prompts import PromptDataset, load_prompts
    from rlhf_mel.f5.backbones.dit import DiT
    from rlhf_mel.f5.backbones.mmdit import MMDiT
    from rlhf_mel.f5.backbones.unett import UNetT
    from rlhf_mel.f5.cfm import CFM
    from rlhf_mel.f5.checkpoints import load_policy, save_policy
    from rlhf_mel.flow.policy import rollout
    from rlhf_mel.rewards.combine import Rewards
    from rlhf_mel.rewards.load import load_reward
    from rlhf_mel.speech.audio import MelSpec, load_audio, log_mel
    from rlhf_mel.speech.recognizer import load_recognizer
    from rlhf_mel.training.config import RLHFConfig
    from rlhf_mel.training.trainer import RLHFTrainer
    from rlhf_mel.types import Audio, Prompts, Rollout, Scores
    from rlhf_mel.vocoders import load_vocoder

_HOME = {
    "data.preferences.load": ("PreferenceDataset", "load_preferences", "write_preferences"),
    "data.prompts": ("PromptDataset", "load_prompts"),
    "f5.backbones.dit": ("DiT",),
    "f5.backbones.mmdit": ("MMDiT",),
    "f5.backbones.unett": ("UNetT",),
    "f5.cfm": ("CFM",),
    "f5.checkpoints": ("load_policy", "save_policy"),
    "flow.policy": ("rollout",),
    "rewards.combine": ("Rewards",),
    "rewards.load": ("load_reward",),
    "speech.audio": ("MelSpec", "load_audio", "log_mel"),
    "speech.recognizer": ("load_recognizer",),
    "training.config": ("RLHFConfig",),
    "training.trainer": ("RLHFTrainer",),
    "types": ("Audio", "Prompts", "Rollout", "Scores"),
    "vocoders": ("load_vocoder",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CFM",
    "Audio",
    "DiT",
    "MMDiT",
    "MelSpec",
    "PreferenceDataset",
    "PromptDataset",
    "Prompts",
    "RLHFConfig",
    "RLHFTrainer",
    "Rewards",
    "Rollout",
    "Scores",
    "UNetT",
    "load_audio",
    "load_policy",
    "load_preferences",
    "load_prompts",
    "load_recognizer",
    "load_reward",
    "load_vocoder",
    "log_mel",
    "rollout",
    "save_policy",
    "write_preferences",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rlhf_mel' has no attribute {name!r}")
    return getattr(import_module(f"rlhf_mel.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
