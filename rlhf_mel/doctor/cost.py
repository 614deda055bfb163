"""Checks of cost: what an update takes, in time and memory, and whether a batch takes more than its frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rlhf_mel.algorithms.families.pairs import clip_prompts
from rlhf_mel.doctor.case import Case, Examination, Finding, Status, trainable
from rlhf_mel.doctor.memory import MIB, free_bytes

SLOWER = 2.0
"""How many times longer than predicted an update may take; faster is expected, since batches use a device better."""


HEAVIER = 1.5
"""How many times more memory than predicted it may take; less is expected, since weights' gradients do not grow."""


ALLOCATOR_MIB = 64.0
"""What may come on top: allocators keep freed blocks, and a CPU's resident set counts them."""


MEMORY_SHARE = 0.9
"""Of the free memory, what an update may take."""


def check_cost(exam: Examination) -> Finding:
    """Seconds and memory of an update: those of the smallest batch times frames over its frames, and measured."""
    case = exam.case
    small, scale = exam.small, frames_ratio(case, exam.small_rows)
    device = case.prompts.reference_audio.device
    weights = trainable(case.pipeline.policy).values()
    optimizer_bytes = 2 * sum(weight.numel() * weight.element_size() for weight in weights)
    numbers = {
        "predicted_s": scale * (small.collect_s + small.loss_s),
        "predicted_mib": scale * small.peak_bytes / MIB,
        "optimizer_mib": optimizer_bytes / MIB,
        "free_mib": free_bytes(device) / MIB,
    }
    if isinstance(exam._attempt, torch.OutOfMemoryError):
        return Finding(name="cost", status="fail", numbers=numbers, advice=_fitting_batch(exam, numbers))
    update = exam.update
    numbers |= {
        "measured_s": update.collect_s + update.loss_s,
        "measured_mib": update.peak_bytes / MIB,
        "run_minutes": case.plan.seconds(update.collect_s, update.loss_s) / 60,
    }
    status, advice = _judge_cost(exam, numbers)
    return Finding(name="cost", status=status, numbers=numbers, advice=advice)


def _judge_cost(exam: Examination, numbers: Mapping[str, float]) -> tuple[Status, str]:
    if numbers["measured_mib"] + numbers["optimizer_mib"] > MEMORY_SHARE * numbers["free_mib"]:
        return "warn", "with the optimizer's state memory is nearly full; " + _fitting_batch(exam, numbers)
    advice = []
    if numbers["measured_mib"] > HEAVIER * numbers["predicted_mib"] + ALLOCATOR_MIB:
        advice.append(
            "the batch takes far more memory than its frames: set reward_batch_size (vocoder and rewards hear a batch "
            "padded to its longest), or look for what grows faster than frames, as attention maps do"
        )
    if numbers["measured_s"] > SLOWER * numbers["predicted_s"]:
        advice.append(
            "the batch takes far more time than its frames: look for swapping, for cpu_threads and other jobs, or "
            "lower per_device_train_batch_size and raise gradient_accumulation_steps"
        )
    return ("warn" if advice else "pass"), "; ".join(advice)


def _fitting_batch(exam: Examination, numbers: Mapping[str, float]) -> str:
    """Advice on the batch size, by the larger of the two memory figures."""
    batch = len(exam.case.prompts)
    per_rollout = max(numbers["predicted_mib"], numbers.get("measured_mib", 0.0)) / batch
    room = MEMORY_SHARE * numbers["free_mib"] - numbers["optimizer_mib"]
    fits = min(max(int(room / per_rollout), 1), max(batch - 1, 1)) if per_rollout > 0 else max(batch // 2, 1)
    return (
        f"lower per_device_train_batch_size from {batch} to at most {fits} and raise gradient_accumulation_steps, or "
        "train with --use_peft or --bf16"
    )


def frames_ratio(case: Case, rows: Sequence[int]) -> float:
    """Total mel frames of the batch over those of `rows`; of pairs, those of both clips."""
    asked = case.prompts if case.pairs is None else clip_prompts(case.pairs)
    frames = case.pipeline.policy.durations(asked).view(-1, len(case.prompts)).sum(0)
    return float(frames.sum() / frames[list(rows)].sum())
