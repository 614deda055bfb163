"""Fine-tune a speaking policy with a reward: the recipe, from YAML and flags to a report.

    accelerate launch recipes/drlx.py                                            the demo: everything bundled, offline
    accelerate launch recipes/drlx.py --learning_rate 2e-5 --reward_models mos   any field of RLHFConfig
    accelerate launch recipes/drlx.py --config recipes/configs/NAME.yaml         a run from a file, flags go over it
    accelerate launch --multi_gpu --num_processes 2 recipes/drlx.py              data parallel, on GPUs or (gloo) CPUs

Without --config the file is recipes/configs/demo.yaml: DRaFT on the bundled 12 M parameter policy towards DistillMOS
and clear words, minutes on two CPU cores; docs/demo.md says what it reaches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before torch loads OpenMP: threads that wait for each other by spinning make a busy machine 15 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from rlhf_mel.training.arguments import lora_config, parse_arguments
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.training.trainer import RLHFTrainer


def use_cpu_threads(args: RLHFConfig) -> None:
    """Let a CPU run use the machine: `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise."""
    if args.device.type == "cpu":
        cores = max(1, (os.cpu_count() or 1) // args.world_size)
        torch.set_num_threads(args.cpu_threads or min(cores, 8))


DEMO = Path(__file__).parent / "configs/demo.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    flags = {item.split("=")[0] for item in given}
    if "--config" not in flags:
        # the demo's algorithm_kwargs are of the demo's algorithm
        given = ["--config", str(DEMO), *(["--algorithm_kwargs", "{}"] if "--algorithm" in flags else []), *given]
    try:
        args, model_config = parse_arguments(given)
    except (ValueError, OSError) as error:
        raise SystemExit(f"drlx.py: {error}") from None
    use_cpu_threads(args)
    trainer = RLHFTrainer(args=args, peft_config=lora_config(model_config))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
