"""LoRA on a policy: where adapters go, which layers have them, and switching them off."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf_mel.modules import modules_of

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_TARGETS = (
    r".*(transformer_blocks|layers)\.\d+\.((attn|2)\.to_([qkv](_c)?|out\.0|out_c)|(ff|ff_[xc]|4)\.ff\.(0\.0|2))"
)
"""Attention and feed-forward of every block, of DiT, MMDiT and UNetT (which numbers its parts); not AdaLN: 42 % of
F5-TTS's weights, and it sees only time."""


def add_lora(policy: nn.Module, config: LoraConfig | None = None) -> nn.Module:
    """Put LoRA adapters into the policy, in place: only they train from now on.

    Args:
        config: peft's; without `target_modules`, attention and feed-forward of every block are adapted, and in a policy
            without blocks like those of F5-TTS every linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, needed by few

    config = copy.copy(config) if config is not None else LoraConfig(r=16, lora_alpha=32)
    if config.target_modules is None:
        linear = [name for name, module in policy.named_modules() if isinstance(module, nn.Linear)]
        of_blocks = any(re.fullmatch(LORA_TARGETS, name) for name in linear)
        config.target_modules = LORA_TARGETS if of_blocks else linear
    policy.requires_grad_(False)
    return inject_adapter_in_model(config, policy)


def lora_layers(policy: object) -> list[Any]:
    """The policy's peft layers; empty without LoRA."""
    if not isinstance(policy, nn.Module) or "peft" not in sys.modules:  # slow to import, for none
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in modules_of(policy) if isinstance(module, BaseTunerLayer)]


@contextmanager
def lora_disabled(layers: Sequence[Any]) -> Iterator[None]:
    """The base weights alone inside; `layers` are those of `lora_layers`."""
    enabled = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in enabled:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in enabled:
            layer.enable_adapters(True)


def only_lora_trains(policy: object) -> bool:
    """Whether no weight is trained but those of LoRA layers."""
    named = policy.named_parameters() if isinstance(policy, nn.Module) else ()
    return all("lora_" in name for name, weight in named if weight.requires_grad)
