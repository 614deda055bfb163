"""What an algorithm is: a batch of prompts in, `(loss, metrics)` out. One file each; the file's name is its name.

    prompts --policy--> mel --vocoder--> waveform --reward models--> scores

    collected = collect(prompts)    once, without gradients;    loss(collected)    for each of num_iterations updates

`Pipeline` is that path, the same for every algorithm. An algorithm declares what it needs of it
(`reward_gradient`) and checks it once, before the first update.

The anchor to the reference policy is the mean over time, frames and mel channels of |v - v_ref|^2 along the policy's
own path. For any SDE with the marginals of the flow, dx = (v + sigma^2 s / 2) dt + sigma dW, the score
s = (t v - x) / (1 - t) is linear in v (see path.py), so by Girsanov's theorem

    KL(path || path_ref) = E int (1 + sigma^2 t / (2 (1 - t)))^2 / (2 sigma^2) |v - v_ref|^2 dt:

the anchor is the integrand without its factor of t (for the memoryless sigma^2 = 2 (1 - t) / t of Adjoint Matching,
arXiv 2409.08861, that factor is t / (1 - t)), and it bounds the Wasserstein-2 distance between what the two flows
generate (ORW-CFM-W2, arXiv 2502.06061). It is not called `kl`, since a flow without noise has none.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

import rlhf_mel.algorithms
from rlhf_mel.flow.ema import LaggedPolicy
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts


@runtime_checkable
class Algorithm(Protocol):
    """Turns prompts into a loss. Its class has a nested `Config`, a dataclass that checks its own values.

    An algorithm with a state of its own (say, an average of the weights) also has `state_dict()` and
    `load_state_dict(state)`: tensors, numbers and strings, saved with every checkpoint and restored on resume.
    """

    name: str
    reward_gradient: bool
    """Whether the loss differentiates the rewards with respect to the mel."""
    needs_groups: bool
    """Whether it compares rollouts of one prompt with each other: num_generations must be at least 2."""
    default_beta: float
    """`beta` of a run that names none."""

    def check(self, pipeline: Pipeline) -> None:
        """Raise a ValueError if the pipeline lacks something that the loss needs."""
        ...

    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> Any:
        """What `loss` learns from, made without gradients and kept for `num_iterations` updates."""
        ...

    def loss(self, pipeline: Pipeline, collected: Any, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """The loss of one batch, and what to log of it."""
        ...

    def on_update(self, pipeline: Pipeline) -> None:
        """Called after each step of the optimizer."""
        ...


class AlgorithmBase:
    """What most algorithms share: nothing to collect but the prompts, nothing to do after an update."""

    reward_gradient = False
    needs_groups = False
    default_beta = 1.0

    def check(self, pipeline: Pipeline) -> None:
        return None

    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> Any:
        return prompts

    def on_update(self, pipeline: Pipeline) -> None:
        return None


class LaggedAlgorithm(AlgorithmBase):
    """An algorithm with an average of past policies, which moves after updates and is kept in checkpoints."""

    _lagged: LaggedPolicy

    def on_update(self, pipeline: Pipeline) -> None:
        self._lagged.on_update()

    def state_dict(self) -> dict[str, Any]:
        return self._lagged.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lagged.load_state_dict(state)


def known_algorithms() -> list[str]:
    """The names `load_algorithm` knows: files of this package."""
    modules = pkgutil.iter_modules(rlhf_mel.algorithms.__path__)
    return sorted(module.name for module in modules if module.name != "base" and not module.ispkg)


def load_algorithm(name: str, options: Mapping[str, Any] | None = None, *, beta: float = 0.0) -> Algorithm:
    """The algorithm called `name` (or your own, 'package.module:Class'), with `options` of its Config.

    Raises:
        ValueError: an unknown name or option; the message lists the known ones.
    """
    factory = algorithm_class(name)
    known = [f.name for f in dataclasses.fields(factory.Config)]
    for option in options or {}:
        if option not in known:
            raise ValueError(f"unknown option {option!r} of algorithm {name!r}: expected some of {known}")
    return factory(factory.Config(**(options or {})), beta=beta)


def algorithm_class(name: str) -> Any:
    """The class behind a name that `load_algorithm` takes; raises ValueError for an unknown one."""
    if ":" in name:
        module_name, class_name = name.split(":", 1)
        return getattr(importlib.import_module(module_name), class_name)
    if name not in known_algorithms():
        raise ValueError(f"unknown algorithm {name!r}: expected one of {known_algorithms()} or 'package.module:Class'")
    return importlib.import_module(f"rlhf_mel.algorithms.{name}").algorithm
