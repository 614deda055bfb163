"""RLHFTrainer: `transformers.Trainer` driving an algorithm, and the run folder it leaves behind.

    loss(theta) = algorithm.loss(algorithm.collect(policy -> vocoder -> rewards))

What Accelerate wraps is `UpdateLoss`: the policy is its only child, its `forward` is the loss. So DDP's hooks fire,
and what is frozen (vocoder, rewards, reference policy) is in no bucket, checkpoint or optimizer. Gradient accumulation,
clipping, schedules, checkpoints and resuming are the Trainer's.

What `collect` returns is kept for `num_iterations` updates, in TRL's sense: with G micro-batches an update, batches
b1..bG are collected in the first update and used again, in that order, by the next ones. Only checkpoints between two
collections, at multiples of num_iterations, resume to the bit; from any other the batches are collected anew.

The noise of every update is a function of (seed, step, process, micro-batch) and the order of the prompts one of (seed,
epoch): a resumed run needs no saved generator to continue as the uninterrupted one.

    output_dir/  config.yaml  metrics.jsonl  checkpoint-N/  samples/  summary.json  report.html  policy/

With `ema_decay` an average of the trained weights follows them (see ema.py), is evaluated beside them (`eval_ema_*`,
`after_ema`) and saved as policy_ema/.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from rlhf_mel.algorithms.base import Algorithm, Metrics, Pipeline, Sampling, load_algorithm, pool
from rlhf_mel.checkpoints import load_policy, save_policy
from rlhf_mel.config import RLHFConfig, save_config
from rlhf_mel.data import GroupSampler, PromptDataset, PromptOptions, load_dataset_prompts, load_prompts, mix_seed
from rlhf_mel.ema import MovingAverage, warmed_up
from rlhf_mel.evaluate import EvaluationResult, evaluate
from rlhf_mel.export import push_to_hub, save_lora
from rlhf_mel.policy import ReferencePolicy, add_lora
from rlhf_mel.policy_gradient import Clip
from rlhf_mel.progress import duration, remaining
from rlhf_mel.recognizer import Recognizer, load_recognizer
from rlhf_mel.report import write_report
from rlhf_mel.rewards import Rewards, RewardSpec
from rlhf_mel.types import Prompts
from rlhf_mel.verdict import in_words, verdict
from rlhf_mel.vocoders import Vocoder, load_vocoder

SHOWN = ("reward", "dnsmos_ovrl", "cer", "voice_similarity")
"""What the console says of an evaluation; summary.json and report.html have all of it."""

HUB_DATASETS = "hf://datasets/"
"""How the Hugging Face libraries write where a data set is; before its id."""

ALGORITHM_STATE = "algorithm.pt"
"""File of a checkpoint with the state of an algorithm that has one."""

EMA_STATE = "ema.pt"
"""File of a checkpoint with the averaged weights, if there are any."""

RATIO_TOLERANCE = 1e-3
"""How far from 1 the first ratio may be where the algorithm clips nothing, or later than there."""

EQUAL_REWARDS = 1e-6
"""Rewards that differ by less than this share of their size are equal: the rest is rounding."""


class UpdateLoss(nn.Module):
    """The loss of an update as a module: what Accelerate wraps. Its only child is the policy."""

    accepts_loss_kwargs = False  # a mean over the batch: the Trainer divides it by gradient_accumulation_steps

    def __init__(self, algorithm: Algorithm, pipeline: Pipeline) -> None:
        super().__init__()
        self.policy = pipeline.policy
        self.algorithm = algorithm
        self.pipeline = pipeline  # no nn.Module: whatever is frozen stays out of parameters() and state_dict()

    @torch.no_grad()
    def collect(self, prompts: Prompts, noise_seed: int) -> Any:
        return self.algorithm.collect(self.pipeline, prompts, _generator(noise_seed))

    def forward(self, collected: Any, noise_seed: int) -> dict[str, Tensor | Metrics]:
        loss, metrics = self.algorithm.loss(self.pipeline, collected, _generator(noise_seed))
        return {"loss": loss, "metrics": metrics}


class RLHFTrainer(Trainer):
    """Trains `policy` towards what `reward_models` like.

    Args:
        policy: a policy or the name of one; it is trained in place. None: `args.policy`.
        reward_models: rewards, or names of them; None: `args.reward_models`.
        args: the run; None: the defaults, which name the bundled models.
        vocoder, recognizer: as objects or names; None: those `args` names. Both are frozen.
        train_dataset, eval_dataset: prompts, or names of them; None: those `args` names. Of `eval_dataset` the first
            `args.num_eval_prompts` are heard before and after training.
        peft_config: train LoRA adapters instead of all weights.
        callbacks: of transformers.
    """

    args: RLHFConfig

    def __init__(
        self,
        policy: Any = None,
        reward_models: RewardSpec | Sequence[RewardSpec] | None = None,
        args: RLHFConfig | None = None,
        *,
        vocoder: Vocoder | str | None = None,
        recognizer: Recognizer | str | None = None,
        train_dataset: PromptDataset | str | Path | None = None,
        eval_dataset: PromptDataset | str | Path | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = args or RLHFConfig()
        _check_launch(args)
        self.peft_config = peft_config
        algorithm = load_algorithm(args.algorithm, args.algorithm_options, beta=args.beta or 0.0)
        rewards = _as_rewards(args.reward_models if reward_models is None else reward_models, args.reward_weights)
        if not isinstance(policy, nn.Module):
            policy = load_policy(policy or args.policy, model=args.policy_model, vocab=args.policy_vocab)
        vocoder = load_vocoder(vocoder or args.vocoder) if vocoder is None or isinstance(vocoder, str) else vocoder
        self.prompts = _as_prompts(train_dataset, args, policy, held_out=False)
        self.heldout = _heldout(eval_dataset, args, policy)
        self.recognizer = _as_recognizer(args.recognizer if recognizer is None else recognizer, self.heldout)
        self.pipeline = _pipeline(policy, vocoder, rewards, args, peft_config)
        algorithm.check(self.pipeline)
        for part in (vocoder, *rewards.models, self.recognizer):
            _freeze(part, args.device)
        self._pending: list[Metrics] = []
        self._micro_batch = (-1, 0)
        self._collected: dict[int, Any] = {}
        self._clock = StepClock()
        self._update_loss = UpdateLoss(algorithm, self.pipeline)
        self.average = None if args.ema_decay is None else MovingAverage(self.pipeline.policy)
        follow = [] if self.average is None else [FollowWeights(self.average, args.ema_decay or 0.0)]
        super().__init__(
            model=self._update_loss,
            args=args,
            data_collator=partial(_collate, self.prompts),
            train_dataset=self.prompts,
            eval_dataset=self.heldout,
            callbacks=[
                self._clock,
                AfterUpdate(self._update_loss),
                FirstGradient(),
                *follow,
                MetricsFile(Path(args.output_dir)),
                *(callbacks or []),
            ],
        )
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(Console())

    @property
    def policy(self) -> Any:
        """The policy that is trained, without what wraps it."""
        return self.pipeline.policy

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """Listen to the held-out prompts, train, listen again; then write policy, samples, summary and report."""
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(folder / "config.yaml", self.args, self.peft_config)
            print(self._title(), flush=True)
        self._micro_batch = (-1, 0)
        self._collected.clear()
        started = time.monotonic()
        before = self._listen("before")
        floor = self._listen("another seed", seed=self.args.seed + 1) if self.args.noise_floor else None
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        after = self._listen("after")
        after_ema = self._listen_averaged("after")
        if self.args.should_save:
            save_policy(self.policy, folder / "policy")
            if self.peft_config is not None:
                save_lora(self.policy, folder / "adapter", base=self.args.policy)
            self._write_results(folder, before, after, after_ema, floor, seconds=time.monotonic() - started)
        self.accelerator.wait_for_everyone()
        return output

    def _title(self) -> str:
        trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad) / 1e6
        rewards = " + ".join(self.pipeline.rewards.names)
        where = f"{self.args.world_size} x {_device_name(self.args.device)}"
        return (
            f"{self.args.algorithm}: {trained:.1f} M parameters towards {rewards}, {len(self.prompts)} prompts, {where}"
        )

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        at_start = self._micro_batch[0] < 0
        step, index = self._next_micro_batch()
        # The same in a resumed run, different everywhere else.
        where = (self.args.seed, step, self.args.process_index, index)
        collected = self._collect(inputs["prompts"], step, index, mix_seed(*where, 1))
        outputs = model(collected=collected, noise_seed=mix_seed(*where))
        if at_start:
            check_first_batch(self._update_loss.algorithm, outputs["metrics"])
        self._pending.append(outputs["metrics"])
        return outputs["loss"]

    def _next_micro_batch(self) -> tuple[int, int]:
        """The update that is under way, and which of its micro-batches this is."""
        step, index = self._micro_batch
        self._micro_batch = (self.state.global_step, index + 1 if step == self.state.global_step else 0)
        return self._micro_batch

    def _collect(self, prompts: Prompts, step: int, index: int, noise_seed: int) -> Any:
        """What micro-batch `index` learns from: of this update if it is the first of its iterations, else kept."""
        if step % self.args.num_iterations == 0 or index not in self._collected:
            with self.accelerator.autocast():  # as in the loss, so that both compute the same numbers
                self._collected[index] = self._update_loss.collect(prompts, noise_seed)
        return self._collected[index]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of all updates, micro-batches and processes since the last line."""
        if "loss" in logs:
            logs |= self._pooled() | {"step_time": self._clock.pop()}
        super().log(logs, start_time)

    def _pooled(self) -> dict[str, float]:
        mine = [{name: value.flatten().tolist() for name, value in batch.items()} for batch in self._pending]
        self._pending.clear()
        return pool(gather_object(mine))

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupSampler:
        return GroupSampler(
            len(self.prompts),
            num_generations=self.args.num_generations,
            num_iterations=self.args.num_iterations,
            rollouts_per_update=self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What rlhf_mel.evaluate says of the held-out prompts; in a distributed run the main process listens."""
        result = self._listen(f"step {self.state.global_step}")
        averaged = self._listen_averaged(f"step {self.state.global_step}")
        shared = [{} if result is None else result.metrics, {} if averaged is None else averaged.metrics]
        broadcast_object_list(shared)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in shared[0].items()}
        metrics |= {f"{metric_key_prefix}_ema_{name}": value for name, value in shared[1].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _listen(self, when: str, seed: int | None = None) -> EvaluationResult | None:
        """Evaluate on the main process, the others wait; None there, and where there is no held-out prompt."""
        started = time.monotonic()
        result = None
        if self.heldout and self.args.should_save:
            result = evaluate(
                self.policy,
                self.pipeline.vocoder,
                self.pipeline.rewards,
                _all_prompts(self.heldout).to(self.args.device),
                steps=self.args.sampling_steps,
                cfg_strength=self.args.cfg_strength,
                sway_sampling_coef=self.args.sway_sampling_coef,
                method=self.args.solver,
                seed=self.args.seed if seed is None else seed,
                recognizer=self.recognizer,
                batch_size=self.args.per_device_eval_batch_size,
                shown_as=f"{when:>8}",
            )
            shown = {name: result.metrics[name] for name in SHOWN if name in result.metrics}
            took = duration(time.monotonic() - started)
            print(f"{when:>8}: {len(self.heldout)} held-out prompts  {_line(shown)}  ({took})", flush=True)
        self.accelerator.wait_for_everyone()
        return result

    def _listen_averaged(self, when: str) -> EvaluationResult | None:
        """The same of the averaged weights; None without any."""
        if self.average is None:
            return None
        with self.average.applied():
            return self._listen(f"{when}, ema")

    def _write_results(
        self,
        folder: Path,
        before: EvaluationResult | None,
        after: EvaluationResult | None,
        after_ema: EvaluationResult | None,
        floor: EvaluationResult | None,
        seconds: float,
    ) -> None:
        summary: dict[str, Any] = {
            "algorithm": self.args.algorithm,
            "seed": self.args.seed,
            "steps": self.state.global_step,
            "seconds": round(seconds, 1),
            "device": _device_name(self.args.device),
            "before": before.metrics if before else {},
            "after": after.metrics if after else {},
            "verdict": verdict(before, after, floor) if before and after else {},
            "policy": str(folder / "policy"),
        }
        if self.average is not None:
            with self.average.applied():
                save_policy(self.policy, folder / "policy_ema")
            summary["after_ema"] = after_ema.metrics if after_ema else {}
            summary["policy_ema"] = str(folder / "policy_ema")
        _write_json(folder / "summary.json", summary)
        if self.heldout and before and after:
            write_samples(folder / "samples", _all_prompts(self.heldout), before, after)
            print("\n".join(f"          {line}" for line in in_words(summary["verdict"])), flush=True)
            print(f" verdict: {summary['verdict']['overall']}", flush=True)
        print(f"  report: {write_report(folder)}", flush=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Adds the algorithm's own state, where it has one, and the averaged weights, where there are any."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        for name, owner in self._owners_of_state():
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(owner.state_dict(), folder / name)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, owner in self._owners_of_state():
            file = Path(resume_from_checkpoint) / name
            if not file.exists():
                raise ValueError(
                    f"checkpoint {resume_from_checkpoint}: expected {name}, which this run's algorithm or ema_decay "
                    "needs, got none; resume with the options that it was written with"
                )
            owner.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _owners_of_state(self) -> list[tuple[str, Any]]:
        """What a checkpoint holds beside weights and optimizer: file names, and whose state they are."""
        algorithm = self._update_loss.algorithm
        owners = [(ALGORITHM_STATE, algorithm)] if hasattr(algorithm, "state_dict") else []
        return owners if self.average is None else [*owners, (EMA_STATE, self.average)]

    def push_to_hub(self, commit_message: str | None = "Upload policy", **kwargs: Any) -> str:  # type: ignore[override]
        """Upload the policy with a card of what the run measured (export.push_to_hub), after `train`."""
        if kwargs:
            raise ValueError(f"push_to_hub of RLHFTrainer: expected commit_message alone, got {sorted(kwargs)} as well")
        if not self.args.should_save:
            return ""
        folder = Path(self.args.output_dir)
        return push_to_hub(
            self.policy,
            self.args.hub_model_id or folder.resolve().name,
            base=self.args.policy,
            folder=folder / "policy",
            run=folder,
            private=self.args.hub_private_repo is not False,
            token=self.args.hub_token,
            commit_message=commit_message or "Upload policy",
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing yet: `push_to_hub` makes the repository."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint in the middle is no policy that was judged."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the policy alone (checkpoints of the Trainer hold the same weights under `policy.`)."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            save_policy(self.policy, output_dir or Path(self.args.output_dir) / "policy")


class StepClock(TrainerCallback):
    """Seconds an update, checkpoints and evaluations between updates left out."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

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

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update_loss.algorithm.on_update(self._update_loss.pipeline)


class FirstGradient(TrainerCallback):
    """Warns of a first update whose gradient, clipped or not, moves no weight or is not finite."""

    def __init__(self) -> None:
        self._seen = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._seen and not args.fp16:  # whose loss scale begins so high that first gradients may overflow
            self._seen = True
            check_first_gradient([weight.grad for weight in model.parameters() if weight.grad is not None])


class FollowWeights(TrainerCallback):
    """Moves an average of the weights after each step of the optimizer."""

    def __init__(self, average: MovingAverage, decay: float) -> None:
        self._average = average
        self._decay = decay

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._average.update(warmed_up(self._decay, state.global_step))


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one JSON object a log line. A resumed run drops the lines after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "metrics.jsonl"

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text().splitlines() if self._file.exists() and state.global_step else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self._file.write_text("".join(f"{line}\n" for line in kept))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            with self._file.open("a") as file:
                file.write(json.dumps(_json_ready({"step": state.global_step, **logs})) + "\n")


class Console(ProgressCallback):
    """A line a log step of what one watches and of the time that is left, and on a terminal a progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self._began = (0.0, 0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = (time.monotonic(), state.global_step)
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "reward" not in logs:
            return
        watched = ("reward", "anchor", "kl", "loss", "grad_norm", "step_time", "dropped_rollouts")
        shown = {name: logs[name] for name in logs if name in watched and (name != "dropped_rollouts" or logs[name])}
        write = print if self.training_bar is None else self.training_bar.write
        started, first = self._began
        left = remaining(started, state.global_step - first, state.max_steps - first)
        write(f"{state.global_step:>8}/{state.max_steps}  {_line(shown)}  {left}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def first_ratio_limit(algorithm: Algorithm) -> float:
    """How far from 1 the first ratio may be: beyond the clip range, updates are cut that have not even begun."""
    clip = getattr(getattr(algorithm, "config", None), "clip", None)
    return min(clip.low, clip.high, RATIO_TOLERANCE) if isinstance(clip, Clip) else RATIO_TOLERANCE


def all_equal(rewards: Tensor) -> bool:
    """Whether finite rewards [B] are one number, up to rounding."""
    return len(rewards) < 2 or bool(rewards.max() - rewards.min() <= EQUAL_REWARDS * rewards.abs().max())


def check_first_batch(algorithm: Algorithm, metrics: Metrics) -> None:
    """Warn of a run whose first batch, by what is logged of it anyway, teaches nothing; doctor.py measures why."""
    rewards = metrics.get("reward", torch.zeros(0))
    finite = rewards[rewards.isfinite()]
    clipped, ratio_error = metrics.get("clip_ratio/region_mean"), metrics.get("ratio_error")
    flat, dropped = metrics.get("frac_reward_zero_std"), metrics.get("dropped_rollouts")
    off = ratio_error is not None and not bool((ratio_error <= first_ratio_limit(algorithm)).all())
    faults = []
    if off or (clipped is not None and bool((clipped > 0).any())):
        largest = "" if ratio_error is None else f" (off by {float(ratio_error.max()):.2g})"
        faults.append(f"expected ratio 1, got others{largest}: the replay is not the policy that rolled out")
    if dropped is not None and dropped.numel() and bool(dropped.all()):
        faults.append("expected finite rewards, got none")
    elif flat is not None and float(flat) == 1 and not algorithm.reward_gradient:
        faults.append("expected rewards that differ within a group, got equal ones")
    elif len(finite) > 1 and all_equal(finite) and not algorithm.reward_gradient:
        faults.append("expected rewards that differ, got equal ones")
    for fault in faults:
        _warn_at_start(f"{len(rewards)} fresh rollouts: {fault}")


def check_first_gradient(gradients: Sequence[Tensor]) -> None:
    """Warn of a gradient that is 0, NaN or infinite; where beta is above 0, an anchor may hide that a reward's is 0."""
    norm = float(nn.utils.get_total_norm(gradients))
    if norm == 0 or not math.isfinite(norm):
        _warn_at_start(f"first update: expected a finite gradient above 0, got one of norm {norm:g}")


def _warn_at_start(fault: str) -> None:
    warnings.warn(f"{fault}; run `rlhf-mel doctor` with these options", stacklevel=3)


def write_samples(folder: Path, prompts: Prompts, before: EvaluationResult, after: EvaluationResult) -> None:
    """samples/: what each held-out prompt sounded like before and after, its reference clip, and index.json."""
    import soundfile  # loads a C library that training itself does not need

    folder.mkdir(parents=True, exist_ok=True)
    references = [
        clip[:length] for clip, length in zip(prompts.reference_audio, prompts.reference_lengths_samples, strict=True)
    ]
    results = {"before": before, "after": after}
    index = []
    for row, text in enumerate(prompts.texts):
        names = {kind: f"{kind}_{row:03d}.wav" for kind in ("before", "after", "reference")}
        for kind, heard in results.items():
            soundfile.write(folder / names[kind], heard.waveforms[row].numpy(), heard.sample_rate_hz)
        soundfile.write(folder / names["reference"], references[row].numpy(), prompts.sample_rate_hz)
        index.append(
            {
                "id": prompts.columns.get("id", range(len(prompts)))[row],
                "text": text,
                "voice": prompts.columns.get("voice", [None] * len(prompts))[row],
                **names,
                "scores_before": before.items[row],
                "scores_after": after.items[row],
            }
            | ({f"transcript_{k}": heard.transcripts[row] for k, heard in results.items() if heard.transcripts})
        )
    _write_json(folder / "index.json", index)


def _pipeline(
    policy: Any, vocoder: Vocoder, rewards: Rewards, args: RLHFConfig, peft_config: LoraConfig | None
) -> Pipeline:
    if vocoder.mel_spec != policy.mel_spec:
        raise ValueError(
            f"policy and vocoder must mean the same by a mel: expected a vocoder of {policy.mel_spec}, "
            f"got one of {vocoder.mel_spec}; choose another --vocoder"
        )
    if peft_config is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # peft draws its first weights from the global generator of the CPU
            policy = add_lora(policy, peft_config)
    policy.to(args.device)  # before the reference is copied, so that it lies on the same device
    _speed_up(policy, args)
    return Pipeline(
        policy=policy,
        vocoder=vocoder,
        rewards=rewards,
        reference=ReferencePolicy(policy) if args.beta else None,
        sampling=Sampling(
            steps=args.sampling_steps,
            cfg_strength=args.cfg_strength if args.train_cfg_strength is None else args.train_cfg_strength,
            sway_sampling_coef=args.sway_sampling_coef,
            method=args.solver,
        ),
        reward_batch_size=args.reward_batch_size,
    )


def _speed_up(policy: Any, args: RLHFConfig) -> None:
    on_gpu = args.device.type == "cuda"
    if args.cuda_graphs and not on_gpu:
        raise ValueError(f"cuda_graphs: expected a GPU, got {args.device}; remove the option")
    cuda_graphs = on_gpu if args.cuda_graphs is None else args.cuda_graphs
    if not (cuda_graphs or args.compile_policy):
        return
    if hasattr(policy, "speed_up"):
        policy.speed_up(compiled=args.compile_policy, cuda_graphs=cuda_graphs)
    elif args.cuda_graphs or args.compile_policy:
        raise ValueError(
            f"torch_compile, cuda_graphs: expected a policy with a method speed_up, as CFM has, got {type(policy)};"
            " remove the options"
        )


def _check_launch(args: RLHFConfig) -> None:
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "FSDP and DeepSpeed are not supported yet: expected one device or DDP; launch with --multi_gpu"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"this is one of {launched} processes, but {args.world_size} work together: expected a launch on GPUs, or "
            "on CPUs with --use_cpu"
        )
    # Plain `python` on a machine with several GPUs would split each batch by nn.DataParallel, which knows no Prompts.
    args._n_gpu = min(args.n_gpu, 1)


def _as_rewards(models: RewardSpec | Sequence[RewardSpec], weights: Sequence[float] | None) -> Rewards:
    return Rewards(models if isinstance(models, list | tuple) else [models], weights)  # type: ignore[list-item]


def _as_prompts(
    given: PromptDataset | str | Path | None, args: RLHFConfig, policy: Any, *, held_out: bool
) -> PromptDataset:
    """The prompts, all of which the policy can read."""
    prompts = (args.eval_prompts if held_out else args.train_prompts) if given is None else given
    if not isinstance(prompts, PromptDataset):
        options = PromptOptions(prepare_references=args.prepare_references, duration_rule=args.duration_rule)
        named: Any = dict(columns=args.prompt_columns or {}, mel_spec=policy.mel_spec, options=options)
        if str(prompts).startswith(HUB_DATASETS):
            split = args.dataset_test_split if held_out else args.dataset_train_split
            prompts = load_dataset_prompts(str(prompts).removeprefix(HUB_DATASETS), split=split, **named)
        else:
            prompts = load_prompts(prompts, split="heldout" if held_out else "train", **named)
    if policy.tokenizer is not None:
        prompts.check_texts(policy.tokenizer)
    return prompts


def _heldout(given: PromptDataset | str | Path | None, args: RLHFConfig, policy: Any) -> PromptDataset | None:
    if args.num_eval_prompts == 0:
        return None
    return _as_prompts(given, args, policy, held_out=True).head(args.num_eval_prompts)


def _as_recognizer(given: Recognizer | str, heldout: PromptDataset | None) -> Recognizer | None:
    """The recognizer; None without anything to listen to, and for the name 'none'."""
    if heldout is None or given == "none":
        return None
    return load_recognizer(given) if isinstance(given, str) else given


def _collate(dataset: PromptDataset, rows: Sequence[Mapping[str, Any]]) -> dict[str, Prompts]:
    return {"prompts": dataset.collate(rows)}


def _all_prompts(dataset: PromptDataset) -> Prompts:
    return dataset.collate([dataset[row] for row in range(len(dataset))])


def _generator(seed: int) -> torch.Generator:
    """On the CPU, so that a seed means the same noise on every device."""
    return torch.Generator().manual_seed(seed)


def _freeze(part: Any, device: torch.device) -> None:
    """Move a part in place, and see to it that it stays what it is."""
    if isinstance(part, nn.Module):
        part.to(device).requires_grad_(False).eval()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _line(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _json_ready(value: Any) -> Any:
    """NaN and infinity as null: they are not JSON."""
    if isinstance(value, Mapping):
        return {name: _json_ready(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(_json_ready(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
