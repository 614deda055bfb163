"""Checks of gradients: does the reward's reach the weights, and where does it break."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_mel.doctor.case import Examination, Finding, Status
from rlhf_mel.training.first_batch import all_equal


def check_gradient(exam: Examination) -> Finding:
    """What the first update would do to the weights. LoRA starts with half of its weights at gradient zero.

    Where the loss follows the reward's own gradient, that is measured alone too: an anchor has one without any reward.
    """
    update = exam.update
    numbers = {"loss": update.loss, **gradient_numbers(update.gradients)}
    if exam.case.algorithm.reward_gradient:
        numbers["reward_gradient_norm"] = gradient_numbers(exam.reward_gradients)["gradient_norm"]
    numbers["dropped_rollouts"] = float(update.metrics.get("dropped_rollouts", torch.zeros(1)).sum())
    status, advice = _judge_gradient(exam, numbers)
    return Finding(name="gradient", status=status, numbers=numbers, advice=advice)


def gradient_numbers(gradients: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Norm over all weights; shares of zeros, of the numbers and of whole tensors; tensors outside of the loss."""
    present = [gradient.detach().float() for gradient in gradients.values() if gradient is not None]
    zeros = sum(int((gradient == 0).sum()) for gradient in present)
    elements = sum(gradient.numel() for gradient in present)
    empty = sum(not bool(gradient.any()) for gradient in present)
    return {
        "gradient_norm": math.sqrt(sum(float(gradient.double().square().sum()) for gradient in present)),
        "zero_share": zeros / elements if elements else 1.0,
        "zero_tensors": empty / len(present) if present else 1.0,
        "unused_tensors": len(gradients) - len(present),
    }


def _judge_gradient(exam: Examination, numbers: Mapping[str, float]) -> tuple[Status, str]:
    norm = numbers["gradient_norm"]
    reward_norm = numbers.get("reward_gradient_norm", norm)
    if not exam.update.gradients:
        return "fail", "the policy has no trainable weight: set requires_grad, or --use_peft"
    if not all(map(math.isfinite, (norm, reward_norm, numbers["loss"]))):
        return "fail", "loss or gradient is NaN or infinite: " + _where_it_breaks(exam)
    if norm == 0:
        return "fail", "no weight would move: " + _where_it_breaks(exam)
    if reward_norm == 0:
        return "fail", "the weights would follow the anchor alone: " + _where_it_breaks(exam)
    if numbers["dropped_rollouts"]:
        return "warn", "rollouts without a finite reward or gradient are left out: see which, and why"
    if numbers["unused_tensors"]:
        return "warn", "trainable weights take no part in the loss: freeze them (or --ddp_find_unused_parameters true)"
    if numbers["zero_tensors"] > 0.5:
        return "warn", "most weight tensors get no gradient: look for zero initialisation and detach in the policy"
    return "pass", ""


def _where_it_breaks(exam: Examination) -> str:
    """Which part of policy -> mel -> sound -> reward the fault lies in."""
    if exam.case.pairs is not None:
        return "look for detach or no_grad in encode and velocity, and for soft labels of 0.5 or weights of 0"
    if not exam.case.algorithm.reward_gradient:
        flat = all_equal(exam.rewards[exam.rewards.isfinite()])
        return "all rewards are equal" if flat else "look for detach or no_grad in encode and velocity"
    with torch.enable_grad():
        mel = exam.ode.mel.detach().clone().requires_grad_()
        total = exam.case.pipeline.score(replace(exam.ode, mel=mel), exam.case.prompts).total.sum()
        (gradient,) = torch.autograd.grad(total, mel, allow_unused=True) if total.requires_grad else (None,)
    if gradient is None or not bool(gradient.any()):
        return "the reward has no gradient at the mel; look for detach, numpy, rounding or clamps in vocoder and reward"
    if not bool(gradient.isfinite().all()):
        return "the reward's gradient at the mel is not finite; look for sqrt, log or division at 0, e.g. in padding"
    return "the reward's gradient reaches the mel; look for detach or no_grad in encode, velocity and finalize"
