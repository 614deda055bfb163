"""Callbacks of a run: clock, first gradient, averages of weights, metrics.jsonl and the console."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from typing_extensions import override

from rlhf_mel.flow.ema import MovingAverage, warmed_up
from rlhf_mel.progress import remaining
from rlhf_mel.training.run_folder import json_ready, metrics_line
from rlhf_mel.training.update import UpdateLoss

OF_PREFERENCES = ("rewards/accuracies", "rewards/margins", "chosen_error")
"""What one watches where preferences are learnt from."""


class StepClock(TrainerCallback):
    """Seconds an update, checkpoints and evaluations between updates left out."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds: list[float] = []

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds.append(time.perf_counter() - self._started)

    def pop(self) -> float:
        """Mean since the last call."""
        seconds, self._seconds = self._seconds, []
        return sum(seconds) / max(len(seconds), 1)


class AfterUpdate(TrainerCallback):
    """Tells the algorithm of each step of the optimizer."""

    def __init__(self, update_loss: UpdateLoss) -> None:
        self._update_loss = update_loss

    @override
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update_loss.algorithm.on_update(self._update_loss.pipeline)


class FirstGradient(TrainerCallback):
    """Warns of a first update whose gradient, clipped or not, moves no weight or is not finite."""

    def __init__(self) -> None:
        self._seen = False

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = False

    @override
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._seen and not args.fp16:  # whose loss scale begins so high that first gradients may overflow
            self._seen = True
            check_first_gradient([weight.grad for weight in model.parameters() if weight.grad is not None])


class FollowWeights(TrainerCallback):
    """Moves an average of the weights after each step of the optimizer."""

    def __init__(self, average: MovingAverage, decay: float) -> None:
        self._average = average
        self._decay = decay

    @override
    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._average.update(warmed_up(self._decay, state.global_step))


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one JSON object a log line. A resumed run drops the lines after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "metrics.jsonl"

    @override
    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text().splitlines() if self._file.exists() and state.global_step else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self._file.write_text("".join(f"{line}\n" for line in kept))

    @override
    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            with self._file.open("a") as file:
                file.write(json.dumps(json_ready({"step": state.global_step, **logs})) + "\n")


class Console(ProgressCallback):
    """A line a log step of what one watches and of the time that is left, and on a terminal a progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self._began = (0.0, 0)

    @override
    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = (time.monotonic(), state.global_step)
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]  # of transformers

    @override
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    @override
    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or not {"reward", *OF_PREFERENCES} & logs.keys():
            return
        watched = ("reward", *OF_PREFERENCES, "anchor", "kl", "loss", "grad_norm", "step_time", "dropped_rollouts")
        shown = {name: logs[name] for name in logs if name in watched and (name != "dropped_rollouts" or logs[name])}
        write = print if self.training_bar is None else self.training_bar.write
        started, first = self._began
        left = remaining(started, state.global_step - first, state.max_steps - first)
        write(f"{state.global_step:>8}/{state.max_steps}  {metrics_line(shown)}  {left}")

    @override
    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def check_first_gradient(gradients: Sequence[Tensor]) -> None:
    """Warn of a gradient that is 0, NaN or infinite; where beta is above 0, an anchor may hide that a reward's is 0."""
    norm = float(nn.utils.get_total_norm(gradients))
    if norm == 0 or not math.isfinite(norm):
        warn_at_start(f"first update: expected a finite gradient above 0, got one of norm {norm:g}")


def warn_at_start(fault: str) -> None:
    """Warn of a fault that the doctor can examine."""
    warnings.warn(f"{fault}; run `rlhf-mel doctor` with these options", stacklevel=3)
