"""Fine-tune a speaking policy by preferences: Flow-DPO on a data set of pairs, from YAML and flags to a report.

    accelerate launch recipes/flow_dpo.py --train_preferences runs/pairs             pairs of the policy's own samples
    accelerate launch recipes/flow_dpo.py --train_preferences OWNER/NAME --dataset_train_split train
    accelerate launch recipes/flow_dpo.py --train_preferences runs/pairs --algorithm sft_chosen --beta 0    the control
    accelerate launch recipes/flow_dpo.py --algorithm_kwargs '{"online": true}' --num_generations 8 \\
        --per_device_train_batch_size 32 --num_iterations 4 --save_steps 100         pairs made and ranked as it trains

Trains LoRA on the bundled policy with recipes/configs/flow_dpo.yaml, any field of RLHFConfig goes over it; all else is
as in recipes/drlx.py: held-out prompts before and after, report.html, policy/. The rewards are judges here, except
online, where they rank. Leaves out: making pairs (`rlhf-mel pairs`), answering them (`rlhf-mel annotate`).
Hardware: two CPU cores, or a GPU; an update of 8 pairs is 16 velocities with their gradients and 16 of the reference.
Number to expect: `loss` begins at log 2 = 0.69, whatever the pairs weigh; `rewards/accuracies` rises from 0.5 (at the
very first update it is 0: all rewards are), `chosen_error` stays about where it was. Where it rises, lower
learning_rate or set sft_weight: --algorithm_kwargs '{"sft_weight": 500}'.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import drlx

CONFIG = Path(__file__).parent / "configs/flow_dpo.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    if not any(item.split("=")[0] == "--config" for item in given):
        given = ["--config", str(CONFIG), *given]
    drlx.main(given)


if __name__ == "__main__":
    main()
