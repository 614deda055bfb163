"""The policy as it was before training: its own weights with LoRA off, or a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_mel.flow.lora import lora_disabled, lora_layers, only_lora_trains
from rlhf_mel.flow.policy import Policy, evaluating, rollout
from rlhf_mel.types import Prompts, Rollout


class ReferencePolicy:
    """The policy as it was before training, frozen: the same weights with LoRA off, if LoRA is all that trains.

    Else a copy made now: base weights that train too (`modules_to_save`, biases) are on with LoRA off as well.
    """

    def __init__(self, policy: Policy):
        self._lora = lora_layers(policy) if only_lora_trains(policy) else []
        # The copy shares the tokenizer, which has no weights: what it has read it need not read again.
        tokenizer = getattr(policy, "tokenizer", None)
        self._policy = policy if self._lora else copy.deepcopy(policy, {id(tokenizer): tokenizer})
        if not self._lora and isinstance(self._policy, nn.Module):
            self._policy.requires_grad_(False)

    @contextmanager
    def _as_it_was(self) -> Iterator[Policy]:
        with torch.no_grad(), evaluating(self._policy), lora_disabled(self._lora):
            yield self._policy

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        """Its own condition: LoRA or training may have changed the text embedding."""
        with self._as_it_was() as policy:
            return policy.encode(prompts, cfg_strength=cfg_strength)

    def velocity(self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: Any) -> Float[Tensor, "b n m"]:
        """Its velocity; differentiated with respect to x where x has a gradient, never to weights."""
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with self._as_it_was() as policy, torch.set_grad_enabled(differentiable):
            return policy.velocity(x, t, cond)

    def rollout(self, prompts: Prompts, **options: Any) -> Rollout:
        """Sample from the policy as it was before training; options as for `rollout`."""
        with self._as_it_was() as policy:
            return rollout(policy, prompts, **{**options, "grad_steps": 0})
