"""What an algorithm is: a batch of prompts in, `(loss, metrics)` out. One file each; the file's name is its name.

    prompts --policy--> mel --vocoder--> waveform --reward models--> scores

    collected = collect(prompts)    once, without gradients;    loss(collected)    for each of num_iterations updates

One that `learns_from_pairs` has batches of a preference data set in the place of prompts: `collect_pairs(pairs)`.

`Pipeline` is that path, the same for every algorithm. An algorithm declares what it needs of it (`reward_gradient`)
and what others may look at (`clip`, `step_noise`, `trajectories`), and checks the path once, before the first update.

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
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

import rlhf_mel.algorithms
from rlhf_mel.data.preferences.load import PairBatch, PreferenceDataset
from rlhf_mel.flow.ema import LaggedPolicy
from rlhf_mel.flow.sde import SDE
from rlhf_mel.flow.sde_rollout import Trajectory
from rlhf_mel.lookup import did_you_mean, load_object
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline, require_reward_gradient
from rlhf_mel.types import Prompts


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How far a ratio counts, and in which form."""

    low: float
    """eps_low; infinite: no bound."""
    high: float
    guard: bool = False
    """The ratio and the weights of steps of GRPO-Guard."""

    @classmethod
    def of(cls, epsilon: float, epsilon_high: float | None, *, guard: bool = False) -> Clip:
        """From options of an algorithm; without an upper range it is the lower one."""
        return cls(low=epsilon, high=epsilon if epsilon_high is None else epsilon_high, guard=guard)


@runtime_checkable
class Algorithm(Protocol):
    """Turns prompts into a loss. `AlgorithmBase` has a plain default of everything but `name` and `loss`.

    Its class has a nested `Config`, a dataclass that checks its own values. An algorithm with a state of its own (say,
    an average of the weights) also has `state_dict()` and `load_state_dict(state)`: tensors, numbers and strings, saved
    with every checkpoint and restored on resume.
    """

    name: str
    reward_gradient: bool
    """Whether the loss differentiates the rewards with respect to the mel."""
    needs_groups: bool
    """Whether it compares rollouts of one prompt with each other: num_generations must be at least 2."""
    default_beta: float
    """`beta` of a run that names none."""
    learns_from_pairs: bool
    """Whether its batches are pairs of clips that someone compared, and not prompts."""

    @property
    def clip(self) -> Clip | None:
        """How far ratios of probabilities count; None: the loss has no ratios."""
        ...

    @property
    def step_noise(self) -> SDE | None:
        """Noise in the steps of its rollouts; None: they follow the ODE."""
        ...

    def check(self, pipeline: Pipeline) -> None:
        """Raise a ValueError if the pipeline lacks something that the loss needs."""
        ...

    def check_pairs(self, preferences: PreferenceDataset) -> None:
        """Raise a ValueError if the data set lacks something that the loss needs."""
        ...

    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> Any:
        """What `loss` learns from, made without gradients and kept for `num_iterations` updates."""
        ...

    def collect_pairs(self, pipeline: Pipeline, pairs: PairBatch, generator: torch.Generator) -> Any:
        """The same of a batch of preferences, where it `learns_from_pairs`."""
        ...

    def loss(self, pipeline: Pipeline, collected: Any, generator: torch.Generator) -> tuple[Float[Tensor, ""], Metrics]:
        """The loss of one batch, and what to log of it."""
        ...

    def trajectories(self, collected: Any) -> Sequence[Trajectory]:
        """The random steps in what was collected, if it has any."""
        ...

    def on_update(self, pipeline: Pipeline) -> None:
        """Called after each step of the optimizer."""
        ...


class AlgorithmBase:
    """An algorithm without probabilities and groups, that learns from nothing but prompts; subclasses add `loss`.

    Args:
        config: of the nested class `Config`; None: its defaults.
        beta: weight of what ties the policy to its reference.
    """

    name: ClassVar[str]
    Config: ClassVar[Any]
    reward_gradient = False
    needs_groups = False
    default_beta = 1.0
    learns_from_pairs = False

    def __init__(self, config: Any = None, *, beta: float = 0.0) -> None:
        self.config = self.Config() if config is None else config
        self.beta = beta

    @property
    def clip(self) -> Clip | None:
        """See `Algorithm`."""
        return None

    @property
    def step_noise(self) -> SDE | None:
        """See `Algorithm`."""
        return None

    def check(self, pipeline: Pipeline) -> None:
        """Raise a ValueError if the loss follows a gradient that the vocoder or a reward does not have."""
        if self.reward_gradient:
            require_reward_gradient(self.name, pipeline)

    def check_pairs(self, preferences: PreferenceDataset) -> None:
        """Nothing is asked of them."""

    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> Any:
        """The prompts as they are."""
        return prompts

    def collect_pairs(self, pipeline: Pipeline, pairs: PairBatch, generator: torch.Generator) -> Any:
        """Where an algorithm `learns_from_pairs`, it has a method of its own."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method collect_pairs, got none")

    def loss(self, pipeline: Pipeline, collected: Any, generator: torch.Generator) -> tuple[Float[Tensor, ""], Metrics]:
        """The loss of one batch, and what to log of it."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method loss, got none; see CONTRIBUTING.md")

    def trajectories(self, collected: Any) -> Sequence[Trajectory]:
        """None."""
        return ()

    def on_update(self, pipeline: Pipeline) -> None:
        """Nothing to do."""


class LaggedAlgorithm(AlgorithmBase):
    """An algorithm with an average of past policies, which moves after updates and is kept in checkpoints."""

    def __init__(self, config: Any = None, *, beta: float = 0.0) -> None:
        super().__init__(config, beta=beta)
        self._lagged = LaggedPolicy(*self.lag())

    def lag(self) -> tuple[float, float]:
        """Growth of the average's decay an update, and its limit (`LaggedPolicy`)."""
        return self.config.old_decay_rate, self.config.old_decay_max

    @override
    def on_update(self, pipeline: Pipeline) -> None:
        self._lagged.on_update()

    def state_dict(self) -> dict[str, Any]:
        """Of the average."""
        return self._lagged.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
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
            raise ValueError(
                f"unknown option {option!r} of algorithm {name!r}: expected some of {known}"
                f"{did_you_mean(option, known)}"
            )
    return cast(Algorithm, factory(factory.Config(**(options or {})), beta=beta))


def algorithm_class(name: str) -> Any:
    """The class behind a name that `load_algorithm` takes; raises ValueError for an unknown one."""
    known = known_algorithms()
    if ":" not in name and name not in known:
        raise ValueError(
            f"unknown algorithm {name!r}: expected one of {known} or 'package.module:Class'{did_you_mean(name, known)}"
        )
    return load_object(name if ":" in name else f"rlhf_mel.algorithms.{name}:algorithm", "algorithm")
