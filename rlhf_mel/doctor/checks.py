"""Before a run: is what the equations take for granted true of this policy, these rewards and this configuration?

    rlhf-mel doctor --config my.yaml --json checks.json          any flag of RLHFConfig goes over the file

| check             | measured                                                            | fails where                |
|-------------------|---------------------------------------------------------------------|----------------------------|
| zero noise = ODE  | SDE rollout at noise 0 against the ODE's, `deviation`               | above the tolerance        |
| first ratio = 1   | ratio and log-probability of fresh rollouts, computed again         | off by the clip range      |
| reward spread     | rewards of one batch: finite, different within their group          | nothing to compare         |
| batch = single    | mel and reward of an item in the batch against those of it alone    | above the tolerance        |
| gradient          | norm by the trainable weights: of the loss, of the reward alone     | 0, NaN or infinite         |
| SDE near ODE      | mean reward of noisy rollouts less that of ODE rollouts             | (warns if far below)       |
| cost              | seconds and memory of one update, scaled from a small one, and real | out of memory (else warns) |

`deviation` is the root mean square difference of an item's mel over the standard deviation of that mel, of the worst
item. Items of one total duration are solved together (policy.rollout), so `batch = single` gives its items one.
Of a run on pairs of a data set the update, its gradient and its cost are those of the pairs; policy and rewards, which
its evaluations need, are examined on the prompts of these; rewards need not differ, and `reward spread` is skipped.
All checks share one real update on the run's first micro-batch: collect, loss and backward, without the optimizer.
Weights, their `.grad`, the algorithm's state and the global generators are left as they were.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from rlhf_mel.data.preferences.load import PairBatch
from rlhf_mel.doctor.case import Case, Examination, Finding, Plan
from rlhf_mel.doctor.cost import check_cost
from rlhf_mel.doctor.gradient import check_gradient
from rlhf_mel.doctor.noise import check_first_ratio, check_sde_near_ode, check_zero_noise
from rlhf_mel.doctor.spread import check_batch_is_single, check_reward_spread
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.training.trainer import RLHFTrainer

CHECKS: Mapping[str, Callable[[Examination], Finding]] = {
    "zero noise = ODE": check_zero_noise,
    "first ratio = 1": check_first_ratio,
    "reward spread": check_reward_spread,
    "batch = single": check_batch_is_single,
    "gradient": check_gradient,
    "SDE near ODE": check_sde_near_ode,
    "cost": check_cost,
}


def examine(case: Case) -> Iterator[Finding]:
    """All checks, one after the other; one that raises has failed, and says with what."""
    exam = Examination(case)
    for name, check in CHECKS.items():
        with global_generators_kept():
            finding = _guarded(name, check, exam)
        yield finding


def _guarded(name: str, check: Callable[[Examination], Finding], exam: Examination) -> Finding:
    try:
        return check(exam)
    except Exception as error:  # whatever a policy or reward of one's own may raise is a finding
        said = " ".join(str(error).split())
        return Finding(name=name, status="fail", numbers={}, advice=f"raised {type(error).__name__}: {said}")


def doctor(args: RLHFConfig, peft_config: LoraConfig | None = None, json_file: Path | None = None) -> int:
    """Examine the run that `args` describe, a line a check; 1 if a check failed, else 0.

    Raises:
        ValueError: what the trainer raises for a run that cannot begin.
    """
    if args.world_size > 1:
        raise ValueError(f"doctor: expected one process, got {args.world_size}; start it without accelerate launch")
    with global_generators_kept(), tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder  # of this object alone: the run's own folder is not begun
        case = case_of(RLHFTrainer(args=args, peft_config=peft_config))
        findings = []
        for finding in examine(case):
            findings.append(finding)
            print(line(finding), flush=True)
    if json_file is not None:
        write_json(json_file, findings)
    return int(any(finding.status == "fail" for finding in findings))


def case_of(trainer: RLHFTrainer) -> Case:
    """The trainer's first micro-batch and its plan."""
    args = trainer.args
    loader = trainer.get_train_dataloader()
    (batch,) = next(iter(loader)).values()
    pairs = batch.to(args.device) if isinstance(batch, PairBatch) else None
    a_epoch = max(len(loader) // args.gradient_accumulation_steps, 1)
    updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * a_epoch)
    update_loss: Any = trainer.model
    return Case(
        algorithm=update_loss.algorithm,
        pipeline=trainer.pipeline,
        prompts=batch.to(args.device) if pairs is None else pairs.prompts,
        pairs=pairs,
        plan=Plan(updates=updates, micro_batches=args.gradient_accumulation_steps, iterations=args.num_iterations),
        seed=args.seed,
        precision=trainer.accelerator.autocast,
    )


def line(finding: Finding) -> str:
    """`status  name  numbers  -> what to change`, aligned."""
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in finding.numbers.items())
    advice = f"-> {finding.advice}" if finding.advice else ""
    return f"{finding.status:<7}  {finding.name:<16}  {'  '.join(part for part in (numbers, advice) if part)}".rstrip()


def write_json(path: Path, findings: Sequence[Finding]) -> None:
    """{"failed": count, "checks": [...]}; NaN and infinity, which JSON lacks, as null."""
    checks = [
        {**asdict(f), "numbers": {name: value if math.isfinite(value) else None for name, value in f.numbers.items()}}
        for f in findings
    ]
    failed = sum(finding.status == "fail" for finding in findings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"failed": failed, "checks": checks}, indent=2) + "\n", encoding="utf-8")


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """The global generators of torch, numpy and Python leave as they came, whatever a model draws from them."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
