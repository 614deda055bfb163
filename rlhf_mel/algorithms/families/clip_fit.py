"""How much better than its reference a policy fits a clip: the core of what learns from preferences.

    x_t = (1 - t) x_0 + t x_1,    u = x_1 - x_0                        x_1: the mel of a clip; x_0, t: drawn
    r(x_1) = -(beta / 2) (|v_theta(x_t, t) - u|^2 - |v_ref(x_t, t) - u|^2)

r is the implicit reward of the policy, in the place of DPO's beta log p_theta / p_ref, which a flow does not have: the
error of a regression bounds a likelihood, and no more than that, so there are no `logps` here.

|.|^2 is a mean over the elements of the generated frames, as in the repository of Flow-DPO's first author. So beta does
not depend on the length of a clip, and a beta of 2000 on 200 frames of 100 channels is 0.1 a unit of a summed error.
beta is constant over time, as Flow-DPO's paper recommends over the beta_t that its derivation leads to.

Time and noise are shared by clips with one number, frame by frame: of unequal clips the shorter has the first frames of
the longer one's noise. Or each clip has the noise that its own sampling began with, where that is known.

Frames of the reference clip are in x_1 as `finalize` pastes them in, as in pretraining; only generated frames count.
The end of the flow must be the log mel itself. Clips of one total duration are taken together, so each is what it would
be alone. Losses are float32.

References: Wallace et al. 2023, Diffusion-DPO, arXiv 2311.12908; Liu et al. 2025, Flow-DPO, arXiv 2501.13918, and the
DPO of github.com/yifan123/flow_grpo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.algorithms.families.forward_process import ForwardProcessOptions, draw_times
from rlhf_mel.flow.noise import item_generators, of_rows
from rlhf_mel.flow.path import interpolate, velocity
from rlhf_mel.flow.policy import Policy, Velocities, evaluating, rows_by_duration, velocity_as_now
from rlhf_mel.flow.recompute import differentiated
from rlhf_mel.masked import counted_mean, lengths_to_mask
from rlhf_mel.types import Prompts, Rollout


@dataclass(frozen=True, kw_only=True)
class Clips:
    """c clips of speech, and what they are said to be an answer to."""

    prompts: Prompts
    """With `durations_frames` as the clips have them."""
    rollouts: Rollout
    draw_ids: Sequence[int]
    """Clips with one number share times and noise; numbers from 0."""
    noise: Sequence[Float[Tensor, "_ m"]] | None = None
    """Where the sampling of each clip began, over all frames of its state; None: it is drawn."""

    def select(self, rows: Sequence[int], draw_ids: Sequence[int]) -> Clips:
        """The clips at `rows`, in that order, with these numbers."""
        mel, lengths_frames = self.rollouts.mel[list(rows)], self.rollouts.lengths_frames[list(rows)]
        return Clips(
            prompts=self.prompts.select(rows),
            rollouts=Rollout(mel=mel, lengths_frames=lengths_frames),
            draw_ids=draw_ids,
            noise=None if self.noise is None else [self.noise[row] for row in rows],
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well velocities fit c clips at n draws of time and noise, with gradients of the policy's."""

    errors: Float[Tensor, "n c"]
    """|v_theta - u|^2."""
    excess: Float[Tensor, "n c"]
    """|v_theta - u|^2 - |v_ref - u|^2; 0 without a reference."""
    anchors: Float[Tensor, "n c"]
    """|v_theta - v_ref|^2; 0 without a reference."""

    def rewards(self, beta: float) -> Float[Tensor, "n c"]:
        """Implicit rewards r."""
        return -beta / 2 * self.excess


@torch.no_grad()
def starting_noise(
    policy: Policy, prompts: Prompts, generators: Sequence[torch.Generator], draws: int = 1
) -> list[list[Float[Tensor, "_ m"]]]:
    """x_0 of each prompt, which has its duration, as `policy.rollout` draws it from these generators; a list a draw."""
    noise: list[dict[int, Tensor]] = [{} for _ in range(draws)]
    for rows in rows_by_duration(prompts):
        cond = policy.encode(prompts.select(rows), cfg_strength=0.0)
        for drawn in noise:
            drawn |= zip(rows, policy.prior(cond, of_rows(generators, rows)), strict=True)
    return [[drawn[row] for row in range(len(prompts))] for drawn in noise]


def fit_of(
    policy: Policy,
    reference: Velocities | None,
    clips: Clips,
    options: ForwardProcessOptions,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Fit:
    """How well policy and reference fit the clips.

    Args:
        options: draws, times and guidance; no guidance unless it is given.
        generator: for times and noise; one for all, seeded in the order of `draw_ids`, or one for each of these.

    Raises:
        ValueError: the policy makes more or fewer frames of a prompt than its clip has.
    """
    count = max(clips.draw_ids) + 1
    generators = item_generators(generator, count)
    assert generators is not None
    times = draw_times(count, options, generators)[:, list(clips.draw_ids)]
    starts = _starts(policy, clips, generators, options.num_noise_samples)
    guidance = options.loss_cfg_strength or 0.0
    by_duration = rows_by_duration(clips.prompts)
    checkpoint = len(by_duration) * len(times) > 1  # else one velocity's graph is all there is
    with evaluating(policy):
        fits = [
            _fit_rows(policy, reference, clips, rows, times[:, rows], starts, guidance, checkpoint)
            for rows in by_duration
        ]
    order = torch.tensor([row for rows in by_duration for row in rows]).argsort()
    errors, excess, anchors = (torch.cat(parts, dim=1)[:, order] for parts in zip(*fits, strict=True))
    return Fit(errors=errors, excess=excess, anchors=anchors)


@torch.no_grad()
def _starts(
    policy: Policy, clips: Clips, generators: Sequence[torch.Generator], draws: int
) -> list[list[Float[Tensor, "_ m"]]]:
    """x_0 of each clip in each draw: its own, or the first frames of that of the longest with its number."""
    if clips.noise is not None:
        return [list(clips.noise)] * draws
    assert clips.prompts.durations_frames is not None
    totals = clips.prompts.durations_frames.tolist()
    longest: dict[int, int] = {}
    for row, number in enumerate(clips.draw_ids):
        if number not in longest or totals[row] > totals[longest[number]]:
            longest[number] = row
    prompts = clips.prompts.select([longest[number] for number in range(len(generators))])
    drawn = starting_noise(policy, prompts, generators, draws)
    return [[noise[number][:total] for number, total in zip(clips.draw_ids, totals, strict=True)] for noise in drawn]


def _fit_rows(
    policy: Policy,
    reference: Velocities | None,
    clips: Clips,
    rows: Sequence[int],
    times: Float[Tensor, "n r"],
    starts: Sequence[Sequence[Float[Tensor, "_ m"]]],
    guidance: float,
    checkpoint: bool,
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "n r"], Float[Tensor, "n r"]]:
    """Errors, excess and anchors (`Fit`) of the clips at `rows`, which share a total duration."""
    prompts = clips.prompts.select(rows)
    cond = policy.encode(prompts, cfg_strength=guidance)
    cond_ref = None if reference is None else reference.encode(prompts, cfg_strength=guidance)
    x1, counted = clip_ends(policy, clips, rows, cond), cond.generated
    function = differentiated(velocity_as_now(policy, cond), checkpoint)
    errors, excess, anchors = [], [], []
    for drawn, start in zip(times, starts, strict=True):
        noise = torch.stack([start[row] for row in rows])
        t = drawn.to(noise).float()  # as the policy sees it, so that x_t is where it believes to be
        x0 = noise.float()
        at, u = (interpolate(x0, x1, t).to(noise), t.to(noise)), velocity(x0, x1)
        v = function(*at).float()
        v_ref = v
        if reference is not None:
            with torch.no_grad():
                v_ref = reference.velocity(*at, cond_ref).float()
        errors.append(counted_mean((v - u).square(), counted))
        # (v - u)^2 - (v_ref - u)^2, without the difference of two numbers that are nearly equal
        excess.append(counted_mean((v - v_ref) * (v + v_ref - 2 * u), counted))
        anchors.append(counted_mean((v - v_ref).square(), counted))
    return torch.stack(errors), torch.stack(excess), torch.stack(anchors)


def clip_ends(policy: Policy, clips: Clips, rows: Sequence[int], cond: Any) -> Float[Tensor, "r n m"]:
    """x_1, float32: the mels at `rows` where the policy generates, elsewhere what `finalize` pastes in."""
    mel, lengths_frames = clips.rollouts.mel[list(rows)], clips.rollouts.lengths_frames[list(rows)]
    generated = cond.generated.sum(1)
    if not torch.equal(generated, lengths_frames):
        raise ValueError(
            f"clips: expected as many frames as the policy generates, {generated.tolist()}, got "
            f"{lengths_frames.tolist()}; mels of another kind, or a policy that does not follow generated_frames"
        )
    x1 = mel.new_zeros(*cond.generated.shape, mel.shape[-1])
    x1[cond.generated] = mel[lengths_to_mask(lengths_frames, mel.shape[1])]
    return policy.finalize(x1, cond).float().detach()
