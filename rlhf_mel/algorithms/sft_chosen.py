"""SFT on the chosen clips: plain flow matching, the control that a method of preferences has to be better than.

    loss = mean by weight of |v_theta(x_t, t) - u|^2(chosen) + beta mean by weight of |v_theta - v_ref|^2(chosen)

What a preference teaches beyond "this is good speech" is what Flow-DPO gains over this. Same data, order, options and
draws as there (families/pairs.py); rejected clips, soft labels and margins are not looked at. beta is the weight of the
anchor, as in the other algorithms, and 0 unless given. With `online` it learns from the best of each group of rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.families.pairs import PairAlgorithm, Pairs, PairTrainingOptions, weighted_mean
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline


class SFTChosen(PairAlgorithm):
    """Flow matching to chosen clips; see the top."""

    name = "sft_chosen"
    default_beta = 0.0

    @dataclass(frozen=True, kw_only=True)
    class Config(PairTrainingOptions):
        """The family's."""

        def __post_init__(self) -> None:
            self.check("sft_chosen")

    config: Config

    def __init__(self, config: Config | None = None, *, beta: float = default_beta) -> None:
        super().__init__(config, beta=beta)

    @override
    def check(self, pipeline: Pipeline) -> None:
        """Nothing: it needs no reference."""

    @override
    def loss(
        self, pipeline: Pipeline, collected: Pairs, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        rows = range(len(collected.weights))
        fit = self.fit(pipeline, collected.clips.select(rows, rows), generator)
        loss = weighted_mean(fit.errors, collected.weights) + self.beta * weighted_mean(fit.anchors, collected.weights)
        errors, anchors = fit.errors.detach().mean(0), fit.anchors.detach().mean(0)
        return loss, {**collected.metrics, "chosen_error": errors, "anchor": anchors}


algorithm = SFTChosen
