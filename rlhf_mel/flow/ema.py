"""Averages of a policy's trainable weights over its updates, and policies that run on them.

    average <- decay average + (1 - decay) theta

`MovingAverage` is one average and the policy with it in place: evaluated and saved beside the online weights (trainer),
or a policy of its own. `LaggedPolicy` is the theta_old that DiffusionNFT (arXiv 2509.16117) and RAM (arXiv 2605.10759)
let make the rollouts and compare theta with. It follows theta from collection to collection,

    theta_old <- decay_n theta_old + (1 - decay_n) theta,    decay_n = min(rate n, maximum),    n updates so far

and holds still in between, so that all updates on one collection know the policy of the rollouts. Decay 0 is on-policy.

Only weights that are trained are averaged, so a LoRA run keeps a second set of adapters and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_mel.flow.policy import evaluating
from rlhf_mel.types import Prompts


def warmed_up(decay: float, updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)) at update n: warmed-up EMA decay, as flow_grpo's."""
    return min(decay, (1 + updates) / (10 + updates))


class MovingAverage:
    """A moving average of the trainable weights of `policy`, which begins at what they are now."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        # At least float32: in bfloat16 a small change of a weight would be rounded away, every time.
        self._average = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in self._trained()
        }

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.policy.named_parameters() if weight.requires_grad]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay average + (1 - decay) weights; decay 0 makes it an exact copy."""
        averages = [self._average[name] for name, _ in self._trained()]
        weights = [weight.to(average.dtype) for (_, weight), average in zip(self._trained(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[Any]:
        """The policy with the average for its weights inside; outside, exceptions included, with its own again."""
        trained = [(name, parameter, parameter.data) for name, parameter in self._trained()]
        try:
            for name, parameter, _ in trained:
                # The data is exchanged, not overwritten: a graph that waits for its backward() keeps its weights.
                parameter.data = self._average[name].to(parameter.dtype)
            torch.clear_autocast_cache()  # it knows a parameter by its identity, not by its data
            yield self.policy
        finally:
            for _, parameter, data in trained:
                parameter.data = data
            torch.clear_autocast_cache()

    @torch.no_grad()
    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        """The condition as the averaged policy sees it."""
        with self.applied() as policy, evaluating(policy):
            return policy.encode(prompts, cfg_strength=cfg_strength)

    @torch.no_grad()
    def velocity(self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: Any) -> Float[Tensor, "b n m"]:
        """The averaged policy's velocity, without gradient."""
        with self.applied() as policy, evaluating(policy):
            v: Tensor = policy.velocity(x, t, cond)
        return v

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the name of their weight, at least float32."""
        return {name: average.clone() for name, average in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: averages of other weights.
        """
        if state.keys() != self._average.keys():
            differing = sorted(state.keys() ^ self._average.keys())
            raise ValueError(
                f"average of weights: expected those of the {len(self._average)} that are trained, got {len(state)}, "
                f"of which {differing[:3]} ... differ; resume with the policy and LoRA options of the checkpoint"
            )
        for name, average in self._average.items():
            average.copy_(state[name])


def check_lag(name: str, rate: float, maximum: float, *, prefix: str = "old") -> None:
    """Raise a ValueError unless rate and maximum make decays of [0, 1); `name` is the algorithm's."""
    if not isinstance(rate, int | float) or rate < 0:
        raise ValueError(f"{prefix}_decay_rate of {name}: expected a number of at least 0, got {rate!r}")
    if not isinstance(maximum, int | float) or not 0 <= maximum < 1:
        raise ValueError(f"{prefix}_decay_max of {name}: expected a number of [0, 1), got {maximum!r}")


class LaggedPolicy:
    """theta_old of the module's docstring; begins as the policy of the first `refreshed`."""

    def __init__(self, rate: float, maximum: float) -> None:
        self._rate = rate
        self._maximum = maximum
        self._updates = 0
        self._behind = False
        self._average: MovingAverage | None = None
        self._saved: Mapping[str, Tensor] | None = None

    def refreshed(self, policy: Any) -> MovingAverage:
        """theta_old for a collection: moved towards `policy` if that was updated since the last one."""
        if self._average is None:
            self._average = MovingAverage(policy)
            if self._saved is not None:
                self._average.load_state_dict(self._saved)
        if self._behind:
            self._average.update(min(self._rate * self._updates, self._maximum))
            self._behind = False
        return self._average

    def on_update(self) -> None:
        """Count a step of the optimizer."""
        self._updates += 1
        self._behind = True

    def state_dict(self) -> dict[str, Any]:
        """The average, and where it is in its schedule."""
        weights = {} if self._average is None else self._average.state_dict()
        return {"updates": self._updates, "behind": self._behind, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, at the next `refreshed`."""
        self._updates, self._behind = state["updates"], state["behind"]
        self._saved, self._average = state["weights"] or None, None
