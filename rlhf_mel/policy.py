"""The policy: a flow from noise to mel, conditioned on a prompt; and what all policies share.

    cond = encode(prompts);  x_0 = prior(cond);  dx/dt = velocity(x, t, cond);  mel = finalize(x_1, cond)

A policy is anything with those methods (`Policy`). Its velocity is pure, so solvers, checkpointing,
truncation and the reference policy are written once, for all of them. Time convention: see path.py.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .nn import keep_mode, modules_of, set_modes, weights_of
from .solvers import GradSteps, PureVelocity, Velocity, solve
from .types import Prompts, Rollout

if TYPE_CHECKING:
    from peft import LoraConfig

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, one for each item, or None: PyTorch's global one."""


@runtime_checkable
class Policy(Protocol):
    """A flow that turns noise into mel."""

    def durations(self, prompts: Prompts) -> Tensor:
        """Long [B]: frames of reference plus generated speech, as asked for or by the policy's own rule."""
        ...

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        """All that the velocity needs to know of the prompts, with its graph: a pytree; once a solve.

        It has an attribute `generated`, bool [B, T]: the frames that are the policy's work.
        """
        ...

    def prior(self, cond: Any, generator: Generators = None) -> Tensor:
        """Noise x_0 [B, T, M], different for each item."""
        ...

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """dx/dt [B, T, M]; pure, guidance included. t is a scalar, or [B]."""
        ...

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Tensor:
        """Times [steps + 1] from 0 to 1."""
        ...

    def finalize(self, x1: Tensor, cond: Any) -> Tensor:
        """The end of the flow as log mel [B, T, M]: reference pasted in."""
        ...


def rollout(
    policy: Policy,
    prompts: Prompts,
    *,
    steps: int = 16,
    cfg_strength: float = 2.0,
    sway_sampling_coef: float | None = -1.0,
    grad_steps: GradSteps = None,
    checkpoint: bool = True,
    generator: Generators = None,
    method: str = "euler",
    return_trajectory: bool = False,
) -> Rollout:
    """Let the policy speak: the generated mel of each prompt, with gradients unless `grad_steps=0`.

    Each item is what it would be alone: items of one total duration are solved together, others apart, since
    padding changes what attention and the text embedding compute. Runs in eval mode (dropout would be noise
    that no one scores), backward() included, and gives the caller's mode back.

    generator: distinct noise for each item, seeded in the order of the prompts and drawn on the generator's
        own device, so it depends on neither grouping nor the policy's device; a list gives each item its own.
    grad_steps, checkpoint, method: see solvers.solve.
    """
    differentiable = grad_steps is None or bool(grad_steps)
    if differentiable:
        require_gradients("rollout", remedy="pass grad_steps=0 for samples without gradients")
    prompts = replace(prompts, durations_frames=policy.durations(prompts))
    generators = item_generators(generator, len(prompts))
    mels: dict[int, Tensor] = {}
    trajectories: dict[int, Tensor] = {}
    constant = getattr(policy, "velocity_without_gradient", None)
    with evaluating(policy), torch.set_grad_enabled(differentiable):
        t = policy.timesteps(steps, sway_sampling_coef=sway_sampling_coef)
        for rows in rows_by_duration(prompts):
            cond = policy.encode(prompts.select(rows), cfg_strength=cfg_strength)
            states = solve(
                velocity_as_now(policy, cond),
                policy.prior(cond, None if generators is None else [generators[row] for row in rows]),
                t,
                method=method,
                grad_steps=grad_steps,
                checkpoint=checkpoint,
                constant=None if constant is None else partial(constant, cond=cond),
            )
            mel = policy.finalize(states[-1], cond)
            for item, row in enumerate(rows):
                mels[row] = mel[item, cond.generated[item]]
                if return_trajectory:
                    trajectories[row] = torch.stack([state[item] for state in states])
    return collect_rollout(mels, trajectories)


def rows_by_duration(prompts: Prompts) -> list[list[int]]:
    """Places in the batch of the prompts of each total duration."""
    assert prompts.durations_frames is not None
    rows: dict[int, list[int]] = defaultdict(list)
    for row, duration in enumerate(prompts.durations_frames.tolist()):
        rows[duration].append(row)
    return list(rows.values())


def velocity_as_now(policy: Policy | ReferencePolicy, cond: Any) -> Velocity:
    """The policy's velocity under `cond`, always in the train/eval mode it has now."""
    if not isinstance(policy, nn.Module):
        return partial(policy.velocity, cond=cond)
    velocity = PureVelocity(
        keep_mode(policy, policy.velocity),
        cond,
        lambda: [weight for weight in weights_of(policy) if weight.requires_grad],
    )
    own = {"terms": getattr(policy, "velocity_terms", None)}
    if not policy.training:
        own["differentiate"] = getattr(policy, "differentiate", None)
    return replace(velocity, **{name: value for name, value in own.items() if value is not None})


def collect_rollout(mels: Mapping[int, Tensor], trajectories: Mapping[int, Tensor] | None = None) -> Rollout:
    """Mels [T, M], and trajectories [K+1, T_total, M] if any, by their place in the batch, padded and in order."""
    ordered = [mels[row] for row in range(len(mels))]
    lengths = torch.tensor([len(mel) for mel in ordered], device=ordered[0].device)
    trajectory = None
    if trajectories:
        longest = max(states.shape[1] for states in trajectories.values())
        padded = [F.pad(trajectories[row], (0, 0, 0, longest - trajectories[row].shape[1])) for row in range(len(mels))]
        trajectory = torch.stack(padded, dim=1)
    return Rollout(pad_sequence(ordered, batch_first=True), lengths, trajectory)


def require_gradients(caller: str, *, remedy: str) -> None:
    """Raise where autograd is off: a result that silently carries no gradient trains nothing."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise RuntimeError(
            f"{caller}: expected gradients to be enabled, got torch.{mode}; leave that context, or {remedy}"
        )


@contextmanager
def evaluating(policy: object) -> Iterator[None]:
    """Eval mode inside; outside, every module back in the mode it was in."""
    modules = modules_of(policy) if isinstance(policy, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        set_modes(modules, [False] * len(modules))
        yield
    finally:
        set_modes(modules, modes)


def item_generators(generator: Generators, batch: int) -> list[torch.Generator] | None:
    """A generator for each item, seeded in order by the one given; None stays None."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        if len(generator) != batch:
            raise ValueError(f"generator: expected one, or {batch} (one an item), got {len(generator)}")
        return list(generator)
    seeds = torch.randint(2**63 - 1, (batch,), generator=generator, device=generator.device)
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds.tolist()]


def item_noise(
    lengths_frames: Sequence[int],
    channels: int,
    generators: Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Standard normal [B, T, M], zero beyond each length; each item from its own generator, in float32."""
    if generators is None:
        rows = [torch.randn(length, channels, device=device, dtype=dtype) for length in lengths_frames]
    else:
        rows = [
            torch.randn(length, channels, generator=generator, device=generator.device).to(device, dtype)
            for length, generator in zip(lengths_frames, generators, strict=True)
        ]
    return pad_sequence(rows, batch_first=True)


LORA_TARGETS = (
    r".*(transformer_blocks|layers)\.\d+\.((attn|2)\.to_([qkv](_c)?|out\.0|out_c)|(ff|ff_[xc]|4)\.ff\.(0\.0|2))"
)
"""Attention and feed-forward of every block, of DiT, MMDiT and UNetT (which numbers its parts); not AdaLN: 42 % of
F5-TTS's weights, and it sees only time."""


def add_lora(policy: nn.Module, config: LoraConfig | None = None) -> nn.Module:
    """Put LoRA adapters into the policy, in place: only they train from now on.

    config: peft's; without `target_modules`, attention and feed-forward of every block are adapted.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, needed by few

    config = copy.copy(config) if config is not None else LoraConfig(r=16, lora_alpha=32)
    if config.target_modules is None:
        config.target_modules = LORA_TARGETS
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


def _only_lora_trains(policy: object) -> bool:
    named = policy.named_parameters() if isinstance(policy, nn.Module) else ()
    return all("lora_" in name for name, weight in named if weight.requires_grad)


class ReferencePolicy:
    """The policy as it was before training, frozen: the same weights with LoRA off, if LoRA is all that trains.

    Else a copy made now: base weights that train too (`modules_to_save`, biases) are on with LoRA off as well.
    """

    def __init__(self, policy: Policy):
        self._lora = lora_layers(policy) if _only_lora_trains(policy) else []
        self._policy = policy if self._lora else copy.deepcopy(policy)
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

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Its velocity; differentiated by x where x has a gradient, never by weights."""
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with self._as_it_was() as policy, torch.set_grad_enabled(differentiable):
            return policy.velocity(x, t, cond)

    def rollout(self, prompts: Prompts, **options: Any) -> Rollout:
        """What the policy would have said before training; options as for `rollout`."""
        with self._as_it_was() as policy:
            return rollout(policy, prompts, **{**options, "grad_steps": 0})
